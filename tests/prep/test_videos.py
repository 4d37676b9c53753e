"""Clips: which frames are taken, at what rate and size; damaged and odd files."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from prep.media.backends import BACKENDS, PyavClip
from prep.media.source import MediaSource
from prep.media.videos import decode_video, frame_indices, probe_video
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.settings import MediaSettings

SETTINGS = MediaSettings()


def write_clip(
    path: Path, num_frames: int, fps: int, *, width: int = 64, height: int = 48, codec: str = "mpeg4"
) -> Path:
    """A clip whose frames can be told apart: frame k is grey of brightness 20 + 3k."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((height, width, 3), 20 + 3 * number, dtype=np.uint8), format="rgb24"
            )
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def source(path: Path) -> MediaSource:
    return MediaSource(path.name, path)


@pytest.mark.parametrize(
    ("total", "duration_s", "expected"),
    [
        (100, 16.0, [0, 33, 66, 99]),  # 16 / 4 = 4 frames
        (100, 1.0, [0, 33, 66, 99]),  # at least 4
        (1000, 400.0, [0, 142, 285, 428, 570, 713, 856, 999]),  # at most 8
        (500, 20.0, [0, 124, 249, 374, 499]),  # 5 frames
        (2, 1.0, [0, 1]),  # fewer than asked for: each once
        (1, 0.04, [0]),
    ],
)
def test_frames_are_spread_evenly_one_for_each_interval(total: int, duration_s: float, expected: list[int]) -> None:
    assert list(frame_indices(total, duration_s, SETTINGS)) == expected


def test_an_odd_number_of_frames_repeats_the_last_and_keeps_the_true_rate(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "x.mp4", 50, 5)  # 10 s
    settings = MediaSettings(base_interval=2.0)  # 5 frames: 0, 12, 24, 36, 49
    frames, plan = decode_video(source(path), settings)
    assert plan.indices == (0, 12, 24, 36, 49)
    assert plan.second_per_grid_t == pytest.approx(2 * 10 / 5)
    assert plan.grid == (3, frames.shape[2] // 14, frames.shape[3] // 14)
    assert frames.shape[:2] == (6, 3)
    assert (frames[5] == frames[4]).all()
    brightness = frames.reshape(6, -1).mean(axis=1)
    assert brightness == pytest.approx([20 + 3 * index for index in (0, 12, 24, 36, 49, 49)], abs=3)
    assert probe_video(source(path), settings) == plan


def test_frames_are_resized_as_pictures_are_with_the_video_bounds(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "x.mp4", 8, 2, width=320, height=240)
    frames, plan = decode_video(source(path), SETTINGS)
    assert plan.grid.h * plan.grid.w * 196 >= SETTINGS.video_min_frame_pixels
    original = PyavClip(source(path)).frames([0])[0]
    expected = Image.fromarray(original).resize((plan.grid.w * 14, plan.grid.h * 14), Image.Resampling.BICUBIC)
    assert (frames[0] == np.asarray(expected).transpose(2, 0, 1)).all()


def test_backends_agree_on_count_duration_size_and_frames(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "x.mp4", 30, 10)
    clips = {name: open_clip(source(path)) for name, open_clip in BACKENDS.items() if name != "torchcodec"}
    facts = {(clip.num_frames, clip.duration_s, clip.height, clip.width) for clip in clips.values()}
    assert facts == {(30, 3.0, 48, 64)}
    pictures = [clip.frames([0, 7, 29]) for clip in clips.values()]
    assert all((picture == pictures[0]).all() for picture in pictures)


def test_the_next_backend_serves_when_one_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_clip(tmp_path / "x.mp4", 8, 2)

    def broken(source: MediaSource) -> PyavClip:
        raise MediaError(ReasonCode.MEDIA_UNREADABLE, "out of order")

    monkeypatch.setitem(BACKENDS, "decord", broken)
    monkeypatch.setitem(BACKENDS, "torchcodec", broken)
    _, plan = decode_video(source(path), SETTINGS)
    assert plan.backend == "pyav"


def test_a_damaged_clip_is_unreadable_and_names_every_backend(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "x.mp4", 30, 10)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(MediaError) as caught:
        decode_video(source(path), SETTINGS)
    assert caught.value.code is ReasonCode.MEDIA_UNREADABLE
    assert all(name in caught.value.message for name in BACKENDS)


def test_a_picture_where_a_clip_should_be_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_text("not a clip")
    with pytest.raises(MediaError) as caught:
        probe_video(source(tmp_path / "x.mp4"), SETTINGS)
    assert caught.value.code is ReasonCode.MEDIA_UNREADABLE


def test_frames_larger_than_the_limit_are_refused_before_sampling(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "x.mp4", 8, 2)
    with pytest.raises(MediaError) as caught:
        probe_video(source(path), MediaSettings(max_source_pixels=64 * 48 - 1))
    assert caught.value.code is ReasonCode.MEDIA_TOO_LARGE


def test_real_clips_are_sampled_over_their_whole_length(qwen_demo: Path) -> None:
    plan = probe_video(source(qwen_demo / "videos" / "v_TpB_zMG3XBA.mp4"), SETTINGS)
    assert plan.indices == (0, 70, 140, 210, 280, 350, 420, 490)  # 491 frames at 3 per second
    assert plan.second_per_grid_t == pytest.approx(2 * (491 / 3) / 8)
    assert plan.grid == (4, 26, 44)
