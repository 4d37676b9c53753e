"""Where the encoded bytes of a medium are: a file, a run of bytes inside a file, memory, or the beginning in memory."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from schemas.annotation import ReasonCode
from schemas.errors import MediaError

_PREFIX = re.compile(r"^\[\d\d:\d\d:\d\d\] \S+:\d+: ")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class HeadTooShortError(MediaError):
    """A header that goes on behind the beginning of the medium that is here; never goes to the ledger."""

    def __init__(self, name: str) -> None:
        super().__init__(ReasonCode.MEDIA_UNREADABLE, f"the header of {name!r} is longer than what was fetched of it")
        self.name = name

    def __reduce__(self) -> tuple[type[HeadTooShortError], tuple[str]]:
        return HeadTooShortError, (self.name,)


class Beginning:
    """The first bytes of a medium that is stored elsewhere.

    Attributes:
        data: the bytes.
        num_bytes: size of the whole medium.
        was_left: whether a reader wanted what lies behind them.
    """

    def __init__(self, data: bytes, num_bytes: int) -> None:
        self.data = data
        self.num_bytes = num_bytes
        self.was_left = False


@dataclass(frozen=True, slots=True)
class MediaSource:
    """A medium before decoding.

    Attributes:
        name: what messages call it: the name in the annotation.
        path: file that holds it; None if it is in memory.
        span: first byte and size of it in the file, or None for the whole file.
        data: its bytes, if it is in memory.
        beginning: its first bytes, where only these are here; enough to probe most pictures, nothing else.
    """

    name: str
    path: Path | None = None
    span: tuple[int, int] | None = None
    data: bytes | None = None
    beginning: Beginning | None = None

    def open(self) -> BinaryIO:
        """Open it for reading, positioned at its start.

        Reading behind the beginning of a medium of which only that is here raises :class:`HeadTooShortError`.
        """
        if self.data is not None:
            return io.BytesIO(self.data)
        if self.beginning is not None:
            return _BeginningFile(self.name, self.beginning)
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


class _BeginningFile(io.BytesIO):
    """A file as long as the medium, of which the first bytes can be read."""

    def __init__(self, name: str, beginning: Beginning) -> None:
        super().__init__(beginning.data)
        self._name = name
        self._beginning = beginning

    def read(self, size: int | None = -1, /) -> bytes:
        at, whole = self.tell(), self._beginning.num_bytes
        self._require(whole if size is None or size < 0 else min(at + size, whole))
        return super().read(size)

    def readinto(self, buffer: Any, /) -> int:
        self._require(min(self.tell() + memoryview(buffer).nbytes, self._beginning.num_bytes))
        return super().readinto(buffer)

    def readline(self, size: int | None = -1, /) -> bytes:
        line = super().readline(size)
        if not line.endswith(b"\n"):
            self._require(min(self.tell() + 1, self._beginning.num_bytes))
        return line

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence == io.SEEK_END:
            return super().seek(self._beginning.num_bytes + offset)
        return super().seek(offset, whence)

    def _require(self, stop: int) -> None:
        """Hold that all bytes before ``stop`` are here."""
        if stop > len(self._beginning.data) and self.tell() < self._beginning.num_bytes:
            self._beginning.was_left = True
            raise HeadTooShortError(self._name)
