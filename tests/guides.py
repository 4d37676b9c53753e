"""Examples of the guides in ``docs``, for tests that run them or compare them with the programs."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(guide: str, section: str, language: str) -> list[str]:
    """Code blocks of a language in one section (a second-level heading) of a guide."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", _section(guide, section), re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]


def table_rows(guide: str, section: str) -> list[list[str]]:
    """Cells of every row of the table in one section of a guide, without its header."""
    lines = [line for line in _section(guide, section).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def _section(guide: str, section: str) -> str:
    text = (DOCS / guide).read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    return str(body)
