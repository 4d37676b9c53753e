"""The stream hands out exactly the bins of the order, and stops at the first wrong byte."""

from __future__ import annotations

import dataclasses
import itertools
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.errors import ConfigError, ShardError
from tests.train.synthetic import Sample, make_bins, make_medium, make_sample, write_shards
from train.batches import workers as workers_module
from train.batches.batch import MicroBatch
from train.batches.stream import BinStream
from train.batches.workers import Stalled, StepWork
from train.model.pixels import pixel_values
from train.order.dealing import DataOrder
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import BinReader, read_checked_bin

BINS = make_bins(num_bins=10)
READ = BinReader.read


@pytest.fixture(params=["zstd", "raw"])
def index(tmp_path: Path, request: pytest.FixtureRequest) -> ShardIndex:
    return open_shards(write_shards(tmp_path / "set", BINS, codec=request.param))


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    """Check that every test leaves no stream thread behind."""
    yield
    wait_for_threads()
    assert not stream_threads()


def wait_for_threads() -> None:
    wait_until(lambda: not stream_threads(), seconds=5)


def wait_until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def stream_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("bin-stream")]


def open_stream(index: ShardIndex, *, epochs: float | None = 2, global_batch: int = 4, **changes: object) -> BinStream:
    order = DataOrder(index.cost(), seed=3, global_batch=global_batch, epochs=epochs)
    settings: dict[str, object] = {"rank": 0, "world_size": 2, "accumulation": 2, "per_device": 1, **changes}
    return BinStream(index, order, **settings)  # type: ignore[arg-type]


def tokens_of(bins: list[list[Sample]], bin_ids: tuple[int, ...]) -> list[int]:
    return [int(token) for bin_id in bin_ids for sample in bins[bin_id] for token in sample.input_ids]


def tensors_of(micro: MicroBatch) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    micro.map(lambda tensor: (tensors.append(tensor), tensor)[1])
    return tensors


def test_every_rank_gets_the_bins_of_the_order(index: ShardIndex) -> None:
    order = DataOrder(index.cost(), seed=3, global_batch=4, epochs=2)
    for rank in range(2):
        with open_stream(index, rank=rank) as stream:
            for step, batch in enumerate(stream):
                dealt = order.bins_of_step(step, world_size=2, accumulation=2, per_device=1)
                assert batch.step == step
                assert batch.bins == tuple(dealt.ravel().tolist())
                assert [micro.bins for micro in batch.micro_batches] == [(n,) for n in dealt[:, rank, 0].tolist()]
                for micro in batch.micro_batches:
                    assert micro.input_ids[0].tolist() == tokens_of(BINS, micro.bins)
            assert step == 4


def test_an_epoch_over_all_ranks_is_every_bin_with_its_pixels(index: ShardIndex) -> None:
    """Planes survive the shard, the codec and the stream unchanged."""
    seen: list[int] = []
    for rank in range(2):
        with open_stream(index, rank=rank, epochs=1, global_batch=10, accumulation=5) as stream:
            (batch,) = stream
        for micro in batch.micro_batches:
            seen += micro.bins
            media = [medium for bin_id in micro.bins for sample in BINS[bin_id] for medium in sample.media]
            frames = [torch.from_numpy(frame) for medium in media for frame in medium.frames]
            if frames:
                raw = dataclasses.replace(
                    micro.vision, planes=torch.cat([frame.flatten() for frame in frames]), residuals=False
                )
                assert torch.equal(pixel_values(micro.vision), pixel_values(raw))
    assert sorted(seen) == list(range(10))


def test_targets_of_the_global_step_are_known_to_every_rank(index: ShardIndex) -> None:
    """They equal the sum of what all ranks train on, also in the last, short step."""
    streams = [open_stream(index, rank=rank, global_batch=6, accumulation=3, epochs=1) for rank in range(2)]
    num_steps = 0
    for first, second in zip(*streams):
        micro_batches = [*first.micro_batches, *second.micro_batches]
        assert first.num_targets == second.num_targets == sum(micro.targets.numel() for micro in micro_batches)
        assert first.num_tokens == second.num_tokens == sum(micro.num_tokens for micro in micro_batches)
        assert first.num_samples == second.num_samples == sum(micro.num_samples for micro in micro_batches)
        assert first.max_tokens == second.max_tokens == 6 * 4096
        assert sorted(first.bins) == sorted(bin_id for micro in micro_batches for bin_id in micro.bins)
        num_steps += 1
    assert num_steps == 2
    assert len(first.bins) == 4
    for stream in streams:
        stream.close()


