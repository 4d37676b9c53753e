"""Boxes whose coordinates nobody declared: how ``build`` and ``validate`` count them and say what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_CHOICES = """\
  pixels    pixels of the original image, as displayed
  norm1     shares of the image, 0 to 1
  norm1000  shares of the image, 0 to 1000
  resized   pixels of the resized image, as the model was trained: left alone
  off       no coordinates: text that only looks like boxes"""


@dataclass(kw_only=True, slots=True)
class UndeclaredBoxes:
    """Records of one dataset or file with boxes whose coordinates nobody declared.

    Attributes:
        source: the dataset or file.
        num_records: number of records.
        first: the first of them, as ``file:line``.
        excerpt: its first box, as it reads.
    """

    source: str
    num_records: int
    first: str
    excerpt: str


class UndeclaredCounts:
    """Collects undeclared boxes by dataset or file."""

    def __init__(self) -> None:
        self._by_source: dict[str, UndeclaredBoxes] = {}

    def __bool__(self) -> bool:
        return bool(self._by_source)

    def add(self, source: str, records: Iterable[tuple[str, str]]) -> None:
        """Count records, each with its ``file:line`` and the excerpt of a box."""
        for first, excerpt in records:
            if source not in self._by_source:
                self._by_source[source] = UndeclaredBoxes(source=source, num_records=0, first=first, excerpt=excerpt)
            self._by_source[source].num_records += 1

    @property
    def num_records(self) -> dict[str, int]:
        """Records by dataset or file."""
        return {source: boxes.num_records for source, boxes in self._by_source.items()}

    def message(self) -> str:
        """What was found where, the choices, and where to declare one."""
        sentences = [
            f"{'1 record has' if boxes.num_records == 1 else f'{boxes.num_records:,} records have'} boxes or points in "
            f"{boxes.source}, and nothing says what their coordinates are; the first is {boxes.first}: {boxes.excerpt}"
            for boxes in self._by_source.values()
        ]
        return "\n".join(
            (
                *sentences,
                'Declare them with --boxes, or as boxes = "…" in the table of the dataset in datasets.toml:',
                _CHOICES,
            )
        )
