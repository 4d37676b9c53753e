"""Decodes in a child process with a time limit: a decoder that hangs or crashes costs one medium, not the build.

Input: a source, its media type, the media settings and those of the item. Output: as :mod:`prep.media.decode`. One
child serves one worker. It starts with the first medium: as a fork of the worker, which takes a few milliseconds, or as
an interpreter of its own if the worker has threads. Requests go through a pipe. The child writes frames into shared
memory that both processes keep mapped, so the detour costs one copy (a fraction of a millisecond per image) and about
0.1 ms of messages.

A child that exceeds the time limit is killed, a child that crashes is replaced, and the current medium is rejected. If
the child was killed from outside, the request is retried first: when memory runs out, the kernel is told to kill the
decoder before the worker, whatever medium it is decoding.
"""

from __future__ import annotations

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
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prep.engines.processes import Fork, at_exit, can_fork, die_with_parent, without
from prep.media.decode import MediaInfo, decode, probe
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings

_Child: TypeAlias = "Fork | subprocess.Popen[bytes]"

_HEADER = struct.Struct("<Q")
_START_TIMEOUT_S = 120.0
"""Time for a child to start (imports on a busy machine). Not counted against the medium."""

_MAX_KEPT_BYTES = 1 << 26
"""Shared memory that is kept between media. What a larger video needs beyond this is freed with the next medium."""

_SHARED_MEMORY = "memory shared with the decoder process"
"""Name of the shared memory in errors. A limit on the size of files applies to it too."""

_MAX_ATTEMPTS = 2

_OOM_SCORE_ADJUSTMENT = "500"
"""Of 1000. The kernel adds it to a process's share of memory when it chooses one to kill."""


class _KilledError(Exception):
    """The child was killed from outside (SIGKILL)."""


