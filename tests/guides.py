"""Examples of the guides in ``docs``, for tests that run them or compare them with the programs."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[1] / "docs"


def blocks(guide: str, section: str, language: str) -> list[str]:
    """Code blocks of a language in one section (a second-level heading) of a guide."""
    text = (DOCS / guide).read_text(encoding="utf-8")
    (body,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", body, re.DOTALL | re.MULTILINE)
    return [text for name, text in fenced if name == language]
