"""Which DeepSpeed file a run takes: flags, checkpoint, memory of the device -> :class:`Strategy`, with its batch.

A file that a flag names is obeyed, and a run that resumes keeps its ZeRO stage. Otherwise the run takes ZeRO-2, unless
ZeRO-1 saves communication and fits: at ZeRO-1, ranks exchange gradients once a step instead of once a forward pass.

Cost: that of the memory arithmetic, milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.memory.budget import USABLE, bins_that_fit, rank_memory
from train.memory.loads import loads_of_shards
from train.memory.terms import GIB
from train.model.sizes import sizes_of
from train.run.device import Compute
from train.run.run_dir import ZERO_STAGE, RunState
from train.settings.arguments import TrainArguments
from train.settings.batch import Batch, choose_batch
from train.settings.declarations import DEEPSPEED_FILE, FEWER_EXCHANGES_FILE
from train.settings.deepspeed_file import read_deepspeed_config
from train.settings.recipe import Recipe
from train.shards.index import ShardIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How ranks share weights, gradients and optimizer states, and the bins of a step.

    Attributes:
        args: the flags, with the DeepSpeed file that the run takes.
        deepspeed: contents of that file.
        batch: bins of a step, and their forward passes.
        note: why the run takes another file than the default without being told to; None if it does not.
    """

    args: TrainArguments
    deepspeed: dict[str, Any]
    batch: Batch
    note: str | None = None


def choose_strategy(
    args: TrainArguments,
    recipe: Recipe,
    index: ShardIndex,
    config: Mapping[str, Any],
    saved: tuple[Path, RunState] | None,
    *,
    compute: Compute,
    world: int,
) -> Strategy:
    """Choose the DeepSpeed file, the bins of a step, and forward passes that fit the device.

    If the flags name no file, the run takes ZeRO-1 where it saves exchanges and fits: several ranks would make several
    forward passes a step at ZeRO-2, and the peak of ZeRO-1 fits, perhaps with more and smaller passes. If the memory of
    the device is unknown, as on a CPU, it takes ZeRO-2.

    Args:
        args: the flags.
        recipe: what is recommended.
        index: the bins.
        config: ``config.json`` of the checkpoint.
        saved: the checkpoint to resume from, with its state.
        compute: how a rank computes, with the memory of the smallest device.
        world: number of ranks.

    Raises:
        ConfigError: the file is not usable, or ``--max_tokens_per_forward`` does not allow a single bin.
    """

    def planned(file: str, note: str | None = None) -> Strategy:
        named, deepspeed = dataclasses.replace(args, deepspeed=file), read_deepspeed_config(file)
        batch = plan_batch(named, recipe, index, config, saved, compute=compute, deepspeed=deepspeed, world=world)
        return Strategy(args=named, deepspeed=deepspeed, batch=batch, note=note)

    if args.deepspeed is not None:
        return planned(args.deepspeed)
    if saved is not None and saved[1].settings.get(ZERO_STAGE) == 1:
        return planned(FEWER_EXCHANGES_FILE, f"DeepSpeed: {FEWER_EXCHANGES_FILE}, at whose stage the run began")
    default = planned(DEEPSPEED_FILE)
    num_passes = default.batch.accumulation
    if saved is not None or compute.capacity is None or world == 1 or num_passes == 1:
        return default
    other = planned(FEWER_EXCHANGES_FILE)
    sizes = sizes_of(config, args)
    load_of = loads_of_shards(index, checkpointed=args.gradient_checkpointing, dtype=compute.dtype)
    load = load_of(other.batch.per_device, sizes)
    peak = rank_memory(sizes, other.args, load, deepspeed=other.deepspeed, world=world, dtype=compute.dtype).peak()
    if peak > USABLE * compute.capacity:
        return default
    note = (
        f"DeepSpeed: {FEWER_EXCHANGES_FILE}, which fits ({peak / GIB:.1f} of {compute.capacity / GIB:.1f} GiB by the "
        f"estimate): ranks exchange gradients once a step; --deepspeed {DEEPSPEED_FILE} takes less memory, for "
        f"{num_passes} forward passes and exchanges"
    )
    return dataclasses.replace(other, note=note)


def plan_batch(
    args: TrainArguments,
    recipe: Recipe,
    index: ShardIndex,
    config: Mapping[str, Any],
    saved: tuple[Path, RunState] | None,
    *,
    compute: Compute,
    deepspeed: dict[str, Any],
    world: int,
) -> Batch:
    """Choose the bins of a step, and split them into forward passes that fit the device.

    Raises:
        ConfigError: ``--max_tokens_per_forward`` does not allow a single bin.
    """

    def fitting(most: int) -> int:
        load_of = loads_of_shards(index, checkpointed=args.gradient_checkpointing, dtype=compute.dtype)
        assert compute.capacity is not None
        return bins_that_fit(
            sizes_of(config, args),
            args,
            load_of,
            deepspeed=deepspeed,
            world=world,
            dtype=compute.dtype,
            available=compute.capacity,
            most=most,
        )

    return choose_batch(
        args,
        recipe,
        samples_per_bin=index.samples_per_bin,
        largest_bin=int(index.num_tokens.max()),
        world=world,
        begun=(None, 0) if saved is None else (saved[1].aim, saved[1].stream["global_batch"]),
        fitting=None if compute.capacity is None else fitting,
    )
