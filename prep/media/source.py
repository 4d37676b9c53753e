"""Where the encoded bytes of a medium are: a file, or a run of bytes inside a file (media that came inside a table)."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO


@dataclass(frozen=True, slots=True)
class MediaSource:
    """A medium before decoding.

    Attributes:
        name: what messages call it: the name in the annotation.
        path: file that holds it.
        offset: first byte of it in the file.
        num_bytes: its size, or None for the whole file.
    """

    name: str
    path: Path
    offset: int = 0
    num_bytes: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether the medium is a file of its own."""
        return self.num_bytes is None

    def open(self) -> BinaryIO:
        """Open it for reading, positioned at its start."""
        file = self.path.open("rb")
        if self.num_bytes is None:
            return file
        with file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.num_bytes))
