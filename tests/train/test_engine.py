"""The protocol of a DeepSpeed engine is what DeepSpeed's own class offers, in every ZeRO stage and precision."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from deepspeed import DeepSpeedEngine
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.train.synthetic import as_bin, make_sample
from train.batches.batch import build_micro_batch
from train.model.packed import PackedQwen
from train.run import process_group
from train.run.engine import Engine, LossScaler, ZeroOptimizer, can_lower_scale, initialize
from train.settings.batch import Batch
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments

METHODS = ["__call__", *(name for name in vars(Engine) if inspect.isfunction(vars(Engine)[name]) and name[0] != "_")]


def test_the_protocol_has_the_methods_of_a_training_loop() -> None:
    """Nothing is compared below if the protocol is empty."""
    assert {"__call__", "backward", "step", "eval", "train", "save_checkpoint", "load_checkpoint"} <= {*METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_deepspeed_accepts_every_call_of_the_protocol(name: str) -> None:
    """The engine passes a call on to the forward pass of its module."""
    real = PackedQwen.forward if name == "__call__" else getattr(DeepSpeedEngine, name)
    parameters = inspect.signature(getattr(Engine, name)).parameters.values()
    by_name = {parameter.name: None for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    inspect.signature(real).bind(*[None] * (len(parameters) - len(by_name)), **by_name)


@pytest.fixture(scope="module")
def process_group_of_one() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            # setenv first, so that monkeypatch restores what the code under test sets
            patch.setenv(name, "")
            patch.delenv(name)
        process_group.read_ranks(-1)
        process_group.join(torch.device("cpu"))
        yield
        process_group.leave()


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (1, torch.float32),
        (1, torch.bfloat16),
        (2, torch.float32),
        (2, torch.float16),
        (3, torch.float32),
        (3, torch.float16),
    ],
)
def test_an_engine_has_the_attributes_of_the_protocol(
    process_group_of_one: None,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    dtype: torch.dtype,
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    args = parse_arguments(["--shards", "none"])
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
    model = PackedQwen(hf, attn_implementation="sdpa")
    config = complete_config(
        read_deepspeed_config(f"zero{stage}.json"),
        args,
        Batch(bins=4, per_device=1, accumulation=4),
        world=1,
        dtype=dtype,
        hidden_size=32,
        num_trained=1,
    )
    engine = initialize(model, torch.optim.AdamW(model.parameters(), lr=1e-3), config)
    values = {name: getattr(engine, name) for name in get_type_hints(Engine)}
    assert values["module"] is model
    assert values["device"] == torch.device("cpu")
    assert {*get_type_hints(ZeroOptimizer)} == {"overflow", "loss_scaler"}
    assert not engine.optimizer.overflow
    assert engine.fp16_enabled() == (dtype == torch.float16)
    if engine.fp16_enabled():
        assert not [name for name in get_type_hints(LossScaler) if not hasattr(engine.optimizer.loss_scaler, name)]
    assert can_lower_scale(engine) == (dtype == torch.float16)
    micro = build_micro_batch([as_bin([make_sample(np.random.default_rng(0))])])
    assert engine(micro, scores=True).shape == (2, micro.targets.numel())
