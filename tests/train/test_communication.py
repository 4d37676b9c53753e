"""Two ranks exchange gradients in few large messages, and wait for them as rarely as the documentation says."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.train.communication import NUM_MICRO_STEPS, Case, count
from tests.train.launching import made_once, run_ranks
from tests.train.synthetic import make_bins, write_shards

pytestmark = pytest.mark.slow

BFLOAT16, FLOAT32 = 2, 4
"""Bytes of a scalar."""

SMALL_BUCKETS = {"reduce_bucket_size": 64 * 64}
"""The square of the hidden size, which transformers fills in."""

ALONE = {"overlap_comm": False}

CASES: dict[str, Case] = {
    "chosen": (None, "bfloat16", {}),
    "zero1": ("zero1.json", "bfloat16", {}),
    "zero1, float32": ("zero1.json", "float32", {}),
    "zero1, float32, no overlap": ("zero1.json", "float32", ALONE),
    "zero2": ("zero2.json", "bfloat16", {}),
    "zero2, small buckets": ("zero2.json", "bfloat16", SMALL_BUCKETS),
    "zero2, no overlap": ("zero2.json", "bfloat16", ALONE),
    "zero3": ("zero3.json", "bfloat16", {}),
    "zero3, small buckets": ("zero3.json", "bfloat16", SMALL_BUCKETS),
    "zero3, no overlap": ("zero3.json", "bfloat16", ALONE),
}


@pytest.fixture(scope="module")
def counts(tiny_vocab_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two ranks counted in a step of every case."""

    def run(out: Path) -> None:
        out.mkdir()
        shards = write_shards(out / "shards", make_bins(num_bins=4))
        prepare = partial(count, tiny_vocab_checkpoint, shards, out / "counts.json", list(CASES.values()))
        done = run_ranks(2, prepare=prepare)
        assert done.returncode == 0, done.stderr

    folder = made_once(tmp_path_factory, "communication", run)
    return dict(zip(CASES, json.loads((folder / "counts.json").read_text()), strict=True))


@pytest.mark.parametrize(("name", "width"), [("zero1", BFLOAT16), ("zero1, float32", FLOAT32)])
def test_zero_1_reduces_gradients_once_a_step(counts: dict[str, Any], name: str, width: int) -> None:
    *before, last = counts[name]["reductions"]
    assert before == [[]] * (NUM_MICRO_STEPS - 1)
    assert sum(last) == width * counts[name]["trained"]


def test_a_run_with_room_for_it_reduces_gradients_once_a_step_unless_a_file_is_named(counts: dict[str, Any]) -> None:
    """As many bytes in a step as ZeRO-2 in each of its forward passes."""
    assert counts["chosen"] == counts["zero1"]
    assert counts["chosen"]["file"] == "zero1.json"
    chosen, zero2 = (sum(map(sum, counts[name]["reductions"])) for name in ("chosen", "zero2"))
    assert zero2 == NUM_MICRO_STEPS * chosen


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_zero_2_and_3_reduce_gradients_once_a_micro_step_and_in_few_messages(
    counts: dict[str, Any], stage: str
) -> None:
    """All gradients of the tiny model fit one bucket. A bucket of the size in transformers holds one matrix."""
    num_bytes = BFLOAT16 * counts[stage]["trained"]
    assert counts[stage]["reductions"] == NUM_MICRO_STEPS * [[num_bytes]]
    for messages in counts[f"{stage}, small buckets"]["reductions"]:
        assert len(messages) > 20
        assert sum(messages) == pytest.approx(num_bytes, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "num_streams", "num_host"),
    [
        ("zero1", 0, 0),
        ("zero1, float32, no overlap", 0, 0),
        ("zero2", 2, 1),
        ("zero2, no overlap", 0, 0),
        ("zero3", 69, 1),
        ("zero3, no overlap", 0, 1),
    ],
)
def test_a_backward_pass_waits_as_often_as_documented(
    counts: dict[str, Any], name: str, num_streams: int, num_host: int
) -> None:
    """Streams of the device for each other: twice a bucket in ZeRO-2, once a parameter in ZeRO-3; and the host."""
    for waited in counts[name]["waits"]:
        assert (waited.get("streams", 0), waited.get("host", 0)) == (num_streams, num_host)


def test_small_buckets_make_the_streams_wait_more_often(counts: dict[str, Any]) -> None:
    few, many = (sum(step["streams"] for step in counts[name]["waits"]) for name in ("zero2", "zero2, small buckets"))
    assert many > 20 * few
