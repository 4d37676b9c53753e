"""Memory of a run before it runs: flags, checkpoint and bins -> :class:`~train.memory.states.Memory`, and a table.

``python -m train.memory --world-size 64 --model_name_or_path 7B --deepspeed zero3.json --max-length 4096`` works it out
without a GPU, a checkpoint or shards; ``--dry_run`` of the trainer prints the same for the ranks that it is started on.

Cost: seconds, most of which go into importing the trainer; a few passes over all bins for each size of model.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, VlprepError
from schemas.qwen import MERGED_PATCHES
from train.arithmetic.dimensions import OFFICIAL
from train.memory.activations import Load, activation_terms
from train.memory.states import GIB, Memory, Phase, Sharding, state_terms
from train.model import pretrained
from train.model.packed import CHUNK
from train.model.sizes import Sizes, sizes_of
from train.settings.arguments import TrainArguments
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe
from train.shards.index import ShardIndex, open_shards

STRATEGIES = ("zero1.json", "zero2.json", "zero3.json", "zero3_offload.json")
"""Files of ``train/settings/configs`` that the table compares."""

_OFFICIAL_NAME = re.compile(r"(?:Qwen/)?(?:Qwen2\.5-VL-)?(3B|7B|32B|72B)(?:-Instruct)?")


LoadOf = Callable[[int, Sizes], Load]
"""A number of bins and sizes of a model -> the largest micro-batch of so many bins."""


def largest_bins(index: ShardIndex, number: int, sizes: Sizes, *, checkpointed: bool, dtype: torch.dtype) -> list[int]:
    """The bins that together take most memory, which a rank might get in one forward pass.

    What bins take grows with their tokens and patches, and up to a chunk with their targets, at rates that depend on
    the model, on what is trained and on what lives for a moment: for each of these moments the bins that take most are
    found, and of them the largest.

    Args:
        index: the bins.
        number: of bins; where there are fewer, a forward pass may hold some of them twice.
        sizes: of the model, as it is trained.
        checkpointed: whether activations are recomputed.
        dtype: what is computed in.
    """

    def rates_of(load: Load) -> list[tuple[Phase, int]]:
        return [(term.phase, term.num_bytes) for term in activation_terms(sizes, load, dtype)]

    def peak(bins: list[int]) -> int:
        load = load_of_bins(index, bins, checkpointed=checkpointed)
        return Memory(tuple(activation_terms(sizes, load, dtype))).peak()

    nothing = Load(num_tokens=0, num_targets=0, num_patches=0, is_checkpointed=checkpointed)
    units = (replace(nothing, num_tokens=1), replace(nothing, num_patches=1), replace(nothing, num_targets=1))
    terms = list(zip(*map(rates_of, units)))
    kept = [sum(size for phase, size in unit if phase == Phase.BACKWARD) for unit in zip(*terms)]
    rates = []
    for term in terms:
        if term[0][0] == Phase.MOMENT:
            per_token, per_patch, per_target = (size + moment for size, (_, moment) in zip(kept, term))
            rates.append((per_token, per_patch, per_target))
    return max((_most_of(index, number, *one) for one in dict.fromkeys(rates)), key=peak)


def _most_of(index: ShardIndex, number: int, per_token: int, per_patch: int, per_target: int) -> list[int]:
    """The bins that together take most; targets count up to a chunk of them."""
    targets = np.minimum(index.num_targets, CHUNK).astype(np.int64)
    fixed = per_token * index.num_tokens.astype(np.int64) + per_patch * index.num_patches.astype(np.int64)
    count = min(number, index.num_bins)
    # One after the other is taken, of those that are among the first with or without their targets.
    pool = np.unique(np.concatenate([_first(fixed, count), _first(fixed + per_target * targets, count)]))
    chosen: list[int] = []
    num_targets = 0
    for _ in range(count):
        takes = fixed[pool] + per_target * np.minimum(targets[pool] + num_targets, CHUNK)
        place = int(takes.argmax())
        num_targets += int(targets[pool[place]])
        chosen.append(int(pool[place]))
        pool = np.delete(pool, place)
    return [chosen[place % count] for place in range(number)]


def _first(values: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Places of the largest values, those of equal ones in their order: the same on every machine."""
    least = np.partition(values, -number)[-number]
    places = np.flatnonzero(values >= least)
    return places[np.argsort(-values[places], kind="stable")[:number]]


