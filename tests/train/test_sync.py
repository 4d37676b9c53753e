"""The forward pass never waits for the device: no operation needs a value that only the device has."""

from __future__ import annotations

from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.benchmarks.gpu.scale import official_config
from tests.train.synthetic import make_medium, make_sample
from tests.train.test_model import EVERYTHING, micro_batch, samples_of_all_kinds
from train.batches.batch import MicroBatch, build_micro_batch
from train.model import optim
from train.model.attention import FLASH_ATTENTION, VARLEN
from train.model.packed import PackedQwen, checkpoint_activations

NEEDS_FLASH_ATTENTION = pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("flash_attn") is None, reason="no GPU with flash-attn is here"
)

SYNCHRONIZING = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.masked_scatter,
    torch.ops.aten.masked_scatter_backward,
    torch.ops.aten.equal,
    torch.ops.aten._unique2,
    torch.ops.aten.unique_consecutive,
    torch.ops.aten.bincount,
    torch.ops.aten.repeat_interleave,
}
"""Operations whose result, or its size, must be copied back from the device."""

INDEXING = {torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_, torch.ops.aten._index_put_impl_}
"""Operations that look for the nonzero elements of a mask if they are given one instead of positions."""

COPIES = ("tolist", "cpu", "numpy")
"""Methods that copy from the device. On a CPU they copy nothing and dispatch no operation."""


class SyncRecorder(TorchDispatchMode):
    """Records every operation that would synchronize with a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.calls: list[str] = []
        for name in COPIES:
            monkeypatch.setattr(torch.Tensor, name, self._recording(name, getattr(torch.Tensor, name)))

    def _recording(self, name: str, method: Any) -> Any:
        def copy(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return method(*args, **kwargs)

        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func.overloadpacket in INDEXING and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or func.overloadpacket in SYNCHRONIZING:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))


def bins() -> list[MicroBatch]:
    """Media of all kinds, text only, and an empty position of the order."""
    samples = samples_of_all_kinds()
    return [micro_batch(*samples), micro_batch(samples[1], samples[3]), build_micro_batch([])]


@pytest.fixture
def model(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> PackedQwen:
    """A model with all parts trained and a stand-in for flash attention that returns its queries."""

    def attention(module: nn.Module, query: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
        return query.transpose(1, 2), None

    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, FLASH_ATTENTION, attention)
    for config in (hf.model.language_model.config, hf.model.visual.config):
        monkeypatch.setattr(config, "_attn_implementation_internal", FLASH_ATTENTION)
    packed = PackedQwen(hf, attn_implementation=FLASH_ATTENTION).train()
    optim.group_parameters(packed, EVERYTHING)
    checkpoint_activations(packed)
    return packed


def test_no_operation_of_a_forward_and_backward_pass_synchronizes(
    model: PackedQwen, monkeypatch: pytest.MonkeyPatch
) -> None:
    for batch in bins():
        with monkeypatch.context() as patch, SyncRecorder(patch) as recorder:
            model(batch).backward()
        assert recorder.calls == []


class Operations(TorchDispatchMode):
    """Counts operations, and notes queries, keys and boundaries of the variable-length attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attended: Counter[tuple[tuple[int, ...], tuple[int, ...], int]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] += 1
        if name == "_varlen_attn":
            query, key, _, boundaries, *_ = args
            self.attended[tuple(query.shape), tuple(key.shape), boundaries.numel()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_a_7b_attends_with_one_call_a_layer_and_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on tensors without values: 16k tokens, and layers that are computed again."""
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration._from_config(official_config("7B"), dtype=torch.bfloat16)
    model = PackedQwen(hf, attn_implementation=VARLEN).train()
    optim.group_parameters(model, EVERYTHING)
    checkpoint_activations(model)
    rng = np.random.default_rng(0)
    media = [make_medium(rng, 12, 20), make_medium(rng, 20, 12, steps=2)]
    batch = micro_batch(*(make_sample(rng, media, num_text=1900) for _ in range(8)), make_sample(rng, num_text=600))
    with monkeypatch.context() as patch, SyncRecorder(patch) as recorder, Operations() as operations:
        loss = model(batch.to("meta"))
        loss.backward()
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert all(weight.grad.shape == weight.shape for weight in model.parameters() if weight.grad is not None)

    tokens, patches, vision = batch.num_tokens, batch.vision.num_patches, batch.vision
    assert tokens > 16384
    assert operations.attended == {
        # 28 layers; 32 blocks, 4 of which attend to whole frames and 28 to windows; each computed twice.
        ((tokens, 28, 128), (tokens, 4, 128), batch.cu_seqlens.numel()): 2 * 28,
        ((patches, 16, 80), (patches, 16, 80), vision.cu_seqlens.numel()): 2 * 4,
        ((patches, 16, 80), (patches, 16, 80), vision.cu_window_seqlens.numel()): 2 * 28,
    }
    assert operations.counts["_varlen_attn_backward"] == 28 + 32
    assert [name for name in operations.counts if "scaled_dot_product" in name or name == "_softmax"] == []
    assert recorder.calls == []


def test_an_operation_that_synchronizes_would_be_noticed(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads positions to find sample boundaries, and SDPA of the vision tower reads window boundaries.

    The language model does not synchronize: its sample lengths are known on the host.
    """
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    ids, positions = torch.arange(10, 16)[None], torch.tensor([0, 1, 2, 0, 1, 2]).expand(4, 1, -1)
    with monkeypatch.context() as patch, SyncRecorder(patch) as recorder, torch.no_grad():
        hf.model.language_model(input_ids=ids, position_ids=positions, use_cache=False)
        assert "aten._local_scalar_dense.default" in recorder.calls
        recorder.calls.clear()
        PackedQwen(hf, attn_implementation="sdpa")(bins()[0])
    assert recorder.calls == 3 * len(hf.model.visual.blocks) * ["tolist"]
    values, mask = torch.ones(3, requires_grad=True), torch.tensor([True, False, True])
    with monkeypatch.context() as patch, SyncRecorder(patch) as recorder:
        values[mask].sum().backward()
        torch.zeros(3)[mask] = 1.0
    assert recorder.calls == ["aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default"]


@NEEDS_FLASH_ATTENTION
def test_a_gpu_runs_forward_and_backward_passes_without_synchronizing(tiny_checkpoint: Path) -> None:
    device = torch.device("cuda", 0)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tiny_checkpoint, dtype=torch.bfloat16, attn_implementation=FLASH_ATTENTION
    ).to(device)
    model = PackedQwen(hf, attn_implementation=FLASH_ATTENTION).train()
    optim.group_parameters(model, EVERYTHING)
    checkpoint_activations(model)
    batches = [batch.pin_memory() for batch in bins()]
    for batch in batches:
        model(batch.to(device, non_blocking=True)).backward()  # the first call initializes libraries
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            model(batch.to(device, non_blocking=True)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
