"""Flags of the trainer: command line -> one immutable :class:`TrainArguments`, checked when made.

Names and meaning follow the upstream fine-tuning scripts, so that a launch script can move over. A switch is written
``--bf16``, ``--bf16 True`` or ``--bf16 False``. Each flag is one field of the dataclass; a setting that would be
ignored, or that contradicts another one, is an error.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from schemas.errors import ConfigError

DEFAULT_LEARNING_RATE = 2e-7
DEFAULT_EPOCHS = 3.0
SCHEDULES = ("cosine", "linear", "constant")
ATTENTIONS = ("auto", "sdpa", "flash_attention_2")
REPORTS = ("none", "tensorboard", "wandb")
RESUME_AUTO, RESUME_NONE = "auto", "none"

BUILD_TIME_FLAGS = {
    "--dataset_use": "make shards DATASET=name%50",
    "--data_flatten": "bins are always packed and isolated",
    "--data_packing": "bins are always packed and isolated",
    "--model_max_length": "vlprep build --max-length",
    "--max_pixels": "media settings of vlprep build",
    "--min_pixels": "media settings of vlprep build",
    "--video_max_frames": "media settings of vlprep build",
    "--video_min_frames": "media settings of vlprep build",
    "--video_max_frame_pixels": "media settings of vlprep build",
    "--video_min_frame_pixels": "media settings of vlprep build",
    "--base_interval": "media settings of vlprep build",
}
"""Upstream flags that are decided when shards are built, and where."""


def _help(text: str, choices: Sequence[str] | None = None) -> dict[str, Any]:
    return {"help": text, "choices": choices}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """All settings of a run. The help text of a field is the help text of its flag."""

    shards: str = field(metadata=_help("folder with a manifest, or one whose sub-folders have one (they are mixed)"))
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata=_help("checkpoint: a folder or a hub id")
    )
    output_dir: Path | None = field(
        default=None, metadata=_help("where the run is written (default: runs/ and the run name)")
    )
    run_name: str | None = field(
        default=None, metadata=_help("name of the run in reports (default: the checkpoint's name)")
    )
    seed: int = field(default=0, metadata=_help("decides the order of bins"))

    max_steps: int | None = field(default=None, metadata=_help("optimizer steps (instead of --num_train_epochs)"))
    num_train_epochs: float | None = field(
        default=None, metadata=_help(f"passes over all bins (default: {DEFAULT_EPOCHS:g})")
    )
    per_device_train_batch_size: int = field(
        default=1, metadata=_help("bins of one rank in one forward pass; a bin packs many samples")
    )
    gradient_accumulation_steps: int = field(
        default=4, metadata=_help("forward passes of one rank in an optimizer step")
    )

    tune_mm_llm: bool = field(default=True, metadata=_help("train the language model with embeddings and lm_head"))
    tune_mm_mlp: bool = field(default=True, metadata=_help("train the merger between vision tower and language model"))
    tune_mm_vision: bool = field(default=False, metadata=_help("train the vision tower"))
    learning_rate: float | None = field(
        default=None, metadata=_help(f"peak rate, of all modules without their own ({DEFAULT_LEARNING_RATE:g})")
    )
    mm_projector_lr: float | None = field(
        default=None, metadata=_help("peak rate of the merger (default: --learning_rate)")
    )
    vision_tower_lr: float | None = field(
        default=None, metadata=_help("peak rate of the vision tower (default: --learning_rate)")
    )
    lr_scheduler_type: str = field(default="cosine", metadata=_help("course of the rates after warm-up", SCHEDULES))
    warmup_ratio: float = field(default=0.03, metadata=_help("share of all steps in which the rates rise from 0"))
    weight_decay: float = field(default=0.01, metadata=_help("AdamW decay of matrices; norms and biases have none"))
    max_grad_norm: float = field(default=1.0, metadata=_help("longer gradients are shortened to this norm; 0: never"))

    deepspeed: str = field(
        default="zero2.json", metadata=_help("DeepSpeed configuration: a file, or a name in train/configs")
    )
    bf16: bool | None = field(
        default=None, metadata=_help("compute in bfloat16 (default: where the accelerator can; else float32)")
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=_help("recompute activations instead of keeping them: less memory, a fifth slower")
    )
    attn_implementation: str = field(
        default="auto", metadata=_help("auto: flash_attention_2 where it is installed, else sdpa", ATTENTIONS)
    )
    dataloader_num_workers: int = field(default=4, metadata=_help("threads of a rank that read and decompress bins"))

    logging_steps: int = field(
        default=10, metadata=_help("steps between two lines of metrics.jsonl; first and last step always have one")
    )
    report_to: str = field(default="none", metadata=_help("where metrics go besides metrics.jsonl", REPORTS))
    save_steps: int = field(default=500, metadata=_help("steps between two checkpoints to resume from; 0: none"))
    save_total_limit: int | None = field(default=None, metadata=_help("keep so many newest checkpoints (default: all)"))
    resume: str = field(
        default=RESUME_AUTO,
        metadata=_help(
            "auto: go on from the newest checkpoint of the output folder; none: start anew; or a checkpoint"
        ),
    )

    local_rank: int = field(default=-1, metadata=_help("appended by the deepspeed launcher"))
    debug: bool = field(default=False, metadata=_help("show tracebacks of errors"))

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_contradictions()

    @property
    def epochs(self) -> float:
        """Passes over all bins, where the number of steps is not given."""
        return DEFAULT_EPOCHS if self.num_train_epochs is None else self.num_train_epochs

    @property
    def base_lr(self) -> float:
        """Peak rate of the language model, and of the other modules unless they have their own."""
        return DEFAULT_LEARNING_RATE if self.learning_rate is None else self.learning_rate

    @property
    def merger_lr(self) -> float:
        """Peak rate of the merger."""
        return self.base_lr if self.mm_projector_lr is None else self.mm_projector_lr

    @property
    def vision_lr(self) -> float:
        """Peak rate of the vision tower."""
        return self.base_lr if self.vision_tower_lr is None else self.vision_tower_lr

    @property
    def name(self) -> str:
        """Name of the run: as given, or that of the checkpoint."""
        return self.run_name or Path(self.model_name_or_path).resolve().name

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        return self.output_dir or Path("runs") / self.name

    def _check_ranges(self) -> None:
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        _require(self.max_steps is None or self.max_steps >= 1, "max_steps", self.max_steps, "1 or more")
        _require(0 < self.epochs < float("inf"), "num_train_epochs", self.num_train_epochs, "more than 0")
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "dataloader_num_workers",
            "logging_steps",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "1 or more")
        for name in ("learning_rate", "mm_projector_lr", "vision_tower_lr"):
            rate = getattr(self, name)
            _require(rate is None or 0 < rate < float("inf"), name, rate, "more than 0")
        _require(0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "0 to 1")
        for name in ("weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more")
        _require(self.save_steps >= 0, "save_steps", self.save_steps, "0 or more")
        limit = self.save_total_limit
        _require(limit is None or limit >= 1, "save_total_limit", limit, "1 or more")
        for name, choices in (
            ("lr_scheduler_type", SCHEDULES),
            ("attn_implementation", ATTENTIONS),
            ("report_to", REPORTS),
        ):
            _require(getattr(self, name) in choices, name, getattr(self, name), ", ".join(choices))

    def _check_contradictions(self) -> None:
        if self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError("--max_steps and --num_train_epochs both say how long to train: give one of them.")
        if not (self.tune_mm_llm or self.tune_mm_mlp or self.tune_mm_vision):
            raise ConfigError(
                "nothing is to be trained: at least one of --tune_mm_llm, --tune_mm_mlp, --tune_mm_vision must be True."
            )
        own_rates = (
            ("mm_projector_lr", self.mm_projector_lr, "tune_mm_mlp", self.tune_mm_mlp),
            ("vision_tower_lr", self.vision_tower_lr, "tune_mm_vision", self.tune_mm_vision),
        )
        for rate_flag, rate, tune_flag, tuned in own_rates:
            if rate is not None and not tuned:
                raise ConfigError(f"--{rate_flag} {rate:g} has no effect with --{tune_flag} False: change one of them.")
        needs_base = self.tune_mm_llm or any(rate is None and tuned for _, rate, _, tuned in own_rates)
        if self.learning_rate is not None and not needs_base:
            raise ConfigError(
                f"--learning_rate {self.learning_rate:g} has no effect: all that is trained has rates of its own. "
                "Leave it out."
            )
        if self.save_steps == 0 and self.save_total_limit is not None:
            raise ConfigError("--save_total_limit has no effect with --save_steps 0, which saves no checkpoints.")
        if self.attn_implementation == "flash_attention_2" and self.bf16 is False:
            raise ConfigError("--attn_implementation flash_attention_2 computes in bfloat16: leave out --bf16 False.")


def _require(condition: bool, name: str, found: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"--{name} is {found}; allowed: {allowed}.")


def parse_arguments(argv: Sequence[str]) -> TrainArguments:
    """Parse the command line, without the name of the program.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type or range, or a contradiction.
        SystemExit: ``--help`` (exit code 0).
    """
    parser = _parser()
    values, unknown = parser.parse_known_args(list(argv))
    if unknown:
        raise ConfigError(_explain_unknown(unknown[0].partition("=")[0]))
    return TrainArguments(**vars(values))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deepspeed train/main.py",
        description="Train Qwen2.5-VL on packed shards.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(TrainArguments)
    for item in fields(TrainArguments):
        (kind,) = [part for part in get_args(hints[item.name]) or (hints[item.name],) if part is not type(None)]
        options: dict[str, Any] = {"help": item.metadata["help"], "type": kind, "metavar": kind.__name__.upper()}
        if kind is bool:
            options.update(type=_switch, nargs="?", const=True, metavar="True|False")
        if choices := item.metadata["choices"]:
            options.update(choices=choices, metavar="|".join(choices))
        if item.name == "shards":
            options["required"] = True
        else:
            options["default"] = argparse.SUPPRESS if item.default is None else item.default
        parser.add_argument(f"--{item.name}", **options)
    return parser


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: True or False")
    return text.lower() == "true"


def _explain_unknown(flag: str) -> str:
    if flag in BUILD_TIME_FLAGS:
        return (
            f"{flag} is no flag of the trainer: it was decided when the shards were built ({BUILD_TIME_FLAGS[flag]})."
        )
    near = difflib.get_close_matches(flag, [f"--{item.name}" for item in fields(TrainArguments)], n=1)
    return f"unknown flag {flag}" + (f"; did you mean {near[0]}?" if near else "; --help lists the flags.")
