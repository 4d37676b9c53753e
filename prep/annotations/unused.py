"""Names of fields without effect: as a problem, and for people, with suggestions for misspelled ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from prep.annotations.dialects import FIELDS
from prep.annotations.turns import TURN_FIELDS
from schemas.annotation import Problem, ReasonCode

_MAX_NAMES = 20


def unused_problem(names: Sequence[str]) -> Problem:
    """The problem of a record with unused fields, where these are not accepted."""
    return Problem(
        ReasonCode.UNSUPPORTED_FIELD,
        f"fields that are not used: {', '.join(map(with_suggestion, names))}; remove them, or leave out "
        "--strict-fields",
    )


def suggestion(name: str) -> str | None:
    """The used field that a name may be a misspelling of: ``image`` for ``img``."""
    leaf = name.rpartition(".")[2]
    if leaf.lower() in ("img", "image_path", "img_path", "image_file", "pic", "picture"):
        return "image"
    used = FIELDS | TURN_FIELDS
    return None if leaf in used else next(iter(get_close_matches(leaf.lower(), used, n=1, cutoff=0.8)), None)


def with_suggestion(name: str) -> str:
    """``img (did you mean image?)``, or the name alone."""
    near = suggestion(name)
    return f"{name} (did you mean {near}?)" if near else name


def describe_unused(counts: Mapping[str, int]) -> str:
    """``width ×1,204, img ×3 (did you mean image?)``, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [with_suggestion(name).replace(name, f"{name} ×{count:,}", 1) for name, count in ordered[:_MAX_NAMES]]
    if len(ordered) > _MAX_NAMES:
        parts.append(f"… and {len(ordered) - _MAX_NAMES:,} more")
    return ", ".join(parts)
