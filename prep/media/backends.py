"""Video decoders behind one small interface: PyAV, decord and torchcodec, in the order in which they are tried.

Input: a source. Output: an open :class:`Video`. Whatever the library raises becomes ``media_unreadable`` with the
library's message. A library that is not installed, or does not know the format, is :class:`BackendUnavailableError`.

PyAV comes first because it decodes on the calling thread, one packet after the other, so that a damaged video gives the
same frames or the same error every time. decord reads ahead on a thread of its own. What its decoder has seen when it
seeks, and whether an error arrives before or after a frame, depends on the speed of both threads. Each backend uses one
thread, because the workers of a build already occupy the cores.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
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
    from av.filter import Graph


_MAX_BATCH = 32
"""Frames that are decoded at once: 85 MB of 1280x720 pixels."""


class BackendUnavailableError(MediaError):
    """A backend is not installed, or does not know the format of a video. The next one is tried."""


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
        raise BackendUnavailableError(
            ReasonCode.MEDIA_UNREADABLE, f"a package of the decoder is missing ({source.explain(error)})"
        ) from error
    except errors as error:
        raise MediaError(ReasonCode.MEDIA_UNREADABLE, source.explain(error)) from error


def _check_index(source: MediaSource) -> None:
    """Refuse containers without an index: only PyAV, which decodes from the start, returns the right frames."""
    container = container_of(source)
    if not container.has_index:
        raise BackendUnavailableError(ReasonCode.MEDIA_UNREADABLE, f"cannot seek exactly in {container.demuxer}")


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
            from decord._ffi.base import DECORDError, DECORDLimitReachedError

            decord.logging.set_level(decord.logging.QUIET)
            self._errors = (DECORDError, DECORDLimitReachedError)
            with _failures(source, *self._errors):
                self._reader = decord.VideoReader(source.target(), ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
                self.num_frames = len(self._reader)
                self.fps = float(self._reader.get_avg_fps())
                self.height, self.width = map(int, self._reader[0].shape[:2])

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See :class:`Video`."""
        for batch in _batches(indices):
            with _failures(self._source, *self._errors, RuntimeError, AssertionError, ValueError, OSError):
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
    """A video opened by PyAV, which bundles FFmpeg.

    Opening reads all packets, to learn the time of every frame. Where the times tell frames apart, decoding starts at
    the last key frame before each requested one. Otherwise it goes from the start to the last requested frame.
    """

    def __init__(self, source: MediaSource) -> None:
        self._source = source
        with _failures(source, OSError):
            container_type = container_of(source)
            self._demuxer = container_type.demuxer
            import av

            self._error = av.FFmpegError
            shown: list[tuple[int | None, bool]] = []
            first: VideoFrame | None = None
            with self._opened() as (container, stream):
                for packet in container.demux(stream):
                    # The last packet is empty. It makes the decoder hand over what it holds back.
                    if first is None:
                        first = next(iter(packet.decode()), None)
                    if packet.size and not packet.is_discard:
                        shown.append((packet.pts, packet.is_keyframe))
                self.fps = float(stream.average_rate or 0)
        self.num_frames = len(shown)
        self._times = sorted(time for time, _ in shown if time is not None)
        self._key_times = sorted(time for time, is_key in shown if is_key and time is not None)
        self._has_index = container_type.has_index and len(set(self._times)) == len(shown)
        size = (0, 0) if first is None else (first.height, first.width)
        sideways = first is not None and round(first.rotation / 90) % 2 == 1
        self.height, self.width = size[::-1] if sideways else size

    def frames(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """See :class:`Video`."""
        num_sought = 0
        if self._has_index:
            for frame in self._sought(indices):
                yield frame
                num_sought += 1
        # Where the container's index or the times are wrong, counting frames is left.
        if num_sought < len(indices):
            yield from self._counted(indices[num_sought:])

    def _sought(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """The frames at ``indices`` up to the first that is not where the index says."""
        with contextlib.suppress(MediaError), self._opened() as (container, stream):
            convert = _RgbConverter()
            start: int | None = None
            decoded: Iterator[VideoFrame] = iter(())
            for index in indices:
                time = self._times[index]
                key = bisect_right(self._key_times, time) - 1
                if key != start:
                    container.seek(self._key_times[max(key, 0)], stream=stream)
                    decoded, start = container.decode(stream), key
                # Frames come in the order of their times.
                frame = next((frame for frame in decoded if frame.pts is None or frame.pts >= time), None)
                if frame is None or frame.pts != time:
                    return
                yield convert(frame)

    def _counted(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        with self._opened() as (container, stream):
            convert = _RgbConverter()
            decoded = enumerate(container.decode(stream))
            for index in indices:
                frame = next((frame for position, frame in decoded if position == index), None)
                if frame is None:
                    return
                yield convert(frame)

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
            if stream.codec_context is None:
                raise BackendUnavailableError(ReasonCode.MEDIA_UNREADABLE, "has no decoder for the video")
            stream.codec_context.thread_count = 1
            yield container, stream


class _RgbConverter:
    """Converts frames to upright RGB by FFmpeg's ``scale`` filter, as decord does.

    ``VideoFrame.to_ndarray`` gives other colours where chroma is subsampled: with 10 bits, or for odd sizes.
    """

    def __init__(self) -> None:
        self._graph: Graph | None = None
        self._input: tuple[int, int, str] | None = None
        self._size: tuple[int, int] | None = None

    def __call__(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Returns (H, W, 3) uint8. Frames of one video have the size of its first one."""
        self._size = self._size or (frame.width, frame.height)
        kind = (frame.width, frame.height, frame.format.name)
        if self._graph is None or kind != self._input:
            self._graph, self._input = _rgb_graph(frame, self._size), kind
        self._graph.push(frame)
        rgb = self._graph.pull()
        return _upright(np.asarray(rgb.to_ndarray(), dtype=np.uint8), frame.rotation)


def _rgb_graph(frame: VideoFrame, size: tuple[int, int]) -> Graph:
    from av.filter import Graph

    graph = Graph()
    graph.threads = 1
    graph.link_nodes(
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=frame.time_base),
        graph.add("scale", f"{size[0]}:{size[1]}"),
        graph.add("format", "pix_fmts=rgb24"),
        graph.add("buffersink"),
    ).configure()
    return graph


def _upright(frame: NDArray[np.uint8], rotation: int) -> NDArray[np.uint8]:
    """Rotate a frame (H, W, 3) by the container's display matrix (``rotation``: degrees counter-clockwise)."""
    return np.ascontiguousarray(np.rot90(frame, k=round(rotation / 90) % 4))


BACKENDS: dict[str, Callable[[MediaSource], Video]] = {
    "pyav": PyavVideo,
    "decord": DecordVideo,
    "torchcodec": TorchcodecVideo,
}
"""Backends by their name in the ledger, in the order in which they are tried."""
