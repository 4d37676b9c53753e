"""What stands in the guides of ``docs``: examples, so that tests can run them or compare them with the programs."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(guide: str, section: str, language: str) -> list[str]:
    """The code blocks of a language in one section (a heading of the second level) of a guide."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    (found,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", found, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]
