"""The estimate of weights, gradients and optimizer states equals the bytes that DeepSpeed holds."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from schemas.checkpoints import read_config
from tests.train.held_bytes import measure
from tests.train.launching import made_once, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.dimensions import OFFICIAL
from train.memory.cli import main
from train.memory.states import MOMENTS, Sharding, state_terms
from train.memory.terms import DEVICE, HOST, Memory, Phase, Term
from train.model.sizes import sizes_of
from train.settings.arguments import TrainArguments
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments
from train.shards.index import open_shards

ARGS = TrainArguments(shards="shards", tune_mm_vision=True)


def sharding(name: str, dtype: torch.dtype, *, world: int = 2, hidden_size: int = 32, num_trained: int = 1) -> Sharding:
    args = parse_arguments(["--shards", "none", "--gradient_accumulation_steps", "2"])
    config = read_deepspeed_config(name)
    config = complete_config(
        config, args, None, world=world, dtype=dtype, hidden_size=hidden_size, num_trained=num_trained
    )
    return Sharding.of(config, world=world, dtype=dtype, is_fused=True)


VARIANTS: dict[str, tuple[int, dict[str, object]]] = {
    "offload1": (1, {"offload_optimizer": {"device": "cpu"}}),
    "offload2": (2, {"offload_optimizer": {"device": "cpu"}}),
    "hpz": (3, {"zero_hpz_partition_size": 2}),
}
"""ZeRO stage and further settings of files that are not shipped."""


def deepspeed_file(folder: Path, strategy: str) -> str:
    """A shipped file, or one of :data:`VARIANTS` that is written to a folder."""
    if strategy not in VARIANTS:
        return f"{strategy}.json"
    stage, settings = VARIANTS[strategy]
    config = read_deepspeed_config(f"zero{stage}.json")
    config["zero_optimization"].update(settings)
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps(config))
    return str(path)


def estimate(terms: list[Term], *names: str, phases: tuple[Phase, ...] = (Phase.ALWAYS, Phase.BACKWARD)) -> int:
    return sum(term.num_bytes for term in terms if term.phase in phases and term.name in names)


CASES = [
    ("zero1", "bfloat16", "111"),
    ("zero1", "float32", "111"),
    ("zero2", "bfloat16", "111"),
    ("zero2", "float32", "111"),
    ("zero2", "bfloat16", "011"),
    ("offload1", "bfloat16", "111"),
    ("offload2", "bfloat16", "111"),
    ("zero3", "bfloat16", "111"),
    ("zero3_offload", "bfloat16", "110"),
    ("hpz", "bfloat16", "111"),
]


@pytest.fixture(scope="module")
def held(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bytes that two ranks hold in every case, and the DeepSpeed files that they used."""

    def run(out: Path) -> None:
        out.mkdir()
        cases = [(deepspeed_file(out, strategy), dtype, tune) for strategy, dtype, tune in CASES]
        done = run_ranks(2, prepare=partial(measure, tiny_checkpoint, out / "held.json", cases))
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "held", run)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "dtype", "tune"), CASES)
def test_two_ranks_hold_what_was_estimated(
    held: Path, tiny_checkpoint: Path, strategy: str, dtype: str, tune: str
) -> None:
    """To a hundredth, because partitions are padded."""
    measured = json.loads((held / "held.json").read_text())[CASES.index((strategy, dtype, tune))]
    flags = {f"tune_mm_{part}": digit == "1" for part, digit in zip(("llm", "mlp", "vision"), tune)}
    sizes = sizes_of(read_config(tiny_checkpoint), TrainArguments(shards="shards", **flags))
    terms = state_terms(sizes, sharding(deepspeed_file(held, strategy), getattr(torch, dtype)))
    assert measured["steps"]["weights"] == pytest.approx(
        estimate(terms, "weights", "unpartitioned small weights"), rel=0.01
    )
    # Offloaded gradients outlive the step; others are part of the accumulated gradients below.
    kinds = {"float32 weights": "float32 weights", "moments of AdamW": MOMENTS}
    if "offload" in strategy:
        kinds["float32 gradients"] = "float32 gradients"
    for name, term in kinds.items():
        assert measured["steps"][name] == pytest.approx(estimate(terms, term), rel=0.01), name
    accumulated = estimate(terms, "gradients", "accumulated gradients", "gradients across boundaries")
    of_micro_batch = estimate(terms, "micro-batch gradients")
    secondary = estimate(terms, "weights within a group of ranks")
    assert measured["backward"]["secondary weights"] == pytest.approx(secondary, rel=0.01)
    assert (secondary > 0) == (strategy == "hpz")
    backward = measured["backward"]
    assert backward["buckets"] == estimate(terms, "gradient buckets", "gradient bucket")
    if strategy == "zero1" and dtype == "float32":
        # They stay with the parameters until the last micro-step moves them.
        assert max(backward["gradients"], backward["gradients of a pass"]) == pytest.approx(accumulated, rel=0.02)
    else:
        assert backward["gradients"] == pytest.approx(accumulated, rel=0.02)
        assert backward["gradients of a pass"] == pytest.approx(of_micro_batch, rel=0.01, abs=20_000)


