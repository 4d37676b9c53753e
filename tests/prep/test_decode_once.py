"""A reused medium is probed once per chunk and decoded once per shard, and the bytes of the shards do not change."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from prep.build.pipeline import build
from prep.engines import SerialEngine
from prep.media import caches
from prep.media.caches import FrameCache, ProbeCache
from prep.media.decode import MediaInfo
from prep.media.sandbox import Sandbox
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE
from schemas.errors import MediaError
from schemas.qwen import Grid
from schemas.settings import BuildSettings
from tests.prep.corpus import turn
from tests.prep.packed import packed_samples
from tests.prep.test_build import contents, ledger, leftovers, request_for
from tests.prep.test_videos import write_video

pytestmark = pytest.mark.slow


class Requests:
    """Probes and decodes that reached the decoder process, counted by the name of the medium."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kinds = {"probe": Counter[str](), "decode": Counter[str]()}
        for kind, counted in self.kinds.items():
            monkeypatch.setattr(Sandbox, kind, self._watched(getattr(Sandbox, kind), counted))

    @staticmethod
    def _watched(real: Any, counted: Counter[str]) -> Any:
        def request(box: Sandbox, source: Any, *rest: Any) -> Any:
            counted[source.name] += 1
            return real(box, source, *rest)

        return request


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> Requests:
    return Requests(monkeypatch)


def write_corpus(folder: Path, *, share: bool, num: int = 12) -> Path:
    """Records that share one image, one video and one truncated image, or have a copy of each."""
    folder.mkdir(parents=True)
    colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((150, 220)).save(folder / "image.png")
    Image.fromarray(colours).resize((300, 300)).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:700])
    write_video(folder / "video.mp4", 12, 2)

    def medium(name: str, index: int) -> str:
        if share:
            return name
        own = f"{index}-{name}"
        shutil.copy(folder / name, folder / own)
        return own

    records: list[dict[str, Any]] = []
    for index in range(num):
        image, video, cut = (medium(name, index) for name in ("image.png", "video.mp4", "cut.jpg"))
        records += [
            {"images": [image, image], "conversations": turn("<image> and <image>")},
            {"image": image, "video": video, "conversations": turn("<video> of this <image>?")},
            {"image": cut, "conversations": turn("<image>")},
        ]
    lines = [json.dumps({"id": index, **record}) for index, record in enumerate(records)]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "a.jsonl"


ONE_SHARD = BuildSettings(max_length=1500)
MANY_SHARDS = BuildSettings(max_length=1500, shard_bytes=2_000_000)


@pytest.mark.parametrize("settings", [ONE_SHARD, MANY_SHARDS])
def test_shared_media_are_decoded_once_per_shard_and_give_the_bytes_of_separate_copies(
    tmp_path: Path, tiny_checkpoint: Path, requests: Requests, settings: BuildSettings
) -> None:
    shared = write_corpus(tmp_path / "shared", share=True)
    manifest = build(request_for(shared, tmp_path / "one", tiny_checkpoint, settings), SerialEngine())
    assert requests.kinds["probe"] == {"image.png": 1, "video.mp4": 1, "cut.jpg": 1}
    num_shards = len(manifest.shards)
    assert (num_shards == 1) == (settings is ONE_SHARD)
    if num_shards == 1:
        assert requests.kinds["decode"] == {"image.png": 1, "video.mp4": 1, "cut.jpg": 1}
    else:
        assert all(1 <= count <= num_shards for count in requests.kinds["decode"].values())
    assert manifest.counts.rejects_by_code == {"media_unreadable": 12}

    separate = write_corpus(tmp_path / "separate", share=False)
    build(request_for(separate, tmp_path / "two", tiny_checkpoint, settings), SerialEngine())
    # Shards do not contain the names of media, so equal pixels give equal bytes.
    shared_files, separate_files = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {name: data for name, data in shared_files.items() if name.endswith(".tar")} == {
        name: data for name, data in separate_files.items() if name.endswith(".tar")
    }
    assert leftovers(tmp_path / "one") == []


def test_a_broken_medium_is_tried_once_and_fails_every_sample_with_its_message(
    tmp_path: Path, tiny_checkpoint: Path, requests: Requests
) -> None:
    build(
        request_for(write_corpus(tmp_path / "in", share=True), tmp_path / "out", tiny_checkpoint, ONE_SHARD),
        SerialEngine(),
    )
    assert requests.kinds["decode"]["cut.jpg"] == 1
    failed = [row["message"] for row in ledger(tmp_path / "out") if row["codes"] == ["media_unreadable"]]
    assert len(failed) == 12
    assert len(set(failed)) == 1
    assert "'cut.jpg' cannot be decoded" in failed[0]


