"""``python -m train.memory``: memory of a rank without a GPU, and without a checkpoint or shards if need be.

``python -m train.memory --world-size 64 --model_name_or_path 7B --deepspeed zero3.json --max-length 4096`` prints the
table that ``--dry-run`` of the trainer prints for the ranks it is started on.

Cost: seconds, most of which go into importing the trainer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from schemas.wording import counted
from train.arithmetic.dimensions import OFFICIAL
from train.exits import guarded
from train.memory.budget import TABLE_TITLE, rank_memory, size_table
from train.memory.loads import loads_of_length, loads_of_shards
from train.model import pretrained
from train.model.sizes import sizes_of
from train.settings.batch import bins_of_budget, choose_batch
from train.settings.deepspeed_file import read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe
from train.shards.index import open_shards

_OFFICIAL_NAME = re.compile(rf"(?:Qwen/)?(?:Qwen2\.5-VL-)?({'|'.join(OFFICIAL)})(?:-Instruct)?")


@click.command(
    name="python -m train.memory",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="\b\nExamples:\n"
    "  python -m train.memory --world-size 8 --model_name_or_path 7B --shards shards/mine\n"
    "  python -m train.memory --world-size 64 --model_name_or_path 72B --deepspeed zero3.json --max-length 8192",
)
@click.option("--world-size", "--world_size", type=click.IntRange(1, 10**6), required=True, help="Number of ranks.")
@click.option(
    "--max-length",
    type=click.IntRange(1, 2**31 - 1),
    help="Tokens of a bin, if there are no shards yet: assumes the fullest possible bins.",
)
@click.pass_context
@guarded
def main(context: click.Context, world_size: int, max_length: int | None) -> None:
    """Print the memory of a rank, term by term, and a table for all official sizes.

    Takes the flags of the trainer (--shards, --model_name_or_path, --deepspeed, --tune_mm_vision, ...). A checkpoint
    may be named by its size (7B). The default precision is bfloat16.
    """
    logging.basicConfig(level=logging.WARNING)
    click.echo(report(context.args, world=world_size, max_length=max_length))


def report(flags: list[str], *, world: int, max_length: int | None) -> str:
    """The output of ``python -m train.memory``.

    Args:
        flags: flags of the trainer, with ``--shards`` unless ``max_length`` is set.
        world: number of ranks.
        max_length: tokens of a bin.

    Raises:
        ConfigError: the flags are wrong or contradict each other.
        ShardError: shards are incomplete.
    """
    args = parse_arguments(flags, shards="")
    if max_length is None and not args.shards:
        raise ConfigError("the size of a bin is unknown: pass --shards, or --max-length if there are no shards yet.")
    if max_length is not None and args.shards:
        raise ConfigError(f"--max-length {max_length} and --shards {args.shards} exclude each other: pass one of them.")
    dtype = torch.float16 if args.fp16 else torch.float32 if args.bf16 is False else torch.bfloat16
    model_config = find_config(args.model_name_or_path)
    checkpointed = args.gradient_checkpointing
    if max_length is None:
        index = open_shards(args.shards)
        load_of = loads_of_shards(index, checkpointed=checkpointed, dtype=dtype)
        num_bins = choose_batch(
            args,
            choose_recipe(args, model_config),
            samples_per_bin=index.samples_per_bin,
            largest_bin=int(index.num_tokens.max()),
            world=world,
        ).per_device
    else:
        load_of = loads_of_length(max_length, checkpointed=checkpointed)
        num_bins = (args.per_device_train_batch_size or 1) if args.counts_bins else bins_of_budget(args, max_length)
    deepspeed = read_deepspeed_config(args.deepspeed_file)
    sizes = sizes_of(model_config, args)
    load = load_of(num_bins, sizes)
    memory = rank_memory(sizes, args, load, deepspeed=deepspeed, world=world, dtype=dtype)
    table = size_table(args, load_of, num_bins, world=world, dtype=dtype)
    ranks, precision = counted(world, "rank"), str(dtype).removeprefix("torch.")
    title = f"{args.model_name_or_path}, {args.deepspeed_file}, {ranks}, {precision}"
    return "\n".join([title, memory.format(), "", TABLE_TITLE % ranks, table])


def find_config(name: str) -> Mapping[str, Any]:
    """``config.json`` of a checkpoint. Official checkpoints need not be present, and may be named by their size.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    if not Path(name).is_dir() and (match := _OFFICIAL_NAME.fullmatch(name)):
        return OFFICIAL[match[1]]
    return read_config(pretrained.find_checkpoint(name))
