"""The flags of both programs are an interface: scripts and documents name them, so their list is frozen."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from pathlib import Path

import click
import pytest

from prep.cli import main as vlprep
from tests.guides import all_pages, page_commands, page_path
from tests.typed import TOOLS, tool
from train.generate.cli import main as generate
from train.memory.cli import main as memory
from train.order.cli import main as order
from train.settings.flags import make_parser, parse_arguments
from train.tiny_model import main as tiny_model
from train.tools.merge import main as merge
from train.tools.summary import main as summary

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


def examples_of(text: str, program: str) -> list[list[str]]:
    """The words that the examples at the end of a help give to the program."""
    examples = [line.strip().removeprefix(f"{program} ") for line in text.partition("Examples:\n")[2].splitlines()]
    assert len(examples) >= 2
    return [shlex.split(example) for example in examples]


@pytest.mark.parametrize("command", [order, generate, memory, merge, summary, tiny_model])
def test_the_help_of_each_tool_ends_with_examples_that_it_accepts(command: click.Command) -> None:
    name = str(command.name)
    with click.Context(command, info_name=name) as context:
        text = command.get_help(context)
    for words in examples_of(text, name):
        command.make_context(name, words)


def test_the_help_of_the_trainer_ends_with_examples_that_it_accepts() -> None:
    for words in examples_of(make_parser().format_help(), "deepspeed train/main.py"):
        assert str(make_parser().parse_args(words).output_dir) == words[words.index("--output_dir") + 1]


STARTS = ("vlprep ", "deepspeed train/main.py ", "python -m train.")


def inline_commands(page: str) -> list[list[str]]:
    """The words of the commands in the sentences and tables of a page."""
    text = re.sub(r"^```.*?^```$", "", page_path(page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", text)]
    complete = [span for span in spans if span.startswith(STARTS) and not {*"…|"} & {*span}]
    return [words for span in complete if len(words := shlex.split(re.sub(r"\bN\b", "1", span))) > 2]


@pytest.mark.parametrize("page", all_pages())
def test_every_command_of_a_page_is_accepted_by_its_program(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('shards = "shards/demo"\n')
    for command in page_commands(page):
        parse(command.words)
    for words in inline_commands(page) if page != "messages.md" else []:  # it quotes messages
        with suppress(click.MissingParameter, click.BadOptionUsage, click.exceptions.Exit):  # a part of a command
            parse(words)


def parse(words: list[str]) -> None:
    """Let the program of a command parse its arguments."""
    if words[:1] == ["vlprep"]:
        vlprep.commands[words[1]].make_context(words[1], words[2:])
    elif "train/main.py" in words:
        flags = words[words.index("train/main.py") + 1 :]
        parse_arguments(["run.toml" if before == "--config" else word for before, word in zip(["", *flags], flags)])
    elif words[:2] == ["python", "-m"] and words[2] in TOOLS:
        tool(words[2]).make_context(words[2], words[3:])


def test_the_pages_have_commands_of_every_program() -> None:
    programs = {word for page in all_pages() for command in page_commands(page) for word in command.words}
    assert programs >= {"vlprep", "train/main.py", *TOOLS}
