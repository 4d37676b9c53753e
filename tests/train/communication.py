"""Counts what DeepSpeed communicates and waits for: trains a tiny model for a step and writes the counts as JSON.

Collectives are counted as torch dispatches them. Waits are those of a GPU: DeepSpeed's accelerator is replaced by one
whose streams note that they are waited for, and wait for nothing.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from torch.utils._python_dispatch import TorchDispatchMode

from schemas.checkpoints import read_config
from tests.train.synthetic import as_bin, make_sample
from train.batches.batch import build_micro_batch
from train.model import optim, pretrained
from train.model.packed import PackedQwen
from train.run import process_group
from train.run.device import Compute
from train.run.engine import initialize, register_zero3_loading
from train.run.strategy import choose_strategy
from train.settings.arguments import TrainArguments
from train.settings.batch import Batch
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe
from train.shards.index import open_shards

REDUCTIONS = ("allreduce_", "_reduce_scatter_base_")
NUM_MICRO_STEPS = 2
HIDDEN_SIZE, VOCAB_SIZE = 64, 2048
"""Of the tiny model."""

Case = tuple[str | None, str, dict[str, Any]]
"""DeepSpeed file, dtype, and settings of its ``zero_optimization`` that differ. Without a file, the run chooses one."""

waits: Counter[str] = Counter()


class Reductions(TorchDispatchMode):
    """Notes the bytes of every reduction of more than a few scalars."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and func.overloadpacket.__name__ in REDUCTIONS:
            # allreduce_(tensors, ...), _reduce_scatter_base_(output, input, ...)
            tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[1]]
            if (num_bytes := sum(tensor.nbytes for tensor in tensors)) > 100:
                self.sizes.append(num_bytes)
        return func(*args, **(kwargs or {}))


class Stream:
    """A stream of a GPU on which nothing runs."""

    def wait_stream(self, other: object) -> None:
        waits["streams"] += other is not self

    def wait_event(self, event: object) -> None:
        waits["streams"] += 1

    def synchronize(self) -> None:
        waits["host"] += 1


class Event:
    """An event that has happened."""

    def record(self, stream: object = None) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        waits["host"] += 1


def emulate_streams() -> None:
    """Let DeepSpeed believe that the CPU has streams, like a GPU. A rank ends with its run: nothing is undone."""
    default = Stream()
    current = [default]

    @contextmanager
    def stream(self: CPU_Accelerator, entered: Stream) -> Iterator[None]:
        current.append(entered)
        yield
        current.pop()

    accelerator: Any = CPU_Accelerator
    accelerator.is_synchronized_device = lambda self: False
    accelerator.Stream, accelerator.Event = property(lambda self: Stream), property(lambda self: Event)
    accelerator.stream = stream
    accelerator.current_stream = lambda self, index=None: current[-1]
    accelerator.default_stream = lambda self, index=None: default
    accelerator.synchronize = lambda self, index=None: waits.update(host=1)
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None


def chosen_file(args: TrainArguments, checkpoint: Path, shards: Path, *, dtype: torch.dtype, world: int) -> str:
    """The DeepSpeed file that a run takes on GPUs with plenty of memory."""
    config, cpu = read_config(checkpoint), torch.device("cpu")
    compute = Compute(device=cpu, dtype=dtype, attention="sdpa", peak_tflops=None, capacity=2**40)
    recipe, index = choose_recipe(args, config), open_shards(str(shards))
    return choose_strategy(args, recipe, index, config, None, compute=compute, world=world).args.deepspeed_file


def run_step(checkpoint: Path, shards: Path, case: Case) -> dict[str, Any]:
    """Make one optimizer step; return the bytes of reductions and the waits, each per micro-step."""
    deepspeed, dtype, changes = case
    flags = ["--shards", str(shards), "--gradient_accumulation_steps", str(NUM_MICRO_STEPS)]
    args, ranks, kind = parse_arguments(flags), process_group.read_ranks(-1), getattr(torch, dtype)
    if deepspeed is None:
        deepspeed = chosen_file(args, checkpoint, shards, dtype=kind, world=ranks.world)
    file = read_deepspeed_config(deepspeed)
    file["zero_optimization"].update(changes)
    config = complete_config(
        file,
        args,
        Batch(bins=NUM_MICRO_STEPS * ranks.world, per_device=1, accumulation=NUM_MICRO_STEPS),
        world=ranks.world,
        dtype=kind,
        hidden_size=HIDDEN_SIZE,
        num_trained=10**6,
    )
    zero3_loading = register_zero3_loading(config)
    hf = pretrained.load_model(checkpoint, dtype=kind, attn_implementation="sdpa")
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    groups = optim.group_parameters(model, optim.learning_rates(args, 1e-3))
    engine = initialize(model, optim.build_optimizer(groups, args), config)
    micro = build_micro_batch([as_bin([make_sample(np.random.default_rng(0))])])
    micro = replace(micro, input_ids=micro.input_ids % VOCAB_SIZE, targets=micro.targets % VOCAB_SIZE)
    reductions, waited = [], []
    for _ in range(NUM_MICRO_STEPS):
        loss = engine(micro)
        waits.clear()
        with Reductions() as noted:
            engine.backward(loss)
        reductions.append(noted.sizes)
        waited.append(dict(waits))
        engine.step()
    del zero3_loading
    engine.destroy()
    num_trained = sum(group.num_elements for group in groups if group.learning_rate is not None)
    return {"reductions": reductions, "waits": waited, "trained": num_trained, "file": deepspeed}


def count(checkpoint: Path, shards: Path, out: Path, cases: Sequence[Case]) -> None:
    """Be a rank that counts and ends.

    Args:
        checkpoint: folder of the model.
        shards: shards that it can train on.
        out: file that gets one object per case.
        cases: what to count.
    """
    emulate_streams()
    process_group.join(torch.device("cpu"))
    results = [run_step(checkpoint, shards, case) for case in cases]
    if process_group.read_ranks(-1).is_first:
        out.write_text(json.dumps(results))
    process_group.leave()
    sys.exit(0)
