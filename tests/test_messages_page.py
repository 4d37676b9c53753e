"""The page of messages is complete: every message for users has a row, and every row a message.

A message is a text that reaches a user: the arguments of the errors that entry points print without a traceback, of
problems of records, of findings of ``verify``, of usage errors and of warnings. Sentences that functions return or
yield for such a call count too; a function that composes them may lie anywhere, so every sentence of a module counts
unless the module writes results. Errors that only a programmer meets (ValueError, TypeError, AssertionError, …) do not.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from schemas.annotation import ReasonCode

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs" / "messages.md"
FIRST_ERRORS = REPOSITORY / "docs" / "troubleshooting.md"
ROOMS = ("demo", "examples", "prep", "schemas", "storage", "train")

REPORTS = {"Finding", "Problem", "UsageError", "BadParameter", "damaged", "fail", "inconsistent", "warning"}
"""Functions that bring their text before a user, beside the constructors of errors."""

ROOT_ERRORS = {
    "VlprepError",
    "BoxError",
    "FieldError",
    "ToolError",
    "ShellError",
    "ArgumentTypeError",
    "ClickException",
    "EOFError",
}
"""Errors whose text is printed. Those below VlprepError are; the others become problems of records or usage errors."""

QUIET = {
    "info",
    "debug",
    "Setting",
    "Meta",
    "field",
    "option",
    "argument",
    "command",
    "group",
    "add_argument",
    "_Parser",
}
"""Calls whose text is help or progress."""

RESULTS = (
    "demo/",
    "prep/annotations/tools.py",
    "prep/build/summary.py",
    "prep/help.py",
    "prep/inspect/report/",
    "prep/inspect/show.py",
    "prep/inspect/transcript.py",
    "prep/migrate/",
    "prep/shards/drift.py",
    "schemas/foreign_flags.py",
    "storage/folder_contents.py",
    "train/generate/page.py",
    "train/memory/",
    "train/model/processors.py",
    "train/order/explain.py",
    "train/order/simulate.py",
    "train/run/evaluation.py",
    "train/run/plan.py",
    "train/run/strategy.py",
    "train/settings/batch.py",
    "train/settings/declarations.py",
    "train/settings/record.py",
)
"""Modules whose sentences are results, help, notes, names of kinds, or texts of the demo and of the chat template.

In them, only the arguments of errors and reports are messages.
"""

HOLE = "\0"
"""Stands for a part of a message that varies."""

MIN_WORDS, MIN_WORDS_OF_SENTENCE = 3, 5
"""Shorter texts are parts of a message, which has a row itself."""

MAX_MESSAGES_OF_PATTERN = 12
"""A row that stands for more says too little about each of them."""


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _text(node: ast.AST) -> str | None:
    """The text that an expression builds, with a hole for each value, or None."""
    match node:
        case ast.Constant(value=str(text)):
            return re.sub(r"%[sdgr]", HOLE, text)
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            texts = [_text(left), _text(right)]
            return None if texts == [None, None] else "".join(HOLE if text is None else text for text in texts)
    return None


def _num_words(text: str) -> int:
    return len(re.findall(r"[A-Za-z]{2,}", text))


@functools.cache
def _trees() -> dict[str, ast.Module]:
    paths = [path for room in ROOMS for path in sorted((REPOSITORY / room).rglob("*.py"))]
    return {path.relative_to(REPOSITORY).as_posix(): ast.parse(path.read_text()) for path in paths}


@functools.cache
def _errors() -> set[str]:
    """Names of the classes of errors for users."""
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases}
        for tree in _trees().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    errors = set(ROOT_ERRORS)
    while more := {name for name, of in bases.items() if of & errors} - errors:
        errors |= more
    return errors


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_of_programmer(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        return True
    if not isinstance(node, ast.Raise) or node.exc is None:
        return False
    error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
    return ast.unparse(error).split(".")[-1] not in _errors() and isinstance(node.exc, ast.Call)


def _texts(node: ast.AST, reported: bool, sentences: bool) -> Iterator[tuple[int, str, bool]]:
    """Line and text of every message below a node and its parts, and whether it needs a row."""
    if _is_docstring(node) or _is_of_programmer(node):
        return
    if isinstance(node, ast.Call):
        if _name(node) in QUIET:
            return
        reported = reported or _name(node) in REPORTS | _errors()
    text = _text(node)
    if text is None:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child, reported, sentences)
        return
    if isinstance(node, ast.expr) and " " in text and (reported or sentences):
        num_words = _num_words(text)
        needs_row = (reported and num_words >= MIN_WORDS) or (sentences and num_words >= MIN_WORDS_OF_SENTENCE)
        yield node.lineno, " ".join(text.split()), needs_row
    for part in ast.walk(node):
        if isinstance(part, ast.FormattedValue):
            yield from _texts(part.value, False, sentences)


@functools.cache
def _messages() -> dict[str, tuple[str, bool]]:
    """Text of every message and part of one -> the first place in the code that has it, and whether it needs a row."""
    messages: dict[str, tuple[str, bool]] = {}
    for path, tree in _trees().items():
        for line, text, needs_row in _texts(tree, reported=False, sentences=not path.startswith(RESULTS)):
            place, needed = messages.get(text, (f"{path}:{line}", False))
            messages[text] = place, needed or needs_row
    return messages | dict.fromkeys(_messages_of_make(), ("Makefile", True))


def _messages_of_make() -> list[str]:
    """What the Makefile writes to standard error."""
    return re.findall(r'echo "([^"]+)" >&2', (REPOSITORY / "Makefile").read_text())


@functools.cache
def _patterns(page: Path) -> list[str]:
    """The patterns in the first column of the tables of a page."""
    rows = re.findall(r"^\| (`.*?`) \| ", page.read_text(), re.MULTILINE)
    return [pattern for row in rows for pattern in re.findall(r"`([^`]+)`", row)]


@functools.cache
def _parts(pattern: str) -> list[str]:
    return [part.strip() for part in pattern.split("…")]


def _is_pattern_of(pattern: str, message: str) -> bool:
    """Whether the words of a pattern stand in a message, in order, and are three or half of its words.

    ``…`` stands for anything.
    """
    end = 0
    for part in _parts(pattern):
        start = message.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    return _num_words(pattern) >= min(3, math.ceil(_num_words(message) / 2))


def test_every_message_for_users_has_a_row() -> None:
    patterns = _patterns(PAGE)
    missing = {
        place: text.replace(HOLE, "…")
        for text, (place, needs_row) in _messages().items()
        if needs_row and not any(_is_pattern_of(pattern, text) for pattern in patterns)
    }
    assert missing == {}


@pytest.mark.parametrize("page", [PAGE, FIRST_ERRORS], ids=lambda page: page.stem)
def test_every_row_stands_for_a_few_messages_of_the_code(page: Path) -> None:
    counts = {pattern: sum(_is_pattern_of(pattern, text) for text in _messages()) for pattern in _patterns(page)}
    assert len(counts) > 10
    assert {pattern: count for pattern, count in counts.items() if not 1 <= count <= MAX_MESSAGES_OF_PATTERN} == {}


@pytest.mark.parametrize("code", ReasonCode)
def test_every_reason_code_has_its_heading(code: ReasonCode) -> None:
    headings = re.findall(r"^#+ (.*)$", PAGE.read_text(), re.MULTILINE)
    assert any(f"`{code.value}`" in heading for heading in headings)
