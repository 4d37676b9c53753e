"""Sampling at a frame rate and the settings of single images and videos equal the real ``qwen_vl_utils``.

Videos as lists and folders of frames, and all of this from the annotation to the bytes of a bin.
"""

from __future__ import annotations

import io
import json
import math
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from prep.annotations.chunks import Chunk
from prep.annotations.validation import parse_record
from prep.build.pipeline import build
from prep.build.scan import ScanTask, part_path
from prep.engines import SerialEngine
from prep.media.backends import PyavVideo
from prep.media.caches import ProbeCache
from prep.media.decode import decode, probe
from prep.media.frame_lists import decode_frames
from prep.media.images import image_grid
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings, frame_bounds, image_bounds
from prep.media.paths import resolve_frames, resolve_media
from prep.media.resize import smart_resize
from prep.media.sampling import frame_count, sampled_frames, torch_linspace
from prep.media.videos import decode_video, probe_video, video_grid
from prep.samples.media import MediaLocation, check_media, media_key, probe_media
from prep.samples.sample import shrink
from prep.samples.text import Template
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import ConfigError, MediaError
from schemas.qwen import IMAGE_PAD, VIDEO_PAD
from schemas.settings import MediaSettings
from tests.prep.packed import packed_samples
from tests.prep.qwen_vl_utils_module import qwen_vl_utils, resized_frames, sampled_video
from tests.prep.test_build import ledger, request_for
from tests.prep.test_images import random_image
from tests.prep.test_videos import brightness_of, source, write_video

TOKEN = 28 * 28
AS_AT_INFERENCE = MediaSettings(
    min_pixels=4 * TOKEN,
    max_pixels=16384 * TOKEN,
    video_sampling="fps",
    video_min_frame_pixels=128 * TOKEN,
    video_max_frame_pixels=768 * TOKEN,
    video_total_pixels=int(128000 * TOKEN * 0.9),
)
"""The constants of ``qwen_vl_utils`` as settings of a build."""

SIDES = st.integers(1, 4000)
PIXELS = st.integers(TOKEN, 2000 * TOKEN)


def element_of(item: ItemSettings) -> dict[str, Any]:
    """The settings as a part of a message has them."""
    return {name: value for name, value in msgspec.to_builtins(item).items() if value is not None}


