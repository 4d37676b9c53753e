"""The ledger's totals against numpy; what the planning process hands to a writer, and how little it weighs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import prep.build.pipeline
from prep.build.distribution import ValueCounts
from prep.build.write import WriteTask, write_shard
from tests.prep.corpus import turn
from tests.prep.finished import build_set


@given(st.lists(st.lists(st.integers(0, 5000), max_size=30), max_size=6))
def test_distributions_are_those_of_all_values_together(parts: list[list[int]]) -> None:
    counts = ValueCounts()
    for part in parts:
        counts.add(np.asarray(part, dtype=np.int32))
    values = np.asarray([value for part in parts for value in part], dtype=np.int64)
    distribution = counts.distribution()
    if not values.size:
        assert distribution is None
        return
    assert distribution is not None
    assert (distribution.total, distribution.mean) == (values.sum(), values.sum() / values.size)
    quantiles = np.quantile(values, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf").tolist()
    assert [distribution.min, distribution.p50, distribution.p90, distribution.p99, distribution.max] == quantiles


def test_a_write_task_weighs_17_bytes_a_sample(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tasks of two sets of one chunk and different sizes differ by the weight of their samples alone."""
    monkeypatch.setattr("prep.annotations.json_records.FIRST_CHUNK_RECORDS", 600)
    weights: dict[int, int] = {}

    def weighed(task: WriteTask) -> object:
        weights[task.part.size] = len(pickle.dumps(task))
        return write_shard(task)

    monkeypatch.setattr(prep.build.pipeline, "write_shard", weighed)
    for num_samples in (100, 600):
        annotations = tmp_path / f"{num_samples}.jsonl"
        records = ({"id": f"sample-{index}", "conversations": turn(f"Say {index}.")} for index in range(num_samples))
        annotations.write_text("\n".join(json.dumps(record) for record in records))
        build_set(annotations, tmp_path / f"out-{num_samples}", tiny_checkpoint)
    num_bin_starts = 8 * 30
    assert (weights[600] - weights[100]) / 500 <= 17 + num_bin_starts / 500
