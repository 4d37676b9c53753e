"""Course of the learning rates: step -> factor on the peak rate of every group."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from train.settings.arguments import FLAT


def schedule(kind: str, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Linear warm-up, then ``cosine`` or ``linear`` decay towards 0, or the peak (``constant_with_warmup``).

    ``constant`` is the peak in all steps. Names and courses are those of transformers, but no step is spent at a rate
    of 0: where a schedule of theirs has ``step / warmup_steps``, this one is a step ahead. So step 0 has
    ``1 / warmup_steps``, step ``warmup_steps - 1`` the peak, and 0 would be reached by the step after the last.

    Args:
        kind: ``cosine``, ``linear``, ``constant`` or ``constant_with_warmup``.
        warmup_steps: steps in which the factor rises; 0 for none, as ``constant`` has it.
        total_steps: steps of the run.

    Returns:
        A function of the step (counted from 0) that gives the factor, 0 to 1.
    """
    assert kind != FLAT or not warmup_steps, f"{FLAT} has no warm-up"
    decay = _DECAYS[kind]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return decay(min(1.0, progress))

    return factor


def warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps of warm-up: ``ratio`` of all steps, rounded up."""
    return math.ceil(ratio * total_steps)


def set_rates(optimizer: torch.optim.Optimizer, peaks: Sequence[float | torch.Tensor], factor: float) -> None:
    """Give every group of an optimizer its peak rate times ``factor``."""
    for group, peak in zip(optimizer.param_groups, peaks):
        group["lr"] = peak * factor


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1.0 - progress


def _constant(progress: float) -> float:
    return 1.0


_DECAYS: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    FLAT: _constant,
    "constant_with_warmup": _constant,
}