def test_the_efficiency_of_a_step_follows_from_the_costs_of_its_ranks(index: ShardIndex) -> None:
    cost = index.cost()
    batches = []
    for rank in range(2):
        with open_stream(index, rank=rank) as stream:
            batches.append(next(stream))
    loads = [[cost[list(micro.bins)].sum() for micro in batch.micro_batches] for batch in batches]
    highest = sum(max(both) for both in zip(*loads))
    assert 0 < batches[0].efficiency < 1
    for batch in batches:
        assert batch.efficiency == pytest.approx(np.sum(loads) / 2 / highest)


def test_empty_positions_are_batches_without_tokens_of_bins(index: ShardIndex) -> None:
    with open_stream(index, epochs=0.1, world_size=1, accumulation=4) as stream:
        (batch,) = stream
    assert sorted(len(micro.bins) for micro in batch.micro_batches) == [0, 0, 0, 1]
    assert sum(micro.num_tokens for micro in batch.micro_batches) == batch.num_tokens


def test_the_bins_of_a_device_form_one_batch(index: ShardIndex) -> None:
    with open_stream(index, accumulation=1, per_device=2, epochs=1) as stream:
        for batch in stream:
            (micro,) = batch.micro_batches
            assert micro.input_ids[0].tolist() == tokens_of(BINS, micro.bins)
    assert batch.step == 2


@pytest.mark.parametrize("resume_at", range(5))
def test_a_stream_started_at_a_step_continues_bit_for_bit(index: ShardIndex, resume_at: int) -> None:
    with open_stream(index) as unbroken:
        expected = list(itertools.islice(unbroken, resume_at, None))
    with open_stream(index, start_step=resume_at, num_threads=3, prefetch=1) as resumed:
        assert resumed.state_dict()["step"] == resume_at
        actual = list(resumed)
        assert resumed.state_dict()["step"] == 5
    assert [batch.step for batch in actual] == list(range(resume_at, 5))
    for ours, theirs in zip(actual, expected):
        assert (ours.bins, ours.num_targets) == (theirs.bins, theirs.num_targets)
        for micro, other in zip(ours.micro_batches, theirs.micro_batches):
            assert all(torch.equal(a, b) for a, b in zip(tensors_of(micro), tensors_of(other)))


def test_a_stream_ends_before_its_end_step(index: ShardIndex) -> None:
    with open_stream(index, epochs=None, start_step=7, end_step=9) as stream:
        assert [batch.step for batch in stream] == [7, 8]
        assert next(stream, None) is None
    with open_stream(index, end_step=99) as stream:
        assert len(list(stream)) == 5


