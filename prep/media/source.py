"""The encoded bytes of a medium: a file, a span of a file, bytes in memory, or only the first bytes in memory.

A video can also be several of these: the images that are its frames.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from schemas.annotation import ReasonCode
from schemas.errors import MediaError

_PREFIX = re.compile(r"^(?:\[\d\d:\d\d:\d\d\] \S+:\d+: )+")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


class HeadTooShortError(MediaError):
    """The header is longer than the bytes that were fetched. Callers fetch the medium again, so no ledger shows it."""

    def __init__(self, name: str) -> None:
        super().__init__(
            ReasonCode.MEDIA_UNREADABLE, f"the header of {name!r} is longer than the bytes that were fetched"
        )
        self.name = name

    def __reduce__(self) -> tuple[type[HeadTooShortError], tuple[str]]:
        return HeadTooShortError, (self.name,)


class Beginning:
    """The first bytes of a remote medium.

    Attributes:
        data: the bytes.
        num_bytes: size of the complete medium.
        was_left: whether a reader tried to read past ``data``.
    """

    def __init__(self, data: bytes, num_bytes: int) -> None:
        self.data = data
        self.num_bytes = num_bytes
        self.was_left = False


@dataclass(frozen=True, slots=True)
class MediaSource:
    """A medium before decoding. Exactly one of ``path``, ``data``, ``beginning`` and ``frames`` is set.

    Attributes:
        name: name in the annotation, used in messages.
        path: file that holds the medium.
        span: offset and size of the medium in the file, in bytes. None for the complete file.
        data: the complete medium in memory.
        beginning: only the first bytes, which are enough to probe most images and nothing else.
        frames: the images that are the frames of a video.
    """

    name: str
    path: Path | None = None
    span: tuple[int, int] | None = None
    data: bytes | None = None
    beginning: Beginning | None = None
    frames: tuple[MediaSource, ...] = ()

    @property
    def is_too_short(self) -> bool:
        """Whether a reader tried to read past the first bytes, of it or of a frame."""
        was_left = self.beginning is not None and self.beginning.was_left
        return was_left or any(frame.is_too_short for frame in self.frames)

    def open(self) -> BinaryIO:
        """Open the medium for reading, positioned at its start.

        If only the first bytes are available, reading past them raises :class:`HeadTooShortError`.
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
        """Reduce a library's error to its first line, without anything that differs between runs or machines.

        decord starts its messages with the time of day and a source file, at times twice. Others contain the path or a
        memory address.
        """
        text = str(error).strip() or type(error).__name__
        text = _PREFIX.sub("", text.splitlines()[0])
        if self.path is not None:
            text = text.replace(str(self.path), self.name)
        return _ADDRESS.sub("", text)[:200]

    def target(self) -> str | BinaryIO:
        """What a video library should open: the path if the medium is a complete file, otherwise an open file."""
        return str(self.path) if self.path is not None and self.span is None else self.open()


class _BeginningFile(io.BytesIO):
    """A file as long as the medium, of which only the first bytes can be read."""

    def __init__(self, name: str, beginning: Beginning) -> None:
        super().__init__(beginning.data)
        self._name = name
        self._beginning = beginning

    def read(self, size: int | None = -1, /) -> bytes:
        end = self._beginning.num_bytes
        self._require(end if size is None or size < 0 else min(self.tell() + size, end))
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
        """Check that all bytes before ``stop`` are available."""
        if stop > len(self._beginning.data) and self.tell() < self._beginning.num_bytes:
            self._beginning.was_left = True
            raise HeadTooShortError(self._name)
