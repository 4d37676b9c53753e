"""Bounds of the numbers and texts in manifests and tables, since sets of shards come from strangers too.

Fields of structs are annotated with these types. msgspec checks them when it decodes a manifest, and
:func:`column_bounds` returns the same bounds for checks of complete columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from msgspec.inspect import IntType, LiteralType, NoneType, UnionType

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_BYTES = 2**62 - 1
"""Largest size or offset, so that the sum of two fits 64 bits."""

MAX_LENGTH = 2**24
"""Largest ``max_length``: 128 times the context of Qwen2.5-VL. The sizes of the arrays of a bin follow from it."""

FREE_BIN_BYTES, MAX_BYTES_PER_TOKEN = 64 << 20, 1 << 14
"""Largest size of a bin: so many bytes for anything, and so many for each token. A token of a video takes 4,704
bytes of pixels, and 24 of other arrays. Ids and boxes of samples take what they take."""

MAX_RATE = 100
"""Largest share of a dataset: 1000 % of one whose own sampling rate is 10."""

Count = Annotated[int, Meta(ge=0, le=MAX_INT64)]
Count32 = Annotated[int, Meta(ge=0, le=MAX_INT32)]
PositiveCount = Annotated[int, Meta(ge=1, le=MAX_INT64)]
"""Counts, sizes and indices: 0 or more, or 1 or more, in the integers of their columns."""

Length = Annotated[int, Meta(ge=1, le=MAX_LENGTH)]
"""Tokens of a bin or sample."""

Size = Annotated[int, Meta(ge=0, le=MAX_BYTES)]
PositiveSize = Annotated[int, Meta(ge=1, le=MAX_BYTES)]
"""Sizes and offsets in bytes."""

Checksum = Annotated[int, Meta(ge=0)]
"""XXH3-64."""

Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$(?!\n)")]
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}$(?!\n)")]
FileName = Annotated[
    str, Meta(pattern=r"^(bins-([0-9]{5}|[1-9][0-9]{5,8})\.tar|bins\.parquet|samples\.parquet)$(?!\n)")
]
"""Name of a shard or table. It cannot lead out of the folder of its set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnBounds:
    """What a column of a table may hold.

    Attributes:
        low: smallest number, or None for other columns.
        high: largest number, likewise.
        choices: all texts that are allowed, if they are a closed list.
        is_nullable: whether it may have nulls.
    """

    low: int | None = None
    high: int | None = None
    choices: tuple[Any, ...] = ()
    is_nullable: bool = False

    def allowed(self) -> str:
        """The bounds or choices in words."""
        if self.choices:
            return ", ".join(map(str, self.choices))
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"


@cache
def column_bounds(row: type[msgspec.Struct]) -> dict[str, ColumnBounds]:
    """Bounds of the columns of a table, from the struct of its rows."""
    (described,) = msgspec.inspect.multi_type_info([row])
    assert isinstance(described, msgspec.inspect.StructType)
    bounds = {}
    for field in described.fields:
        kinds = field.type.types if isinstance(field.type, UnionType) else (field.type,)
        (kind,) = (kind for kind in kinds if not isinstance(kind, NoneType))
        bounds[field.name] = ColumnBounds(
            low=kind.ge if isinstance(kind, IntType) else None,
            high=kind.le if isinstance(kind, IntType) else None,
            choices=tuple(kind.values) if isinstance(kind, LiteralType) else (),
            is_nullable=len(kinds) > 1,
        )
    return bounds
