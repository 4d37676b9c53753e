"""Where the encoded bytes of a medium are: a file, a run of bytes inside a file, or memory."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclass(frozen=True, slots=True)
class MediaSource:
    """A medium before decoding.

    Attributes:
        name: what messages call it: the name in the annotation.
        path: file that holds it; None if it is in memory.
        span: first byte and size of it in the file, or None for the whole file.
        data: its bytes, if it is in memory.
    """

    name: str
    path: Path | None = None
    span: tuple[int, int] | None = None
    data: bytes | None = None

    def open(self) -> BinaryIO:
        """Open it for reading, positioned at its start."""
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.path is None:
            raise ValueError(f"medium {self.name!r} has neither a path nor data")
        file = self.path.open("rb")
        if self.span is None:
            return file
        with file:
            file.seek(self.span[0])
            return io.BytesIO(file.read(self.span[1]))

    def explain(self, error: Exception) -> str:
        """The first line of what a library says, without what differs from run to run or names this machine.

        decord starts its messages with the time of day and a source file; some name the path or an address in memory.
        """
        text = str(error).strip() or type(error).__name__
        text = _PREFIX.sub("", text.splitlines()[0])
        if self.path is not None:
            text = text.replace(str(self.path), self.name)
        return _ADDRESS.sub("", text)[:200]

    def target(self) -> str | BinaryIO:
        """What video libraries open: the path of a file of its own, else an open file."""
        return str(self.path) if self.path is not None and self.span is None else self.open()
