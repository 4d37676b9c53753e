"""Memory of a rank: flags, checkpoint and largest micro-batch -> :class:`Memory`, and a table for the official sizes.

The other way round, :func:`bins_that_fit` finds the largest micro-batch that a device has room for.

Cost: milliseconds; with adapters, a tenth of a second per size.
"""

from __future__ import annotations

import bisect
from typing import Any

import torch

from train.arithmetic.dimensions import OFFICIAL
from train.memory.activations import Load, activation_terms
from train.memory.loads import LoadOf
from train.memory.states import Sharding, state_terms
from train.memory.terms import GIB, HOST, Memory
from train.model.sizes import Sizes, sizes_of
from train.settings.arguments import TrainArguments
from train.settings.declarations import FUSED
from train.settings.deepspeed_file import complete_config, read_deepspeed_config

STRATEGIES = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
"""Files of ``train/settings/configs`` that the table compares."""

USABLE = 0.8
"""Share of a device's memory that a run may fill by the estimate, which lacks the CUDA context, NCCL's buffers and
fragmentation."""

TABLE_TITLE = "peak (always held), GiB per rank on %s, with the largest micro-batch of each size:"


def rank_memory(
    sizes: Sizes,
    args: TrainArguments,
    load: Load,
    *,
    deepspeed: dict[str, Any],
    world: int,
    dtype: torch.dtype,
) -> Memory:
    """Memory of a rank.

    Args:
        sizes: parameter counts of the model.
        args: the flags.
        load: the largest micro-batch.
        deepspeed: DeepSpeed configuration; values may be left to the flags.
        world: number of ranks.
        dtype: dtype of the computation.

    Raises:
        ConfigError: flags and configuration contradict each other.
    """
    complete = complete_config(
        deepspeed,
        args,
        None,
        world=world,
        dtype=dtype,
        hidden_size=sizes.dims.hidden_size,
        num_trained=sizes.num_trained,
    )
    sharding = Sharding.of(complete, world=world, dtype=dtype, is_fused=args.optim == FUSED)
    return Memory((*state_terms(sizes, sharding), *activation_terms(sizes, load, dtype)))


def bins_that_fit(
    sizes: Sizes,
    args: TrainArguments,
    load_of: LoadOf,
    *,
    deepspeed: dict[str, Any],
    world: int,
    dtype: torch.dtype,
    available: int,
    most: int,
) -> int:
    """Bins of the largest micro-batch for which a device has room by the estimate, at least 1.

    Args:
        sizes: parameter counts of the model.
        args: the flags.
        load_of: the largest micro-batch of a number of bins.
        deepspeed: DeepSpeed configuration; values may be left to the flags.
        world: number of ranks.
        dtype: dtype of the computation.
        available: memory of the device in bytes, of which :data:`USABLE` is filled.
        most: bins that are enough.
    """

    def peak(num_bins: int) -> int:
        load = load_of(num_bins, sizes)
        return rank_memory(sizes, args, load, deepspeed=deepspeed, world=world, dtype=dtype).peak()

    return max(1, bisect.bisect_right(range(1, most + 1), USABLE * available, key=peak))


def size_table(args: TrainArguments, load_of: LoadOf, num_bins: int, *, world: int, dtype: torch.dtype) -> str:
    """Memory of a rank for every official size and every file of :data:`STRATEGIES`.

    Args:
        args: the flags.
        load_of: the largest micro-batch of a model.
        num_bins: its bins.
        world: number of ranks.
        dtype: dtype of the computation.
    """
    rows = [("", *(name.removesuffix(".json") for name in STRATEGIES))]
    for size, model_config in OFFICIAL.items():
        sizes, cells = sizes_of(model_config, args), []
        load = load_of(num_bins, sizes)
        for name in STRATEGIES:
            config = read_deepspeed_config(name)
            memory = rank_memory(sizes, args, load, deepspeed=config, world=world, dtype=dtype)
            cell = f"{memory.peak() / GIB:.1f} ({memory.held() / GIB:.1f})"
            if host := memory.peak(HOST):
                cell += f", host {host / GIB:.1f}"
            cells.append(cell)
        rows.append((size, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
