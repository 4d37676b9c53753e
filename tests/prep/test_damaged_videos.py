"""A damaged video gives the same frames, or the same error, every time it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from prep.media.sandbox import Sandbox
from tests.prep.damaged_videos import CODECS, encoded, flipped, outcomes

NUM_OF_A_CODEC = 24
"""``python -m tests.prep.damaged_videos`` decodes 300."""


@pytest.fixture(scope="module")
def box() -> Iterator[Sandbox]:
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@pytest.mark.parametrize("codec", CODECS)
def test_a_damaged_video_decodes_to_the_same_five_times(tmp_path: Path, box: Sandbox, codec: str) -> None:
    name, content = encoded(codec, tmp_path)
    counts = outcomes(box, list(flipped(name, content, NUM_OF_A_CODEC)), rounds=5)
    assert [dict(seen) for seen in counts if len(seen) > 1] == []
    results = [next(iter(seen)) for seen in counts]
    assert len(set(results)) > 3, "the flips change nothing"
    assert any(result.startswith("pyav ") for result in results)
    assert not any("crashes" in result for result in results)
