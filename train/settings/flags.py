"""Reads the settings of a run: the command line, and a TOML file of flags -> :class:`TrainArguments`.

A switch is written ``--bf16``, ``--bf16 True`` or ``--bf16 False``. Names may have hyphens (``--dry-run``).
``--config run.toml`` names a file with one line per flag, such as ``learning_rate = 1e-6``. The command line overrides
the file. :mod:`train.settings.foreign` translates the flags of other trainers. All errors are reported at once; that of
an unknown name suggests the nearest one.
"""

from __future__ import annotations

import argparse
import collections
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from schemas.errors import ConfigError, ConfigErrors
from schemas.setting import MAX_INT, SettingField, setting_fields
from train.settings.arguments import TrainArguments
from train.settings.foreign import Translation, translate

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger(__name__)

FIELDS = setting_fields(TrainArguments)
_PARSER_FLAGS = ("help", "version", "config")
SHORT_FLAGS = {"verbose": ("-v",)}
NOT_IN_FILES = ("local_rank", "config", "version")
RECORD_TABLES = ("run", "versions")
"""Tables of ``settings.toml`` that record a run and set nothing: ``--config`` skips them."""

_INVALID = object()
"""Stands for a value that a flag cannot take."""


def parse_arguments(
    argv: Sequence[str], *, shards: str | None = None, note: Callable[[str], None] = logger.info
) -> TrainArguments:
    """Parse the command line and the file that it names with ``--config``.

    Args:
        argv: the words of the command line, without the name of the program.
        shards: default of ``--shards``; None requires the flag.
        note: gets a sentence for each flag that has no effect, or is spelled otherwise here.

    Raises:
        ConfigErrors: all that is wrong: unknown flags, values of the wrong type or out of bounds, contradictions.
        SystemExit: after ``--help`` and ``--version`` (exit code 0).
    """
    problems: list[str] = []
    own, foreign = _separate(argv, problems)
    values, strays = _parse_words(own, problems)
    problems += [f"unknown flag {word}; --help lists the flags." for word in strays]
    path = values.pop("config", None)
    if path is not None:
        values = {**read_flag_file(path, note=note), **values}
    for word, name, value in foreign:
        _add_foreign(values, word, translate(word, name, value, FIELDS), problems, note)
    if shards is not None:
        values.setdefault("shards", shards)
    if "shards" not in values:
        problems.append("--shards is missing: give the folder that `vlprep build --out` wrote.")
        values["shards"] = ""
    _drop_unread_name(values, note)
    try:
        arguments = TrainArguments(**values)
    except ConfigErrors as error:
        problems += error.problems
    if problems:
        raise ConfigErrors(problems)
    return arguments


def _separate(argv: Sequence[str], problems: list[str]) -> tuple[list[str], list[tuple[str, str, str]]]:
    """Split a command line into the words of our flags, and the flags that the trainer does not declare.

    A flag of ours that lacks its value is a problem. argparse would stop there, and hide all others.

    Returns:
        The words of our own flags, hyphens in their names made underscores; and of every other flag how it is written,
        its name and its value.
    """
    own: list[str] = []
    foreign: list[tuple[str, str, str]] = []
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        written, equals, value = word.partition("=")
        name = written.removeprefix("--").replace("-", "_")
        needs_value = written.startswith("--") and (
            name == "config" or (name in FIELDS and FIELDS[name].kind is not bool)
        )
        if needs_value and not equals and (not words or words[0].startswith(("--", "-v"))):
            problems.append(f"argument --{name}: expected one argument; --help lists the flags.")
            continue
        if not written.startswith("--") or name in (*FIELDS, *_PARSER_FLAGS):
            own.append(f"--{name}{equals}{value}" if written.startswith("--") else word)
            continue
        while not equals and words and not words[0].startswith(("--", "-v")):
            value = f"{value} {words.popleft()}".strip()
        foreign.append((written, name, value))
    return own, foreign