def load_of_bins(index: ShardIndex, bins: list[int], *, checkpointed: bool) -> Load:
    """What a micro-batch of these bins holds."""
    return Load(
        num_tokens=int(index.num_tokens[bins].sum()),
        num_targets=int(index.num_targets[bins].sum()),
        num_patches=int(index.num_patches[bins].sum()),
        is_checkpointed=checkpointed,
    )


def fullest_load(max_length: int, number: int, *, checkpointed: bool) -> Load:
    """The most that a micro-batch of ``number`` bins can hold: pictures alone in the vision tower, and all trained."""
    num_tokens = max_length * number
    return Load(
        num_tokens=num_tokens,
        num_targets=num_tokens,
        num_patches=num_tokens * MERGED_PATCHES,
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
    complete = complete_config(
        deepspeed,
        args,
        choose_recipe(args, model_config),
        world=world,
        dtype=dtype,
        hidden_size=sizes.dims.hidden_size,
    )
    sharding = Sharding.of(complete, world=world, dtype=dtype)
    return Memory((*state_terms(sizes, sharding), *activation_terms(sizes, load, dtype)))


def loads_of_shards(index: ShardIndex, *, checkpointed: bool, dtype: torch.dtype) -> LoadOf:
    """The largest micro-batches of some shards."""

    def load_of(number: int, sizes: Sizes) -> Load:
        bins = largest_bins(index, number, sizes, checkpointed=checkpointed, dtype=dtype)
        return load_of_bins(index, bins, checkpointed=checkpointed)

    return load_of


def loads_of_length(max_length: int, *, checkpointed: bool) -> LoadOf:
    """The largest micro-batches that there can be of bins of a length."""
    return lambda number, _: fullest_load(max_length, number, checkpointed=checkpointed)


def size_table(args: TrainArguments, load_of: LoadOf, *, world: int, dtype: torch.dtype) -> str:
    """Memory of a rank for every official size and every file of :data:`STRATEGIES`.

    Args:
        args: the flags.
        load_of: the largest micro-batch of a model; it has as many bins as flags or recommendation say.
        world: number of ranks.
        dtype: what is computed in.
    """
    rows = [("", *(f"{name.removesuffix('.json')}" for name in STRATEGIES))]
    for size, model_config in OFFICIAL.items():
        sizes, cells = sizes_of(model_config, args), []
        load = load_of(choose_recipe(args, model_config).per_device, sizes)
        for name in STRATEGIES:
            config = read_deepspeed_config(name)
            memory = budget(model_config, sizes, args, load, deepspeed=config, world=world, dtype=dtype)
            cell = f"{memory.peak() / GIB:.1f} ({memory.held() / GIB:.1f})"
            if host := memory.peak("cpu"):
                cell += f", host {host / GIB:.1f}"
            cells.append(cell)
        rows.append((size, *cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


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
    may be named by its size (7B). Precision is bfloat16, if flags say nothing else.
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
    model_config = find_config(args.model_name_or_path)
    number, checkpointed = choose_recipe(args, model_config).per_device, args.gradient_checkpointing
    if max_length is None:
        index = open_shards(args.shards)
        load_of = loads_of_shards(index, checkpointed=checkpointed, dtype=dtype)
    else:
        load_of = loads_of_length(max_length, checkpointed=checkpointed)
    deepspeed = read_deepspeed_config(args.deepspeed)
    sizes = sizes_of(model_config, args)
    load = load_of(number, sizes)
    memory = budget(model_config, sizes, args, load, deepspeed=deepspeed, world=world, dtype=dtype)
    table = size_table(args, load_of, world=world, dtype=dtype)
    head = f"{args.model_name_or_path}, {args.deepspeed}, {world} ranks, {str(dtype).removeprefix('torch.')}"
    return "\n".join([head, memory.format(), "", TABLE_TITLE % world, table])
