"""Measuring equals encoding: what the scan counted from headers is what lies in the bins, for random data and settings.

Every example is a full build of a few random records, which draw from images and videos that are made once.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prep.samples.tokenizer
from schemas.qwen import CONTROL_TOKENS
from schemas.settings import BuildSettings, MediaSettings
from storage.shard_set import read_manifest
from tests.prep.finished import build_set
from tests.prep.packed import Packed, packed_samples
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

pytestmark = pytest.mark.slow

Record = dict[str, Any]

IMAGES = {
    f"{width}x{height}.png": (width, height)
    for width, height in [(1, 1), (28, 28), (29, 55), (200, 1), (640, 480), (70, 700), (14, 13), (500, 500)]
}
VIDEOS = {f"{frames}-{fps}.mp4": (frames, fps) for frames, fps in [(1, 5), (2, 1), (3, 1), (7, 2), (40, 2), (75, 1)]}

TOKEN = 28 * 28
TOO_LONG = "too_long"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measuring")
    for index, (name, (width, height)) in enumerate(IMAGES.items()):
        random_image(width, height, "RGBA" if index % 2 else "RGB", seed=index).save(folder / name)
    for index, (name, (frames, fps)) in enumerate(VIDEOS.items()):
        write_video(folder / name, frames, fps, width=64 + 30 * index, height=150 - 20 * index)
    return folder


words = st.one_of(
    st.text(max_size=15).map(lambda text: text.replace("<", "(")),
    st.sampled_from(["assistant", "\n", " \n\n", "user\n", "e\u0301", "👩🏽‍💻", "  ", "<nothing>", "long words " * 30]),
    st.sampled_from(sorted(CONTROL_TOKENS)),
)
sentences = st.lists(words, max_size=4).map("".join)


@st.composite
def records(draw: st.DrawFn) -> Record:
    """A conversation of one to three exchanges with up to four media anywhere in the questions."""
    images: list[str] = []
    videos: list[str] = []
    turns: list[dict[str, str]] = []
    if draw(st.booleans()):
        turns.append({"from": "system", "value": draw(sentences) + "."})
    for _ in range(draw(st.integers(1, 3))):
        pieces = [draw(sentences)]
        for kind in draw(st.lists(st.sampled_from(["image", "image", "video"]), max_size=2)):
            pieces += [f"<{kind}>", draw(sentences)]
            if kind == "image":
                images.append(draw(st.sampled_from(sorted(IMAGES))))
            else:
                videos.append(draw(st.sampled_from(sorted(VIDEOS))))
        turns.append({"from": "human", "value": "".join(pieces) + "?"})
        turns.append({"from": "gpt", "value": draw(sentences) + "!"})
    return {"images": images, "videos": videos, "conversations": turns}


@st.composite
def media_settings(draw: st.DrawFn) -> MediaSettings:
    low, frame_low = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    least = draw(st.integers(1, 6))
    return MediaSettings(
        min_pixels=low * TOKEN,
        max_pixels=(low + draw(st.integers(0, 150))) * TOKEN + draw(st.integers(0, TOKEN)),
        video_min_frame_pixels=frame_low * TOKEN,
        video_max_frame_pixels=(frame_low + draw(st.integers(0, 30))) * TOKEN,
        video_min_frames=least,
        video_max_frames=least + draw(st.integers(0, 8)),
        base_interval=draw(st.sampled_from([0.3, 1.0, 4.0, 17.5])),
        boxes="off",
    )


build_settings = st.builds(
    BuildSettings,
    media=media_settings(),
    max_length=st.sampled_from([64, 150, 333, 800, 2000]),
    max_patches=st.sampled_from([None, 64, 900]),
    packer=st.sampled_from(["bfd", "binpacking"]),
    overlong=st.sampled_from(["reject", "shrink"]),
    reserved=st.sampled_from(["reject", "escape"]),
    shard_bytes=st.sampled_from([1, 300_000, 1 << 29]),
)


def build_and_read(
    dataset: list[Record], media: Path, checkpoint: Path, how: BuildSettings
) -> tuple[list[dict[str, Any]], dict[str, list[Packed]]]:
    """Ledger and samples of a build of ``dataset`` and of one short text, so that there is something to pack."""
    short = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    lines = [json.dumps(record | {"id": f"r{index}"}) for index, record in enumerate([short, *dataset])]
    annotations = media / "annotations.jsonl"
    annotations.write_text("\n".join(lines))
    with tempfile.TemporaryDirectory() as folder:
        out = build_set(annotations, Path(folder), checkpoint, how)
        rows: list[dict[str, Any]] = pq.read_table(out / "samples.parquet").to_pylist()
        bins = pq.read_table(out / "bins.parquet").to_pylist()
        samples = packed_samples(out)
        counts = read_manifest(out).counts
    packed = [row for row in rows if row["status"] == "packed"]
    assert len(rows) == counts.num_annotations == len(dataset) + 1
    assert len(packed) == counts.num_packed == sum(len(bin_) for name, bin_ in samples.items() if "/" in name)
    for name in ("num_tokens", "num_targets", "num_patches"):
        assert sum(row[name] for row in packed) == sum(row[name] for row in bins) == getattr(counts, name)
    return rows, samples


def changed(how: BuildSettings, **changes: Any) -> BuildSettings:
    return BuildSettings(**{**{name: getattr(how, name) for name in how.__struct_fields__}, **changes})


def only_one_token_each(how: BuildSettings) -> BuildSettings:
    """The same settings with images and frames of one token each, in bins that hold everything."""
    sizes = {name: getattr(how.media, name) for name in how.media.__struct_fields__}
    sizes.update(dict.fromkeys(["min_pixels", "max_pixels", "video_min_frame_pixels", "video_max_frame_pixels"], TOKEN))
    return changed(how, media=MediaSettings(**sizes), max_length=1 << 20, overlong="reject")


@pytest.fixture(scope="module", autouse=True)
def fingerprints_once(tiny_checkpoint: Path) -> Any:
    """Read the checkpoint's fingerprints once: they do not change, and take most of the time of a small build."""
    files = prep.samples.tokenizer.find_model_files(str(tiny_checkpoint))
    fingerprints = prep.samples.tokenizer.read_fingerprints(files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prep.build.pipeline.read_fingerprints", lambda _: fingerprints)
        yield


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(dataset=st.lists(records(), min_size=1, max_size=8), how=build_settings)
def test_what_was_measured_is_what_the_bins_hold(
    media: Path, tiny_checkpoint: Path, dataset: list[Record], how: BuildSettings
) -> None:
    rows, samples = build_and_read(dataset, media, tiny_checkpoint, how)
    lengths: Counter[int] = Counter()
    patches: dict[int, list[int]] = {}
    for row in rows:
        if row["status"] != "packed":
            assert row["codes"] in ([TOO_LONG], ["reserved_token"]), row["message"]
            assert (row["codes"] == ["reserved_token"]) <= (how.reserved == "reject")
            continue
        (sample,) = samples[row["id"]]
        assert (row["bin"], row["slot"]) == (sample.bin, sample.slot)
        assert row["num_tokens"] == sample.input_ids.size == sample.labels.size == sample.position_ids.shape[1]
        assert row["num_targets"] == np.count_nonzero(sample.labels != -100) > 0
        assert row["num_patches"] == sample.num_patches
        assert np.isin(sample.input_ids, [151655, 151656]).sum() == sample.num_patches // 4
        lengths[sample.bin] += sample.input_ids.size
        patches.setdefault(sample.bin, []).append(sample.num_patches)
    assert max(lengths.values()) <= how.max_length
    if how.max_patches is not None:
        assert all(
            sum(in_bin) <= how.max_patches or len([num_patches for num_patches in in_bin if num_patches]) == 1
            for in_bin in patches.values()
        )


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(dataset=st.lists(records(), min_size=1, max_size=5), how=build_settings)
def test_shrinking_rejects_only_what_does_not_fit_at_one_token_a_frame(
    media: Path, tiny_checkpoint: Path, dataset: list[Record], how: BuildSettings
) -> None:
    """Compared with a build whose pixel bounds are those of one token, whatever the size of the media."""
    how = changed(how, overlong="shrink")
    rows, samples = build_and_read(dataset, media, tiny_checkpoint, how)
    _, smallest = build_and_read(dataset, media, tiny_checkpoint, only_one_token_each(how))
    for row in rows:
        if row["codes"] == ["reserved_token"]:
            continue
        (least,) = smallest[row["id"]]
        if row["status"] == "packed":
            (sample,) = samples[row["id"]]
            text = [
                np.delete(s.input_ids, np.flatnonzero(np.isin(s.input_ids, [151655, 151656]))) for s in (sample, least)
            ]
            assert np.array_equal(*text), "shrinking touches media only"
            assert [(kind, grid[0]) for kind, grid, _ in sample.media] == [
                (kind, grid[0]) for kind, grid, _ in least.media
            ]
        else:
            assert row["codes"] == [TOO_LONG]
            assert least.input_ids.size > how.max_length


def test_shrinking_goes_down_to_the_last_token(media: Path, tiny_checkpoint: Path) -> None:
    """Twenty images and a video that fit only at their smallest: one token less is too long. (A frame four times as
    wide as high has two tokens at least, by the arithmetic of the reference.)"""
    record = {
        "images": ["640x480.png"] * 20,
        "videos": ["75-1.mp4"],
        "conversations": [{"from": "human", "value": "<image>" * 20 + "<video>"}, {"from": "gpt", "value": "Yes."}],
    }
    how = BuildSettings(overlong="shrink")
    _, smallest = build_and_read([record], media, tiny_checkpoint, only_one_token_each(how))
    least = smallest["r1"][0]
    assert [t * h * w // 4 for _, (t, h, w), _ in least.media] == [1] * 20 + [8]
    fitting, _ = build_and_read([record], media, tiny_checkpoint, changed(how, max_length=least.input_ids.size))
    too_long, _ = build_and_read([record], media, tiny_checkpoint, changed(how, max_length=least.input_ids.size - 1))
    assert (fitting[1]["status"], fitting[1]["num_tokens"]) == ("packed", least.input_ids.size)
    assert too_long[1]["codes"] == [TOO_LONG]
