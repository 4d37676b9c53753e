"""The flags of both programs are an interface: scripts and documents name them, so their list is frozen."""

from __future__ import annotations

from pathlib import Path

import click

from prep.cli import main as vlprep
from train.generate.cli import main as generate
from train.order.cli import main as order
from train.settings.flags import make_parser

FROZEN = Path(__file__).with_name("flags.txt")


def flags_of(program: str, command: click.Command) -> list[str]:
    names = [name for option in command.params for name in (*option.opts, *option.secondary_opts)]
    own = [f"{program} {name}" for name in names if name.startswith("-")]
    commands = command.commands if isinstance(command, click.Group) else {}
    return own + [flag for name, sub in commands.items() for flag in flags_of(f"{program} {name}", sub)]


def test_the_flags_of_both_programs_are_the_frozen_ones() -> None:
    trainer = [f"train/main.py {name}" for action in make_parser()._actions for name in action.option_strings]
    tools = [*flags_of("python -m train.order", order), *flags_of("python -m train.generate", generate)]
    flags = sorted([*flags_of("vlprep", vlprep), *trainer, *tools])
    frozen = FROZEN.read_text(encoding="utf-8").splitlines()
    added, removed = sorted(set(flags) - set(frozen)), sorted(set(frozen) - set(flags))
    assert flags == frozen, (
        f"flags changed: added {added}, removed {removed}. If that is on purpose, edit {FROZEN.name} to match (sorted, "
        "one flag per line), and the documents and CHANGELOG.md with it: a removed flag breaks the scripts that use it."
    )
