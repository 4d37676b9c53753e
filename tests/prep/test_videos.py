"""Videos: which frames are sampled, at what rate and size, and what happens with damaged and unusual files."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prep.media.backends import BACKENDS, BackendUnavailableError, DecordVideo, PyavVideo
from prep.media.sampling import interval_frames
from prep.media.source import MediaSource
from prep.media.videos import decode_video, probe_video
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings

SETTINGS = MediaSettings()
INSTALLED = {"decord", "pyav"} | ({"torchcodec"} if find_spec("torchcodec") else set())


def write_video(
    path: Path,
    num_frames: int,
    fps: int,
    *,
    width: int = 64,
    height: int = 48,
    codec: str = "mpeg4",
    container: str | None = None,
    timestamps_ms: list[int] | None = None,
) -> Path:
    """Write a video whose frame k is grey of brightness 20 + 3k, with a white corner at the top left.

    ``timestamps_ms`` sets the time of every frame instead of ``fps``.
    """
    with av.open(str(path), "w", format=container) as file:
        stream = file.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if timestamps_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index in range(num_frames):
            pixels = np.full((height, width, 3), 20 + 3 * index, dtype=np.uint8)
            pixels[: height // 4, : width // 4] = 255
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if timestamps_ms is not None:
                frame.pts, frame.time_base = timestamps_ms[index], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def brightness_of(frames: Iterable[NDArray[np.uint8]]) -> list[float]:
    """Mean of the lower right quarter of every frame (H, W, 3)."""
    return [float(frame[frame.shape[0] // 2 :, frame.shape[1] // 2 :].mean()) for frame in frames]


def rotate_video(path: Path, degrees: int) -> None:
    """Write a clockwise rotation into the display matrix of an MP4 file."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    # tkhd, version 0: 4 bytes of name, 4 of version and flags, 5 fields, 8 reserved, 8 of layer, group and volume
    at = data.find(b"tkhd") + 4 + 4 + 20 + 8 + 8
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def source(path: Path) -> MediaSource:
    return MediaSource(path.name, path)


@pytest.mark.parametrize(
    ("total", "duration_s", "expected"),
    [
        (100, 16.0, [0, 33, 66, 99]),  # 16 / 4 = 4 frames
        (100, 1.0, [0, 33, 66, 99]),  # at least 4
        (1000, 400.0, [0, 142, 285, 428, 570, 713, 856, 999]),  # at most 8
        (500, 20.0, [0, 124, 249, 374, 499]),  # 5 frames
        (2, 1.0, [0, 1]),  # fewer frames than the minimum: each once
        (1, 0.04, [0]),
    ],
)
def test_frames_are_spread_evenly_with_one_per_interval(total: int, duration_s: float, expected: list[int]) -> None:
    assert list(interval_frames(total, duration_s, SETTINGS)) == expected


