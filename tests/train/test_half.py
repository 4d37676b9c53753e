"""Training in 16 bits. In float16 the loss is scaled, a scale that is too large is lowered, and norms are unscaled.

CPUs are slow in float16, and DeepSpeed believes that some do not support it; the tests tell it that they do. In
bfloat16 DeepSpeed uses another optimizer under ZeRO-1 than under ZeRO-2 and 3.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from safetensors.torch import load_file

from tests.train.launching import (
    as_flags,
    assert_close_metrics,
    assert_same_run,
    fingerprint_of,
    made_once,
    read_metrics,
    read_weights,
    resume,
    run_once,
    run_ranks,
)
from tests.train.synthetic import make_bins, write_shards
from train.run.engine import can_lower_scale
from train.settings.deepspeed_file import CONFIGS
from train.settings.record import read_record

pytestmark = pytest.mark.slow

TIMES_TWO, TIMES_FOUR = (("--gradient_accumulation_steps", count) for count in "24")


def pretend_float16_is_supported() -> None:
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    fingerprint = fingerprint_of(tiny_checkpoint)
    shards = made_once(
        tmp_path_factory, "half-shards", lambda out: write_shards(out, make_bins(num_bins=4), tokenizer=fingerprint)
    )
    return as_flags({"shards": shards, "model_name_or_path": tiny_checkpoint, "logging_steps": 1})


def write_config(folder: Path, stage: int, **fp16: int) -> tuple[str, str]:
    """A DeepSpeed file with settings of float16, as a flag."""
    config = json.loads((CONFIGS / f"zero{stage}.json").read_bytes())
    config["fp16"] = {"enabled": "auto", "hysteresis": 1, **fp16}
    (folder / "ds.json").write_text(json.dumps(config))
    return "--deepspeed", str(folder / "ds.json")


CHANGE_NOTHING = ("--learning_rate", "1e-30", "--max_steps", "6", "--save_steps", "0", "--max_skipped_steps", "0")
"""With a rate that changes nothing, every step has the loss and gradient of the untrained model."""


@pytest.fixture(scope="module")
def untrained(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank in float32."""
    return run_once(
        tmp_path_factory, "half-untrained", 1, *flags, *CHANGE_NOTHING, "--gradient_accumulation_steps", "2"
    )


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_and_norms_are_those_of_float32_once_the_scale_fits(
    flags: list[str], untrained: Path, tmp_path: Path, stage: int
) -> None:
    config = write_config(tmp_path, stage, initial_scale_power=20)
    command = [*flags, *CHANGE_NOTHING, *TIMES_TWO, "--fp16", *config]
    done = run_ranks(1, *command, "--output_dir", str(tmp_path / "run"), prepare=pretend_float16_is_supported)
    assert done.returncode == 0, done.stderr

    half = read_metrics(tmp_path / "run")
    skipped = [record["grad_norm"] is None for record in half]
    assert skipped[0] and not skipped[-1], "a scale of 2^20 overflows, a lower one does not"
    assert skipped == sorted(skipped, reverse=True)
    assert half[-1]["skipped_steps"] == sum(skipped)
    for record, expected in zip(half, read_metrics(untrained), strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert record["learning_rate"] == expected["learning_rate"]
        if record["grad_norm"] is not None:
            assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_a_gradient_that_overflows_at_the_lowest_scale_stops_the_run(flags: list[str], tmp_path: Path) -> None:
    """Losses are finite, but the gradient fits at no scale. The run stops instead of skipping for ever."""
    config = write_config(tmp_path, 2, initial_scale_power=21, min_loss_scale=2**20)
    command = [*flags, *CHANGE_NOTHING, "--gradient_accumulation_steps", "1", "--fp16", *config]
    done = run_ranks(1, *command, "--output_dir", str(tmp_path / "run"), prepare=pretend_float16_is_supported)
    assert done.returncode == 1, done.stderr
    assert "step 1 skipped: its gradient overflowed, lowering the loss scale" in done.stderr
    assert "error: the gradient of step 2 is not finite, though all losses are; bin" in done.stderr


@pytest.mark.parametrize(("scale", "expected"), [(4.0, True), (2.0, False)])
def test_a_scale_can_be_lowered_until_the_minimum(scale: float, expected: bool) -> None:
    def engine(scaler: object) -> object:
        return SimpleNamespace(fp16_enabled=lambda: True, optimizer=SimpleNamespace(loss_scaler=scaler))

    moving = DynamicLossScaler(scale, scale_window=9, min_scale=2.0, delayed_shift=1, consecutive_hysteresis=False)
    assert can_lower_scale(engine(moving)) == expected
    assert not can_lower_scale(engine(LossScaler(scale)))


@pytest.fixture(scope="module")
def training(flags: list[str]) -> list[str]:
    return [*flags, "--learning_rate", "1e-3", "--max_steps", "3", "--save_steps", "2"]


@pytest.fixture(scope="module")
def in_float32(training: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once(tmp_path_factory, "half-full", 2, *training, *TIMES_TWO, "--save_steps", "0")


def have_plenty_of_memory() -> None:
    mock.patch("train.run.device.device_capacity", return_value=2**40).start()


STAGES = {
    1: ([], partial(run_ranks, prepare=have_plenty_of_memory)),
    3: (["--deepspeed", "zero3.json"], run_ranks),
}
"""ZeRO stage -> its flags, and what starts the ranks. ZeRO-1 is what a run chooses where memory allows."""


@pytest.fixture(scope="module", params=STAGES)
def in_bfloat16(
    request: pytest.FixtureRequest, training: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A run of two ranks under a ZeRO stage, and its flags."""
    of_stage, launcher = STAGES[request.param]
    flags = [*training, *of_stage, "--bf16"]
    run = run_once(tmp_path_factory, f"half-brain-{request.param}", 2, *flags, *TIMES_TWO, launcher=launcher)
    assert read_record(run)[0].deepspeed == f"zero{request.param}.json"
    return run, flags


def test_two_ranks_in_bfloat16_have_the_losses_of_float32(
    in_float32: Path, in_bfloat16: tuple[Path, list[str]]
) -> None:
    run, _ = in_bfloat16
    assert_close_metrics(run, in_float32, "loss", rel=1e-2)
    assert_close_metrics(run, in_float32, "grad_norm", rel=5e-2)


def test_a_resumed_run_in_bfloat16_is_the_uninterrupted_run_to_the_bit(
    in_bfloat16: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """It keeps the stage that it began with, where the memory of the devices is no longer known."""
    run, flags = in_bfloat16
    resume(run, tmp_path, 2, *flags, *TIMES_TWO)
    assert_same_run(tmp_path, run)
    assert read_record(tmp_path)[0].deepspeed == read_record(run)[0].deepspeed


def test_one_rank_resumes_a_bfloat16_run_of_two(
    in_bfloat16: tuple[Path, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Sums of gradients are rounded otherwise; weights are a fiftieth of the way apart that training moved them."""
    run, flags = in_bfloat16
    resume(run, tmp_path, 1, *flags, *TIMES_FOUR)
    assert_close_metrics(tmp_path, run, "loss", rel=1e-6)
    assert_close_metrics(tmp_path, run, "grad_norm", rel=1e-4)
    before = load_file(tiny_checkpoint / "model.safetensors")
    assert distance(read_weights(tmp_path), read_weights(run)) < distance(before, read_weights(run)) / 50


def distance(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """Between two models, over all their weights."""
    return sum((weight.float() - others[name].float()).square().sum().item() for name, weight in some.items()) ** 0.5
