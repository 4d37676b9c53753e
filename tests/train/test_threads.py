"""Threads do the CPU work of a batch, in array operations, whatever step a run starts at."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bins import Bin
from storage import bins
from storage import reading as storage
from storage.bins import BinLocation
from tests.train.synthetic import Sample, make_bins, make_medium, make_sample, write_shards
from train.batches import batch as batch_module
from train.batches import workers as workers_module
from train.batches.stream import BinStream
from train.order.dealing import DataOrder, Grouping
from train.shards import reader as reader_module
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import BinReader, ReadSettings

BINS = make_bins(num_bins=10)


@pytest.mark.parametrize(
    ("codec", "decode"), [("zstd", "_decompress"), ("jpeg", "decode_jpegs"), ("raw", "_require_size")]
)
def test_threads_read_decode_and_compute_boundaries_windows_and_rotary_positions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, decode: str
) -> None:
    """Residuals are left for the device to undo."""
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=8), codec=codec))
    order = DataOrder(index.cost(), seed=0, global_batch=4, epochs=1)
    done_by: Counter[tuple[str, bool]] = Counter()

    def watch(owner: Any, name: str) -> None:
        work = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            done_by[name, threading.current_thread().name.startswith("bin-stream-")] += 1
            return work(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    for owner, name in (
        (BinReader, "read"),
        (workers_module, "build_micro_batch"),  # sample boundaries and target positions
        (batch_module, "vision_inputs"),  # windows, rotary positions, frame boundaries
        (batch_module, decode),
    ):
        watch(owner, name)
    with BinStream(index, order, rank=0, world_size=1, accumulation=4, per_device=1) as stream:
        residuals = [micro.vision.residuals for batch in stream for micro in batch.micro_batches if micro.bins]
    assert {name: count for (name, _), count in done_by.items()} == {
        "read": 8,
        "build_micro_batch": 8,
        "vision_inputs": 8,
        decode: 6,  # two of the eight bins are text only
    }
    assert all(by_thread for _, by_thread in done_by)
    assert residuals.count(True) == (6 if codec == "zstd" else 0)


def lines_of_python(work: Callable[[], object]) -> int:
    """Count the executed Python lines, of this project and of all libraries."""
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def lines_of_batch(folder: Path, samples: list[Sample], codec: str) -> tuple[int, int]:
    """Count the lines that read a bin and build its batch, once caches are warm; return them and the bin's bytes."""
    index = open_shards(write_shards(folder, [samples], codec=codec))
    reader = BinReader(index)

    def work() -> None:
        loaded = reader.read(0)
        workers_module.build_micro_batch([loaded.bin], memory=[loaded.buffer])

    work()
    return lines_of_python(work), int(index.num_bytes[0])


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_the_executed_python_lines_do_not_grow_with_the_tokens_of_a_bin(tmp_path: Path, codec: str) -> None:
    """A thousand times the text adds no line. More pixels add one iteration of the reading loop per half MiB."""

    def lines(name: str, *, num_text: int, num_targets: int, side: int) -> tuple[int, int]:
        rng = np.random.default_rng(0)
        media = [make_medium(rng, side, side), make_medium(rng, side, side, steps=2)]
        return lines_of_batch(tmp_path / name, [make_sample(rng, media, num_text, num_targets)], codec)

    few, few_bytes = lines("few", num_text=20, num_targets=15, side=4)
    assert few_bytes < storage._DIGEST_BYTES
    assert lines("words", num_text=20_000, num_targets=15_000, side=4)[0] == few
    many, many_bytes = lines("pixels", num_text=20, num_targets=15, side=48)
    assert many_bytes > 3 * storage._DIGEST_BYTES
    lines_per_iteration = 4
    assert 0 < many - few <= lines_per_iteration * (many_bytes // storage._DIGEST_BYTES)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return open_shards(write_shards(tmp_path_factory.mktemp("resumed") / "set", BINS))


def test_verify_first_checks_each_bin_once_per_run_and_again_after_resume(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs of ten bins in steps of four; checks before the interruption do not count after it."""
    order = DataOrder(index.cost(), seed=1, global_batch=4, epochs=3)
    compared: Counter[int] = Counter()
    compare = bins.check_digest

    def counted(location: BinLocation, xxh3: int) -> None:
        compared[location.local_bin] += 1
        compare(location, xxh3)

    monkeypatch.setattr(bins, "check_digest", counted)

    def run(start: int, verify: str) -> Counter[int]:
        compared.clear()
        read, layout = ReadSettings(verify=verify), {"rank": 0, "world_size": 1, "accumulation": 4, "per_device": 1}
        with BinStream(index, order, **layout, start_step=start, num_threads=1, read=read) as stream:
            assert [batch.step for batch in stream] == list(range(start, 8))
        return Counter(compared)

    assert run(0, "first") == dict.fromkeys(range(10), 1)
    assert run(5, "first") == dict.fromkeys(range(10), 1)
    assert run(0, "always") == dict.fromkeys(range(10), 3)
    assert run(0, "never") == {}


@pytest.mark.parametrize(("verify", "times"), [("always", 1), ("first", 3), ("never", 3)])
def test_contents_are_checked_with_every_read_unless_the_checksum_shows_that_they_have_passed(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch, verify: str, times: int
) -> None:
    """Three reads of each bin. With ``first``, only the first compares the checksum."""
    checked: Counter[int] = Counter()
    check = reader_module.check_samples

    def counted(bin_: Bin, **options: Any) -> None:
        checked[bin_.index] += 1
        check(bin_, **options)

    monkeypatch.setattr(reader_module, "check_samples", counted)
    reader = BinReader(index, ReadSettings(verify=verify))
    for bin_id in [*range(10)] * 3:
        reader.read(bin_id)
    assert checked == dict.fromkeys(range(10), times)


@settings(deadline=None, max_examples=25)
@given(
    parts=st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1, max_size=4),
    grouping=st.sampled_from([None, Grouping(steps=2, runs=3)]),
    epochs=st.sampled_from([None, 2.5]),
)
def test_a_run_resumed_on_changing_numbers_of_ranks_hands_out_the_same_steps(
    index: ShardIndex, parts: list[tuple[int, int]], grouping: Grouping | None, epochs: float | None
) -> None:
    """Each part resumes from the stream state of the previous part. Together, its ranks get the bins of every step of
    the unbroken run exactly once, with their tokens. 2.5 epochs of ten bins end inside step 2."""
    order = DataOrder(index.cost(), seed=5, global_batch=12, epochs=epochs, grouping=grouping)
    state, step = order.state_dict(0), 0
    for num_steps, world in parts:
        start = order.step_of(state)
        assert start == step
        end = step + num_steps
        layout = {"world_size": world, "accumulation": 12 // world, "per_device": 1}
        streams = [
            BinStream(index, order, rank=rank, **layout, start_step=start, end_step=end) for rank in range(world)
        ]
        for batches in zip(*streams):
            expected = sorted(order.global_bins(step).tolist())
            micros = [micro for batch in batches for micro in batch.micro_batches]
            assert sorted(bin_id for micro in micros for bin_id in micro.bins) == expected
            assert len(micros) == 12
            for micro in micros:
                samples = BINS[micro.bins[0]] if micro.bins else []
                assert micro.input_ids[0].tolist() == [n for sample in samples for n in sample.input_ids.tolist()] or [
                    0
                ]
                assert micro.targets.numel() == sum(int((sample.labels != -100).sum()) for sample in samples)
            assert {batch.num_targets for batch in batches} == {sum(micro.targets.numel() for micro in micros)}
            step += 1
        assert step == min(end, order.num_steps or end)
        states = [stream.state_dict() for stream in streams]
        for stream in streams:
            stream.close()
        state = states[0]
        assert all(other == state for other in states)
