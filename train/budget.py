"""Memory of a run before it runs: flags, checkpoint and bins -> :class:`train.memory.Memory`, and a table of sizes.

``python -m train.memory --world-size 64 --model_name_or_path 7B --deepspeed zero3.json --max-length 4096`` works it out
without a GPU, a checkpoint or shards; ``--dry_run`` of the trainer prints the same for the ranks that it is started on.

Cost: seconds, most of which go into importing the trainer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from schemas.errors import ConfigError, VlprepError
from schemas.qwen import MERGED_PATCHES
from train import engine, pretrained
from train.activations import Load, activation_terms
from train.arguments import TrainArguments
from train.cost import read_config
from train.flags import parse_arguments
from train.index import ShardIndex, open_shards
from train.memory import GIB, Memory, Sharding, state_terms
from train.model import FLASH_ATTENTION
from train.recipe import choose_recipe
from train.sizes import OFFICIAL, Sizes, sizes_of

STRATEGIES = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
"""Files of ``train/configs`` that the table compares."""

_OFFICIAL_NAME = re.compile(r"(?:Qwen/)?(?:Qwen2\.5-VL-)?(3B|7B|32B|72B)(?:-Instruct)?")


def largest_bins(index: ShardIndex, number: int) -> list[int]:
    """The bins that cost most, which a rank might get in one forward pass: ``number`` of them, if there are as many."""
    return [int(place) for place in np.argsort(-index.cost(), kind="stable")[:number]]


def load_of_bins(index: ShardIndex, bins: list[int], *, attention: str, checkpointed: bool) -> Load:
    """What a micro-batch of these bins holds."""
    num_samples = int(index.num_samples[bins].sum())
    return Load(
        num_tokens=int(index.num_tokens[bins].sum()),
        num_targets=int(index.num_targets[bins].sum()),
        num_patches=int(index.num_patches[bins].sum()),
        is_masked=attention != FLASH_ATTENTION and num_samples > 1,
        is_checkpointed=checkpointed,
    )


def fullest_load(max_length: int, number: int, *, attention: str, checkpointed: bool) -> Load:
    """The most that a micro-batch of ``number`` bins can hold: pictures alone in the vision tower, and all trained."""
    num_tokens = max_length * number
    return Load(
        num_tokens=num_tokens,
        num_targets=num_tokens,
        num_patches=num_tokens * MERGED_PATCHES,
        is_masked=attention != FLASH_ATTENTION,
        is_checkpointed=checkpointed,
    )


def budget(
    model_config: Mapping[str, Any],
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
        model_config: contents of the ``config.json`` of the checkpoint.
        sizes: of its model, as it is trained.
        args: the flags.
        load: the largest micro-batch.
        deepspeed: configuration of DeepSpeed; what it leaves to the flags may be open.
        world: number of ranks.
        dtype: what is computed in.

    Raises:
        ConfigError: flags and configuration do not fit together.
    """
    complete = engine.complete_config(
        deepspeed,
        args,
        choose_recipe(args, model_config),
        world=world,
        dtype=dtype,
        hidden_size=sizes.hidden_size,
    )
    sharding = Sharding.of(complete, world=world, dtype=dtype)
    return Memory((*state_terms(sizes, sharding), *activation_terms(sizes, load, dtype)))