class _NoRoomError(Exception):
    """Frames do not fit into the shared memory. Not an ``OSError``, because that would be blamed on the medium."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class Sandbox:
    """A child process that probes and decodes. It is started and restarted as needed, and :meth:`close` ends it."""

    def __init__(self) -> None:
        self._child: _Child | None = None
        self._memory = -1
        self._shared: mmap.mmap | None = None
        self._request_id = 0

    def probe(
        self, source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS
    ) -> MediaInfo:
        """As :func:`prep.media.decode.probe`; also raises ``decode_timeout`` and blames a crash on the medium."""
        info: MediaInfo
        info, _ = self._request("probe", source, media_type, settings, item)
        return info

    def decode(
        self, source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS
    ) -> tuple[MediaInfo, NDArray[np.uint8]]:
        """As :func:`prep.media.decode.decode`; also raises ``decode_timeout`` and blames a crash on the medium."""
        info, shape = self._request("decode", source, media_type, settings, item)
        size = int(np.prod(shape))
        if self._shared is None or len(self._shared) != os.fstat(self._memory).st_size:
            self._unmap()
            self._shared = mmap.mmap(self._memory, 0, prot=mmap.PROT_READ)
        return info, np.frombuffer(self._shared, dtype=np.uint8, count=size).reshape(shape).copy()

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

    def _request(
        self, kind: str, source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings
    ) -> tuple[Any, Any]:
        """Send a request, again if the child is killed. Returns the media info, and the shape of decoded frames."""
        for _ in range(_MAX_ATTEMPTS):
            with contextlib.suppress(_KilledError):
                return self._request_once(kind, source, media_type, settings, item)
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"the decoder of {source.name!r} was killed {_MAX_ATTEMPTS} times (SIGKILL), probably because memory ran "
            "out; run with fewer --workers and --retry-media, or lower max_source_pixels",
        )

    def _request_once(
        self, kind: str, source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings
    ) -> tuple[Any, Any]:
        if self._child is not None and self._child.poll() is not None:
            # It died between two requests (out of memory, say), so this medium is not to blame.
            self.close()
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            self._request_id += 1
            _send(child.stdin, (self._request_id, kind, source, media_type, settings, item))
            request_id, answer = _receive(child.stdout, time.monotonic() + settings.decode_timeout)
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
            raise _crash_error(source, code) from None
        except BaseException:
            # Interrupted between request and response: the next request must not receive this response.
            self.close()
            raise
        if request_id != self._request_id:
            self.close()
            raise RuntimeError(f"the decoder process answered request {request_id}, not {self._request_id}")
        if isinstance(answer, (MediaError, OSError)):
            raise answer
        result: tuple[Any, Any] = answer
        return result

    def _start(self) -> _Child:
        self._memory = os.memfd_create("vlprep-frames")
        # Signals that stop a build reach all its processes. A child that obeyed them would look like a crash.
        with without(signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            child = (_fork if can_fork() else _spawn)(self._memory)
        self._child = child
        assert child.stdout is not None
        try:
            _receive(child.stdout, time.monotonic() + _START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise RuntimeError("the decoder process did not start") from error
        return child


def _fork(memory: int) -> Fork:
    return Fork(partial(_serve, memory), keep=[memory])


def _spawn(memory: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "prep.media.sandbox", str(memory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=(memory,),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )


def _crash_error(source: MediaSource, code: int) -> MediaError:
    cause = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
    return MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} crashes its decoder ({cause})")


def sandbox() -> Sandbox:
    """The sandbox of this process. A fork of it has its own."""
    return _sandbox_of(os.getpid())


@lru_cache(maxsize=1)
def _sandbox_of(process: int) -> Sandbox:
    box = Sandbox()
    at_exit(partial(_close_own, box, process))
    return box


def _close_own(box: Sandbox, process: int) -> None:
    if os.getpid() == process:
        box.close()


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
        received = os.read(descriptor, size - len(data))
        if not received:
            raise EOFError
        data += received
    return bytes(data)


def _serve(memory: int) -> None:
    """Answer requests until the pipe closes. Runs in the child."""
    # Otherwise a child that hangs in a decoder would outlive a worker that is killed.
    die_with_parent()
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE_ADJUSTMENT)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # Discard what decoders print: it must reach neither the answers nor the progress bar.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    shared = _SharedFrames(memory)
    _send(answers, "ready")
    while True:
        try:
            request_id, *request = _receive(requests)
        except EOFError:
            return
        _send(answers, (request_id, _answer(shared, *request)))


def _answer(
    shared: _SharedFrames,
    kind: str,
    source: MediaSource,
    media_type: int,
    settings: MediaSettings,
    item: ItemSettings = NO_ITEM_SETTINGS,
) -> tuple[MediaInfo, tuple[int, ...] | None] | MediaError | OSError:
    """Probe or decode: returns the info and the shape of the frames in shared memory, or the error."""
    too_large = MediaError(ReasonCode.MEDIA_TOO_LARGE, f"{source.name!r} needs more memory than is available")
    try:
        if kind == "probe":
            return probe(source, media_type, settings, item), None
        info, frames = decode(source, media_type, settings, item, shared.allocate)
    except MediaError as error:
        return error
    except MemoryError:
        return too_large
    except _NoRoomError as error:
        return too_large if error.reason.errno == errno.ENOMEM else error.reason
    return info, frames.shape


class _SharedFrames:
    """The child's mapping of the shared memory, kept from one medium to the next."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._mapped: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return an array at the start of the shared memory. Earlier arrays are overwritten.

        Raises:
            _NoRoomError: not enough memory.
        """
        num_bytes = math.prod(shape)
        size = max(num_bytes, min(_MAX_KEPT_BYTES, len(self._mapped or b"")))
        if self._mapped is None or len(self._mapped) != size:
            # Drop the mapping instead of closing it: an exception in flight may still hold an array in it.
            self._mapped = None
            try:
                os.ftruncate(self._memory, size)
                self._mapped = mmap.mmap(self._memory, size)
            except OSError as error:
                error.filename = _SHARED_MEMORY
                raise _NoRoomError(error) from error
        return np.frombuffer(self._mapped, dtype=np.uint8, count=num_bytes).reshape(shape)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
