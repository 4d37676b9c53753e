"""Every command and program of every page is run by a test, or a list says why no test can."""

from __future__ import annotations

import ast
import configparser
import json
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from tests.guides import (
    NOT_RUN,
    REPOSITORY,
    all_pages,
    guide,
    page_blocks,
    page_commands,
    page_path,
    split_commands,
)

LANGUAGES: dict[str, Callable[[str], object]] = {
    "bash": lambda text: subprocess.run(["bash", "-n"], input=text, text=True, check=True),
    "dockerfile": str,
    "json": json.loads,
    "python": ast.parse,
    "text": str,
    "toml": tomllib.loads,
    "yaml": lambda text: [*yaml.safe_load_all(text)],
}
"""The languages of blocks, each with what reads it."""

CALL = re.compile(r"\bguide\(\s*((?:\"[^\"]+\",?\s*)+)\)")
NO_TESTS_OF_PAGES = ("tests/guides.py", "tests/test_guides.py")


def opened() -> set[tuple[str, str | None]]:
    """Page and heading of every call of ``guide`` in the tests; None stands for all headings."""
    listed = subprocess.run(
        ["git", "ls-files", "tests/*.py"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    sources = [name for name in listed.stdout.split() if name not in NO_TESTS_OF_PAGES]
    text = "".join((REPOSITORY / name).read_text(encoding="utf-8") for name in sources)
    calls = [re.findall(r'"([^"]+)"', arguments) for arguments in CALL.findall(text)]
    return {(page, heading) for page, *headings in calls for heading in headings or [None]}


def test_every_command_of_every_page_is_run_by_a_test_or_stands_in_the_list() -> None:
    run = opened()
    left = [
        f"{page}: {command.text}"
        for page in all_pages()
        for command in page_commands(page)
        if command.reason is None and not {(page, None), (page, command.heading)} & run
    ]
    assert left == [], "run them in a test with tests.guides.guide, or say in NOT_RUN why no test can"


def test_every_entry_of_the_list_stands_for_a_command_and_has_a_reason() -> None:
    commands = [command for page in all_pages() for command in page_commands(page)]
    assert [start for start in NOT_RUN if not any(command.starts_with(start) for command in commands)] == []
    assert [start for start, reason in NOT_RUN.items() if len(reason.split()) < 3] == []


@pytest.mark.parametrize("page", all_pages())
def test_every_block_of_a_page_is_found_and_is_of_its_language(page: str) -> None:
    found = page_blocks(page)
    for block in found:
        LANGUAGES[block.language](block.text)
    assert len(re.findall(r"^ *```", page_path(page).read_text(encoding="utf-8"), re.MULTILINE)) == 2 * len(found)


def test_the_extras_that_pages_install_exist() -> None:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    installs = [command for page in all_pages() for command in page_commands(page) if "install" in command.words]
    named = re.findall(r"'\.\[([\w,]+)\]'", "".join(command.text for command in installs))
    extras = {extra for names in named for extra in names.split(",")}
    assert extras and extras <= {*parser["options.extras_require"]}


def test_a_test_that_leaves_out_a_command_of_its_page_fails() -> None:
    with pytest.raises(AssertionError, match="eval_shards"), guide("training.md", "Evaluate"):
        pass
    with guide("training.md", "Evaluate") as page:
        (command,) = page.take()
    assert command.words[:2] == ["python", "train/main.py"]
    with pytest.raises(AssertionError), guide("training.md", "No such heading"):
        pass


def test_commands_span_lines_in_quotes_and_after_backslashes() -> None:
    text = "# a comment\na b \\\n    c # why\n\nd 'e\nf'\n"
    assert split_commands(text) == ["a b c # why", "d 'e\nf'"]