def test_folders_are_mixed_into_one_stream(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", BINS[:4], codec="zstd")
    write_shards(tmp_path / "b", BINS[4:], codec="raw")
    index = open_shards(tmp_path)
    with open_stream(index, world_size=1, accumulation=2, per_device=5, global_batch=10, epochs=1) as stream:
        (batch,) = stream
    assert sorted(batch.bins) == list(range(10))
    for micro in batch.micro_batches:
        assert micro.input_ids[0].tolist() == tokens_of(BINS, micro.bins)


def test_the_number_of_prefetched_bins_is_bounded(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = counted_reads(monkeypatch)
    with open_stream(index, epochs=None, prefetch=3) as stream:
        next(stream)
        wait_until(lambda: len(reads) >= 5)
        time.sleep(0.1)
        assert len(reads) == 2 + 3
        next(stream)
    assert len(reads) <= 4 + 3


def test_prefetched_batches_are_handed_out_without_reading(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-batches are ready: two steps need no reads, the third waits for the file system."""
    reads = counted_reads(monkeypatch)
    with open_stream(index, epochs=None, prefetch=4) as stream:
        next(stream)
        wait_until(lambda: len(reads) >= 6)
        wait_until_ready(stream)
        answers = threading.Event()

        def read(reader: BinReader, bin_id: int) -> object:
            assert answers.wait(30)
            return READ(reader, bin_id)

        monkeypatch.setattr(BinReader, "read", read)
        assert next(stream).data_wait_s < 5
        assert next(stream).data_wait_s < 5
        threading.Timer(0.2, answers.set).start()
        assert next(stream).data_wait_s > 0.1


def wait_until_ready(stream: BinStream) -> None:
    wait_until(lambda: all(work.is_done() for work in stream._steps))


def test_a_step_that_is_dropped_is_kept_nowhere(index: ShardIndex) -> None:
    """Its memory is free before the next step is asked for, also that of the last step."""
    with open_stream(index, prefetch=1) as stream:
        while (batch := next(stream, None)) is not None:
            kept = weakref.WeakSet(micro.vision.planes for micro in batch.micro_batches)
            del batch
            wait_until(partial(operator.not_, kept))


def counted_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    reads: list[int] = []

    def read(reader: BinReader, bin_id: int) -> object:
        reads.append(bin_id)
        return READ(reader, bin_id)

    monkeypatch.setattr(BinReader, "read", read)
    return reads


def delayed_reads(monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
    def read(reader: BinReader, bin_id: int) -> object:
        time.sleep(seconds)
        return READ(reader, bin_id)

    monkeypatch.setattr(BinReader, "read", read)


# Damage after the start, and the error message besides shard, bin and offset.


def flip_a_byte(index: ShardIndex, bin_id: int) -> None:
    location = index.locate(bin_id)
    data = bytearray(location.path.read_bytes())
    data[location.offset + location.num_bytes // 2] ^= 0x10
    location.path.write_bytes(data)


def cut_the_shard(index: ShardIndex, bin_id: int) -> None:
    location = index.locate(bin_id)
    location.path.write_bytes(location.path.read_bytes()[: location.offset + location.num_bytes - 700])


def remove_the_shard(index: ShardIndex, bin_id: int) -> None:
    index.locate(bin_id).path.unlink()


def replace_the_shard_by_a_folder(index: ShardIndex, bin_id: int) -> None:
    path = index.locate(bin_id).path
    path.unlink()
    path.mkdir()


DAMAGE_OF_A_BIN: dict[str, tuple[Callable[[ShardIndex, int], None], str]] = {
    "flipped byte": (flip_a_byte, r"checksum is [0-9a-f]{16}, expected [0-9a-f]{16}"),
    "short shard": (cut_the_shard, r"the shard ends after \d+ of the bin's \d+ bytes"),
}
DAMAGE_OF_A_SHARD: dict[str, tuple[Callable[[ShardIndex, int], None], str]] = {
    "missing file": (remove_the_shard, "the shard does not exist"),
    "not a regular file": (replace_the_shard_by_a_folder, "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("kind", [*DAMAGE_OF_A_BIN, *DAMAGE_OF_A_SHARD])
@pytest.mark.parametrize("bin_id", [2, 9])
def test_damage_after_the_start_raises_with_shard_bin_and_offset(index: ShardIndex, kind: str, bin_id: int) -> None:
    """Bins 2 and 9 are the last of their shards, so truncating the shard truncates them."""
    damage, message = {**DAMAGE_OF_A_BIN, **DAMAGE_OF_A_SHARD}[kind]
    damaged = [bin_id] if kind in DAMAGE_OF_A_BIN else np.flatnonzero(index.shard == index.shard[bin_id]).tolist()
    damage(index, bin_id)
    stream = open_stream(index)
    with pytest.raises(ShardError, match=message) as caught:
        list(stream)
    assert any(str(caught.value).startswith(f"{index.locate(bad)}: ") for bad in damaged)
    assert next(stream, None) is None, "a failed stream hands out another step"
    for other in range(index.num_bins):
        if other in damaged:
            location = index.locate(other)
            expected = rf"{location.path}, bin {other} at offset {location.offset}: {message}"
            with pytest.raises(ShardError, match=expected):
                read_checked_bin(index, other)
        else:
            read_checked_bin(index, other)


def test_a_bin_at_the_offset_of_another_raises(index: ShardIndex) -> None:
    """Bin 5, with a valid checksum, is stored where bin 4 should be."""
    swapped = dataclasses.replace(
        index,
        **{
            name: np.concatenate([getattr(index, name)[:4], getattr(index, name)[5:6], getattr(index, name)[5:]])
            for name in ("offset", "num_bytes", "xxh3")
        },
    )
    with pytest.raises(ShardError, match=r"bins-00001\.tar, bin 4 at offset \d+: found a member of bin 00000005"):
        read_checked_bin(swapped, 4)


@pytest.mark.parametrize(
    ("column", "what"),
    [("num_tokens", "tokens"), ("num_targets", "targets"), ("num_samples", "samples"), ("num_patches", "patches")],
)
def test_a_bin_whose_counts_differ_from_the_index_raises(index: ShardIndex, column: str, what: str) -> None:
    """The loss of a step is divided by counts of the index, so these must be those of the bins."""
    wrong = dataclasses.replace(index, **{column: getattr(index, column) + 1})
    with pytest.raises(ShardError, match=rf"bin 3 at offset \d+: holds \d+ {what}, the index says \d+"):
        read_checked_bin(wrong, 3)


def broken_sample(what: str) -> Sample:
    rng = np.random.default_rng(0)
    sample = make_sample(rng, [make_medium(rng, 4, 4)])
    if what == "trained first label":
        sample.labels[0] = sample.input_ids[0]
    elif what == "lost pad token":
        sample.input_ids[2] = 11
    elif what in ("negative id", "unknown id"):
        sample.input_ids[-1] = -1 if what == "negative id" else 152_064
        sample.labels[-1] = -100
    elif what == "other label":
        sample.labels[-1] = sample.input_ids[-1] + 1
    return sample


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("trained first label", "the first label of sample 1 is not -100"),
        ("lost pad token", "7 media pad tokens in input_ids, but its media have 8"),
        ("negative id", r"input_ids are -1 to \d+; allowed: 0 to 152063"),
        ("unknown id", r"input_ids are \d+ to 152064; allowed: 0 to 152063"),
        ("other label", "a label is neither -100 nor the id of its token"),
    ],
)
def test_an_inconsistent_bin_raises(tmp_path: Path, what: str, says: str) -> None:
    bins = [[broken_sample("nothing"), broken_sample(what)]]
    index = open_shards(write_shards(tmp_path / "set", bins))
    with pytest.raises(ShardError, match=rf"bins-00000\.tar, bin 0 at offset 0: {says}"):
        read_checked_bin(index, 0)


def test_a_grid_with_odd_rows_raises(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    index = open_shards(write_shards(tmp_path / "set", [[make_sample(rng, [make_medium(rng, 3, 4)])]]))
    with pytest.raises(ShardError, match=r"bin 0 at offset 0: grid_thw .* is not positive with even rows"):
        read_checked_bin(index, 0)


def test_a_stalled_read_raises_and_names_the_bin(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(BinReader, "read", lambda reader, bin_id: released.wait(30))
    monkeypatch.setattr(workers_module, "JOIN_TIMEOUT_S", 0.1)
    stream = open_stream(index, read_timeout_s=0.2)
    start_s = time.monotonic()
    with pytest.raises(ShardError, match=r"bin \d at offset \d+: not read within 0\.2 s"):
        next(stream)
    assert time.monotonic() - start_s < 5
    released.set()


@contextmanager
def handed_in(work: StepWork, positions: range) -> Iterator[None]:
    """Hand in a batch every tenth of a second."""
    ended = threading.Event()

    def hand_in() -> None:
        for position in positions:
            if ended.wait(0.1):
                return
            work.set_batch(position, position)  # type: ignore[arg-type]

    thread = threading.Thread(target=hand_in)
    thread.start()
    yield
    ended.set()
    thread.join()


def test_the_time_limit_holds_for_a_micro_batch_and_not_for_a_step() -> None:
    work = StepWork(np.zeros((13, 1, 1), dtype=np.int64), [(bin_id,) for bin_id in range(13)])
    with handed_in(work, range(13)):
        assert work.wait(1.0) == tuple(range(13))


def test_a_stalled_step_names_the_first_micro_batch_that_is_missing() -> None:
    """Micro-batches behind it do not extend its time."""
    work = StepWork(np.zeros((50, 1, 1), dtype=np.int64), [(bin_id + 3,) for bin_id in range(50)])
    work.set_batch(0, 0)  # type: ignore[arg-type]
    start_s = time.monotonic()
    with handed_in(work, range(2, 50)), pytest.raises(Stalled) as stalled:
        work.wait(0.3)
    assert stalled.value.bins == (4,)
    assert time.monotonic() - start_s < 3, "the last micro-batch comes after five seconds"


def test_the_first_error_of_a_step_ends_the_wait_at_once() -> None:
    """Also where earlier micro-batches are missing, and where more fails later."""
    work = StepWork(np.zeros((3, 1, 1), dtype=np.int64), [(4,), (5,), (6,)])
    for error in (ShardError("damaged"), MemoryError()):
        work.set_error(error)
    work.set_batch(0, None)  # type: ignore[arg-type]
    with pytest.raises(ShardError, match="damaged"):
        work.wait(30)


def test_any_failure_of_a_thread_reaches_the_training_thread(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(reader: BinReader, bin_id: int) -> object:
        raise MemoryError("no memory for the bin")

    monkeypatch.setattr(BinReader, "read", read)
    with pytest.raises(MemoryError, match="no memory for the bin"):
        next(open_stream(index))


def test_close_ends_the_threads_without_delay(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queued work is dropped."""
    delayed_reads(monkeypatch, seconds=0.05)
    stream = open_stream(index, epochs=None, prefetch=200, num_threads=2)
    next(stream)
    assert len(stream_threads()) == 2
    start_s = time.monotonic()
    stream.close()
    assert time.monotonic() - start_s < 2
    assert not stream_threads()
    stream.close()
    assert next(stream, None) is None
    assert not stream_threads()


def test_a_dropped_stream_leaves_no_threads(index: ShardIndex) -> None:
    """The fixture waits for them."""
    stream = open_stream(index, epochs=None, prefetch=20, num_threads=3)
    next(stream)
    assert len(stream_threads()) == 3
    del stream


def test_a_dropped_stream_stops_reading_even_if_its_reads_fail(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    is_dropped = threading.Event()

    def fail(_: BinReader, bin_id: int) -> object:
        reads.append(bin_id)
        assert is_dropped.wait(30)
        raise ShardError("the folder was removed")

    stream = open_stream(index, epochs=None, prefetch=20, num_threads=3)
    next(stream)
    wait_until_ready(stream)
    monkeypatch.setattr(BinReader, "read", fail)
    for _ in range(5):
        next(stream)
    wait_until(lambda: len(reads) == 3)
    del stream
    is_dropped.set()
    wait_for_threads()
    assert len(reads) == 3
    assert not stream_threads()


def test_more_threads_than_the_system_allows_are_a_config_error(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The threads that did start are ended."""
    start = threading.Thread.start

    def start_a_few(thread: threading.Thread) -> None:
        if len(stream_threads()) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_a_few)
    with pytest.raises(ConfigError, match=r"allows 3 of 7 threads \(can't start new thread\)\. Lower --dataloader"):
        next(open_stream(index, num_threads=7))


def test_an_unusable_device_raises_at_the_first_step(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> None:
        raise RuntimeError(f"{device} is busy")

    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    with (
        open_stream(index, pin_device=torch.device("cuda", 3), read_timeout_s=20) as stream,
        pytest.raises(RuntimeError, match="cuda:3 is busy"),
    ):
        next(stream)


def test_an_unused_stream_starts_no_thread(index: ShardIndex) -> None:
    with open_stream(index):
        assert not stream_threads()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rank": 2}, "rank is 2; allowed: 0 to 1"),
        ({"rank": -1}, "rank is -1"),
        ({"num_threads": 0}, "num_threads 0"),
        ({"prefetch": 0}, "prefetch 0"),
        ({"read_timeout_s": 0.0}, "read_timeout_s 0.0"),
        ({"read_timeout_s": 1e300}, r"read_timeout_s 1e\+300.*a positive time of up to \d+ s"),
        ({"start_step": -1}, "start_step -1"),
    ],
)
def test_settings_out_of_range_are_a_config_error(index: ShardIndex, changes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_stream(index, **changes)


def test_an_order_over_other_bins_is_a_config_error(index: ShardIndex) -> None:
    order = DataOrder(np.ones(3), seed=0, global_batch=1)
    with pytest.raises(ConfigError, match="over 3 bins, but the shards hold 10"):
        BinStream(index, order, rank=0, world_size=1, accumulation=1, per_device=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_cuda_device_are_in_pinned_memory(index: ShardIndex) -> None:
    with open_stream(index, pin_device=torch.device("cuda", 0)) as stream:
        for micro in next(stream).micro_batches:
            assert all(tensor.is_pinned() for tensor in tensors_of(micro))