@given(SIDES, SIDES, PIXELS, PIXELS)
@settings(max_examples=500, deadline=None)
def test_sizes_with_bounds_of_an_item_equal_qwen_vl_utils(height: int, width: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    assume(max(height, width) / min(height, width) <= 200)
    expected = qwen_vl_utils().smart_resize(height, width, 28, low, high)
    assume(min(expected) > 0)  # it can return a side of 0, which its callers fail with
    assert smart_resize(height, width, min_pixels=low, max_pixels=high, keeps_thin=True) == expected


@given(SIDES, SIDES, st.none() | PIXELS, st.none() | PIXELS, st.none() | st.tuples(SIDES, SIDES))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_an_image_with_settings_of_its_own_gets_the_size_of_fetch_image(
    height: int, width: int, low: int | None, high: int | None, resized: tuple[int, int] | None
) -> None:
    rows, columns = resized or (None, None)
    item = ItemSettings(min_pixels=low, max_pixels=high, resized_height=rows, resized_width=columns)
    assume(item.sets_size and (low or AS_AT_INFERENCE.min_pixels) <= (high or math.inf))
    assume(all(max(size) / min(size) <= 200 for size in ((height, width), resized or (1, 1))))
    assume(height * width < 1_000_000 and (rows or 1) * (columns or 1) < 1_000_000)
    image = Image.new("RGB", (width, height))
    grid = _image_grid(height, width, item)
    try:
        expected = qwen_vl_utils().fetch_image({"image": image, **element_of(item)})
    except ValueError:  # a side of 0
        assume(False)
        raise
    assert (grid.h * 14, grid.w * 14) == (expected.height, expected.width)


def _image_grid(height: int, width: int, item: ItemSettings) -> Any:
    low, high = image_bounds(AS_AT_INFERENCE, item)
    return image_grid(height, width, min_pixels=low, max_pixels=high, item=item)


@given(
    num_frames=st.integers(1, 400).map(lambda half: 2 * half),
    size=st.tuples(st.integers(15, 2200), st.integers(15, 2200)),
    low=st.none() | PIXELS,
    high=st.none() | PIXELS,
    total=st.none() | st.integers(TOKEN, 200_000 * TOKEN),
    resized=st.none() | st.tuples(st.integers(1, 2000), st.integers(1, 2000)),
)
@settings(max_examples=500, deadline=None)
def test_frames_get_the_size_of_fetch_video(
    num_frames: int,
    size: tuple[int, int],
    low: int | None,
    high: int | None,
    total: int | None,
    resized: tuple[int, int] | None,
) -> None:
    rows, columns = resized or (None, None)
    item = ItemSettings(min_pixels=low, max_pixels=high, total_pixels=total, resized_height=rows, resized_width=columns)
    # With an upper bound below its own lower one, qwen_vl_utils fails; here the lower one gives way.
    assume((low or AS_AT_INFERENCE.video_min_frame_pixels) <= (high or math.inf))
    assume(max(resized or (1, 1)) / min(resized or (1, 1)) <= 200)
    expected = resized_frames(element_of(item), num_frames, *size)
    assume(min(expected) > 0)
    grid = video_grid(num_frames, *size, AS_AT_INFERENCE, item)
    assert grid == (num_frames // 2, expected[0] // 14, expected[1] // 14)


RATES = st.sampled_from([1.0, 8.0, 23.976023976023978, 24.0, 25.0, 29.97002997002997, 30.0, 59.94005994005994])
COUNTS = st.none() | st.integers(1, 900)
SECONDS = st.none() | st.floats(0, 200) | st.integers(0, 200).map(float)


@given(st.integers(1, 30_000), RATES, st.none() | st.floats(0.01, 60), COUNTS, COUNTS, COUNTS, SECONDS, SECONDS)
@settings(max_examples=1000, deadline=None)
def test_the_frames_sampled_at_a_rate_are_those_of_qwen_vl_utils(
    total: int,
    rate: float,
    fps: float | None,
    nframes: int | None,
    low: int | None,
    high: int | None,
    start: float | None,
    end: float | None,
) -> None:
    item = ItemSettings(
        fps=None if nframes else fps,
        nframes=nframes,
        min_frames=low,
        max_frames=high,
        video_start=start,
        video_end=end,
    )
    module, element = qwen_vl_utils(), element_of(item)
    try:
        first, last, count = module.calculate_video_frame_range(element, total, rate)
        expected = module.smart_nframes(element, count, rate)
    except ValueError:
        with pytest.raises(MediaError) as caught:
            sampled_frames(total, rate, AS_AT_INFERENCE, item)
        assert caught.value.code is ReasonCode.BAD_FIELD
        return
    indices = torch.linspace(first, last, expected).round().long().tolist()
    assert sampled_frames(total, rate, AS_AT_INFERENCE, item) == (range(first, last + 1), indices)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="torch rounds twice without FMA")
@given(st.integers(0, 1_000_000), st.integers(1, 1_000_000), st.integers(2, 800))
@settings(max_examples=1000, deadline=None)
def test_positions_in_long_videos_are_those_of_torch_to_the_bit(first: int, length: int, count: int) -> None:
    expected = torch.linspace(first, first + length, count).numpy()
    assert (torch_linspace(first, first + length, count) == expected).all()


@pytest.mark.parametrize(
    ("settings", "item", "expected"),
    [
        # 60 frames, 10 a second: 6 s.
        (MediaSettings(video_sampling="fps"), {}, [0, 5, 11, 16, 21, 27, 32, 38, 43, 48, 54, 59]),  # 6 s at 2 a second
        (MediaSettings(video_sampling="fps", fps=0.1), {}, [0, 20, 39, 59]),  # at least 4
        (MediaSettings(video_sampling="fps", fps_max_frames=5), {}, [0, 20, 39, 59]),  # at most 5, and even
        (MediaSettings(), {"fps": 1.0}, [0, 12, 24, 35, 47, 59]),
        (MediaSettings(), {"nframes": 3}, [0, 20, 39, 59]),  # 3 / 2 = 1.5, rounded to 2 pairs
        (MediaSettings(), {"fps": 0.1, "min_frames": 5}, [0, 12, 24, 35, 47, 59]),
        (MediaSettings(), {"max_frames": 4}, [0, 20, 39, 59]),  # the rate of the build, 2 a second
        (MediaSettings(), {"nframes": 2, "video_start": 1.05, "video_end": 2.0}, [11, 20]),
        (MediaSettings(), {"video_start": 1.0, "video_end": 4.0}, [10, 20, 30, 40]),  # sampled by interval
    ],
)
def test_a_video_gives_the_frames_that_its_settings_ask_for(
    tmp_path: Path, settings: MediaSettings, item: dict[str, float], expected: list[int]
) -> None:
    path = write_video(tmp_path / "x.mp4", 60, 10)
    own = msgspec.convert(item, ItemSettings)
    frames, plan = decode_video(source(path), settings, own)
    assert list(plan.indices) == expected
    originals = brightness_of(list(PyavVideo(source(path)).frames(expected)))
    assert brightness_of(frames.transpose(0, 2, 3, 1)) == pytest.approx(originals, abs=0.5)
    seconds = (expected[-1] - expected[0] + 1) / 10
    assert plan.second_per_grid_t == pytest.approx(2 * seconds / len(expected))
    assert probe_video(source(path), settings, own) == plan


@pytest.mark.parametrize(
    "item",
    [
        {},
        {"fps": 3.0, "max_frames": 10},
        {"nframes": 6, "max_pixels": 150 * TOKEN},
        {"fps": 1.0, "total_pixels": 600 * TOKEN, "min_pixels": 16 * TOKEN},
        {"video_start": 0.5, "video_end": 2.5, "resized_height": 100, "resized_width": 300},
    ],
)
def test_a_real_video_file_is_sampled_as_by_qwen_vl_utils(tmp_path: Path, item: dict[str, Any]) -> None:
    path = write_video(tmp_path / "x.mp4", 50, 12, width=160, height=96)
    indices, fps, size = sampled_video({"video": str(path), **item})
    plan = probe_video(source(path), AS_AT_INFERENCE, msgspec.convert(item, ItemSettings))
    assert list(plan.indices) == indices
    assert plan.second_per_grid_t == pytest.approx(2 / fps, rel=1e-12)
    assert (plan.grid.h * 14, plan.grid.w * 14) == size


def test_many_frames_are_decoded_in_batches_and_equal_those_decoded_in_order(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 76, 10)
    settings = MediaSettings(video_sampling="fps", fps=10.0)
    frames, plan = decode_video(source(path), settings)
    assert plan.indices == tuple(range(76))
    size = (plan.grid.w * 14, plan.grid.h * 14)
    for stored, frame in zip(frames, PyavVideo(source(path)).frames(plan.indices), strict=True):
        resized = Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)
        assert (stored == np.asarray(resized).transpose(2, 0, 1)).all()


