"""The order of bins of a run, from its settings: what the trainer uses and ``python -m train.order`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.arithmetic.cost import CostModel
from train.order.dealing import DataOrder, Grouping
from train.settings.arguments import TrainArguments
from train.shards.index import ShardIndex


def order_of_run(
    args: TrainArguments,
    index: ShardIndex,
    config: Mapping[str, Any] | None,
    *,
    global_batch: int,
    epochs: float | None,
    group_runs: int | None,
) -> DataOrder:
    """Build the order of a run.

    Args:
        args: settings of the run.
        index: its bins.
        config: contents of the ``config.json`` of its checkpoint, from whose sizes the costs of bins follow; None for
            the sizes of the 7B.
        global_batch: bins of a step, over all ranks and micro-steps.
        epochs: epochs until the order ends; None for no end.
        group_runs: runs of the windows of ``group_steps``; None if the steps are not grouped.
    """
    cost_model = (CostModel() if config is None else CostModel.of(config)).in_training(
        tune_llm=args.tune_mm_llm,
        tune_vision=args.tune_mm_vision,
        uses_adapters=args.lora_enable,
        gradient_checkpointing=args.gradient_checkpointing,
    )
    return DataOrder(
        index.cost(cost_model),
        seed=args.seed,
        global_batch=global_batch,
        epochs=epochs,
        mixture=index.mixture,
        grouping=None if group_runs is None else Grouping(steps=args.group_steps, runs=group_runs),
    )