def _parse_words(words: Sequence[str], problems: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Parse the words of our own flags.

    Returns:
        The valid values by name, and the words that belong to no flag.
    """
    try:
        namespace, strays = make_parser(problems).parse_known_args(words)
    except ConfigError as error:  # a flag lacks its value
        problems.append(str(error))
        return {}, []
    return {name: value for name, value in vars(namespace).items() if value is not _INVALID}, strays


def _add_foreign(
    values: dict[str, Any], written: str, translation: Translation, problems: list[str], note: Callable[[str], None]
) -> None:
    """Add the value of a translated flag to ``values``, or what is wrong with it to ``problems``."""
    if translation.problem:
        problems.append(translation.problem)
    if translation.own is not None:
        name, text = translation.own
        parsed, _ = _parse_words([f"--{name}={text}"], problems)
        if name in parsed and values.setdefault(name, parsed[name]) != parsed[name]:
            problems.append(f"{written} and --{name} {values[name]} contradict each other: give one of them.")
    if translation.note:
        note(translation.note)


def _drop_unread_name(values: dict[str, Any], note: Callable[[str], None]) -> None:
    """Drop ``run_name`` where neither the folder of the run nor a report takes its name from it."""
    if "run_name" in values and "output_dir" in values and values.get("report_to") != "wandb":
        note(
            f"--run_name {values.pop('run_name')} has no effect here: with --output_dir, it is the name in wandb only "
            "(--report_to wandb)."
        )
    if "logging_dir" in values and values.get("report_to") != "tensorboard":
        note(
            f"--logging_dir {values.pop('logging_dir')} has no effect here: it is the folder of --report_to "
            "tensorboard."
        )


def read_flag_file(path: Path, *, note: Callable[[str], None] = logger.info) -> dict[str, Any]:
    """Read a TOML file of flags.

    Args:
        path: the file.
        note: gets a sentence for each flag that has no effect, or is spelled otherwise here.

    Returns:
        Values of the fields of :class:`TrainArguments` that the file names.

    Raises:
        ConfigErrors: the file cannot be read, names unknown flags, or has values of the wrong type.
    """
    values: dict[str, Any] = {}
    foreign: dict[str, object] = {}
    problems: list[str] = []
    for name, value in read_toml(path).items():
        if isinstance(value, dict):
            if name not in RECORD_TABLES:
                problems.append(f"--config {path} has a table [{name}]: write flags without tables, one line each.")
        elif name in NOT_IN_FILES:
            problems.append(f"--config {path}: {name} is not allowed in a file: remove it.")
        elif name not in FIELDS:
            foreign[name] = value
        else:
            try:
                values[name] = _value_in_file(path, FIELDS[name], value)
            except ConfigError as error:
                problems.append(str(error))
    in_foreign: list[str] = []
    for name, value in foreign.items():
        _add_foreign(values, name, translate(name, name, str(value), FIELDS), in_foreign, note)
    problems += [f"--config {path}: {problem}" for problem in in_foreign]
    if problems:
        raise ConfigErrors(problems)
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


def make_parser(problems: list[str] | None = None) -> argparse.ArgumentParser:
    """The parser of the command line, with one flag per field of :class:`TrainArguments`.

    Args:
        problems: gets a sentence for each value of the wrong type, which then parses as ``_INVALID``; None raises.
    """
    parser = _Parser(
        prog="deepspeed train/main.py",
        description="Train Qwen2.5-VL on packed shards.",
        epilog="Examples:\n"
        "  deepspeed train/main.py --shards shards/mine --output_dir runs/mine\n"
        "  deepspeed train/main.py --shards shards/ --output_dir runs/lora --lora_enable True\n"
        "  deepspeed train/main.py --config runs/mine/settings.toml --output_dir runs/again --dry_run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        if problems is not None:
            options.update(type=partial(_collecting, options["type"], kind.__name__, name, problems))
        parser.add_argument(
            *SHORT_FLAGS.get(name, ()), f"--{name}", help=field.help_text().replace("%", "%%"), **options
        )
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the flags.")


class _Version(argparse.Action):
    """Looks the version up only when the flag is used: a checkout that is not installed has none."""

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


def _collecting(convert: Callable[[str], Any], kind: str, name: str, problems: list[str], text: str) -> Any:
    """Convert a value, or note why that fails."""
    try:
        return convert(text)
    except (argparse.ArgumentTypeError, ValueError) as error:
        reason = str(error) if isinstance(error, argparse.ArgumentTypeError) else f"invalid {kind} value: {text!r}"
        problems.append(f"argument --{name}: {reason}; --help lists the flags.")
        return _INVALID


def _switch(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"found {text!r}, allowed: True or False")
    return text.lower() == "true"


def _text(kind: type[str] | type[Path], text: str) -> str | Path:
    """Refuse an empty text: most often it is an unset variable of the shell."""
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty: give a value, or leave the flag out")
    return kind(text)
