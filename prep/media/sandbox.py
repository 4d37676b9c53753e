"""Decodes in a child process with a time limit: a decoder that hangs or crashes costs one medium, not the build.

One child serves one worker. A request goes through a pipe; pixels come back through memory that both share, so that
the way through the child costs one copy (a fraction of a millisecond a picture) and about 50 microseconds of
messages. A child that does not answer in time is killed, one that died is replaced, and the medium that it was busy
with gets the blame.
"""

from __future__ import annotations

import atexit
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
from typing import IO, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from prep.media.decode import Facts, decode, probe
from prep.media.source import MediaSource
from prep.processes import die_with_parent
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings

_HEADER = struct.Struct("<Q")
_START_LIMIT_S = 120.0
"""Time for a child to start (imports on a busy machine); not counted against the medium."""

_T = TypeVar("_T")


class Sandbox:
    """A child process that probes and decodes. Restarted as needed; :meth:`close` ends it."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._memory = -1
        self._number = 0

    def probe(self, source: MediaSource, media_type: int, settings: MediaSettings) -> Facts:
        """As :func:`prep.media.decode.probe`; also raises ``decode_timeout`` and blames a crash on the medium."""
        facts: Facts
        facts, _ = self._ask(("probe", source, media_type, settings), source, settings)
        return facts

    def decode(self, source: MediaSource, media_type: int, settings: MediaSettings) -> tuple[Facts, NDArray[np.uint8]]:
        """As :func:`prep.media.decode.decode`; also raises ``decode_timeout`` and blames a crash on the medium."""
        facts, shape = self._ask(("decode", source, media_type, settings), source, settings)
        size = int(np.prod(shape))
        with mmap.mmap(self._memory, size, prot=mmap.PROT_READ) as shared:
            frames = np.frombuffer(shared, dtype=np.uint8).reshape(shape).copy()
        return facts, frames

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            os.close(self._memory)
            self._child = None

    def _ask(self, request: tuple[Any, ...], source: MediaSource, settings: MediaSettings) -> tuple[Any, Any]:
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
            how = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
            raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} crashes its decoder ({how})") from None
        except BaseException:
            # Interrupted between question and answer: the next question must not get this one's answer.
            self.close()
            raise
        if number != self._number:
            self.close()
            raise RuntimeError(f"the decoder process answered request {number}, not {self._number}")
        if isinstance(answer, MediaError):
            raise answer
        found: tuple[Any, Any] = answer
        return found

    def _start(self) -> subprocess.Popen[bytes]:
        self._memory = os.memfd_create("vlprep-frames")
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
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    # What decoders print goes nowhere: neither into the answers nor between the lines of the progress.
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _send(answers, "ready")
    while True:
        try:
            number, kind, source, media_type, settings = _receive(requests)
        except EOFError:
            return
        try:
            if kind == "probe":
                _send(answers, (number, (probe(source, media_type, settings), None)))
                continue
            facts, frames = decode(source, media_type, settings)
        except MediaError as error:
            _send(answers, (number, error))
            continue
        except MemoryError:
            message = f"{source.name!r} needs more memory than there is"
            _send(answers, (number, MediaError(ReasonCode.MEDIA_TOO_LARGE, message)))
            continue
        if os.fstat(memory).st_size < frames.size:
            os.ftruncate(memory, frames.size)
        with mmap.mmap(memory, frames.size) as shared:
            np.frombuffer(shared, dtype=np.uint8)[:] = frames.ravel()
        _send(answers, (number, (facts, frames.shape)))


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
