"""Says what DeepSpeed holds: a script that trains a tiny model for two steps and writes bytes by kind as JSON.

``torchrun … held_bytes.py CHECKPOINT OUT DEEPSPEED,DTYPE,TUNE …``; TUNE is three digits: language model, merger,
vision. OUT gets one object for each of the cases, which are tried one after the other.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.train.synthetic import as_bin, make_medium, make_sample
from train.batches.batch import build_micro_batch
from train.model import optim, pretrained
from train.model.packed import PackedQwen
from train.run import engine
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind some tensors, each once."""
    found = [tensor for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in found}.values())


def held(running: Any) -> dict[str, int]:
    """Bytes of a DeepSpeed engine by kind."""
    parameters, zero = list(running.module.parameters()), running.optimizer
    masters = (
        getattr(zero, "single_partition_of_fp32_groups", None)
        or getattr(zero, "fp32_partitioned_groups_flat", None)
        or zero.fp32_groups_flat_partition
    )
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    averaged = [one for group in getattr(zero, "averaged_gradients", {}).values() if group for one in group]
    return {
        "weights": size(parameter.data for parameter in parameters)
        + size(getattr(parameter, "ds_tensor", None) for parameter in parameters),
        "float32 weights": size(masters),
        "moments of AdamW": size(states),
        "float32 gradients": size(master.grad for master in masters),
        "gradients of a pass": size(parameter.grad for parameter in parameters),
        "gradients": size(getattr(parameter, "grad_accum", None) for parameter in parameters)
        + size([*averaged, *getattr(zero, "fp32_groups_gradients_flat", [])])
        + size([getattr(zero, "grad_partitions_flat_buffer", None)] if not averaged else []),
    }


def train(checkpoint: str, deepspeed: str, dtype: str, tune: str) -> dict[str, dict[str, int]]:
    """Train two steps of two micro-batches; say what is held after a backward pass, at most, and after the steps."""
    flags = ["--shards", "none", "--deepspeed", deepspeed, "--gradient_accumulation_steps", "2"]
    flags += ["--bf16", str(dtype == "bfloat16")]
    for part, trained in zip(("llm", "mlp", "vision"), tune):
        flags += [f"--tune_mm_{part}", str(trained == "1")]
    args, ranks, kind = parse_arguments(flags), engine.read_ranks(-1), getattr(torch, dtype)
    shape = pretrained.read_shape(Path(checkpoint))
    config = engine.complete_config(
        engine.read_deepspeed_config(deepspeed),
        args,
        choose_recipe(args, {}),
        world=ranks.world,
        dtype=kind,
        hidden_size=shape.hidden_size,
    )
    kept_for_loading = engine.keep_for_zero3(config)
    hf = pretrained.load_model(Path(checkpoint), dtype=kind, attn_implementation="sdpa")
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    groups = optim.group_parameters(model, optim.learning_rates(args, 1e-3))
    running = engine.initialize(model, optim.build_optimizer(groups, weight_decay=0.0), config)
    rng = np.random.default_rng(0)
    micro = build_micro_batch([as_bin([make_sample(rng, [make_medium(rng, 4, 4)])])])
    backward: dict[str, int] = {}
    for _ in range(2):
        for _ in range(2):
            running.backward(running(micro) * 1e-3)
            backward = {name: max(value, backward.get(name, 0)) for name, value in held(running).items()}
            running.step()
    del kept_for_loading
    found = {"backward": backward, "steps": held(running)}
    running.destroy()
    return found


def main(checkpoint: str, out: str, *cases: str) -> None:
    """Try all cases."""
    engine.start(torch.device("cpu"))
    found = []
    for case in cases:
        found.append(train(checkpoint, *case.split(",")))
        gc.collect()
    if engine.read_ranks(-1).is_first:
        Path(out).write_text(json.dumps(found))
    engine.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
