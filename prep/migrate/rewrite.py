"""Rewrites a launch: :class:`Launch` -> :class:`Migration`, the two commands with a line for each flag."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from prep.migrate.batch import factors_of_ranks, multiply
from prep.migrate.launch import Flag, Launch
from prep.migrate.rules import BUILD, TRAIN, NoEffect, NotHere, is_left_to_shell
from prep.migrate.shell import quote
from prep.migrate.tools import DATASETS, LLAMA_FACTORY, SWIFT, UPSTREAM
from schemas.annotation import ANNOTATION_SUFFIXES

UNNAMED = "DATASETS"
"""Stands for datasets that a script does not name."""

_WIDTH = 100
_MAX_NAMES = 3
"""Datasets that name the folder of their shards."""

_LISTS = (DATASETS, "lora_target_modules", "report_to")
"""Flags of the two commands that may have several words as their value."""

_INTERVAL_FRAMES = {"video_max_frames": "fps_max_frames", "video_min_frames": "fps_min_frames"}


@dataclass(slots=True)
class Entry:
    """What became of a flag.

    Attributes:
        written: the flag with its value.
        origin: where it comes from if the script leaves it out: "(default of ms-swift)".
        program: the command that takes it; empty if neither does.
        name: name of the flag there.
        value: value there.
        why: reason or remark.
        counted_in: flag and value that the flag is a factor of, if it is one.
        is_left: whether it is left to the reader.
    """

    written: str
    origin: str = ""
    program: str = ""
    name: str = ""
    value: str = ""
    why: str = ""
    counted_in: str = ""
    is_left: bool = False

    def drop(self, why: str) -> None:
        """Take the flag out of its command."""
        self.program, self.why = "", why

    def line(self) -> str:
        """The flag and what became of it, in one line."""
        remark = f": {self.why}" if self.why else ""
        flag = f"{self.written} {self.origin}".strip()
        if self.counted_in:
            return f"{flag}  counted in {self.counted_in}"
        if not self.program:
            return f"{flag}  has no effect here{remark}"
        here = f"{_option(self.program, self.name)} {self.value}".strip()
        if self.program == BUILD:
            return f"{flag}  moved to the build, {here}{remark}"
        name, _, value = self.written.partition(" ")
        is_kept = name.strip("-:").replace("-", "_") == self.name and value.lower() in ("", self.value.lower())
        return f"{flag}  " + (f"kept{remark}" if is_kept else f"replaced by {here}{remark}")


@dataclass(kw_only=True, slots=True)
class Migration:
    """The two commands, and what became of each flag.

    Attributes:
        launch: what was read.
        out: folder of the shards.
        entries: one for each flag.
        datasets: the datasets to build.
    """

    launch: Launch
    out: str
    entries: list[Entry] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)

    @property
    def left(self) -> list[str]:
        """What was not understood or cannot be done here."""
        return [
            *(f"{entry.written}: {entry.why}" for entry in self.entries if entry.is_left),
            *self.launch.not_understood,
        ]

    def build_words(self) -> list[str]:
        """The words of the command that builds the shards."""
        words = ["vlprep", "build", *self.datasets, "--out", self.out]
        model = self.value(TRAIN, "model_name_or_path")
        words += ["--model", model] if model else []
        return words + self._options(BUILD)

    def train_words(self) -> list[str]:
        """The words of the command that trains, without variables in front."""
        return [*self.launch.launcher, "train/main.py", "--shards", self.out, *self._options(TRAIN)]

    def value(self, program: str, name: str) -> str:
        """The value of a flag of one of the commands; empty if it has none."""
        entry = self.find(program, name)
        return entry.value if entry else ""

    def find(self, program: str, name: str) -> Entry | None:
        """The entry that sets a flag of one of the commands."""
        return next((entry for entry in self.entries if (entry.program, entry.name) == (program, name)), None)

    def drop(self, program: str, name: str, why: str) -> None:
        """Take a flag out of its command, if it is there."""
        entry = self.find(program, name)
        if entry is not None:
            entry.drop(why)

    def dataset_names(self) -> list[str]:
        """The datasets, without their shares."""
        return [re.sub(r"%[\d.]+$", "", name) for item in self.datasets for name in item.split(",")]

    def _options(self, program: str) -> list[str]:
        return [
            word
            for entry in self.entries
            if entry.program == program and entry.name != DATASETS
            for word in (_option(program, entry.name), entry.value)
        ]


def rewrite(launch: Launch, *, out: str | None = None) -> Migration:
    """Rewrite a launch.

    Args:
        launch: what a script starts.
        out: folder of the shards; None takes the names of the datasets.
    """
    migration = Migration(launch=launch, out=out or "")
    flag_names = {flag.name for flag in launch.flags}
    for flag in launch.flags:
        _add(migration, flag)
    for name, value in launch.tool.defaults.items():
        if name not in flag_names:
            _add(migration, Flag(written=f"--{name}", name=name, values=(value,)), _default_of(launch))
    _settle(migration)
    migration.datasets = _datasets(migration)
    migration.out = migration.out or f"shards/{_set_name(migration.datasets)}"
    return migration


def _set_name(datasets: Sequence[str]) -> str:
    """The folder that ``make shards`` writes the same datasets to: ``a%50,b`` -> ``a-50+b``."""
    names = []
    for dataset in ",".join(datasets).split(","):
        name, _, share = dataset.partition("%")
        stem = re.sub(r"\W+", "_", name.rsplit("/", 1)[-1].partition(".")[0])
        names.append(f"{stem}-{re.sub(r'[^0-9A-Za-z.]+', '_', share)}" if share else stem)
    others = len(names) - _MAX_NAMES
    return "+".join(names[:_MAX_NAMES]) + (f"+{others}" if others > 0 else "")


def command_text(words: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """A command for a shell, on lines of about 100 columns, a flag and its value together."""
    quoted = [f"{name}={quote(value)}" for name, value in (environment or {}).items()]
    for index, word in enumerate(words):
        is_value = index > 0 and words[index - 1].startswith("--") and not word.startswith("--")
        if is_value and "=" not in words[index - 1]:
            quoted[-1] += f" {quote(word)}"
        else:
            quoted.append(quote(word))
    lines = [""]
    for part in quoted:
        if lines[-1] and len(lines[-1]) + len(part) > _WIDTH:
            lines.append("   ")
        lines[-1] += f" {part}" if lines[-1] else part
    return " \\\n".join(lines)


def _option(program: str, name: str) -> str:
    if name == DATASETS:
        return "DATASETS"
    return "--" + (name.replace("_", "-") if program == BUILD else name)


def _default_of(launch: Launch) -> str:
    return f"(default of {launch.tool.name})"


def _add(migration: Migration, flag: Flag, origin: str = "") -> None:
    rule = migration.launch.tool.rules.get(flag.name)
    if rule is not None and rule.program and rule.name not in _LISTS:
        migration.launch.not_understood += [f"the word {word} after {flag.written}" for word in flag.values[1:]]
        flag = Flag(written=flag.written, name=flag.name, values=flag.values[:1])
    entry = Entry(written=flag.text(), origin=origin)
    if rule is None and flag.name.startswith("ddp_"):
        entry.why = "DeepSpeed moves the gradients"
    elif rule is None:
        entry.why, entry.is_left = f"not a known flag of {migration.launch.tool.name}", True
    else:
        try:
            entry.value = rule.convert(flag.value)
            entry.program, entry.name, entry.why = rule.program, rule.name, rule.why
        except NoEffect as reason:
            entry.why = str(reason)
        except NotHere as reason:
            entry.why, entry.is_left = str(reason), True
        except ValueError:
            entry.why, entry.is_left = f"{flag.value!r} is not a number", True
    before = migration.find(entry.program, entry.name) if entry.program else None
    if before is not None and origin:
        return
    if before is not None:
        before.drop(f"{entry.written} says it again")
    migration.entries.append(entry)


def _settle(migration: Migration) -> None:
    """Take out flags that others make meaningless, which are errors here."""
    tool, value = migration.launch.tool, migration.value
    if tool is SWIFT:
        _set(migration, TRAIN, "learning_rate", "1e-4" if value(TRAIN, "lora_enable") == "True" else "1e-5")
        _set(migration, TRAIN, "gradient_accumulation_steps", _swift_accumulation(migration))
    if tool is LLAMA_FACTORY and value(TRAIN, "lora_r").isdigit():
        _set(migration, TRAIN, "lora_alpha", str(2 * int(value(TRAIN, "lora_r"))))
    if tool is UPSTREAM and value(TRAIN, "lora_enable") == "True":
        _settle_upstream_lora(migration)
    _settle_batch(migration)
    _settle_length_and_rates(migration)
    if value(TRAIN, "lora_enable") != "True":
        for name in ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"):
            migration.drop(TRAIN, name, "LoRA is off")
    if value(TRAIN, "eval_shards") == "":
        migration.drop(TRAIN, "eval_steps", "nothing is evaluated in between")
        strategy = migration.find(TRAIN, "eval_strategy")
        if strategy is not None:
            strategy.drop("build shards to evaluate on, and give it with --eval_shards DIR")
            strategy.is_left = True
    if value(TRAIN, "report_to") != "wandb" and value(TRAIN, "output_dir"):
        migration.drop(TRAIN, "run_name", "it is the name in wandb")
    if value(TRAIN, "report_to") != "tensorboard":
        migration.drop(TRAIN, "logging_dir", "it is the folder of TensorBoard")
    if value(TRAIN, "report_to") == "none":
        migration.drop(TRAIN, "report_to", "none is the default")
    if value(TRAIN, "fp16") == "True":
        migration.drop(TRAIN, "bf16", "--fp16 says how to compute")
    if value(TRAIN, "bf16") == "False" and value(TRAIN, "attn_implementation") not in ("", "auto", "sdpa"):
        migration.drop(TRAIN, "attn_implementation", "it computes in half precision")
    if [value(TRAIN, f"tune_mm_{part}") for part in ("llm", "mlp")] == ["False", "False"] and (
        value(TRAIN, "tune_mm_vision") in ("", "False")
    ):
        migration.launch.not_understood.append("nothing is trained: give --tune_mm_llm, --tune_mm_mlp or both")
    _settle_videos(migration)


def _swift_accumulation(migration: Migration) -> str:
    """The default of ms-swift: at least 16 samples a step over all ranks."""
    ranks = factors_of_ranks(migration.launch.launcher, migration.launch.environment) or ()
    per_pass = multiply(migration.value(TRAIN, "per_device_train_batch_size"), *ranks) or ""
    return str(math.ceil(16 / max(1, int(per_pass)))) if per_pass.isdigit() else "1"


def _settle_batch(migration: Migration) -> None:
    """Count the samples of a step: batch size, accumulation and ranks multiplied."""
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    entries = [entry for name in names if (entry := migration.find(TRAIN, name))]
    if migration.find(TRAIN, "samples_per_step"):
        for entry in entries:
            entry.drop("--samples_per_step says how many samples a step has")
        return
    launch = migration.launch
    ranks = factors_of_ranks(launch.launcher, launch.environment)
    factors = [entry.value for entry in entries]
    samples = multiply(*factors, *ranks) if ranks and len(factors) == len(names) else None
    if ranks is None or samples is None:
        for entry in entries:
            entry.drop("it is a factor of --samples_per_step")
        formula = " x ".join([*factors, "the number of ranks"])
        launch.not_understood.append(f"the samples of a step: give --samples_per_step, which is {formula}")
        return
    batch, accumulation = entries
    of_ranks = " x ".join(factor for factor in ranks if factor != "1") or "1"
    batch.why = " x ".join(
        f"{count} {noun if count == '1' else plural}"
        for count, noun, plural in (
            (batch.value, "sample", "samples"),
            (accumulation.value, "forward pass", "forward passes"),
            (of_ranks, "rank", "ranks"),
        )
    )
    batch.name, batch.value = "samples_per_step", samples
    accumulation.drop("")
    accumulation.counted_in = f"--samples_per_step {samples}"


def _settle_upstream_lora(migration: Migration) -> None:
    """With LoRA, the upstream framework trains adapters in the attention of the language model alone."""
    for name, value in (("tune_mm_llm", "True"), ("tune_mm_mlp", "False"), ("tune_mm_vision", "False")):
        if migration.value(TRAIN, name) != value:
            migration.drop(TRAIN, name, "with LoRA, the language model alone is trained there")
            _set(migration, TRAIN, name, value)
    _set(migration, TRAIN, "lora_target_modules", "q_proj,k_proj,v_proj,o_proj")


def _settle_length_and_rates(migration: Migration) -> None:
    value = migration.value
    if value(TRAIN, "max_steps"):
        migration.drop(TRAIN, "num_train_epochs", "--max_steps sets the length")
    warmup = migration.find(TRAIN, "warmup_steps")
    if warmup is not None and re.fullmatch(r"0?\.\d+", warmup.value):
        migration.drop(TRAIN, "warmup_ratio", "--warmup_steps below 1 says the share of the steps")
        warmup.name, warmup.why = "warmup_ratio", "below 1, it is a share of the steps"
    if value(TRAIN, "warmup_steps"):
        migration.drop(TRAIN, "warmup_ratio", "--warmup_steps says how long the rates rise")
    if value(TRAIN, "lr_scheduler_type") == "constant":
        for name in ("warmup_ratio", "warmup_steps"):
            migration.drop(TRAIN, name, "constant has no warm-up")
    if value(TRAIN, "tune_mm_mlp") == "False":
        migration.drop(TRAIN, "mm_projector_lr", "the merger is frozen")
    if value(TRAIN, "tune_mm_vision") in ("", "False"):
        migration.drop(TRAIN, "vision_tower_lr", "the vision tower is frozen")
    own_rates = (
        value(TRAIN, "tune_mm_mlp") == "False" or value(TRAIN, "mm_projector_lr"),
        value(TRAIN, "tune_mm_vision") in ("", "False") or value(TRAIN, "vision_tower_lr"),
    )
    if value(TRAIN, "tune_mm_llm") == "False" and all(own_rates):
        migration.drop(TRAIN, "learning_rate", "every trained part has a rate of its own")


def _settle_videos(migration: Migration) -> None:
    """Sample at a frame rate where the other trainer does."""
    if migration.value(BUILD, "fps"):
        _set(migration, BUILD, "video_sampling", "fps")
        migration.drop(BUILD, "base_interval", "--fps says how densely to sample")
    if migration.launch.tool is UPSTREAM and migration.value(BUILD, "fps"):
        for name, of_fps in _INTERVAL_FRAMES.items():
            entry = migration.find(BUILD, name)
            if entry is not None:
                entry.name = of_fps
    if migration.launch.tool is SWIFT:
        _settle_frame_bounds(migration)


def _settle_frame_bounds(migration: Migration) -> None:
    """Raise the upper bound of a frame as qwen_vl_utils does, which ms-swift reads videos with."""
    lowest, highest = (migration.find(BUILD, f"video_{end}_frame_pixels") for end in ("min", "max"))
    if lowest and highest and lowest.value.isdigit() and highest.value.isdigit():
        bound = int(int(lowest.value) * 1.05)
        if int(highest.value) < bound:
            highest.value = str(bound)
            highest.why = f"qwen_vl_utils raises it to 1.05 x the lower bound, {lowest.value}"


def _set(migration: Migration, program: str, name: str, value: str) -> None:
    """Set a flag that the other trainer derives from others, unless it is set."""
    if migration.find(program, name) is None:
        origin = _default_of(migration.launch)
        migration.entries.append(
            Entry(written=f"--{name} {value}", origin=origin, program=program, name=name, value=value)
        )


def _datasets(migration: Migration) -> list[str]:
    """The argument of ``vlprep build``."""
    entry = migration.find(BUILD, DATASETS)
    if entry is None or not entry.value.strip(", "):
        migration.launch.not_understood.append("no dataset is named: give DATASETS to vlprep build")
        return [UNNAMED]
    if migration.launch.tool is not SWIFT:
        return [",".join(entry.value.replace(",", " ").split())]
    files = []
    datasets = next((flag.values for flag in reversed(migration.launch.flags) if flag.name == "dataset"), ())
    for item in datasets:
        name, mark, count = item.partition("#")
        if mark:
            migration.launch.not_understood.append(f"{count} samples of {name}: take a share, such as {name}%10")
        if not name.endswith(ANNOTATION_SUFFIXES) and not is_left_to_shell(name):
            migration.launch.not_understood.append(f"the dataset {name}: download it and give its annotation file")
        files.append(name)
    return files
