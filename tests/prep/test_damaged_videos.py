"""A damaged video gives the same frames, or the same error, every time it is decoded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.engines import SerialEngine
from prep.engines.local import LocalEngine
from prep.media.sandbox import Sandbox
from schemas.settings import BuildSettings
from tests.prep.corpus import turn
from tests.prep.damaged_videos import CODECS, SETTINGS, encoded, flipped, outcomes

NUM_OF_A_CODEC = 300
"""As many as ``python -m tests.prep.damaged_videos`` decodes."""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_video_decodes_to_the_same_five_times(tmp_path: Path, box: Sandbox, codec: str) -> None:
    name, content = encoded(codec, tmp_path)
    counts = outcomes(box, list(flipped(name, content, NUM_OF_A_CODEC)), rounds=5)
    assert [dict(seen) for seen in counts if len(seen) > 1] == []
    results = [next(iter(seen)) for seen in counts]
    assert len(set(results)) > 3, "the flips change nothing"
    assert any(result.startswith("pyav ") for result in results)
    assert not any("crashes" in result for result in results)


def test_damaged_videos_give_the_same_shards_for_any_number_of_workers(tmp_path: Path, demo_checkpoint: Path) -> None:
    records = []
    for number, codec in enumerate(CODECS):
        name, content = encoded(codec, tmp_path)
        for index, source in enumerate(flipped(name, content, 6)):
            video = f"{number}-{index}-{name}"
            (tmp_path / video).write_bytes(source.data or b"")
            records.append({"id": video, "video": video, "conversations": turn("<video>?", "yes")})
    annotations = tmp_path / "a.jsonl"
    annotations.write_text("\n".join(map(json.dumps, records)))
    request = BuildRequest(
        sources=tuple(find_sources(str(annotations), registry=None, media_root=None, media=SETTINGS)),
        out=tmp_path / "serial",
        settings=BuildSettings(max_length=256, media=SETTINGS),
        model=str(demo_checkpoint),
        max_rejected=Fraction(1),
    )
    counts = build(request, SerialEngine()).counts
    assert min(counts.num_packed, counts.num_rejected) > 5
    with LocalEngine(2) as engine:
        build(replace(request, out=tmp_path / "local"), engine)
    names = sorted(path.name for path in (tmp_path / "serial").iterdir() if path.suffix in (".tar", ".parquet"))
    assert len(names) > 2
    for name in (*names, "manifest.json"):
        assert (tmp_path / "local" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()
