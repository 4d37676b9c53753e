"""Media that several samples use are looked at once: probed once a chunk of the scan, decoded once a shard.

A failure is an answer too: a medium that cannot be used is tried once, and fails every sample that uses it.

Memory: :class:`ProbeCache` holds the facts of a few thousand media. :class:`FrameCache` holds 16 bytes for each medium that
comes again; their planes lie in a temporary file without a name (at most half of what the shard holds before
compression), which the kernel keeps in memory as long as there is room. Where the disk has no room for it, a medium is
decoded as often as it is used.
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
    """The most recent probe results, by medium and kind."""

    def __init__(self) -> None:
        self._found: OrderedDict[Hashable, MediaInfo | MediaError] = OrderedDict()

    def has(self, key: Hashable) -> bool:
        """Whether a medium has been probed already and need not be opened again."""
        return key in self._found

    def get(self, key: Hashable, probe: Callable[[], MediaInfo]) -> MediaInfo:
        """What ``probe`` gave for the same key before, or gives now.

        Raises:
            MediaError: what ``probe`` raised.
        """
        if key in self._found:
            self._found.move_to_end(key)
        else:
            self._found[key] = _outcome(probe)
            if len(self._found) > _MAX_PROBED:
                self._found.popitem(last=False)
        return _answer(self._found[key])


@dataclass(frozen=True, slots=True)
class _Kept:
    """A decoded medium in the temporary file: its facts, where its frames start, and their shape."""

    facts: MediaInfo
    offset: int
    shape: tuple[int, ...]


class FrameCache:
    """Frames of the media of one shard that come again; a context manager.

    Args:
        keys: of the media of all samples that will be asked for, each as often as it will be.
        folder: of the temporary file, which is made when something has to be kept.
    """

    def __init__(self, keys: Iterable[bytes], folder: Path) -> None:
        self._uses_left = Counter({key: num for key, num in Counter(keys).items() if num > 1})
        self._folder = folder
        self._found: dict[bytes, _Kept | MediaError] = {}
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
        return key in self._found

    def get(
        self, key: bytes, decode: Callable[[], tuple[MediaInfo, NDArray[np.uint8]]]
    ) -> tuple[MediaInfo, NDArray[np.uint8]]:
        """What ``decode`` gave for the same key before, or gives now: facts and frames (F, 3, H, W) uint8.

        Raises:
            MediaError: what ``decode`` raised.
        """
        if key not in self._uses_left:
            return decode()
        self._uses_left[key] -= 1
        is_last = not self._uses_left[key]
        found = self._found.pop(key, None) if is_last else self._found.get(key)
        if is_last:
            del self._uses_left[key]
        if found is not None:
            kept = _answer(found)
            return kept.facts, self._read(kept)
        decoded = _outcome(decode)
        if not is_last:
            if isinstance(decoded, MediaError):
                self._found[key] = decoded
            else:
                self._keep(key, *decoded)
        return _answer(decoded)

    def _keep(self, key: bytes, facts: MediaInfo, frames: NDArray[np.uint8]) -> None:
        try:
            self._found[key] = self._write(facts, frames)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            # What room there is belongs to the shard: from now on, a medium is decoded as often as it is used.
            self._open.close()
            self._file = None
            self._found.clear()
            self._uses_left.clear()

    def _write(self, facts: MediaInfo, frames: NDArray[np.uint8]) -> _Kept:
        if self._file is None:
            file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115 - the stack closes it
            self._file = self._open.enter_context(file)
        offset = self._file.seek(0, os.SEEK_END)
        rest = np.ascontiguousarray(frames).reshape(-1).data
        while rest:
            rest = rest[self._file.write(rest) :]
        return _Kept(facts, offset, frames.shape)

    def _read(self, kept: _Kept) -> NDArray[np.uint8]:
        assert self._file is not None
        frames = np.empty(kept.shape, dtype=np.uint8)
        rest, offset = frames.reshape(-1).data, kept.offset
        while rest:
            num_bytes = os.preadv(self._file.fileno(), [rest], offset)
            if not num_bytes:
                raise OSError(f"the temporary file of decoded media in {self._folder} ends early")
            rest, offset = rest[num_bytes:], offset + num_bytes
        return frames


_Found = TypeVar("_Found")


def _outcome(look: Callable[[], _Found]) -> _Found | MediaError:
    try:
        return look()
    except MediaError as error:
        return error


def _answer(outcome: _Found | MediaError) -> _Found:
    if isinstance(outcome, MediaError):
        raise MediaError(outcome.code, outcome.message)
    return outcome