def test_the_peak_is_what_is_always_held_plus_the_larger_of_two_phases() -> None:
    def term(name: str, num_bytes: int, phase: Phase, location: str = DEVICE) -> Term:
        return Term(name=name, num_bytes=num_bytes, formula="", location=location, phase=phase)

    always = (term("a", 100, Phase.ALWAYS), term("h", 7, Phase.ALWAYS, HOST))
    backward = (term("b", 10, Phase.BACKWARD), term("m", 5, Phase.TRANSIENT), term("n", 9, Phase.TRANSIENT))
    assert Memory((*always, *backward, term("s", 18, Phase.STEP))).peak() == 100 + 10 + 9
    memory = Memory((*always, *backward, term("s", 12, Phase.STEP), term("t", 11, Phase.STEP)))
    assert memory.peak() == 100 + 12 + 11
    assert (memory.held(), memory.peak(HOST), memory.peak("nvme")) == (100, 7, 0)


def test_each_stage_partitions_what_zero_says(tiny_checkpoint: Path) -> None:
    """7B in bfloat16 on 64 ranks: 2 bytes of weights, 4 of accumulated gradients, 12 of optimizer states."""
    sizes = sizes_of(OFFICIAL["7B"], ARGS)
    total = sizes.num_parameters
    held = {
        stage: sum(
            term.num_bytes
            for term in state_terms(sizes, sharding(f"zero{stage}.json", torch.bfloat16, world=64, hidden_size=3584))
            if term.name in ("weights", "float32 weights", MOMENTS, "gradients", "accumulated gradients")
        )
        for stage in (1, 2, 3)
    }
    assert held[1] == pytest.approx((2 + 4 + 12 / 64) * total, rel=1e-6)
    assert held[2] == pytest.approx((2 + 4 / 64 + 12 / 64) * total, rel=1e-6)
    assert held[3] == pytest.approx((2 + 4 + 12) / 64 * total, rel=1e-6)


def test_a_second_copy_of_the_weights_has_no_more_parts_than_there_are_ranks(tmp_path: Path) -> None:
    path = tmp_path / "hpz.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}))
    assert sharding(str(path), torch.bfloat16, world=2).secondary_ranks == 2
    assert sharding(str(path), torch.bfloat16, world=16).secondary_ranks == 8


def run_cli(*flags: str) -> str:
    done = CliRunner().invoke(main, flags)
    assert done.exit_code == 0, done.output
    return done.output


def test_memory_needs_neither_shards_nor_a_checkpoint() -> None:
    output = run_cli(
        "--world-size", "64", "--model_name_or_path", "7B", "--deepspeed", "zero3.json", "--max-length", "4096"
    )
    assert "7B, zero3.json, 64 ranks, bfloat16" in output
    assert "2 B x 8.292 G / 64 ranks" in output
    assert "16,384 tokens" in output  # four bins
    assert [line.split()[0] for line in output.splitlines()[-4:]] == list(OFFICIAL)


def test_memory_of_real_shards_is_that_of_their_largest_bin(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "set", make_bins(num_bins=8))
    index = open_shards(shards)
    largest = index.num_patches.argmax()
    assert index.num_tokens[largest] == index.num_tokens.max()
    flags = ("--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint))
    one_bin = run_cli("--world-size", "2", *flags, "--per_device_train_batch_size", "1")
    assert f"B x {index.num_tokens[largest]:,} tokens" in one_bin
    budget = str(3 * index.num_tokens[largest])
    three_bins = run_cli("--world-size", "2", *flags, "--max_tokens_per_forward", budget, "--samples_per_step", "99")
    assert f"B x {np.sort(index.num_tokens)[-3:].sum():,} tokens" in three_bins


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "the size of a bin is unknown: pass --shards, or --max-length if there are no shards yet."),
        (["--max-length", "4096", "--shards", "s"], "--max-length 4096 and --shards s exclude each other"),
        (["--max-length", "99999999999999999999"], "99999999999999999999 is not in the range"),
    ],
)
def test_shards_and_max_length_exclude_each_other_and_one_is_needed(flags: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["--world-size", "2", *flags])
    assert done.exit_code == 2
    assert message in done.output
