"""The Markdown pages of the repository: their blocks and tables, and the commands in them that tests run.

Every command of a ``bash`` block and every ``python`` block is run by a test or stands in :data:`NOT_RUN`. A test runs
all that a page has, or that stand right below one of its headings::

    with guide("training.md", "Evaluate") as page:
        (command,) = page.take()

It fails if it leaves out a command. ``tests/test_guides.py`` finds what no test takes.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import dropwhile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"

_IS_THE_TESTS = "runs these tests, or takes as long; `.ci/run` runs `make check` and `make test`"

NOT_RUN = {
    "pip": "changes the environment, from a registry; `.ci/run` installs it with `make .venv`",
    "make demo": "makes the environment, and takes minutes; tests run its data, model, shards, training and summary",
    "make quick": _IS_THE_TESTS,
    "make check": _IS_THE_TESTS,
    "make test": _IS_THE_TESTS,
    "make bench": _IS_THE_TESTS,
    "ray": "starts, asks and stops Ray on several machines; tests run it in a script with stand-ins",
    "docker build": "needs Docker and a base image from a registry",
    "apptainer": "needs Apptainer and that image",
    "vllm serve": "needs vLLM, which the environment does not have",
    "curl http://localhost:8000": "asks the server of vLLM",
    "from transformers import AutoProcessor": "needs torchvision and torchcodec; a test runs it where they are",
}
"""Beginnings of commands and programs that no test can run, each with the reason."""

_HEADING_OR_BLOCK = re.compile(r"^(#+) ([^\n]*)$|^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page as :func:`page_path` takes it.
        headings: the headings that it stands below, from the second level on.
        language: after the fence.
        text: between the fences.
    """

    page: str
    headings: tuple[str, ...]
    language: str
    text: str

    @property
    def commands(self) -> list[Command]:
        """The commands of a ``bash`` block, or all of it if it is a script or a Python program."""
        if self.language == "python" or self.text.startswith("#!"):
            return [Command(self.page, self.headings, self.text, is_program=True)]
        return [Command(self.page, self.headings, text) for text in split_commands(self.text)]


@dataclass(frozen=True, eq=False)
class Command:
    """A command of a page, or a script or a program."""

    page: str
    headings: tuple[str, ...]
    text: str
    is_program: bool = False

    @cached_property
    def words(self) -> list[str]:
        """Program and arguments of a command, without the variables in front of them."""
        words = [] if self.is_program else shlex.split(self.text, comments=True)
        return [*dropwhile(re.compile(r"\w+=").match, words)]

    @property
    def heading(self) -> str:
        """The heading right above."""
        return self.headings[-1] if self.headings else ""

    @property
    def reason(self) -> str | None:
        """Why no test can run it, if none can."""
        return next((reason for start, reason in NOT_RUN.items() if self.starts_with(start)), None)

    def starts_with(self, start: str) -> bool:
        """Whether the program or the words begin so; variables in front of them do not count."""
        return (self.text if self.is_program else " ".join(self.words)).startswith(start)


def split_commands(text: str) -> list[str]:
    """Commands of shell text, each on one line unless a quoted word has several; without comments alone in a line."""
    commands, open_quote = [], ""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        command = open_quote + line
        try:
            words = shlex.split(command, comments=True)
        except ValueError:
            open_quote = f"{command}\n"
            continue
        open_quote = ""
        if words:
            commands.append(command)
    assert not open_quote, open_quote
    return commands


def page_path(page: str) -> Path:
    """A page of ``docs`` by its name, another one by its path in the repository."""
    inside = DOCS / page
    return inside if inside.exists() else REPOSITORY / page


def all_pages() -> list[str]:
    """All pages, in the form that :func:`page_path` takes."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [name.removeprefix("docs/") for name in listed.stdout.split()]


def page_blocks(page: str) -> list[Block]:
    """All fenced blocks of a page."""
    found, headings = [], list[str]()
    for level, heading, language, text in _HEADING_OR_BLOCK.findall(page_path(page).read_text(encoding="utf-8")):
        if level:
            headings[max(0, len(level) - 2) :] = [heading] if len(level) > 1 else []
        else:
            found.append(Block(page, tuple(headings), language, text))
    return found


def page_commands(page: str) -> list[Command]:
    """All commands and programs of a page."""
    runnable = [block for block in page_blocks(page) if block.language in ("bash", "python")]
    return [command for block in runnable for command in block.commands]


@dataclass
class Guide:
    """The commands of a page, or of some headings of it, that a test has to run."""

    left: list[Command] = field(default_factory=list)

    def take(self, heading: str | None = None) -> list[Command]:
        """The commands that the test runs: all, or those right below a heading."""
        taken = [command for command in self.left if heading in (None, command.heading)]
        assert taken, f"no command is left below {heading}"
        self.left = [command for command in self.left if command not in taken]
        return taken


@contextmanager
def guide(page: str, *headings: str) -> Iterator[Guide]:
    """The commands of a page, or those right below some of its headings. At the end, none may be left.

    ``tests/test_guides.py`` finds calls with literal arguments.
    """
    commands = [command for command in page_commands(page) if not headings or command.heading in headings]
    assert {*headings} <= {command.heading for command in commands} and commands, (page, headings)
    opened = Guide([command for command in commands if not command.reason])
    yield opened
    assert not opened.left, f"not run: {[command.text for command in opened.left]}"


def blocks(guide: str, section: str, language: str) -> list[str]:
    """Code blocks of a language in one section of a guide, with those below its sub-headings."""
    found = page_blocks(guide)
    assert section in {heading for block in found for heading in block.headings}, section
    return [block.text for block in found if block.language == language and section in block.headings]


def table_rows(guide: str, section: str) -> list[list[str]]:
    """Cells of every row of the table in one section of a guide, without its header."""
    lines = [line for line in _section(guide, section).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def _section(guide: str, section: str) -> str:
    text = page_path(guide).read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(body)
