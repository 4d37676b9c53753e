"""Options that several commands of ``vlprep`` share: paths, shares, settings, engines.

Options of settings are made from the declarations in :mod:`schemas.settings`, so each setting is described once.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, ParamSpec

import click
from msgspec import UNSET

from prep.engines import ENGINES
from schemas.errors import ConfigError
from schemas.manifest import MANIFEST_FILE
from schemas.qwen import DEFAULT_MODEL
from schemas.setting import setting_fields
from schemas.settings import BuildSettings, MediaSettings
from storage.urls import Location, Url, is_url, parse_location

P = ParamSpec("P")

_NOT_FOR_OUTPUT = {
    "http": "web servers are read-only here",
    "https": "web servers are read-only here",
    "memory": "this memory ends with the command, and workers do not share it",
}
"""Protocols that shards cannot be written to, and why."""


class _NamedPath(click.Path):
    """A path. The empty string is refused: it would mean the working folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty: give one, or leave the option out", param, ctx)
        if not self.file_okay and isinstance(value, str) and Path(value).is_file():
            folder = Path(value).parent
            near = f", such as {folder}" if (folder / MANIFEST_FILE).is_file() else ""
            self.fail(f"{value} is a file, where a folder is expected{near}", param, ctx)
        return super().convert(value, param, ctx)


class _Location(_NamedPath):
    """A path or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and is_url(value):
            location = parse_location(value)
            return location if isinstance(location, Url) else super().convert(str(location), param, ctx)
        return value if isinstance(value, Url) else super().convert(value, param, ctx)


class Share(click.ParamType[Fraction]):
    """A share, written ``5%`` or ``0.05``."""

    name = "share"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Fraction:
        """Read a share from 0 to 1."""
        if isinstance(value, Fraction):
            return value
        text = str(value)
        try:
            share = Fraction(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except (ValueError, ZeroDivisionError):
            self.fail(f"{text!r} is not a share such as 5% or 0.05", param, ctx)
        if not 0 <= share <= 1:
            self.fail(f"{text} is not between 0% and 100%", param, ctx)
        return share


FOLDER = _NamedPath(file_okay=False, path_type=Path)
FOLDER_OR_URL = _Location(file_okay=False, path_type=Path)
PATH_OR_URL = _Location(path_type=Path)
FILE = _NamedPath(dir_okay=False, path_type=Path)

look_model_option = click.option(
    "--model",
    help=f"Checkpoint folder or hub id. Only its tokenizer is read.  [default: {DEFAULT_MODEL}, if it is in the hub's "
    "cache and made the shards; otherwise the texts are left out]",
)

media_root_option = click.option(
    "--media-root",
    type=FOLDER_OR_URL,
    help="For annotation files: folder or URL of their media.  [default: the folder of each file]",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")


def require_writable(out: Location, work_dir: Path | None) -> None:
    """Check where a build writes.

    Raises:
        ConfigError: shards cannot be written to ``out``, or ``work_dir`` has no effect.
    """
    if work_dir is not None and isinstance(out, Path):
        raise ConfigError(
            f"--work-dir has no effect unless --out is a URL: unfinished work lies in {out / '.build'}. Leave it out."
        )
    if isinstance(out, Url) and out.protocol in _NOT_FOR_OUTPUT:
        raise ConfigError(
            f"--out {out}: {_NOT_FOR_OUTPUT[out.protocol]}. Give a folder, or a URL such as s3://bucket/shards."
        )


def setting_options(settings_class: type, *names: str) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Options for the declared fields of a settings class: all of them, or those named."""

    def decorate(command: Callable[P, None]) -> Callable[P, None]:
        fields = setting_fields(settings_class)
        for field in [fields[name] for name in reversed(names or tuple(fields))]:
            choices = field.setting.choices
            option = click.option(
                f"--{field.name.replace('_', '-')}",
                field.name,
                type=click.Choice(choices) if choices else field.kind,
                is_flag=field.kind is bool,
                default=None if field.default is UNSET else field.default,
                help=field.help_text(),
            )
            command = option(command)
        return command

    return decorate


def media_settings(options: dict[str, Any]) -> MediaSettings:
    """The values of the options that ``setting_options(MediaSettings)`` adds."""
    return MediaSettings(**{name: options[name] for name in setting_fields(MediaSettings) if options[name] is not None})


def build_settings(options: dict[str, Any]) -> BuildSettings:
    """The same for the options of all settings of a build."""
    values = {name: options[name] for name in setting_fields(BuildSettings) if options[name] is not None}
    return BuildSettings(media=media_settings(options), **values)


def engine_options(command: Callable[P, None]) -> Callable[P, None]:
    """Options of :func:`open_engine`, which runs the parallel steps."""
    for option in (
        click.option(
            "--ray-address",
            metavar="ADDRESS",
            help="With --engine ray: auto, local, host:port or ray://host:port.  [default: the cluster of "
            "RAY_ADDRESS or of this machine, or a new one]",
        ),
        click.option(
            "--engine",
            type=click.Choice(ENGINES),
            default="local",
            show_default=True,
            help="What runs the work: processes of this machine, or a Ray cluster.",
        ),
        click.option(
            "--workers", type=click.IntRange(min=1), help="Number of concurrent tasks.  [default: number of cores]"
        ),
    ):
        command = option(command)
    return command
