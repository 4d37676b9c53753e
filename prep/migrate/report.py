"""What ``vlprep migrate`` prints: a :class:`Migration` and the tables of its datasets -> text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from prep.migrate.launch import Launch
from prep.migrate.registries import Tables, read_registry
from prep.migrate.rewrite import UNNAMED, Migration, command_text
from prep.migrate.tools import LLAMA_FACTORY, UPSTREAM


@dataclass(kw_only=True, slots=True)
class Report:
    """The text, and whether all was understood."""

    sections: list[str] = field(default_factory=list)
    is_complete: bool = True

    def text(self) -> str:
        """The sections, with blank lines between them."""
        return "\n\n".join(self.sections)


def find_registry(launch: Launch, script: Path | None) -> Path | None:
    """The registry that a script uses, where the other trainer has it; None if it is not there."""
    folders = [Path(), *((script.absolute().parent, *script.absolute().parents[1:4]) if script else ())]
    if launch.tool is UPSTREAM:
        names = ["qwenvl/data/__init__.py"]
    elif launch.tool is LLAMA_FACTORY:
        folder = next((flag.value for flag in launch.flags if flag.name == "dataset_dir"), "data")
        names = [f"{folder}/dataset_info.json"]
    else:
        return None
    paths = (folder / name for folder in folders for name in names)
    return next((path for path in paths if path.is_file()), None)


def make_report(migration: Migration, registry: Path | None) -> Report:
    """Write what a migration comes to.

    Args:
        migration: the two commands and the flags.
        registry: registry of the datasets; None leaves them out.

    Raises:
        ScriptError: the registry cannot be read.
    """
    launch, left = migration.launch, migration.left
    report = Report()
    report.sections.append("# 1. Build the shards\n" + command_text(migration.build_words()))
    report.sections.append("# 2. Train\n" + command_text(migration.train_words(), launch.environment))
    lines = [f"#   {entry.line()}" for entry in migration.entries if not entry.is_left]
    report.sections.append(f"# What became of the flags of {launch.tool.name}\n" + "\n".join(lines))
    if launch.tool in (UPSTREAM, LLAMA_FACTORY):
        left += _add_tables(report, migration, registry)
    if left:
        report.is_complete = False
        report.sections.append("# Not understood, or left to you\n" + "\n".join(f"#   {line}" for line in left))
    return report


def registry_report(registry: Path) -> Report:
    """The tables of all datasets of a registry."""
    tables = read_registry(registry)
    report = Report(sections=[tables.text(tables.datasets)] if tables.datasets else [])
    if tables.not_understood:
        report.is_complete = False
        report.sections.append("# Not understood\n" + "\n".join(f"#   {line}" for line in tables.not_understood))
    return report


def _add_tables(report: Report, migration: Migration, registry: Path | None) -> list[str]:
    """Add the tables of the datasets. Returns what is left to the reader."""
    names = migration.dataset_names()
    if names == [UNNAMED]:
        return []
    if registry is None:
        return [f"the registry of {', '.join(names)}: give it with --registry, or register them in datasets.toml"]
    media_dir = next((flag.value for flag in migration.launch.flags if flag.name == "media_dir"), None)
    tables: Tables = read_registry(registry, media_dir=media_dir)
    known = [name for name in names if name in tables.datasets]
    if known:
        report.sections.append(f"# Tables for datasets.toml, from {registry}\n" + tables.text(known))
    missing = [f"the dataset {name}: it is not in {registry}" for name in names if name not in tables.datasets]
    return [*missing, *tables.not_understood]
