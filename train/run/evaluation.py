"""Evaluation on a set of shards: loss, token accuracy and exact match, overall and per dataset.

Every bin is used once, in a forward pass of its own. The results of all samples are gathered and added up in the order
of the samples, so the metrics do not depend on the number of ranks. A sample matches exactly if each of its target
tokens is the likeliest one.

Cost: one forward pass per bin, shared by the ranks; 32 bytes per sample on every rank.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.wording import counted
from train.batches.batch import MicroBatch
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.run.checks import read_settings
from train.run.engine import Engine
from train.run.metrics import Record, format_loss
from train.run.plan import Plan

EVAL_STEPS = 1000
"""Default steps between two evaluations with ``--eval_strategy steps``."""

_RESULT = np.dtype([("bin", "i8"), ("slot", "i4"), ("num_targets", "i4"), ("num_right", "i4"), ("loss", "f8")])
"""Result of a sample; ``loss`` is summed over its targets."""


def is_due(plan: Plan, step: int) -> bool:
    """Whether a run evaluates after ``step`` steps."""
    if step == plan.num_steps:
        return True
    if plan.args.eval_strategy == "steps":
        return step % (plan.args.eval_steps or EVAL_STEPS) == 0
    if plan.args.eval_strategy == "epoch":
        length = plan.order.steps_per_epoch
        return math.floor(step / length) > math.floor((step - 1) / length)
    return False


class Evaluation:
    """Evaluates the model of a run, any number of times."""

    def __init__(self, plan: Plan) -> None:
        """Take the shards to evaluate on from a plan that has some."""
        assert plan.held_out is not None
        self._index = plan.held_out.index
        self._datasets = plan.held_out.datasets
        self._plan = plan

    def run(self, engine: Engine) -> Record:
        """Evaluate. Collective.

        Args:
            engine: the engine, between two steps.

        Returns:
            ``eval_loss``, ``eval_token_accuracy``, ``eval_exact_match`` and ``eval_num_samples``, and the same of every
            dataset under ``eval_datasets``.
        """
        results = self._gather(self._forward(engine))
        of_sample, names = self._datasets.of_sample, self._datasets.names
        assert results.size == of_sample.size, "every sample is evaluated once"
        return {
            **{f"eval_{name}": value for name, value in _summarise(results).items()},
            "eval_datasets": {name: _summarise(results[of_sample == code]) for code, name in enumerate(names)},
        }

    def _forward(self, engine: Engine) -> NDArray[Any]:
        """Results of the samples in the bins of this rank."""
        parts = [np.empty(0, dtype=_RESULT)]
        engine.eval()
        with torch.no_grad(), self._open_stream() as stream:
            for batch in stream:
                for micro in batch.micro_batches:
                    moved = micro.to(self._plan.compute.device, non_blocking=True)
                    parts.append(sum_by_sample(micro, engine(moved, scores=True).double().cpu().numpy()))
        engine.train()
        return np.concatenate(parts)

    def _gather(self, own: NDArray[Any]) -> NDArray[Any]:
        """Results of all ranks, in the order of the samples. Collective."""
        of_ranks: list[Any] = [None] * self._plan.ranks.world
        torch.distributed.all_gather_object(of_ranks, own)
        results = np.concatenate(of_ranks)
        return results[np.lexsort((results["slot"], results["bin"]))]

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
            pin_device=plan.compute.device if plan.compute.device.type == "cuda" else None,
            read=read_settings(plan.args, self._index),
        )


def sum_by_sample(micro: MicroBatch, scores: NDArray[np.float64]) -> NDArray[Any]:
    """Sum the scores of the targets of each sample.

    Args:
        micro: a micro-batch of one bin or none, on the CPU.
        scores: (2, T) loss of every target, and 1 where the target was the likeliest token.

    Returns:
        (num_samples,) of ``_RESULT``.
    """
    results = np.zeros(micro.num_samples, dtype=_RESULT)
    if micro.num_samples:
        (results["bin"],) = micro.bins
        results["slot"] = np.arange(micro.num_samples)
        # (T,): the sample whose span of positions, [cu_seqlens[s], cu_seqlens[s + 1]), holds the target
        samples = np.searchsorted(micro.cu_seqlens.numpy(), micro.target_positions.numpy(), side="right") - 1
        for name, weights in (("num_targets", None), ("num_right", scores[1]), ("loss", scores[0])):
            results[name] = np.bincount(samples, weights=weights, minlength=micro.num_samples)
    return results


def format_evaluation(record: Record) -> str:
    """The result of :meth:`Evaluation.run` in one line: over all samples, then per dataset if there are several."""
    overall = {name.removeprefix("eval_"): value for name, value in record.items() if name != "eval_datasets"}
    parts = {"": overall, **({} if len(record["eval_datasets"]) == 1 else record["eval_datasets"])}
    return "; ".join(
        f"{f'{name}: ' if name else ''}loss {format_loss(part['loss'])}, {part['token_accuracy']:.1%} of the tokens "
        f"and {part['exact_match']:.1%} of {counted(part['num_samples'], 'sample')} right"
        for name, part in parts.items()
    )


def _summarise(results: NDArray[Any]) -> dict[str, float | None]:
    """Metrics of some samples. A loss that is not finite is None, as in the record of a step."""
    num_targets = max(1, int(results["num_targets"].sum()))
    loss = float(np.add.reduce(results["loss"])) / num_targets
    is_exact = results["num_right"] == results["num_targets"]
    return {
        "loss": loss if math.isfinite(loss) else None,
        "token_accuracy": int(results["num_right"].sum()) / num_targets,
        "exact_match": int(is_exact.sum()) / max(1, results.size),
        "num_samples": results.size,
    }