def test_one_image_at_two_sizes_is_decoded_twice(tmp_path: Path, tiny_checkpoint: Path, requests: Requests) -> None:
    """The images of an overlong sample are shrunk; the other samples keep the full size."""
    colours = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((560, 560)).save(tmp_path / "p.png")
    records = [{"image": "p.png", "conversations": turn("<image>")} for _ in range(4)]
    records.append({"images": ["p.png"] * 4, "conversations": turn("<image>" * 4)})
    (tmp_path / "a.json").write_text(json.dumps(records))
    settings = BuildSettings(max_length=1000, overlong="shrink")
    manifest = build(request_for(tmp_path / "a.json", tmp_path / "out", tiny_checkpoint, settings), SerialEngine())
    assert manifest.counts.num_packed == 5
    assert requests.kinds["decode"] == {"p.png": 2}


def test_embedded_media_with_equal_names_are_not_confused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    images = []
    for level in (40, 200):
        buffer = io.BytesIO()
        Image.new("RGB", (112, 112), (level, level, level)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": "same.png"})
    rows = [{"id": str(index), "image": images[index % 2], "conversations": turn("<image>")} for index in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    build(request_for(tmp_path / "a.parquet", tmp_path / "out", tiny_checkpoint, ONE_SHARD), SerialEngine())
    packed = packed_samples(tmp_path / "out")
    levels = [set(packed[str(index)][0].media[0][2].ravel().tolist()) for index in range(4)]
    assert levels == [{40}, {200}, {40}, {200}]


def test_reused_media_are_decoded_once(tmp_path: Path) -> None:
    assert decoded_once(tmp_path, [b"a", b"b", b"a", b"b", b"a"]) == 2
    assert decoded_once(tmp_path, [b"a", b"b", b"c"]) == 3


def decoded_once(folder: Path, keys: list[bytes]) -> int:
    """Get media whose frames differ by key, and return how many were decoded. Checks that no file remains."""
    decodes = 0

    def decode(key: bytes) -> tuple[MediaInfo, np.ndarray[Any, np.dtype[np.uint8]]]:
        nonlocal decodes
        decodes += 1
        return MediaInfo(Grid(1, 2, 2), 28, 28), np.full((1, 3, 28, 28), key[0], dtype=np.uint8)

    with FrameCache(keys, folder) as cache:
        for key in keys:
            info, frames = cache.get(key, lambda key=key: decode(key))  # type: ignore[misc]
            assert info.grid == Grid(1, 2, 2)
            assert (frames == key[0]).all()
            frames[:] = 0
    assert list(folder.iterdir()) == []
    return decodes


def test_a_medium_is_dropped_after_its_last_use(tmp_path: Path) -> None:
    with FrameCache([b"a", b"a", b"b"], tmp_path) as cache:
        assert not cache.has(b"a")
        for expected in (True, False):
            cache.get(b"a", lambda: (MediaInfo(Grid(1, 2, 2), 28, 28), np.zeros((1, 3, 28, 28), dtype=np.uint8)))
            assert cache.has(b"a") is expected
        cache.get(b"b", lambda: (MediaInfo(Grid(1, 2, 2), 28, 28), np.zeros((1, 3, 28, 28), dtype=np.uint8)))
        assert not cache.has(b"b")


def test_on_a_full_disk_media_are_decoded_at_every_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(caches.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", 0))  # noqa: SIM115
        assert decoded_once(tmp_path, [b"a", b"b", b"a", b"b", b"a"]) == 5
    assert decoded_once(tmp_path, [b"a", b"b", b"a", b"b", b"a"]) == 2


def test_the_probe_cache_evicts_the_least_recently_used_medium(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "_MAX_PROBED", 3)
    cache, num_probes = ProbeCache(), Counter[str]()

    def probe(name: str) -> MediaInfo:
        num_probes[name] += 1
        if name == "broken":
            raise MediaError(ReasonCode.MEDIA_MISSING, "'broken' does not exist")
        return MediaInfo(Grid(1, 2, 2), 28, 28)

    for name in ("a", "b", "broken", "a", "broken", "c", "b", "a", "broken"):
        try:
            cache.get((name, MEDIA_IMAGE), lambda name=name: probe(name))  # type: ignore[misc]
        except MediaError as error:
            assert (name, error.code) == ("broken", ReasonCode.MEDIA_MISSING)
        else:
            assert name != "broken"
    # c evicts b, which was used before a and broken. Then b evicts a, a evicts broken, and broken evicts c.
    assert num_probes == {"a": 2, "b": 2, "broken": 2, "c": 1}