def test_an_odd_frame_count_repeats_the_last_frame_and_keeps_the_true_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 50, 5)  # 10 s
    settings = MediaSettings(base_interval=2.0)  # 5 frames: 0, 12, 24, 36, 49
    frames, plan = decode_video(source(path), settings)
    assert plan.indices == (0, 12, 24, 36, 49)
    assert plan.second_per_grid_t == pytest.approx(2 * 10 / 5)
    assert plan.grid == (3, frames.shape[2] // 14, frames.shape[3] // 14)
    assert frames.shape[:2] == (6, 3)
    assert (frames[5] == frames[4]).all()
    assert brightness_of(frames.transpose(0, 2, 3, 1)) == pytest.approx(
        [20 + 3 * index for index in (0, 12, 24, 36, 49, 49)], abs=3
    )
    assert probe_video(source(path), settings) == plan


def test_frames_are_resized_like_images_with_the_video_bounds(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 8, 2, width=320, height=240)
    frames, plan = decode_video(source(path), SETTINGS)
    assert plan.grid.h * plan.grid.w * 196 >= SETTINGS.video_min_frame_pixels
    original = next(PyavVideo(source(path)).frames([0]))
    expected = Image.fromarray(original).resize((plan.grid.w * 14, plan.grid.h * 14), Image.Resampling.BICUBIC)
    assert (frames[0] == np.asarray(expected).transpose(2, 0, 1)).all()


def test_backends_agree_on_count_duration_size_and_frames(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 30, 10)
    videos = [open_video(source(path)) for name, open_video in BACKENDS.items() if name in INSTALLED]
    headers = {(video.num_frames, video.fps, video.height, video.width) for video in videos}
    assert headers == {(30, 10.0, 48, 64)}
    first, *others = (np.stack(list(video.frames([0, 7, 29]))) for video in videos)
    assert all((frames == first).all() for frames in others)


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("size", [(64, 48), (320, 240)])
def test_a_rotated_video_is_decoded_upright(tmp_path: Path, degrees: int, size: tuple[int, int]) -> None:
    """The white corner at the top left moves clockwise: top right, bottom right, bottom left."""
    path = write_video(tmp_path / "x.mp4", 8, 2, width=size[0], height=size[1])
    rotate_video(path, degrees)
    frames, plan = decode_video(source(path), SETTINGS)
    assert (plan.height, plan.width) == (size if degrees != 180 else size[::-1])
    assert (plan.grid.h > plan.grid.w) == (degrees != 180)
    corners = [frames[0, 0, 5, 5], frames[0, 0, 5, -5], frames[0, 0, -5, -5], frames[0, 0, -5, 5]]
    assert int(np.argmax(corners)) == degrees // 90


def test_a_variable_frame_rate_uses_the_real_duration(tmp_path: Path) -> None:
    """Ten frames 0.1 s apart and ten frames 0.5 s apart last 5.7 s at the average rate."""
    timestamps = [100 * k for k in range(10)] + [1000 + 500 * k for k in range(10)]
    path = write_video(tmp_path / "x.mp4", 20, 5, timestamps_ms=timestamps)
    plan = probe_video(source(path), SETTINGS)
    assert plan.indices == (0, 6, 12, 19)
    assert plan.second_per_grid_t == pytest.approx(2 * 5.7 / 4, abs=0.2)


def test_frames_of_a_stream_without_frame_count_and_duration_are_counted(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.h264", 20, 25, codec="libx264", container="h264")
    frames, plan = decode_video(source(path), SETTINGS)
    assert plan.backend == "pyav"
    assert plan.indices == (0, 6, 12, 19)
    expected = [20 + 3 * index for index in plan.indices]
    assert brightness_of(frames.transpose(0, 2, 3, 1)) == pytest.approx(expected, abs=3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("x.mp4", "libx264"),
        ("x.mkv", "libx264"),
        ("x.mov", "mpeg4"),
        ("x.avi", "mpeg4"),
        ("x.webm", "libvpx-vp9"),
        ("x.flv", "flv"),
        ("x.ts", "mpeg2video"),
        ("x.mpg", "mpeg2video"),
        ("x.ts", "libx264"),
    ],
)
def test_every_container_returns_the_requested_frames(tmp_path: Path, name: str, codec: str) -> None:
    path = write_video(tmp_path / name, 40, 10, codec=codec)
    frames, plan = decode_video(source(path), SETTINGS)
    expected = [20 + 3 * index for index in plan.indices]
    assert plan.indices == (0, 13, 26, 39)
    assert brightness_of(frames.transpose(0, 2, 3, 1)) == pytest.approx(expected, abs=4)


def unavailable(source: MediaSource) -> PyavVideo:
    raise BackendUnavailableError(ReasonCode.MEDIA_UNREADABLE, "not available")


def test_the_next_backend_is_tried_when_one_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", 8, 2)
    frames, plan = decode_video(source(path), SETTINGS)
    assert plan.backend == "pyav"
    monkeypatch.setitem(BACKENDS, "pyav", unavailable)
    other_frames, other_plan = decode_video(source(path), SETTINGS)
    assert other_plan == replace(plan, backend="decord")
    assert np.array_equal(frames, other_frames)


def test_the_message_names_every_backend_that_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", 8, 2)
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, unavailable)
    with pytest.raises(MediaError) as caught:
        decode_video(source(path), SETTINGS)
    assert caught.value.code is ReasonCode.MEDIA_UNREADABLE
    assert all(f"{name}: not available" in caught.value.message for name in BACKENDS)


def test_the_verdict_on_a_damaged_video_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "x.mp4", 30, 10)
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.setitem(BACKENDS, "decord", lambda source: pytest.fail("another backend was tried"))
    with pytest.raises(MediaError) as caught:
        decode_video(source(path), SETTINGS)
    assert caught.value.code is ReasonCode.MEDIA_UNREADABLE
    assert "'x.mp4' cannot be decoded (pyav: " in caught.value.message


