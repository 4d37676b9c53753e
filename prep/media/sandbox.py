"""Decodes in a child process with a time limit: a decoder that hangs or crashes costs one medium, not the build.

One child serves one worker. A request goes through a pipe; pixels come back through memory that both share and keep
mapped: the decoder writes its frames there, so that the way through the child costs a copy (a fraction of a
millisecond a picture) and about 0.1 ms of messages. A child that does not answer in time is killed, one that died is
replaced, and the medium that it was busy with gets the blame. One that was killed from outside is asked again first:
when memory runs out, the kernel picks the decoder before the worker, whatever it is busy with.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import math
import mmap
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from prep.engines.processes import die_with_parent, without
from prep.media.decode import MediaInfo, decode, probe
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings
from storage.files import naming

_HEADER = struct.Struct("<Q")
_START_LIMIT_S = 120.0
"""Time for a child to start (imports on a busy machine); not counted against the medium."""

_MEMORY_KEPT = 1 << 26
"""Shared memory up to this many bytes is kept; what a larger clip needed is given back with the next medium."""

_SHARED = Path("memory shared with the decoder process")
"""What errors call it. A limit on the size of files counts for it too."""

_ATTEMPTS = 2

_FIRST_TO_GO = "500"
"""Of 1000; what the kernel adds to the share of memory that a process has when it looks for one to kill."""


class _KilledError(Exception):
    """The child was killed from outside."""


class _NoRoomError(Exception):
    """Frames do not fit the memory that both share; not an ``OSError``, which would be put down to the medium."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Sandbox:
    """A child process that probes and decodes. Restarted as needed; :meth:`close` ends it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._memory = -1
        self._shared: mmap.mmap | None = None
        self._number = 0

    def probe(self, source: MediaSource, media_type: int, settings: MediaSettings) -> MediaInfo:
        """As :func:`prep.media.decode.probe`; also raises ``decode_timeout`` and blames a crash on the medium."""
        facts: MediaInfo
        facts, _ = self._ask(("probe", source, media_type, settings), source, settings)
        return facts

    def decode(
        self, source: MediaSource, media_type: int, settings: MediaSettings
    ) -> tuple[MediaInfo, NDArray[np.uint8]]:
        """As :func:`prep.media.decode.decode`; also raises ``decode_timeout`` and blames a crash on the medium."""
        facts, shape = self._ask(("decode", source, media_type, settings), source, settings)
        size = int(np.prod(shape))
        if self._shared is None or len(self._shared) != os.fstat(self._memory).st_size:
            self._unmap()
            self._shared = mmap.mmap(self._memory, 0, prot=mmap.PROT_READ)
        return facts, np.frombuffer(self._shared, dtype=np.uint8, count=size).reshape(shape).copy()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._unmap()
            os.close(self._memory)
            self._child = None

    def _unmap(self) -> None:
        if self._shared is not None:
            self._shared.close()
            self._shared = None

    def _ask(self, request: tuple[Any, ...], source: MediaSource, settings: MediaSettings) -> tuple[Any, Any]:
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(_KilledError):
                return self._ask_once(request, source, settings)
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"the decoder of {source.name!r} was killed {_ATTEMPTS} times (SIGKILL), as happens when memory runs out; "
            "run with fewer --workers and --retry-media, or lower max_source_pixels",
        )

    def _ask_once(self, request: tuple[Any, ...], source: MediaSource, settings: MediaSettings) -> tuple[Any, Any]:
        if self._child is not None and self._child.poll() is not None:
            # It died between two requests (for want of memory, say): the medium at hand is not to blame.
            self.close()
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            self._number += 1
            _send(child.stdin, (self._number, *request))
            number, answer = _receive(child.stdout, time.monotonic() + settings.decode_timeout)
        except TimeoutError:
            self.close()
            raise MediaError(
                ReasonCode.DECODE_TIMEOUT,
                f"{source.name!r} was not decoded within {settings.decode_timeout:g} s (decode_timeout)",
            ) from None
        except (EOFError, BrokenPipeError):
            code = child.wait()
            self.close()
            if code == -signal.SIGKILL:
                raise _KilledError from None
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} crashes its decoder ({how})") from None
        except BaseException:
            # Interrupted between question and answer: the next question must not get this one's answer.
            self.close()
            raise
        if number != self._number:
            self.close()
            raise RuntimeError(f"the decoder process answered request {number}, not {self._number}")
        if isinstance(answer, (MediaError, OSError)):
            raise answer
        found: tuple[Any, Any] = answer
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        self._memory = os.memfd_create("vlprep-frames")
        # What stops a build goes to all its processes: a child that obeyed would look like a medium that crashes it.
        with without(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child = subprocess.Popen(
                [sys.executable, "-m", "prep.media.sandbox", str(self._memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=(self._memory,),
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        self._child = child
        assert child.stdout is not None
        try:
            _receive(child.stdout, time.monotonic() + _START_LIMIT_S)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise RuntimeError("the decoder process did not start") from error
        return child


@lru_cache(maxsize=1)
def sandbox() -> Sandbox:
    """The sandbox of this process."""
    box = Sandbox()
    atexit.register(box.close)
    return box


def _send(pipe: IO[bytes], message: object) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    pipe.write(_HEADER.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes], deadline: float | None = None) -> Any:
    (size,) = _HEADER.unpack(_read(pipe, _HEADER.size, deadline))
    return pickle.loads(_read(pipe, size, deadline))


def _read(pipe: IO[bytes], size: int, deadline: float | None) -> bytes:
    descriptor = pipe.fileno()
    data = bytearray()
    while len(data) < size:
        if deadline is not None and not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
            raise TimeoutError
        piece = os.read(descriptor, size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _serve(memory: int) -> None:
    """The child: answer requests until the pipe closes."""
    # A child that hangs in a decoder would otherwise outlive a worker that is killed.
    die_with_parent()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What decoders print goes nowhere: neither into the answers nor between the lines of the progress.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    shared = _SharedFrames(memory)
    _send(answers, "ready")
    while True:
        try:
            number, *request = _receive(requests)
        except EOFError:
            return
        _send(answers, (number, _answer(shared, *request)))


def _answer(
    shared: _SharedFrames, kind: str, source: MediaSource, media_type: int, settings: MediaSettings
) -> tuple[MediaInfo, tuple[int, ...] | None] | MediaError | OSError:
    """Media info and the shape of what lies in the shared memory, or what went wrong."""
    too_large = MediaError(ReasonCode.MEDIA_TOO_LARGE, f"{source.name!r} needs more memory than there is")
    try:
        if kind == "probe":
            return probe(source, media_type, settings), None
        facts, frames = decode(source, media_type, settings, shared.allocate)
    except MediaError as error:
        return error
    except MemoryError:
        return too_large
    except _NoRoomError as error:
        return too_large if error.reason.errno == errno.ENOMEM else error.reason
    return facts, frames.shape


class _SharedFrames:
    """The child's end of the memory that both share; stays mapped from one medium to the next."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._mapped: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """An array at the start of the memory, which those before are no longer needed for.

        Raises:
            _NoRoomError: there is no room for it.
        """
        needed = math.prod(shape)
        size = max(needed, min(_MEMORY_KEPT, len(self._mapped or b"")))
        if self._mapped is None or len(self._mapped) != size:
            # Unmapped with the last array in it: an error on its way here may still hold one.
            self._mapped = None
            try:
                with naming(_SHARED):
                    os.ftruncate(self._memory, size)
                    self._mapped = mmap.mmap(self._memory, size)
            except OSError as error:
                raise _NoRoomError(error) from error
        return np.frombuffer(self._mapped, dtype=np.uint8, count=needed).reshape(shape)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
