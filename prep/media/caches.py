"""Caches for media that several samples use: each is probed once per scan chunk and decoded once per shard.

Failures are cached too: a medium that cannot be used is tried once and fails every sample that uses it.

Memory: :class:`ProbeCache` holds the info of at most 4,096 media. :class:`FrameCache` holds 16 bytes per reused medium.
Its frames lie in an unnamed temporary file, at most half as large as the uncompressed shard, which the kernel keeps in
memory while there is room. If the disk is full, a medium is decoded each time it is used.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from prep.media.decode import MediaInfo
from schemas.errors import MediaError
from storage.files import NO_ROOM

_MAX_PROBED = 4096


class ProbeCache:
    """Least-recently-used cache of probe results."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[Hashable, MediaInfo | MediaError] = OrderedDict()

    def has(self, key: Hashable) -> bool:
        """Whether a medium has been probed already and need not be opened again."""
        return key in self._outcomes

    def get(self, key: Hashable, probe: Callable[[], MediaInfo]) -> MediaInfo:
        """Return the cached info of a medium, or call ``probe`` and cache the outcome.

        Raises:
            MediaError: As raised by ``probe``.
        """
        if key in self._outcomes:
            self._outcomes.move_to_end(key)
        else:
            self._outcomes[key] = _capture(probe)
            if len(self._outcomes) > _MAX_PROBED:
                self._outcomes.popitem(last=False)
        return _unwrap(self._outcomes[key])


@dataclass(frozen=True, slots=True)
class _Entry:
    """A decoded medium in the temporary file: its info, and the offset and shape of its frames."""

    info: MediaInfo
    offset: int
    shape: tuple[int, ...]


class FrameCache:
    """Frames of the media that one shard uses more than once. A context manager.

    Args:
        keys: keys of the media of all samples of the shard, each repeated as often as the medium is used.
        folder: folder of the temporary file. The file is created when the first medium is cached.
    """

    def __init__(self, keys: Iterable[bytes], folder: Path) -> None:
        self._uses_left = Counter({key: uses for key, uses in Counter(keys).items() if uses > 1})
        self._folder = folder
        self._outcomes: dict[bytes, _Entry | MediaError] = {}
        self._file: BinaryIO | None = None
        self._open = ExitStack()

    def __enter__(self) -> FrameCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def has(self, key: bytes) -> bool:
        """Whether a medium has been decoded already and need not be opened again."""
        return key in self._outcomes

    def get(
        self, key: bytes, decode: Callable[[], tuple[MediaInfo, NDArray[np.uint8]]]
    ) -> tuple[MediaInfo, NDArray[np.uint8]]:
        """Return the info and the frames (F, 3, H, W) uint8 of a medium, from the cache or by calling ``decode``.

        The outcome is dropped from the cache with its last use.

        Raises:
            MediaError: As raised by ``decode``.
        """
        if key not in self._uses_left:
            return decode()
        self._uses_left[key] -= 1
        is_last = not self._uses_left[key]
        cached = self._outcomes.pop(key, None) if is_last else self._outcomes.get(key)
        if is_last:
            del self._uses_left[key]
        if cached is not None:
            entry = _unwrap(cached)
            return entry.info, self._read(entry)
        outcome = _capture(decode)
        if not is_last:
            self._add(key, outcome)
        return _unwrap(outcome)

    def _add(self, key: bytes, outcome: tuple[MediaInfo, NDArray[np.uint8]] | MediaError) -> None:
        if isinstance(outcome, MediaError):
            self._outcomes[key] = outcome
            return
        try:
            self._outcomes[key] = self._write(*outcome)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            # Leave the remaining space to the shard. From now on, every use decodes again.
            self._open.close()
            self._file = None
            self._outcomes.clear()
            self._uses_left.clear()

    def _write(self, info: MediaInfo, frames: NDArray[np.uint8]) -> _Entry:
        if self._file is None:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - the stack closes it
            self._file = self._open.enter_context(file)
        offset = self._file.seek(0, os.SEEK_END)
        remaining = np.ascontiguousarray(frames).reshape(-1).data
        while remaining:
            remaining = remaining[self._file.write(remaining) :]
        return _Entry(info, offset, frames.shape)

    def _read(self, entry: _Entry) -> NDArray[np.uint8]:
        assert self._file is not None
        frames = np.empty(entry.shape, dtype=np.uint8)
        remaining, offset = frames.reshape(-1).data, entry.offset
        while remaining:
            num_bytes = os.preadv(self._file.fileno(), [remaining], offset)
            if not num_bytes:
                raise OSError(f"the temporary file of decoded media in {self._folder} is shorter than what was written")
            remaining, offset = remaining[num_bytes:], offset + num_bytes
        return frames


_T = TypeVar("_T")


def _capture(function: Callable[[], _T]) -> _T | MediaError:
    """Call ``function`` and return its ``MediaError`` instead of raising it."""
    try:
        return function()
    except MediaError as error:
        return error


def _unwrap(outcome: _T | MediaError) -> _T:
    """Return an outcome, or raise it as a new exception if it is an error."""
    if isinstance(outcome, MediaError):
        raise MediaError(outcome.code, outcome.message)
    return outcome
