"""Commands of the pages as a user types them, in a folder with the names that they use, and without new interpreters.

``vlprep`` and the tools of the trainer run in this process, with one worker. Launchers and their ranks are forked, on
the CPU. ``make`` says which commands it would run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import click
from click.testing import CliRunner

from prep.cli import main as vlprep
from tests.guides import REPOSITORY, split_commands

TOOLS = {
    "train.generate": "train.generate.cli",
    "train.memory": "train.memory.cli",
    "train.order": "train.order.cli",
    "train.tiny_model": "train.tiny_model",
    "train.tools.merge": "train.tools.merge",
}
"""Programs of the trainer that ``python -m`` starts, each with the module of its command."""

DEFAULT_MODEL = Path("Qwen/Qwen2.5-VL-3B-Instruct")


def prepare_folder(checkpoint: Path) -> None:
    """Put into the working directory what a checkout has, and a checkpoint under the names that the pages use."""
    for name, target in (
        (".venv/bin/activate", Path(sys.executable).with_name("activate")),
        ("train", REPOSITORY / "train"),
        ("checkpoints/tiny", checkpoint),
        (str(DEFAULT_MODEL), checkpoint),
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).symlink_to(target)


def tool(module: str) -> click.Command:
    """The command of a program that ``python -m`` starts."""
    command: click.Command = import_module(TOOLS[module]).main
    return command


def run(words: Sequence[str], *, exit_code: int = 0, environment: Mapping[str, str] | None = None) -> str:
    """Run a command in the working directory until it ends.

    Args:
        words: program and arguments.
        exit_code: the expected one.
        environment: variables for a launcher.

    Returns:
        Its output, of a launcher what it and its ranks log.
    """
    program, *arguments = words
    if program == "vlprep":
        return _invoke(vlprep, arguments, exit_code)
    if program == "python" and arguments[0] == "-m":
        return _invoke(tool(arguments[1]), arguments[2:], exit_code)
    if "train/main.py" in arguments:
        return _launch(program, arguments, exit_code, environment or {})
    if program == "make":
        return "".join(run(planned) for planned in _planned(words))
    assert (program, *arguments) == (".", ".venv/bin/activate"), f"no way to run {program}"
    return ""


def _invoke(command: click.Command, arguments: list[str], exit_code: int) -> str:
    # As if the hub's cache had the default model.
    defaults = {name: {"workers": 1, "model": str(DEFAULT_MODEL)} for name in ("build", "show", "report")}
    result = CliRunner().invoke(command, arguments, default_map={**defaults, "validate": {"workers": 1}})
    assert result.exit_code == exit_code, result.output
    return result.output


def _launch(program: str, arguments: list[str], exit_code: int, environment: Mapping[str, str]) -> str:
    from tests.train.launching import free_port, launch_forked

    launchers = {
        "python": [sys.executable],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--master_port", str(free_port())],
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port())],
    }
    done = launch_forked(*launchers[program], *arguments, folder=Path.cwd(), environment=environment)
    assert done.returncode == exit_code, done.stderr
    return done.stderr


def _planned(words: Sequence[str]) -> list[list[str]]:
    """The commands that a target of the Makefile would run in the working directory, where the environment is there."""
    make = ["make", "--file", str(REPOSITORY / "Makefile"), "--dry-run", "--old-file=.venv/.complete", *words[1:]]
    # Without the flags of a `make` that runs the tests.
    printed = subprocess.run(make, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=True).stdout
    commands = [shlex.split(text) for text in split_commands(printed) if text.startswith(".venv/bin/")]
    assert commands, printed
    return [[Path(program).name, *arguments] for program, *arguments in commands]