def test_a_video_without_a_decoder_is_unreadable(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.avi", 8, 2)
    path.write_bytes(re.sub(rb"FMP4|fmp4", b"QQQQ", path.read_bytes()))
    with pytest.raises(MediaError) as caught:
        decode_video(source(path), SETTINGS)
    assert caught.value.code is ReasonCode.MEDIA_UNREADABLE
    assert "pyav: has no decoder for the video" in caught.value.message


def test_frames_decord_would_substitute_are_an_error(tmp_path: Path) -> None:
    """The last frames cannot be decoded: their packets are zeros."""
    path = write_video(tmp_path / "x.mp4", 12, 4, codec="libx264")
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        last = [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size][-3:]
    for at, size in last:
        content[at + 4 : at + size] = bytes(size - 4)
    path.write_bytes(content)
    with pytest.raises(MediaError):
        list(DecordVideo(source(path)).frames([0, 11]))


@pytest.mark.parametrize(
    ("name", "codec", "pixel_format", "size"),
    [
        ("x.mp4", "libx264", "yuv420p10le", (64, 48)),
        ("x.mp4", "libx264", "yuv444p", (65, 47)),
        ("x.webm", "libvpx", "yuv420p", (65, 47)),
        ("x.mp4", "mpeg4", "yuv420p", (65, 47)),
        ("x.avi", "mjpeg", "yuvj420p", (66, 50)),
    ],
)
def test_colours_equal_those_of_decord(
    tmp_path: Path, name: str, codec: str, pixel_format: str, size: tuple[int, int]
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    with av.open(str(tmp_path / name), "w") as file:
        stream = file.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        for index in range(5):
            frame = np.ascontiguousarray(pixels[index : index + size[1], : size[0]])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    videos = (PyavVideo(source(tmp_path / name)), DecordVideo(source(tmp_path / name)))
    ours, others = (np.stack(list(video.frames([0, 2, 4]))) for video in videos)
    assert np.array_equal(ours, others)


def test_seeking_gives_the_frames_that_counting_gives(tmp_path: Path) -> None:
    """Frames in the same key interval, in the next one, and far apart; B frames are in between."""
    path = tmp_path / "x.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=4)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 6
        for index in range(31):
            pixels = np.full((48, 64, 3), 20 + 3 * index, dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    video = PyavVideo(source(path))
    indices = [0, 1, 5, 6, 13, 17, 30]
    sought, counted = list(video._sought(indices)), list(video._counted(indices))
    assert len(sought) == len(counted) == len(indices)
    assert np.array_equal(np.stack(sought), np.stack(counted))
    assert brightness_of(sought) == pytest.approx([20 + 3 * index for index in indices], abs=3)


def test_an_image_or_a_text_is_not_accepted_as_a_video(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "x.jpg")
    (tmp_path / "x.mp4").write_text("not a video")
    for name in ("x.jpg", "x.mp4"):
        with pytest.raises(MediaError) as caught:
            probe_video(source(tmp_path / name), SETTINGS)
        assert caught.value.code is ReasonCode.UNSUPPORTED_MEDIA


def test_frames_larger_than_the_limit_are_rejected_before_sampling(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 8, 2)
    with pytest.raises(MediaError) as caught:
        probe_video(source(path), MediaSettings(max_source_pixels=64 * 48 - 1))
    assert caught.value.code is ReasonCode.MEDIA_TOO_LARGE


def test_a_real_video_is_sampled_over_its_full_length(qwen_demo: Path) -> None:
    plan = probe_video(source(qwen_demo / "videos" / "v_TpB_zMG3XBA.mp4"), SETTINGS)
    assert plan.indices == (0, 70, 140, 210, 280, 350, 420, 490)  # 491 frames at 3 per second
    assert plan.second_per_grid_t == pytest.approx(2 * (491 / 3) / 8)
    assert plan.grid == (4, 26, 44)


def test_messages_contain_neither_paths_nor_times(tmp_path: Path) -> None:
    """The ledger stores messages, and its bytes must be the same on any machine and on any day."""
    path = write_video(tmp_path / "x.mp4", 30, 10)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(MediaError) as caught:
        decode_video(source(path), SETTINGS)
    assert str(tmp_path) not in caught.value.message
    assert not re.search(r"\d\d:\d\d:\d\d|0x[0-9a-f]", caught.value.message)
