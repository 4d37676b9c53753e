"""Runs with frozen parts: checkpoints leave them out, and resuming restores them on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.launching import (
    as_flags,
    assert_close_metrics,
    assert_close_weights,
    assert_same_run,
    fingerprint_of,
    made_once,
    read_weights,
    resume,
    run_once,
)
from tests.train.synthetic import make_bins, write_shards

pytestmark = pytest.mark.slow

PARTS = {
    "llm": ("--tune_mm_llm", "True", "--tune_mm_mlp", "False", "--learning_rate", "1e-3"),
    "mlp": ("--tune_mm_llm", "False", "--tune_mm_mlp", "True", "--mm_projector_lr", "1e-3"),
}
"""What is trained; the vision tower never is. The second leaves embeddings frozen that are tied to ``lm_head``."""

TIMES_TWO, TIMES_FOUR = (("--gradient_accumulation_steps", count) for count in "24")


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    fingerprint = fingerprint_of(tiny_checkpoint)
    shards = made_once(
        tmp_path_factory, "frozen-shards", lambda out: write_shards(out, make_bins(num_bins=4), tokenizer=fingerprint)
    )
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "max_steps": 3,
        "logging_steps": 1,
        "save_steps": 1,
    }
    return as_flags(settings)


RUNS = [("llm", 2), ("llm", 3), ("mlp", 2), ("mlp", 3)]
"""Part that is trained, and ZeRO stage. Each resumes with another number of ranks, and two with the same number."""


def name_of(run: tuple[str, int]) -> str:
    return f"{run[0]}-zero{run[1]}"


@pytest.fixture(scope="module", params=RUNS, ids=name_of)
def trained(
    request: pytest.FixtureRequest, flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, list[str]]:
    """The part that is trained, a run of two ranks, and the flags that it had."""
    part, stage = request.param
    chosen = [*flags, *PARTS[part], "--deepspeed", f"zero{stage}.json"]

    return part, run_once(tmp_path_factory, f"frozen-{part}-{stage}", 2, *chosen, *TIMES_TWO), chosen


def is_trained(name: str, part: str) -> bool:
    """Whether a run trains a weight, by its name in a checkpoint of transformers."""
    return name.startswith("visual.merger.") if part == "mlp" else not name.startswith("visual.")


def assert_frozen(run: Path, part: str, tiny_checkpoint: Path) -> None:
    before, after = load_file(tiny_checkpoint / "model.safetensors"), read_weights(run)
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight)}
    assert changed == {name for name in before if is_trained(name, part)}


@pytest.mark.parametrize("trained", [RUNS[0], RUNS[3]], ids=name_of, indirect=True)
def test_a_resumed_run_equals_the_uninterrupted_run_to_the_bit(
    trained: tuple[str, Path, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    part, uninterrupted, flags = trained
    resume(uninterrupted, tmp_path, 2, *flags, *TIMES_TWO)
    assert_same_run(tmp_path, uninterrupted)
    assert_frozen(tmp_path, part, tiny_checkpoint)


def test_one_rank_resumes_a_run_of_two_with_the_same_losses_and_frozen_weights(
    trained: tuple[str, Path, list[str]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    part, before, flags = trained
    resume(before, tmp_path, 1, *flags, *TIMES_FOUR)
    assert_frozen(tmp_path, part, tiny_checkpoint)
    assert_close_metrics(tmp_path, before, "loss", "grad_norm", rel=1e-5)
    assert_close_weights(tmp_path, before)


def test_frozen_weights_are_in_no_checkpoint(trained: tuple[str, Path, list[str]], tiny_checkpoint: Path) -> None:
    """Nor under the other name of a tied one: what is left are two moments and a copy or two of what is trained."""
    part, run, _ = trained
    assert_frozen(run, part, tiny_checkpoint)
    before = load_file(tiny_checkpoint / "model.safetensors")
    num_trained = sum(weight.numel() for name, weight in before.items() if is_trained(name, part))
    size = sum(path.stat().st_size for path in (run / "checkpoint-3" / "engine").iterdir())
    assert 12 * num_trained < size < 17 * num_trained + 400_000
