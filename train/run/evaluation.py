"""Evaluates a model on a set of shards: loss, token accuracy and share of right answers, over all and per dataset.

Every bin is used once, in a forward pass of its own, and what each sample came to is gathered and added up in the order
of the samples: so the numbers do not depend on the number of ranks. A sample is right where each of its target tokens
is the likeliest one.

Cost: a forward pass a bin, dealt to the ranks; 32 bytes a sample on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.batches.batch import MicroBatch
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.run.metrics import Record
from train.run.plan import Plan, read_settings

EVAL_STEPS = 1000
"""Steps between two evaluations with ``--eval_strategy steps``."""

_RESULT = np.dtype([("bin", "i8"), ("slot", "i4"), ("num_targets", "i4"), ("num_right", "i4"), ("loss", "f8")])
"""What a sample came to; ``loss`` is summed over its targets."""


def is_due(plan: Plan, step: int) -> bool:
    """Whether a run evaluates when ``step`` steps are done."""
    if step == plan.num_steps:
        return True
    if plan.args.eval_strategy == "steps":
        return step % (plan.args.eval_steps or EVAL_STEPS) == 0
    if plan.args.eval_strategy == "epoch":
        length = plan.order.steps_per_epoch
        return math.floor(step / length) > math.floor((step - 1) / length)
    return False


class Evaluation:
    """Evaluates, as often as asked."""

    def __init__(self, plan: Plan) -> None:
        """Describe the evaluations of a run that has something to evaluate on."""
        assert plan.eval_index is not None and plan.eval_datasets is not None
        self._index = plan.eval_index
        self._datasets = plan.eval_datasets
        self._plan = plan

    def run(self, running: Any) -> Record:
        """Evaluate. All ranks call this together.

        Args:
            running: the DeepSpeed engine, between two steps.

        Returns:
            ``eval_loss``, ``eval_token_accuracy``, ``eval_exact_match``, and the same of every dataset under
            ``eval_datasets``.
        """
        parts = [np.empty(0, dtype=_RESULT)]
        running.eval()
        with torch.no_grad(), self._open_stream() as stream:
            for batch in stream:
                for micro in batch.micro_batches:
                    moved = micro.to(self._plan.device, non_blocking=True)
                    parts.append(sum_by_sample(micro, running(moved, scores=True).double().cpu().numpy()))
        running.train()
        of_ranks: list[Any] = [None] * self._plan.ranks.world
        torch.distributed.all_gather_object(of_ranks, np.concatenate(parts))
        results = np.concatenate(of_ranks)
        results = results[np.lexsort((results["slot"], results["bin"]))]
        datasets = self._datasets
        assert results.size == datasets.of_sample.size, "every sample is seen once"
        return {
            **{f"eval_{name}": value for name, value in _summarise(results).items()},
            "eval_datasets": {
                name: _summarise(results[datasets.of_sample == number]) for number, name in enumerate(datasets.names)
            },
        }

    def _open_stream(self) -> BinStream:
        plan, world = self._plan, self._plan.ranks.world
        return BinStream(
            self._index,
            DataOrder(self._index.cost(), seed=0, global_batch=world, epochs=1),
            rank=plan.ranks.rank,
            world_size=world,
            accumulation=1,
            per_device=1,
            window_size=plan.shape.window_size,
            num_threads=plan.args.dataloader_num_workers,
            read_timeout_s=plan.args.read_timeout_s,
            pin_device=plan.device if plan.device.type == "cuda" else None,
            read=read_settings(plan.args, self._index),
        )


def sum_by_sample(micro: MicroBatch, scores: NDArray[np.float64]) -> NDArray[Any]:
    """What the samples of a micro-batch of one bin, or of none, came to.

    Args:
        micro: the micro-batch, on the CPU.
        scores: (2, T) loss of every target, and 1 where it was the likeliest token.

    Returns:
        (samples,) of ``_RESULT``.
    """
    results = np.zeros(micro.num_samples, dtype=_RESULT)
    if micro.num_samples:
        (results["bin"],) = micro.bins
        results["slot"] = np.arange(micro.num_samples)
        samples = np.searchsorted(micro.cu_seqlens.numpy(), micro.target_positions.numpy(), side="right") - 1
        for name, weights in (("num_targets", None), ("num_right", scores[1]), ("loss", scores[0])):
            results[name] = np.bincount(samples, weights=weights, minlength=micro.num_samples)
    return results


def format_evaluation(found: Record) -> str:
    """What :meth:`Evaluation.run` gave, in one line for a person: over all samples, and of every dataset."""
    whole = {name.removeprefix("eval_"): value for name, value in found.items() if name != "eval_datasets"}
    parts = {"": whole, **({} if len(found["eval_datasets"]) == 1 else found["eval_datasets"])}
    return "; ".join(
        f"{f'{name}: ' if name else ''}loss {_shown(one['loss'])}, {one['token_accuracy']:.1%} of the tokens and "
        f"{one['exact_match']:.1%} of {one['num_samples']} samples right"
        for name, one in parts.items()
    )


def _shown(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _summarise(results: NDArray[Any]) -> dict[str, float | None]:
    """The loss is None where it is no finite number, as that of a step is."""
    num_targets = max(1, int(results["num_targets"].sum()))
    loss = float(np.add.reduce(results["loss"])) / num_targets
    is_right = results["num_right"] == results["num_targets"]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "token_accuracy": int(results["num_right"].sum()) / num_targets,
        "exact_match": int(is_right.sum()) / max(1, results.size),
        "num_samples": results.size,
    }
