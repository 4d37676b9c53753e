"""Learning rate schedule: step -> factor on the peak learning rate of every parameter group."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from train.settings.declarations import FLAT


def schedule(kind: str, *, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """Linear warmup, then ``cosine`` or ``linear`` decay towards 0, or the peak (``constant_with_warmup``).

    ``constant`` is the peak in all steps. Names and curves are those of transformers, except that no step has a rate of
    0: during warmup, where transformers uses ``step / warmup_steps``, this schedule is one step ahead. Step 0 has the
    factor ``1 / warmup_steps``, step ``warmup_steps - 1`` has 1, and a step after the last would have 0.

    Args:
        kind: ``cosine``, ``linear``, ``constant`` or ``constant_with_warmup``.
        warmup_steps: steps in which the factor rises; 0 for ``constant``.
        total_steps: steps of the run.

    Returns:
        A function from the step, counted from 0, to the factor, 0 to 1.
    """
    assert kind != FLAT or not warmup_steps, f"{FLAT} has no warmup"
    decay = _DECAYS[kind]

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return decay(min(1.0, progress))

    return factor


def count_warmup_steps(ratio: float, total_steps: int) -> int:
    """Steps of warmup: ``ratio`` of all steps, rounded up."""
    return math.ceil(ratio * total_steps)


class LearningRates:
    """Sets the learning rate of every group of an optimizer to its peak times the factor of a step."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> None:
        """Take the present learning rates as the peaks."""
        self._optimizer = optimizer
        self._factor = factor
        self._peaks = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> dict[str, float]:
        """Set the rates of a step, counted from 0.

        Returns:
            The learning rate of every trained part of the model.
        """
        factor = self._factor(step)
        groups = self._optimizer.param_groups
        for group, peak in zip(groups, self._peaks):
            group["lr"] = peak * factor
        return {group["part"]: group["lr"] for group in groups}


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
