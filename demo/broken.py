"""Records that cannot become samples, one for each of the most usual ways, so that a ledger has something to say.

-> lines of a JSONL file with the reason code that each must be rejected for, and the damaged media they refer to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from schemas.annotation import ReasonCode

MISSING_PICTURE = "images/broken-missing.png"
TRUNCATED_PICTURE = "images/broken-truncated.jpg"
EMPTY_PICTURE = "images/broken-empty.png"
TRUNCATED_CLIP = "videos/broken-truncated.mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenLine:
    """A line of the annotation file, without its line break, and why it must be rejected."""

    text: str
    code: ReasonCode


def broken_lines(picture: str) -> list[BrokenLine]:
    """Returns the broken lines; each has one fault only.

    Args:
        picture: The path, in an annotation, of a picture that is fine, for the records whose fault lies elsewhere.
    """
    question, answer = "<image>\nWhat colour is the shape?", "red"
    return [
        _line(0, ReasonCode.MEDIA_MISSING, [("human", question), ("gpt", answer)], image=MISSING_PICTURE),
        _line(1, ReasonCode.MEDIA_UNREADABLE, [("human", question), ("gpt", answer)], image=TRUNCATED_PICTURE),
        _line(2, ReasonCode.MEDIA_EMPTY, [("human", question), ("gpt", answer)], image=EMPTY_PICTURE),
        _line(
            3, ReasonCode.MEDIA_UNREADABLE, [("human", "<video>\nWhat moves?"), ("gpt", "a star")], video=TRUNCATED_CLIP
        ),
        _line(4, ReasonCode.MEDIA_OUTSIDE_ROOT, [("human", question), ("gpt", answer)], image=f"../{picture}"),
        _line(5, ReasonCode.TAG_MISMATCH, [("human", question), ("gpt", answer)], images=[picture, picture]),
        _line(6, ReasonCode.BAD_TURN_ORDER, [("human", question), ("human", "Well?"), ("gpt", answer)], image=picture),
        _line(
            7, ReasonCode.RESERVED_TOKEN, [("human", "What does <|im_start|> mean?"), ("gpt", "The start of a turn.")]
        ),
        BrokenLine(text='"a string where a record should be"', code=ReasonCode.NOT_AN_OBJECT),
        BrokenLine(
            text='{"id": "demo-broken-00009", "conversations": [{"from": "human", "va', code=ReasonCode.BAD_JSON
        ),
    ]


def truncate(content: bytes) -> bytes:
    """Returns the first half of a file, as an interrupted copy leaves it."""
    return content[: len(content) // 2]


def _line(number: int, code: ReasonCode, turns: list[tuple[str, str]], **media: str | list[str]) -> BrokenLine:
    record = {
        "id": f"demo-broken-{number:05d}",
        "kind": f"broken/{code.value}",
        **media,
        "conversations": [{"from": role, "value": value} for role, value in turns],
    }
    return BrokenLine(text=json.dumps(record, ensure_ascii=False), code=code)
