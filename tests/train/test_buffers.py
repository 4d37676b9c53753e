"""Memory is used again, and never while something still refers to it."""

from __future__ import annotations

import errno
import gc
import mmap
import threading
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import MagicMock, Mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.synthetic import make_bins, write_shards
from train.batches.batch import MicroBatch, build_micro_batch
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.run import loop
from train.shards.buffers import PinnedBuffers, ReusedBuffers
from train.shards.index import open_shards
from train.shards.reader import BinReader


@given(st.lists(st.integers(0, 300_000), min_size=1, max_size=30))
@settings(deadline=None, max_examples=30)
def test_buffers_in_use_never_overlap(sizes: list[int]) -> None:
    """Every second buffer is released; the others still hold what was written to them."""
    buffers = ReusedBuffers()
    live_buffers: list[torch.Tensor] = []
    for index, size in enumerate(sizes):
        buffer = buffers.take(size)
        assert (buffer.shape, buffer.dtype) == ((size,), torch.uint8)
        buffer.fill_(index % 251)
        if index % 2:
            live_buffers.append(buffer)
        del buffer
    for position, buffer in enumerate(live_buffers):
        assert bool((buffer == (2 * position + 1) % 251).all())


def test_buffers_work_on_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Small(mmap.mmap):
        def madvise(self, *args: int) -> None:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Small)
    assert ReusedBuffers().take(3 << 20).fill_(7).sum(dtype=torch.int64) == 7 * (3 << 20)


@pytest.mark.parametrize(
    "hold", ["the tensor", "a slice", "an array", "a slice of an array", "a memoryview", "bytes of it"]
)
def test_a_buffer_is_reused_once_its_last_view_is_gone(hold: str) -> None:
    buffers = ReusedBuffers()
    tensor = buffers.take(100_000)
    views: dict[str, object] = {
        "the tensor": tensor,
        "a slice": tensor[10:20],
        "an array": tensor.numpy(),
        "a slice of an array": tensor.numpy()[5:].reshape(-1, 5)[3],
        "a memoryview": tensor.numpy().data[7:],
        "bytes of it": np.frombuffer(tensor.numpy().data[8:], dtype="<i4"),
    }
    held = views[hold]
    views.clear()
    address = tensor.data_ptr()
    del tensor
    assert buffers.free_bytes == 0
    assert buffers.take(100_000).data_ptr() != address
    gc.collect()
    before = buffers.free_bytes
    del held
    assert buffers.free_bytes == before + 131_072
    first, second = buffers.take(100_000), buffers.take(70_000)
    assert address in (first.data_ptr(), second.data_ptr())


def test_free_memory_beyond_the_limit_is_released() -> None:
    buffers = ReusedBuffers(max_free_bytes=300_000)
    buffers_in_use = [buffers.take(100_000) for _ in range(5)]
    buffers_in_use.clear()
    assert buffers.free_bytes == 2 * 131_072


def test_threads_share_buffers() -> None:
    buffers, wrong = ReusedBuffers(), []

    def work(mark: int) -> None:
        for turn in range(300):
            buffer = buffers.take(50_000 + turn)
            buffer.fill_(mark)
            if not bool((buffer == mark).all()):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(mark,)) for mark in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert buffers.free_bytes <= 8 * 65_536, "a thread holds two at most"


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_a_stream_reuses_its_memory_but_not_that_of_live_batches(tmp_path: Path, codec: str) -> None:
    """A batch that is still referenced keeps its planes after many others were released."""
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=12), codec=codec))
    order = DataOrder(index.cost(), seed=0, global_batch=3)
    addresses: set[int] = set()
    live_batches: list[tuple[MicroBatch, torch.Tensor]] = []
    with BinStream(index, order, rank=0, world_size=1, accumulation=3, per_device=1, end_step=40) as stream:
        for batch in stream:
            for micro in batch.micro_batches:
                addresses.add(micro.vision.planes.untyped_storage().data_ptr())
            if batch.step % 10 == 0:
                live_batches += [(micro, micro.vision.planes.clone()) for micro in batch.micro_batches]
            del batch, micro
    assert len(addresses) < 60, "120 micro-batches were handed out"
    assert all(torch.equal(micro.vision.planes, planes) for micro, planes in live_batches)


def test_the_trainer_drops_a_step_before_it_takes_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory serves the next step, also after a step that was logged."""

    class Step:
        pass

    def steps() -> Iterator[Step]:
        for _ in range(3):
            step = Step()
            before = weakref.ref(step)
            yield step
            del step
            assert before() is None

    trainer = Mock()
    trainer.run_step = lambda step: (step, "losses")
    trainer.should_stop.return_value = trainer.should_evaluate.return_value = trainer.should_save.return_value = False
    trainer.summarise = lambda result, evaluates: {}
    monkeypatch.setattr(loop, "open_log", MagicMock())
    monkeypatch.setattr(loop, "open_stream", lambda plan: nullcontext(steps()))
    assert loop.run_steps(trainer, Mock(), Mock())


def test_raw_planes_of_one_bin_are_views_of_its_bytes(tmp_path: Path) -> None:
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=4), codec="raw"))
    loaded = BinReader(index).read(3)
    planes = build_micro_batch([loaded.bin], memory=[loaded.buffer]).vision.planes
    assert planes.untyped_storage().data_ptr() == loaded.buffer.untyped_storage().data_ptr()
    assert np.array_equal(planes.numpy(), loaded.bin.pixels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_page_locked_memory_is_reused_only_after_copies_from_it(tmp_path: Path, codec: str) -> None:
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=4), codec=codec))
    reader, buffers = BinReader(index, buffers=PinnedBuffers()), PinnedBuffers()
    for _ in range(50):
        loaded = reader.read(3)
        micro = build_micro_batch([loaded.bin], memory=[loaded.buffer], buffers=buffers).pin_memory()
        assert micro.vision.planes.is_pinned()
        planes = micro.vision.planes.clone()
        on_device = micro.to("cuda", non_blocking=True)
        del micro, loaded
        buffers.take(planes.numel()).fill_(7)
        assert torch.equal(on_device.vision.planes.cpu(), planes)
