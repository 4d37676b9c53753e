"""The loss over chunks equals that of all logits, its gradients are as exact as one product, and logits stay small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from train.model import head as head_module
from train.model.head import ALIGNMENT, TargetHead

HIDDEN, VOCAB = 16, 3 * ALIGNMENT + 8
CHUNK = 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CHUNK", CHUNK)


def make_head(*, hidden: int = HIDDEN, vocab: int = VOCAB, dtype: torch.dtype = torch.float32) -> TargetHead:
    torch.manual_seed(0)
    return TargetHead.of(nn.Linear(hidden, vocab, bias=False, dtype=dtype))


def make_rows(
    num_targets: int, *, hidden: int = HIDDEN, vocab: int = VOCAB, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states and their targets."""
    torch.manual_seed(1)
    states = torch.randn(num_targets, hidden, dtype=dtype, requires_grad=True)
    return states, torch.randint(0, vocab, (num_targets,))


def undivided_loss(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of all logits at once, in float32 or better."""
    logits = functional.linear(states, weight)
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return functional.cross_entropy(precise, targets, reduction="sum")


@pytest.mark.parametrize("num_targets", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK - 1])
def test_the_chunked_loss_equals_the_cross_entropy_of_all_logits(num_targets: int) -> None:
    head, (states, targets) = make_head(), make_rows(num_targets)
    expected = undivided_loss(states, head.weight, targets)
    expected_grads = torch.autograd.grad(0.3 * expected, [states, head.weight])
    loss = head(states, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(0.3 * loss, [states, head.weight]), expected_grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_32_chunks_give_a_gradient_as_exact_as_one_undivided_product(dtype: torch.dtype) -> None:
    """The yardstick is the error of one product in the same precision, against float64.

    The gradient of the states is a sum of products over slices of the vocabulary. Each of them is rounded, hence the
    factor of 1.5.
    """
    num_targets, sizes = 32 * CHUNK, {"hidden": 64, "vocab": 1024}
    head, (states, targets) = make_head(**sizes, dtype=dtype), make_rows(num_targets, **sizes, dtype=dtype)

    def errors(states: torch.Tensor, weight: torch.Tensor, loss: torch.Tensor) -> list[float]:
        grads = torch.autograd.grad(loss, [states, weight])
        return [float((grad - right).norm() / right.norm()) for grad, right in zip(grads, exact)]

    doubles = [tensor.detach().double().requires_grad_() for tensor in (states, head.weight)]
    exact = torch.autograd.grad(undivided_loss(*doubles, targets), doubles)
    yardstick = errors(states, head.weight, undivided_loss(states, head.weight, targets))
    of_states, of_weight = errors(states, head.weight, head(states, targets))
    assert of_weight <= 1.01 * yardstick[1]
    assert of_states <= 1.5 * yardstick[0]

    chunks = zip(states.split(CHUNK), targets.split(CHUNK))
    chunk_losses = [undivided_loss(rows, head.weight, expected) for rows, expected in chunks]
    summed_in_half = errors(states, head.weight, torch.stack(chunk_losses).sum())
    assert summed_in_half[1] > 2 * yardstick[1], "the yardstick is too long: nothing is proved"


@pytest.mark.parametrize(("trains_head", "num_products"), [(True, 4), (False, 3)], ids=["trained", "frozen"])
def test_a_frozen_head_computes_no_gradient_of_its_weight(trains_head: bool, num_products: int) -> None:
    """Logits twice and the gradient of the states; the gradient of the weight only if it is trained."""
    head, (states, targets) = make_head(), make_rows(2 * CHUNK)
    head.weight.requires_grad_(trains_head)
    with FlopCounterMode(display=False) as counter:
        head(states, targets).backward()
    assert counter.get_total_flops() == num_products * 2 * len(targets) * HIDDEN * VOCAB
    assert (head.weight.grad is not None) == trains_head


class LargestResult(TorchDispatchMode):
    """Notes the scalars of the largest tensor that an operation returns, views of the weight apart."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.largest = 0
        self._weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self._weight:
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_more_logits_exist_than_a_chunk_has(dtype: torch.dtype) -> None:
    """Neither in the forward nor in the backward pass, nor between them."""
    sizes = {"hidden": CHUNK // 2, "dtype": dtype}  # so that the weight has fewer scalars than a chunk
    head, (states, targets) = make_head(**sizes), make_rows(3 * CHUNK, **sizes)
    chunk = CHUNK * VOCAB
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    with LargestResult(head.weight) as results:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = head(states, targets)
        assert results.largest == chunk
        loss.backward()
    assert sorted(saved) == sorted([states.numel(), head.weight.numel(), *2 * [len(targets)]])
    assert results.largest == chunk
