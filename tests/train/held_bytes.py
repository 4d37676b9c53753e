"""Measures the memory that DeepSpeed holds: trains a tiny model for two steps and writes bytes by kind as JSON."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.train.synthetic import as_bin, make_medium, make_sample
from train.batches.batch import build_micro_batch
from train.model import optim, pretrained
from train.model.packed import PackedQwen
from train.run import process_group
from train.run.engine import initialize, register_zero3_loading
from train.settings.batch import Batch
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments


def size(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind some tensors, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(ds_engine: Any) -> dict[str, int]:
    """Bytes that a DeepSpeed engine holds, by kind."""
    parameters, zero = list(ds_engine.module.parameters()), ds_engine.optimizer
    masters = (
        getattr(zero, "single_partition_of_fp32_groups", None)
        or getattr(zero, "fp32_partitioned_groups_flat", None)
        or zero.fp32_groups_flat_partition
    )
    states = [value for state in zero.optimizer.state.values() for value in state.values()]
    averaged = [grad for group in getattr(zero, "averaged_gradients", {}).values() if group for grad in group]
    return {
        "weights": size(parameter.data for parameter in parameters)
        + size(getattr(parameter, "ds_tensor", None) for parameter in parameters),
        "secondary weights": size(getattr(parameter, "ds_secondary_tensor", None) for parameter in parameters),
        "float32 weights": size(masters),
        "moments of AdamW": size(states),
        "float32 gradients": size(master.grad for master in masters),
        "gradients of a pass": size(parameter.grad for parameter in parameters),
        "gradients": size(getattr(parameter, "grad_accum", None) for parameter in parameters)
        + size([*averaged, *getattr(zero, "fp32_groups_gradients_flat", [])])
        + size([getattr(zero, "grad_partitions_flat_buffer", None)] if not averaged else []),
    }


def bucket_bytes(ds_engine: Any) -> int:
    """Bytes of the gradient buckets of a DeepSpeed engine. Its first two stages free them after a backward pass."""
    buffers = [getattr(bucket, "buffer", None) for bucket in getattr(ds_engine.optimizer, "ipg_buckets", {}).values()]
    return size(each for buffer in buffers for each in (buffer if isinstance(buffer, list) else [buffer]))


def train(checkpoint: Path, deepspeed: str, dtype: str, tune: str) -> dict[str, dict[str, int]]:
    """Train two steps of two micro-batches; return the peak after a backward pass, and what is held after the steps."""
    flags = ["--shards", "none", "--deepspeed", deepspeed, "--gradient_accumulation_steps", "2"]
    flags += ["--weight_decay", "0"]
    flags += ["--bf16", str(dtype == "bfloat16")]
    for part, trained in zip(("llm", "mlp", "vision"), tune):
        flags += [f"--tune_mm_{part}", str(trained == "1")]
    args, ranks, kind = parse_arguments(flags), process_group.read_ranks(-1), getattr(torch, dtype)
    shape = pretrained.read_shape(checkpoint)
    config = complete_config(
        read_deepspeed_config(deepspeed),
        args,
        Batch(bins=2 * ranks.world, per_device=1, accumulation=2),
        world=ranks.world,
        dtype=kind,
        hidden_size=shape.hidden_size,
        num_trained=1,  # small buckets, as for a model of real size
    )
    zero3_loading = register_zero3_loading(config)
    hf = pretrained.load_model(checkpoint, dtype=kind, attn_implementation="sdpa")
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    groups = optim.group_parameters(model, optim.learning_rates(args, 1e-3))
    ds_engine = initialize(model, optim.build_optimizer(groups, args), config)
    rng = np.random.default_rng(0)
    micro = build_micro_batch([as_bin([make_sample(rng, [make_medium(rng, 4, 4)])])])
    backward: dict[str, int] = {}
    buckets: list[int] = []
    # Its gradient comes after those of the language model.
    model.hf.model.visual.merger.ln_q.weight.register_hook(lambda _: buckets.append(bucket_bytes(ds_engine)))
    for _ in range(2):
        for _ in range(2):
            ds_engine.backward(ds_engine(micro) * 1e-3)
            backward = {name: max(value, backward.get(name, 0)) for name, value in held(ds_engine).items()}
            ds_engine.step()
    del zero3_loading
    backward["buckets"] = max(buckets)
    result = {"backward": backward, "steps": held(ds_engine)}
    ds_engine.destroy()
    return result


def measure(checkpoint: Path, out: Path, cases: Sequence[tuple[str, str, str]]) -> None:
    """Be a rank that measures and ends.

    Args:
        checkpoint: folder of the model.
        out: file that gets one object per case.
        cases: DeepSpeed file, dtype and what is trained: three digits, for language model, merger and vision tower.
    """
    process_group.join(torch.device("cpu"))
    results = []
    for case in cases:
        results.append(train(checkpoint, *case))
        gc.collect()
    if process_group.read_ranks(-1).is_first:
        out.write_text(json.dumps(results))
    process_group.leave()
    sys.exit(0)
