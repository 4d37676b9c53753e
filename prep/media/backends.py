"""Video decoders behind one small interface: decord, torchcodec and PyAV, in the order in which they are tried.

Input: a source. Output: an open :class:`Video`. Whatever the library raises becomes ``media_unreadable`` with the
library's message. A library that is not installed counts as a failure of its backend. Each backend decodes on the
calling thread alone, because the workers of a build already occupy the cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from prep.media.containers import container_of
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer


_MAX_BATCH = 32
"""Frames that are decoded at once: 85 MB of 1280x720 pixels."""


class Video(Protocol):
    """An open video.

    Attributes:
        num_frames: frames in the video stream.
        fps: average frames a second; 0 if the header does not say.
        height: height of an upright frame in pixels.
        width: width of an upright frame in pixels.
    """

    num_frames: int
    fps: float
    height: int
    width: int

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Decode the frames at ``indices`` (ascending, distinct), each to (H, W, 3) uint8, R G B, in that order.

        At most :data:`_MAX_BATCH` of them are held at a time.
        """
        ...


@contextmanager
def _failures(source: MediaSource, *errors: type[Exception]) -> Iterator[None]:
    """Turn a library's exceptions into ``media_unreadable``."""
    try:
        yield
    except ImportError as error:
        raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"not available ({source.explain(error)})") from error
    except errors as error:
        raise MediaError(ReasonCode.MEDIA_UNREADABLE, source.explain(error)) from error


def _check_index(source: MediaSource) -> None:
    """Refuse containers without an index: only PyAV, which decodes from the start, returns the right frames."""
    container = container_of(source)
    if not container.has_index:
        raise ValueError(f"cannot seek exactly in {container.demuxer}")


def _batches(indices: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(indices), _MAX_BATCH):
        yield list(indices[start : start + _MAX_BATCH])


class DecordVideo:
    """A video opened by decord. A frame that decord would substitute is an error."""

    def __init__(self, source: MediaSource) -> None:
        self._source = source
        with _failures(source, RuntimeError, AssertionError, ValueError, OSError):
            _check_index(source)
            import decord
            from decord._ffi.base import DECORDError

            decord.logging.set_level(decord.logging.QUIET)
            self._error = DECORDError
            with _failures(source, DECORDError):
                self._reader = decord.VideoReader(source.target(), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
                self.num_frames = len(self._reader)
                self.fps = float(self._reader.get_avg_fps())
                self.height, self.width = map(int, self._reader[0].shape[:2])

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See :class:`Video`."""
        for batch in _batches(indices):
            with _failures(self._source, self._error, RuntimeError, AssertionError, ValueError, OSError):
                frames: NDArray[np.uint8] = self._reader.get_batch(batch).asnumpy()
            yield from frames


class TorchcodecVideo:
    """A video opened by torchcodec, which needs torch and the shared libraries of FFmpeg."""

    def __init__(self, source: MediaSource) -> None:
        self._source = source
        with _failures(source, RuntimeError, ValueError, OSError):
            _check_index(source)
            from torchcodec.decoders import VideoDecoder

            self._decoder = VideoDecoder(source.target(), num_ffmpeg_threads=1, dimension_order="NHWC")
            metadata = self._decoder.metadata
            self.num_frames = int(metadata.num_frames or 0)
            self.fps = float(metadata.average_fps or 0)
            self.height, self.width = map(int, self._decoder[0].shape[:2])

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See :class:`Video`."""
        for batch in _batches(indices):
            with _failures(self._source, RuntimeError, ValueError, OSError, IndexError):
                frames: NDArray[np.uint8] = self._decoder.get_frames_at(batch).data.numpy()
            yield from frames


class PyavVideo:
    """A video opened by PyAV, which bundles FFmpeg. Decodes in order up to the last requested frame."""

    def __init__(self, source: MediaSource) -> None:
        self._source = source
        with _failures(source, OSError):
            self._demuxer = container_of(source).demuxer
            import av

            self._error = av.FFmpegError
            with self._opened() as (container, stream):
                self.num_frames = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
                self.fps = float(stream.average_rate or 0)
            with self._opened() as (container, stream):
                first = next(container.decode(stream), None)
                upright = None if first is None else _upright(_rgb(first), first.rotation)
                self.height, self.width = (0, 0) if upright is None else upright.shape[:2]

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See :class:`Video`."""
        remaining = set(indices)
        with self._opened() as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index in remaining:
                    yield _upright(_rgb(frame), frame.rotation)
                    remaining.remove(index)
                if not remaining:
                    break

    @contextmanager
    def _opened(self) -> Iterator[tuple[InputContainer, VideoStream]]:
        import av

        with (
            _failures(self._source, self._error, ValueError, OSError, IndexError),
            av.open(self._source.target(), "r", format=self._demuxer) as container,
        ):
            # Not simply the first stream: in an audio file, that may be the cover image.
            stream = container.streams.best("video")
            if not isinstance(stream, av.VideoStream):
                raise MediaError(ReasonCode.MEDIA_UNREADABLE, "the file has no video stream")
            yield container, stream


def _rgb(frame: VideoFrame) -> NDArray[np.uint8]:
    return np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)


def _upright(frame: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Rotate a frame (H, W, 3) by the container's display matrix (``rotation``: degrees counter-clockwise)."""
    return np.ascontiguousarray(np.rot90(frame, k=round(rotation / 90) % 4))


BACKENDS: dict[str, Callable[[MediaSource], Video]] = {
    "decord": DecordVideo,
    "torchcodec": TorchcodecVideo,
    "pyav": PyavVideo,
}
"""Backends by their name in the ledger, in the order in which they are tried."""
