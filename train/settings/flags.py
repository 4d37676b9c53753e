"""Reads the settings of a run: the command line, and a TOML file of flags -> :class:`TrainArguments`.

A switch is written ``--bf16``, ``--bf16 True`` or ``--bf16 False``. Names may have hyphens (``--dry-run``).
``--config run.toml`` names a file with one line per flag, such as ``learning_rate = 1e-6``. The command line overrides
the file. An unknown name is an error that suggests the nearest one.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from schemas.errors import ConfigError
from schemas.setting import MAX_INT, SettingField, setting_fields
from train.settings.arguments import TrainArguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIELDS = setting_fields(TrainArguments)
NOT_IN_FILES = ("local_rank", "config", "version")
RECORD_TABLES = ("run", "versions")
"""Tables of ``settings.toml`` that record a run and set nothing: ``--config`` skips them."""

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
    "save_strategy": "--save_steps says how often to save, 0 only when the run is asked to stop",
    "optim": "the optimizer is AdamW",
}
"""Upstream flags that have no meaning here, and why."""


def parse_arguments(argv: Sequence[str], *, shards: str | None = None) -> TrainArguments:
    """Parse the command line and the file that it names with ``--config``.

    Args:
        argv: the words of the command line, without the name of the program.
        shards: default of ``--shards``; None requires the flag.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type or out of bounds, or a contradiction.
        SystemExit: after ``--help`` and ``--version`` (exit code 0).
    """
    namespace, unknown = make_parser().parse_known_args([_underscored(word) for word in argv])
    if unknown:
        flag = unknown[0].partition("=")[0]
        raise ConfigError(_explain_unknown(flag, flag.lstrip("-"), "--"))
    values = vars(namespace)
    path = values.pop("config", None)
    if path is not None:
        values = {**read_flag_file(path), **values}
    if shards is not None:
        values.setdefault("shards", shards)
    if "shards" not in values:
        raise ConfigError("--shards is missing: give the folder that `vlprep build --out` wrote.")
    return TrainArguments(**values)


def read_flag_file(path: Path) -> dict[str, Any]:
    """Read a TOML file of flags.

    Returns:
        Values of the fields of :class:`TrainArguments` that the file names.

    Raises:
        ConfigError: the file cannot be read, names an unknown flag, or has a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for name, value in read_toml(path).items():
        if isinstance(value, dict):
            if name in RECORD_TABLES:
                continue
            raise ConfigError(f"--config {path} has a table [{name}]: write flags without tables, one line each.")
        if name in NOT_IN_FILES:
            raise ConfigError(f"--config {path}: {name} is not allowed in a file: remove it.")
        if name not in FIELDS:
            raise ConfigError(f"--config {path}: {_explain_unknown(name, name, '')}")
        values[name] = _value_in_file(path, FIELDS[name], value)
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Contents of a TOML file.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    try:
        # Paths may have bytes that are not UTF-8: Python's escapes carry them.
        return tomllib.loads(path.read_text(encoding="utf-8", errors="surrogateescape"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line, with one flag per field of :class:`TrainArguments`."""
    parser = _Parser(
        prog="deepspeed train/main.py",
        description="Train Qwen2.5-VL on packed shards.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="Show the version and exit.")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="Read flags from a file. The command line overrides it."
    )
    for name, field in FIELDS.items():
        kind: type = field.kind
        options: dict[str, Any] = {"type": kind, "metavar": "|".join(field.setting.choices) or kind.__name__.upper()}
        if kind in (str, Path) and name != "shards":
            options.update(type=partial(_text, kind))
        if kind is bool:
            options.update(type=_switch, nargs="?", const=True, metavar="True|False")
        parser.add_argument(f"--{name}", help=field.help_text().replace("%", "%%"), **options)
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for: a checkout that is not installed has none."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            version = importlib.metadata.version("vlprep")
        except importlib.metadata.PackageNotFoundError as error:
            raise ConfigError("vlprep is not installed, so its version is unknown: pip install -e .") from error
        sys.stdout.write(f"vlprep, version {version}\n")
        parser.exit()


def _value_in_file(path: Path, field: SettingField, value: object) -> Any:
    if field.kind is float and type(value) is int and abs(value) <= MAX_INT:
        value = float(value)
    if type(value) is not (str if field.kind is Path else field.kind):
        expected = "text" if field.kind in (str, Path) else field.kind.__name__
        raise ConfigError(f"--config {path}: {field.name} is {value!r}; a value of type {expected} is expected.")
    if isinstance(value, str) and (not value.strip() or "\0" in value):
        raise ConfigError(f"--config {path}: {field.name} is {value!r}: give a value, or remove the line.")
    return Path(value) if field.kind is Path and isinstance(value, str) else value


def _underscored(word: str) -> str:
    """Spell a flag as its field: ``--dry-run=True`` becomes ``--dry_run=True``. Other words are unchanged."""
    name, equals, value = word.partition("=")
    field = name.removeprefix("--").replace("-", "_")
    return f"--{field}{equals}{value}" if name.startswith("--") and field in FIELDS else word


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: True or False")
    return text.lower() == "true"


def _text(kind: type[str] | type[Path], text: str) -> str | Path:
    """Refuse an empty text: most often it is an unset variable of the shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value, or leave the flag out")
    return kind(text)


def _explain_unknown(written: str, name: str, prefix: str) -> str:
    if name in BUILD_TIME_FLAGS:
        where = BUILD_TIME_FLAGS[name]
        return f"{written} is not a flag of the trainer: it was decided when the shards were built ({where})."
    if name in UNNEEDED_FLAGS:
        return f"{written} is not a flag of the trainer: {UNNEEDED_FLAGS[name]}. Leave it out."
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return f"unknown flag {written}" + (f"; did you mean {prefix}{near[0]}?" if near else "; --help lists the flags.")