def size_table(args: TrainArguments, loads: Mapping[str, Load], *, world: int, dtype: torch.dtype) -> str:
    """Memory of a rank for every official size and every file of :data:`STRATEGIES`.

    Args:
        args: the flags.
        loads: the largest micro-batch at each size.
        world: number of ranks.
        dtype: what is computed in.
    """
    rows = [("", *(f"{name.removesuffix('.json')}" for name in STRATEGIES))]
    for size, load in loads.items():
        sizes, cells = sizes_of(OFFICIAL[size], args), []
        for name in STRATEGIES:
            config = engine.read_deepspeed_config(name)
            memory = budget(OFFICIAL[size], sizes, args, load, deepspeed=config, world=world, dtype=dtype)
            cell = f"{memory.peak() / GIB:.1f} ({memory.held() / GIB:.1f})"
            if host := memory.peak("cpu"):
                cell += f", host {host / GIB:.1f}"
            cells.append(cell)
        rows.append((size, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def loads_by_size(args: TrainArguments, index: ShardIndex, *, attention: str) -> dict[str, Load]:
    """The largest micro-batch of each official size, with as many bins as flags or recommendation say."""
    return {
        size: load_of_bins(
            index,
            largest_bins(index, choose_recipe(args, config).per_device),
            attention=attention,
            checkpointed=args.gradient_checkpointing,
        )
        for size, config in OFFICIAL.items()
    }


def find_config(name: str) -> Mapping[str, Any]:
    """``config.json`` of a checkpoint; those of the official ones are known, by their size as well.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if not Path(name).is_dir() and (match := _OFFICIAL_NAME.fullmatch(name)):
        return OFFICIAL[match[1]]
    return read_config(pretrained.find_checkpoint(name))


TABLE_TITLE = "most at a time (held all the time), GiB for each of %d ranks, with the largest micro-batch at each size:"


@click.command(
    name="python -m train.memory",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)
@click.option("--world-size", "--world_size", type=click.IntRange(1, 10**6), required=True, help="Number of ranks.")
@click.option(
    "--max-length",
    type=click.IntRange(1, 2**31 - 1),
    help="Tokens of a bin, where there are no shards yet: the fullest bin there can be is taken.",
)
@click.pass_context
def main(context: click.Context, world_size: int, max_length: int | None) -> None:
    """Work out the memory of a rank, term by term, and for all official sizes.

    Takes the flags of the trainer (--shards, --model_name_or_path, --deepspeed, --tune_mm_vision, ...); a checkpoint
    may be named by its size (7B). Precision is bfloat16 and attention flash attention, if flags say nothing else.
    """
    logging.basicConfig(level=logging.WARNING)
    try:
        click.echo(report(context.args, world=world_size, max_length=max_length))
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


def report(flags: list[str], *, world: int, max_length: int | None) -> str:
    """The text of ``python -m train.memory``.

    Args:
        flags: those of the trainer; without ``--shards`` where ``max_length`` is given.
        world: number of ranks.
        max_length: tokens of a bin.

    Raises:
        ConfigError: the flags make no sense.
        ShardError: shards are incomplete.
    """
    args = parse_arguments(flags, shards="")
    if max_length is None and not args.shards:
        raise ConfigError("nothing says what bins hold: give --shards, or --max-length where there are no shards yet.")
    if max_length is not None and args.shards:
        raise ConfigError(f"--max-length {max_length} and --shards {args.shards} both say what bins hold: give one.")
    dtype = torch.float16 if args.fp16 else torch.float32 if args.bf16 is False else torch.bfloat16
    attention = FLASH_ATTENTION if args.attn_implementation == "auto" else args.attn_implementation
    model_config = find_config(args.model_name_or_path)
    number = choose_recipe(args, model_config).per_device
    checkpointed = args.gradient_checkpointing
    if max_length is None:
        index = open_shards(args.shards)
        load = load_of_bins(index, largest_bins(index, number), attention=attention, checkpointed=checkpointed)
        loads = loads_by_size(args, index, attention=attention)
    else:
        load = fullest_load(max_length, number, attention=attention, checkpointed=checkpointed)
        loads = {
            size: fullest_load(
                max_length, choose_recipe(args, config).per_device, attention=attention, checkpointed=checkpointed
            )
            for size, config in OFFICIAL.items()
        }
    deepspeed = engine.read_deepspeed_config(args.deepspeed)
    sizes = sizes_of(model_config, args)
    memory = budget(model_config, sizes, args, load, deepspeed=deepspeed, world=world, dtype=dtype)
    table = size_table(args, loads, world=world, dtype=dtype)
    head = f"{args.model_name_or_path}, {args.deepspeed}, {world} ranks, {str(dtype).removeprefix('torch.')}"
    return "\n".join([head, memory.format(), "", TABLE_TITLE % world, table])
