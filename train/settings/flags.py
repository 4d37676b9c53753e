"""Reads the settings of a run: command line, and a TOML file of flags -> :class:`TrainArguments`.

A switch is written ``--bf16``, ``--bf16 True`` or ``--bf16 False``; names may have hyphens (``--dry-run``).
``--config run.toml`` names a file with one line a flag, such as ``learning_rate = 1e-6``; what the command line says
goes before it. An unknown name is an error that says which one was meant.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from schemas.errors import ConfigError
from train.settings.arguments import BUILD_TIME_FLAGS, MAX_INT, UNNEEDED_FLAGS, TrainArguments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIELDS = {item.name: item for item in fields(TrainArguments)}
NOT_IN_FILES = ("local_rank", "config")


def parse_arguments(argv: Sequence[str], *, shards: str | None = None) -> TrainArguments:
    """Parse the command line, without the name of the program, and the file that it names with ``--config``.

    Args:
        argv: the words.
        shards: what ``--shards`` is where neither gives it; None: it must be given.

    Raises:
        ConfigError: an unknown flag, a value of the wrong type or range, or a contradiction.
        SystemExit: ``--help`` (exit code 0).
    """
    namespace, unknown = _parser().parse_known_args([_underscored(word) for word in argv])
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
        ConfigError: it cannot be read, names a flag that there is not, or gives a value of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not valid TOML: {error}.") from error
    kinds = _kinds()
    values: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, dict):
            raise ConfigError(f"--config {path} has a table [{name}]: write flags without tables, one line each.")
        if name in NOT_IN_FILES:
            raise ConfigError(f"--config {path}: {name} cannot stand in a file: remove it.")
        if name not in FIELDS:
            raise ConfigError(f"--config {path}: {_explain_unknown(name, name, '')}")
        kind = kinds[name]
        found: Any = float(value) if kind is float and type(value) is int and abs(value) <= MAX_INT else value
        if type(found) is not (str if kind is Path else kind):
            wanted = "text" if kind in (str, Path) else kind.__name__
            raise ConfigError(f"--config {path}: {name} is {value!r}; a value of type {wanted} is expected.")
        if isinstance(found, str) and (not found.strip() or "\0" in found):
            raise ConfigError(f"--config {path}: {name} is {found!r}: give a value, or remove the line.")
        values[name] = Path(value) if kind is Path else found
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="deepspeed train/main.py",
        description="Train Qwen2.5-VL on packed shards.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="flags from a file; the command line goes first"
    )
    for name, kind in _kinds().items():
        item = FIELDS[name]
        text: str = item.metadata["help"]
        # None stands for a default that the text explains; a required flag has none.
        shown = f" (default: {item.default})" if isinstance(item.default, (str, int, float)) else ""
        options: dict[str, Any] = {"help": f"{text}{shown}", "type": kind, "metavar": kind.__name__.upper()}
        if kind in (str, Path) and name != "shards":
            options.update(type=partial(_text, kind))
        if kind is bool:
            options.update(type=_switch, nargs="?", const=True, metavar="True|False")
        if choices := item.metadata["choices"]:
            options.update(choices=choices, metavar="|".join(choices))
        parser.add_argument(f"--{name}", **options)
    return parser


def _kinds() -> dict[str, type]:
    """Type of every flag; of an optional one, that of its value."""
    hints = get_type_hints(TrainArguments)
    kinds = {}
    for name in FIELDS:
        (kinds[name],) = [part for part in get_args(hints[name]) or (hints[name],) if part is not type(None)]
    return kinds


def _underscored(word: str) -> str:
    """A flag as its field is called: ``--dry-run=True`` becomes ``--dry_run=True``; other words stay."""
    name, equals, value = word.partition("=")
    field = name.removeprefix("--").replace("-", "_")
    return f"--{field}{equals}{value}" if name.startswith("--") and field in FIELDS else word


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: True or False")
    return text.lower() == "true"


def _text(kind: type[str] | type[Path], text: str) -> str | Path:
    """A text that says something: an empty one is most often a variable of the shell that was not set."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value, or leave the flag out")
    return kind(text)


def _explain_unknown(written: str, name: str, prefix: str) -> str:
    if name in BUILD_TIME_FLAGS:
        where = BUILD_TIME_FLAGS[name]
        return f"{written} is no flag of the trainer: it was decided when the shards were built ({where})."
    if name in UNNEEDED_FLAGS:
        return f"{written} is no flag of the trainer: {UNNEEDED_FLAGS[name]}. Leave it out."
    near = difflib.get_close_matches(name, FIELDS, n=1)
    return f"unknown flag {written}" + (f"; did you mean {prefix}{near[0]}?" if near else "; --help lists the flags.")
