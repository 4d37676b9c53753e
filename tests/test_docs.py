"""What the documents promise about the repository: names and links exist, lines fit on a screen."""

from __future__ import annotations

import importlib
import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    REPOSITORY / name
    for name in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout.split()
)


def _name(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_line_of_a_page_is_longer_than_120_characters(page: Path) -> None:
    long = [line_number for line_number, line in enumerate(page.read_text().splitlines(), 1) if len(line) > 120]
    assert long == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_to_a_file_leads_to_one(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_of_the_repository_that_a_page_names_exists(page: Path) -> None:
    names = re.findall(r"`((?:demo|docs|prep|schemas|storage|tests|train)/[\w/]+\.(?:py|md|json))`", page.read_text())
    assert [name for name in names if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_object_of_the_code_that_a_page_names_exists(page: Path) -> None:
    for name in re.findall(r"`((?:prep|schemas|storage|train)(?:\.\w+){2,})(?:\([^`]*\))?`", page.read_text()):
        module, _, attribute = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), attribute), name


def test_every_page_has_its_place_in_the_navigation_of_the_site() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    listed = re.findall(r": ([\w]+\.md)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in PAGES if page.parent.name == "docs")


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_link_to_a_heading_leads_to_one(page: Path) -> None:
    for name, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", page.read_text()):
        target = page.parent / name if name else page
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
        anchors = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in anchors, f"{name}#{anchor}"


SPEED = re.compile(
    r"\d ?(?:ms|us|µs|[kMGT]i?B/s|(?:bins|images|records|samples|tokens)(?:/s| (?:a|per) second))\b"
    r"|\btimes (?:as fast|faster|the speed)|\b(?:half|third|quarter|fifth|tenth) of (?:the|its|\w+'s) time\b"
)
"""Times below a second, throughputs and ratios of speeds: nothing but a measurement gives them."""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in ("benchmarks.md", "README.md", "README.zh.md")], ids=_name
)
def test_measured_speeds_stand_on_the_page_about_benchmarks(page: Path) -> None:
    """Other pages link to them; the README quotes them."""
    assert [match[0] for match in SPEED.finditer(page.read_text())] == []


def test_measured_speeds_are_recognised() -> None:
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text()
    assert len(SPEED.findall(text)) > 10


def test_the_chinese_readme_has_the_links_and_the_figures_of_the_english_one() -> None:
    english, chinese = ((REPOSITORY / name).read_text() for name in ("README.md", "README.zh.md"))
    assert _links(english) - {"README.zh.md"} == _links(chinese) - {"README.md"}
    assert _figures(english) == _figures(chinese) != []


def _links(text: str) -> set[str]:
    return set(re.findall(r"\]\(([^)]+)\)", text))


def _figures(text: str) -> list[list[str]]:
    """The numbers in each row of each table."""
    return [re.findall(r"\d[\d.,]*", line) for line in text.splitlines() if line.startswith("| ")]