def test_total_pixels_bound_the_frames_of_a_video_together(tmp_path: Path) -> None:
    """The bound is half of all pixels: of eight frames, each may have a quarter of it."""
    path = write_video(tmp_path / "x.mp4", 40, 10, width=640, height=480)
    budget = MediaSettings(video_sampling="fps", video_min_frame_pixels=16 * TOKEN, video_total_pixels=400 * TOKEN)
    plan = probe_video(source(path), budget)
    assert len(plan.indices) == 8
    assert 80 * TOKEN < plan.grid.h * plan.grid.w * 196 <= 100 * TOKEN
    interval = MediaSettings(video_min_frame_pixels=16 * TOKEN, video_total_pixels=400 * TOKEN)
    assert len(probe_video(source(path), interval).indices) == 4
    assert 160 * TOKEN < probe_video(source(path), interval).grid.num_patches / 2 * 196 <= 400 * TOKEN


def test_what_an_item_leaves_out_comes_from_the_build() -> None:
    build_settings = MediaSettings(min_pixels=20 * TOKEN, max_pixels=100 * TOKEN)
    assert image_bounds(build_settings, NO_ITEM_SETTINGS) == (20 * TOKEN, 100 * TOKEN)
    assert image_bounds(build_settings, ItemSettings(min_pixels=50 * TOKEN)) == (50 * TOKEN, 100 * TOKEN)
    assert image_bounds(build_settings, ItemSettings(max_pixels=50 * TOKEN)) == (20 * TOKEN, 50 * TOKEN)
    # The bound of the item wins where the two contradict each other.
    assert image_bounds(build_settings, ItemSettings(min_pixels=200 * TOKEN)) == (200 * TOKEN, 200 * TOKEN)
    assert image_bounds(build_settings, ItemSettings(max_pixels=10 * TOKEN)) == (TOKEN, 10 * TOKEN)
    assert frame_bounds(MediaSettings(), ItemSettings(max_pixels=100 * TOKEN), 4) == (TOKEN, 100 * TOKEN)
    assert frame_count(100, 10.0, MediaSettings(fps=1.0), ItemSettings(min_frames=2)) == 10


