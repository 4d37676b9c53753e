"""Settings of a run: one immutable :class:`TrainArguments`, checked when made. ``flags`` reads them.

Names and meaning follow the upstream fine-tuning scripts, so that a launch script can move over. Each flag is one field
of the dataclass; a setting that would be ignored, or that contradicts another one, is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError

BY_SIZE = "recommended for the size of the model"
FLAT = "constant"
SCHEDULES = ("cosine", "linear", FLAT, "constant_with_warmup")
WARMUP = 0.03
"""Recommended share of steps of warm-up, for every schedule but the flat one."""

ATTENTIONS = ("auto", "sdpa", "flash_attention_2")
EVALUATIONS = ("no", "steps", "epoch")
REPORTS = ("none", "tensorboard", "wandb")
RESUME_AUTO, RESUME_NONE = "auto", "none"
MAX_INT = 2**63 - 1
"""Whole numbers of flags go into checkpoints and arrays of 64 bits."""

MAX_THREADS, MAX_EPOCHS = 1024, 10**6
MAX_RANK = 8192
"""Of adapters: no matrix of the largest model has a higher one."""

BUILD_TIME_FLAGS = {
    "dataset_use": "make shards DATASET=name%50",
    "data_flatten": "bins are always packed and isolated",
    "data_packing": "bins are always packed and isolated",
    "model_max_length": "vlprep build --max-length",
    "max_pixels": "media settings of vlprep build",
    "min_pixels": "media settings of vlprep build",
    "video_max_frames": "media settings of vlprep build",
    "video_min_frames": "media settings of vlprep build",
    "video_max_frame_pixels": "media settings of vlprep build",
    "video_min_frame_pixels": "media settings of vlprep build",
    "base_interval": "media settings of vlprep build",
}
"""Upstream flags that are decided when shards are built, and where."""

UNNEEDED_FLAGS = {
    "per_device_eval_batch_size": "evaluation takes one bin at a time",
    "save_strategy": "--save_steps says how often checkpoints are saved, 0: only when told to stop",
    "optim": "the optimizer is AdamW",
}
"""Upstream flags that have no meaning here, and why."""


def _help(text: str, choices: Sequence[str] | None = None) -> dict[str, Any]:
    return {"help": text, "choices": choices}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments:
    """All settings of a run. The help text of a field is the help text of its flag."""

    shards: str = field(
        metadata=_help(
            "folder with a manifest, or one whose sub-folders have one, or a URL; several are mixed: a,b or by weight "
            "a:0.7,b:0.3 or by epochs a:2epochs,b:1epochs"
        )
    )
    model_name_or_path: str = field(
        default="Qwen/Qwen2.5-VL-3B-Instruct", metadata=_help("checkpoint: a folder or a hub id")
    )
    output_dir: Path | None = field(
        default=None, metadata=_help("where the run is written (default: runs/ and the run name)")
    )
    run_name: str | None = field(
        default=None,
        metadata=_help(
            "name of the run in wandb, and of its folder without --output_dir (default: the checkpoint's name)"
        ),
    )
    seed: int = field(default=0, metadata=_help("decides the order of bins, and how adapters start and drop out"))

    max_steps: int | None = field(default=None, metadata=_help("optimizer steps (instead of --num_train_epochs)"))
    num_train_epochs: float | None = field(default=None, metadata=_help(f"passes over all bins (default: {BY_SIZE})"))
    per_device_train_batch_size: int | None = field(
        default=None,
        metadata=_help(f"bins of one rank in one forward pass; a bin packs many samples (default: {BY_SIZE})"),
    )
    gradient_accumulation_steps: int | None = field(
        default=None, metadata=_help(f"forward passes of one rank in an optimizer step (default: {BY_SIZE})")
    )
    group_steps: int = field(
        default=1,
        metadata=_help(
            "let similar bins of so many steps meet in the same steps: ranks wait less, the mixture varies more; 1: off"
        ),
    )

    verify: str = field(
        default="always", metadata=_help("compare checksums of bins: always (with every read), first, or never")
    )
    dataloader_num_workers: int = field(default=4, metadata=_help("threads of a rank that read and decompress bins"))
    dataloader_prefetch_factor: int | None = field(
        default=None,
        metadata=_help("forward passes kept ready for each thread (default: so many that two steps are ready)"),
    )
    read_timeout_s: float = field(
        default=600.0, metadata=_help("data of a forward pass that takes longer stop the run instead of hanging it")
    )
    read_connections: int | None = field(
        default=None, metadata=_help("remote shards: requests of a rank under way at once (default: 16)")
    )
    cache_dir: Path | None = field(
        default=None, metadata=_help("remote shards: folder of a local disk that keeps bins, shared by ranks of a node")
    )
    cache_bytes: int | None = field(default=None, metadata=_help("most bytes of --cache_dir (default: 100 GiB)"))

    tune_mm_llm: bool = field(default=True, metadata=_help("train the language model with embeddings and lm_head"))
    tune_mm_mlp: bool = field(default=True, metadata=_help("train the merger between vision tower and language model"))
    tune_mm_vision: bool = field(default=False, metadata=_help("train the vision tower"))
    learning_rate: float | None = field(
        default=None, metadata=_help(f"peak rate of all modules without their own (default: {BY_SIZE})")
    )
    mm_projector_lr: float | None = field(
        default=None, metadata=_help("peak rate of the merger (default: --learning_rate)")
    )
    vision_tower_lr: float | None = field(
        default=None, metadata=_help("peak rate of the vision tower (default: --learning_rate)")
    )
    lora_enable: bool = field(
        default=False,
        metadata=_help(
            "LoRA: the parts that --tune_mm_* names are tuned by adapters beside their linear layers; all weights of "
            "the model itself are frozen"
        ),
    )
    lora_r: int | None = field(default=None, metadata=_help("rank of the adapters (default: 64)"))
    lora_alpha: int | None = field(
        default=None, metadata=_help("adapters count alpha / r times (default: 128, twice the default rank)")
    )
    lora_dropout: float | None = field(
        default=None, metadata=_help("share of an adapter's inputs dropped in training (default: 0)")
    )
    lora_target_modules: str | None = field(
        default=None,
        metadata=_help(
            "layers that get adapters, by the ends of their names: q_proj,v_proj or self_attn.q_proj, each may be a "
            "regular expression (default: all-linear, every linear layer but lm_head)"
        ),
    )
    lr_scheduler_type: str = field(
        default="cosine", metadata=_help("course of the rates after warm-up; constant has none", SCHEDULES)
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata=_help(f"share of all steps in which the rates rise (default: {WARMUP}; with constant 0)"),
    )
    weight_decay: float = field(default=0.01, metadata=_help("AdamW decay of matrices; norms and biases have none"))
    max_grad_norm: float = field(default=1.0, metadata=_help("longer gradients are shortened to this norm; 0: never"))

    deepspeed: str = field(
        default="zero2.json", metadata=_help("DeepSpeed configuration: a file, or a name in train/settings/configs")
    )
    bf16: bool | None = field(
        default=None, metadata=_help("compute in bfloat16 (default: where the accelerator can; else float32)")
    )
    fp16: bool | None = field(
        default=None, metadata=_help("compute in float16 with loss scaling, where bfloat16 is not had")
    )
    gradient_checkpointing: bool = field(
        default=True, metadata=_help("recompute activations instead of keeping them: less memory, a fifth slower")
    )
    use_liger_kernel: bool = field(
        default=False, metadata=_help("compute norms, MLPs and rotary embeddings with Liger kernels; needs a GPU")
    )
    torch_compile: bool = field(
        default=False,
        metadata=_help("compile layers with torch.compile: slow first steps, then faster; not with ZeRO-3"),
    )
    attn_implementation: str = field(
        default="auto", metadata=_help("auto: flash_attention_2 where it is installed, else sdpa", ATTENTIONS)
    )

    logging_steps: int = field(
        default=10, metadata=_help("steps between two lines of metrics.jsonl; first and last step always have one")
    )
    peak_tflops: float | None = field(
        default=None,
        metadata=_help("10^12 operations a second of the accelerator, which MFU refers to (default: as its name says)"),
    )
    report_to: str = field(default="none", metadata=_help("where metrics go besides metrics.jsonl", REPORTS))
    eval_shards: str | None = field(
        default=None, metadata=_help("folders or URLs to evaluate on, after the last step and as --eval_strategy says")
    )
    eval_strategy: str = field(default="no", metadata=_help("when to evaluate before the end as well", EVALUATIONS))
    eval_steps: int | None = field(
        default=None, metadata=_help("steps between two evaluations with --eval_strategy steps (default: 1000)")
    )
    max_skipped_steps: int = field(
        default=3,
        metadata=_help("steps in a row that may be skipped for a loss or gradient of NaN or infinity; one more stops"),
    )
    save_steps: int = field(
        default=500, metadata=_help("steps between two checkpoints to resume from; 0: only when told to stop")
    )
    save_total_limit: int | None = field(default=None, metadata=_help("keep so many newest checkpoints (default: all)"))
    resume: str = field(
        default=RESUME_AUTO,
        metadata=_help(
            "auto: go on from the newest checkpoint of the output folder; none: start anew; or a checkpoint"
        ),
    )

    dry_run: bool = field(
        default=False,
        metadata=_help(
            "show the memory of a rank, run the largest bin, compare packed samples with the same alone, and stop; "
            "nothing is trained or written"
        ),
    )
    local_rank: int = field(default=-1, metadata=_help("appended by the deepspeed launcher"))
    debug: bool = field(default=False, metadata=_help("show tracebacks of errors"))

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_contradictions()

    @property
    def name(self) -> str:
        """Name of the run: as given, or that of the checkpoint."""
        return self.run_name or Path(self.model_name_or_path).resolve().name

    @property
    def run_dir(self) -> Path:
        """Where the run is written."""
        return self.output_dir or Path("runs") / self.name

    @property
    def warmup(self) -> float:
        """Share of all steps in which the rates rise: as given, else as recommended for the schedule."""
        if self.warmup_ratio is not None:
            return self.warmup_ratio
        return 0.0 if self.lr_scheduler_type == FLAT else WARMUP

    def _check_ranges(self) -> None:
        for item in fields(self):
            number = getattr(self, item.name)
            _require(type(number) is not int or number <= MAX_INT, item.name, number, f"up to {MAX_INT}")
        for name, most in (("dataloader_num_workers", MAX_THREADS), ("lora_r", MAX_RANK)):
            number = getattr(self, name)
            _require(number is None or number <= most, name, number, f"1 to {most}")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        for name in (
            "max_steps",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "group_steps",
            "dataloader_num_workers",
            "dataloader_prefetch_factor",
            "read_connections",
            "cache_bytes",
            "logging_steps",
            "save_total_limit",
            "eval_steps",
            "lora_r",
            "lora_alpha",
        ):
            count = getattr(self, name)
            _require(count is None or count >= 1, name, count, "1 or more")
        positive = ("num_train_epochs", "read_timeout_s", "learning_rate", "mm_projector_lr", "vision_tower_lr")
        for name in (*positive, "peak_tflops"):
            value = getattr(self, name)
            _require(value is None or 0 < value < float("inf"), name, value, "more than 0")
        epochs = self.num_train_epochs
        _require(epochs is None or epochs <= MAX_EPOCHS, "num_train_epochs", epochs, f"up to {MAX_EPOCHS}")
        _require(0 <= self.warmup <= 1, "warmup_ratio", self.warmup, "0 to 1")
        dropout = self.lora_dropout
        _require(dropout is None or 0 <= dropout < 1, "lora_dropout", dropout, "0 to below 1")
        for name in ("weight_decay", "max_grad_norm"):
            _require(0 <= getattr(self, name) < float("inf"), name, getattr(self, name), "0 or more")
        for name in ("save_steps", "max_skipped_steps"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        for name, choices in (
            ("lr_scheduler_type", SCHEDULES),
            ("attn_implementation", ATTENTIONS),
            ("report_to", REPORTS),
            ("eval_strategy", EVALUATIONS),
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
        if self.lr_scheduler_type == FLAT and self.warmup > 0:
            raise ConfigError(
                f"--warmup_ratio {self.warmup:g} has no effect with --lr_scheduler_type {FLAT}, which has no warm-up: "
                "leave it out, or give constant_with_warmup."
            )
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            value = getattr(self, name)
            if value is not None and not self.lora_enable:
                raise ConfigError(f"--{name} {value} has no effect without --lora_enable.")
        if self.eval_strategy != "no" and self.eval_shards is None:
            raise ConfigError(f"--eval_strategy {self.eval_strategy} has nothing to evaluate on: give --eval_shards.")
        if self.eval_steps is not None and self.eval_strategy != "steps":
            raise ConfigError(f"--eval_steps {self.eval_steps} has no effect without --eval_strategy steps.")
        if self.save_steps == 0 and self.save_total_limit is not None:
            raise ConfigError(
                f"--save_total_limit {self.save_total_limit} is for a run that saves every --save_steps; with "
                "--save_steps 0 a checkpoint is saved only when told to stop: raise it, or leave the limit out."
            )
        if self.use_liger_kernel and self.torch_compile:
            raise ConfigError("--use_liger_kernel and --torch_compile both replace the same kernels: give one of them.")
        if self.run_name is not None and self.output_dir is not None and self.report_to != "wandb":
            raise ConfigError(
                f"--run_name {self.run_name} has no effect with --output_dir and --report_to {self.report_to}: it is "
                "the name in wandb, and of the folder without --output_dir. Leave it out, or give --report_to wandb."
            )
        if self.bf16 and self.fp16:
            raise ConfigError("--bf16 and --fp16 both say how to compute: give one of them.")
        if self.attn_implementation == "flash_attention_2" and self.bf16 is False and not self.fp16:
            raise ConfigError(
                "--attn_implementation flash_attention_2 computes in bfloat16 or float16: leave out --bf16 False."
            )
        if self.cache_bytes is not None and self.cache_dir is None:
            raise ConfigError("--cache_bytes has no effect without --cache_dir: give the folder, or leave it out.")


def _require(condition: bool, name: str, found: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"--{name} is {found}; allowed: {allowed}.")