def test_a_video_of_one_frame_cannot_be_sampled_at_a_rate(tmp_path: Path) -> None:
    path = write_video(tmp_path / "x.mp4", 1, 10)
    with pytest.raises(MediaError, match="2 to 1") as caught:
        probe_video(source(path), MediaSettings(video_sampling="fps"))
    assert caught.value.code is ReasonCode.BAD_FIELD
    assert probe_video(source(path), MediaSettings()).grid.t == 1


def test_contradicting_bounds_of_frames_are_wrong_use() -> None:
    with pytest.raises(ConfigError, match="fps_max_frames is 4; allowed: at least fps_min_frames"):
        MediaSettings(fps_min_frames=6, fps_max_frames=4)


def test_the_flags_in_the_documentation_are_the_constants_of_qwen_vl_utils() -> None:
    text = (Path(__file__).parents[2] / "docs" / "media.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"(--video-sampling fps) \\\n(.*)$", text, re.MULTILINE)
    words = " ".join(line).split()
    names, values = words[::2], words[1::2]
    flags = {name.removeprefix("--").replace("-", "_"): value for name, value in zip(names, values, strict=True)}
    documented = msgspec.convert(flags, MediaSettings, strict=False)
    module = qwen_vl_utils()
    assert (documented.fps, documented.fps_min_frames, documented.fps_max_frames) == (
        module.FPS,
        module.FPS_MIN_FRAMES,
        module.FPS_MAX_FRAMES,
    )
    assert (documented.video_min_frame_pixels, documented.video_max_frame_pixels) == (
        module.VIDEO_MIN_TOKEN_NUM * TOKEN,
        module.VIDEO_MAX_TOKEN_NUM * TOKEN,
    )
    assert documented.video_total_pixels == module.MODEL_SEQ_LEN * TOKEN * 0.9


# Lists and folders of frames.


@pytest.fixture
def frame_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "clip"
    folder.mkdir()
    for seed in (1, 2, 10):
        random_image(90, 60, seed=seed).save(folder / f"f{seed}.png")
    (folder / "notes.txt").write_text("not a frame")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def test_a_folder_of_frames_is_a_video_of_its_images_in_natural_order(tmp_path: Path, frame_folder: Path) -> None:
    folder = resolve_frames(tmp_path, "clip", max_bytes=1 << 20)
    assert [frame.name for frame in folder.frames] == ["clip/f1.png", "clip/f2.png", "clip/f10.png"]
    info, frames = decode(folder, MEDIA_VIDEO, MediaSettings())
    assert probe(folder, MEDIA_VIDEO, MediaSettings()) == info
    assert (info.grid.t, info.second_per_grid_t, info.backend) == (2, 1.0, "pillow")  # 2 frames a second
    shape = (info.grid.w * 14, info.grid.h * 14)
    for stored, seed in zip(frames, (1, 2, 10, 10), strict=True):  # an odd count repeats the last
        resized = random_image(90, 60, seed=seed).resize(shape, Image.Resampling.BICUBIC)
        assert (stored == np.asarray(resized).transpose(2, 0, 1)).all()


def test_frames_of_different_sizes_are_not_a_video(frame_folder: Path) -> None:
    random_image(60, 90).save(frame_folder / "f3.png")
    for use in (probe, decode):
        with pytest.raises(MediaError, match=r"'clip/f3\.png' has 60x90 pixels") as caught:
            use(resolve_frames(frame_folder.parent, "clip", max_bytes=1 << 20), MEDIA_VIDEO, MediaSettings())
        assert caught.value.code is ReasonCode.UNSUPPORTED_MEDIA


def test_settings_that_choose_frames_of_a_file_are_refused_for_a_list(frame_folder: Path) -> None:
    video = resolve_frames(frame_folder.parent, "clip", max_bytes=1 << 20)
    with pytest.raises(MediaError, match="nframes chooses frames") as caught:
        decode_frames(video, MediaSettings(), ItemSettings(nframes=2))
    assert caught.value.code is ReasonCode.BAD_FIELD


@pytest.mark.parametrize("names", [[], ["x.txt"]])
def test_a_folder_without_images_is_empty(tmp_path: Path, names: list[str]) -> None:
    (tmp_path / "clip").mkdir()
    for name in names:
        (tmp_path / "clip" / name).write_text("x")
    with pytest.raises(MediaError) as caught:
        resolve_frames(tmp_path, "clip", max_bytes=1 << 20)
    assert caught.value.code is ReasonCode.MEDIA_EMPTY


def test_an_image_that_is_a_folder_and_a_frame_that_leads_out_of_the_root_are_refused(
    tmp_path: Path, frame_folder: Path
) -> None:
    with pytest.raises(MediaError) as caught:
        resolve_media(tmp_path, "clip", max_bytes=1 << 20)
    assert caught.value.code is ReasonCode.UNSUPPORTED_MEDIA
    (frame_folder / "f4.png").symlink_to("/etc/hosts")
    with pytest.raises(MediaError) as caught:
        resolve_frames(tmp_path, "clip", max_bytes=1 << 20)
    assert caught.value.code is ReasonCode.MEDIA_OUTSIDE_ROOT


def test_a_file_url_is_a_path_that_must_lie_below_the_root(tmp_path: Path, frame_folder: Path) -> None:
    outside = ["media_outside_root"]
    for name, codes in {f"file://{frame_folder}": [], "file:///etc": outside, "https://host/x": outside}.items():
        checked = parse_record(json.dumps(record({"type": "video", "video": name})).encode())
        assert checked.annotation is not None
        _, problems = probe_media(checked.annotation, tmp_path, MediaSettings(), {})
        assert [problem.code.value for problem in problems] == codes


# From the annotation to the bin.


def record(part: dict[str, Any], answer: str = "an answer") -> dict[str, Any]:
    content = [part, {"type": "text", "text": "What happens?"}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"


PARTS: dict[str, dict[str, Any]] = {
    "small": {"type": "image", "image": "a.png", "max_pixels": 16 * TOKEN},
    "as the build": {"type": "image", "image": "a.png"},
    "exact": {"type": "image", "image": "a.png", "resized_height": 60, "resized_width": 170},
    "rate": {"type": "video", "video": "x.mp4", "fps": 1.0, "max_pixels": 30 * TOKEN},
    "count": {"type": "video", "video": "x.mp4", "nframes": 2, "max_pixels": 30 * TOKEN},
    "list": {"type": "video", "video": ["clip/f10.png", "clip/f2.png"], "sample_fps": 4, "max_pixels": 20 * TOKEN},
    "inside": {
        "type": "video",
        "video": [data_uri(random_image(90, 60, seed=seed)) for seed in (1, 2, 10)],
        "max_pixels": 20 * TOKEN,
    },
    "folder": {"type": "video", "video": "clip", "max_pixels": 20 * TOKEN},
}
GRIDS = {
    "small": (1, 6, 10),  # 120x200 pixels divided by sqrt(24000 / 12544): 3 by 5 tokens
    "as the build": (1, 8, 14),
    "exact": (1, 4, 12),
    "rate": (3, 4, 4),
    "count": (1, 4, 4),
    "list": (1, 4, 6),
    "inside": (2, 4, 6),
    "folder": (2, 4, 6),
}
SECONDS_PER_STEP = {"rate": 2.0, "count": 6.0, "list": 0.5, "inside": 1.0, "folder": 1.0}


@pytest.fixture
def annotations(tmp_path: Path, frame_folder: Path) -> Path:
    random_image(200, 120).save(tmp_path / "a.png")
    write_video(tmp_path / "x.mp4", 60, 10)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": name, **record(part)}) + "\n" for name, part in PARTS.items()))
    return path


def test_a_build_decodes_every_medium_with_the_settings_of_its_item(
    annotations: Path, frame_folder: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    build(request_for(annotations, tmp_path / "out", tiny_checkpoint), SerialEngine())
    samples = packed_samples(tmp_path / "out")
    rows = {row["id"]: row for row in ledger(tmp_path / "out")}
    media = {name: samples[name][0].media for name, row in rows.items()}
    assert {name: sample_media[0][1] for name, sample_media in media.items()} == GRIDS
    assert {name: row["video_backend"] for name, row in rows.items() if name in ("list", "inside", "folder")} == {
        "list": "pillow",
        "inside": "pillow",
        "folder": "pillow",
    }
    for name, seeds in {"list": (10, 2), "inside": (1, 2, 10, 10), "folder": (1, 2, 10, 10)}.items():
        for stored, seed in zip(media[name][0][2], seeds, strict=True):
            resized = random_image(90, 60, seed=seed).resize((84, 56), Image.Resampling.BICUBIC)
            assert (stored == np.asarray(resized).transpose(2, 0, 1)).all()
    originals = brightness_of(list(PyavVideo(source(tmp_path / "x.mp4")).frames([0, 12, 24, 35, 47, 59])))
    assert brightness_of(media["rate"][0][2].transpose(0, 2, 3, 1)) == pytest.approx(originals, abs=0.5)
    for name, seconds in SECONDS_PER_STEP.items():
        steps = samples[name][0].position_ids[0]
        (t, h, w), pads = GRIDS[name], samples[name][0].input_ids == VIDEO_PAD
        first = int(steps[pads][0])
        expected = np.repeat([first + math.floor(k * seconds * 2) for k in range(t)], h * w // 4)
        assert (steps[pads] == expected).all()


def test_the_same_file_with_other_settings_is_another_medium(tmp_path: Path, frame_folder: Path) -> None:
    """Caches of probes and frames must not hand one out for the other."""
    random_image(200, 120).save(tmp_path / "a.png")
    keys, grids = set(), set()
    probed = ProbeCache()
    for part in ({}, {"max_pixels": 16 * TOKEN}, {"resized_height": 60, "resized_width": 170}):
        data = json.dumps(record({"type": "image", "image": "a.png", **part})).encode()
        annotation = parse_record(data).annotation
        assert annotation is not None
        (medium,), _ = probe_media(annotation, tmp_path, MediaSettings(), {}, probed=probed)
        keys.add(media_key(medium, MediaLocation(tmp_path), MediaSettings()))
        grids.add(medium.grid)
    assert (len(keys), len(grids)) == (3, 3)


@pytest.mark.parametrize("name", PARTS)
def test_shrinking_keeps_frames_and_decodes_what_was_measured(annotations: Path, name: str) -> None:
    checked = parse_record(json.dumps(record(PARTS[name])).encode())
    assert checked.annotation is not None
    media, problems = probe_media(checked.annotation, annotations.parent, MediaSettings(), checked.embedded)
    assert not problems
    template = Template(
        ids=np.asarray([VIDEO_PAD if media[0].media_type else IMAGE_PAD], dtype=np.int32),
        trained=np.asarray([False]),
        media_types=(media[0].media_type,),
    )
    limit = media[0].grid.num_tokens // 2
    (shrunk,) = shrink(lambda _: template, media, limit).media
    assert shrunk.grid.num_tokens <= limit
    assert (shrunk.grid.t, shrunk.second_per_grid_t) == (media[0].grid.t, media[0].second_per_grid_t)
    assert not check_media([shrunk], annotations.parent, MediaSettings(), checked.embedded)


def test_a_video_with_too_many_frames_for_its_file_is_rejected_with_the_reason(
    annotations: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    part = {"type": "video", "video": "x.mp4", "nframes": 100}
    annotations.write_text(json.dumps(record(part)) + "\n" + json.dumps(record(PARTS["count"])) + "\n")
    build(request_for(annotations, tmp_path / "out", tiny_checkpoint), SerialEngine())
    rejected, packed = ledger(tmp_path / "out")
    assert (rejected["codes"], packed["status"]) == (["bad_field"], "packed")
    assert "100 frames would be sampled; allowed: 2 to 60" in rejected["message"]


def test_settings_that_no_medium_of_a_chunk_uses_are_not_in_its_key(tmp_path: Path) -> None:
    def key(kinds: list[int], **changes: Any) -> Path:
        task = ScanTask(
            folder=tmp_path,
            file=tmp_path / "a.jsonl",
            file_hash="0",
            modified_ns=None,
            chunk=Chunk(kind="lines", start=0, stop=1, first_line=1, first_record=0, num_records=1),
            copies=b"\1\0",
            media_root=tmp_path,
            media=MediaSettings(**changes),
            reserved="reject",
            strict_fields=False,
            tokenizer=tmp_path,
            tokenizer_hash="0",
            shrink_to=None,
        )
        return part_path(task, kinds)

    for change in ({"video_sampling": "fps"}, {"fps": 1.0}, {"fps_max_frames": 8}, {"video_total_pixels": TOKEN}):
        assert key([MEDIA_IMAGE], **change) == key([MEDIA_IMAGE])
        assert key([MEDIA_VIDEO], **change) != key([MEDIA_VIDEO])
