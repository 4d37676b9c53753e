"""Several ranks compute what one computes under every sharding, and a resumed run equals the uninterrupted one.

The bins are chosen so that in every micro-step one rank has text alone and the other an image and a video. Runs
are launched in separate processes; each is made once and shared by several tests. Ranks without a launcher compute the
loss of the longest bin in three chunks, those of a launcher in one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.checkpoints import read_config
from tests.train.launching import (
    alone,
    as_flags,
    assert_close_metrics,
    assert_close_weights,
    assert_same_run,
    deepspeed_command,
    fingerprint_of,
    launch_forked,
    made_once,
    read_metrics,
    read_weights,
    resume,
    run_once,
    run_ranks,
    torchrun,
    torchrun_command,
)
from tests.train.synthetic import Sample, make_medium, make_sample, write_shards
from train.arithmetic.cost import CostModel
from train.batches.batch import build_micro_batch
from train.model import head
from train.model.packed import PackedQwen
from train.order.dealing import DataOrder
from train.run.universal import convert
from train.shards.index import open_shards
from train.shards.reader import read_checked_bin

pytestmark = pytest.mark.slow

NUM_STEPS, CHUNK = 3, 32
UNFUSED = ("--optim", "adamw_torch")
TIMES_TWO, TIMES_FOUR = (("--gradient_accumulation_steps", count) for count in "24")
STRATEGIES = {"zero2": ()} | {name: ("--deepspeed", f"{name}.json") for name in ("zero1", "zero3", "zero3_offload")}
"""Sharding strategy -> its flags. ZeRO-2 is the default."""


def use_small_chunks() -> None:
    """Let a rank compute few targets at a time, so that few targets are several chunks."""
    pytest.MonkeyPatch().setattr(head, "CHUNK", CHUNK)


run_chunked = partial(run_ranks, prepare=use_small_chunks)


def deepspeed(num_ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer with ``deepspeed``."""
    return launch_forked(*deepspeed_command(num_ranks, *flags))


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four bins; sorted by cost: text, media, text, media. The last has targets for three chunks of lm_head."""
    rng = np.random.default_rng(1)

    def media(rows: int, columns: int) -> Sample:
        return make_sample(rng, [make_medium(rng, rows, columns), make_medium(rng, rows, columns, steps=2)])

    bins = [
        [media(12, 12), make_sample(rng, num_text=4 * CHUNK, num_targets=2 * CHUNK + 10)],
        [make_sample(rng, num_text=8), make_sample(rng, num_text=8)],
        [make_sample(rng, num_text=4 * CHUNK, num_targets=CHUNK - 10)],
        [media(4, 6), make_sample(rng, num_text=8)],
    ]
    fingerprint = fingerprint_of(tiny_checkpoint)
    return made_once(tmp_path_factory, "shards", lambda out: write_shards(out, bins, tokenizer=fingerprint))


@pytest.fixture(scope="module")
def flags(shards: Path, tiny_checkpoint: Path) -> list[str]:
    settings = {
        "shards": shards,
        "eval_shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "max_steps": NUM_STEPS,
        "tune_mm_vision": True,
        "learning_rate": 1e-3,
        "mm_projector_lr": 5e-4,
        "vision_tower_lr": 2e-4,
        "adam_epsilon": 1e-6,  # far above the rounding of gradients, which would otherwise move a weight by a full step
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 2,
    }
    return as_flags(settings)


@pytest.fixture(scope="module")
def one_rank(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One rank with all four bins of a step one after the other, started by the deepspeed launcher.

    Its AdamW is not fused, unlike that of the other runs.
    """

    def run(out: Path) -> None:
        done = deepspeed(1, *flags, *TIMES_FOUR, *UNFUSED, "--output_dir", str(out))
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "one-rank", run)


@pytest.fixture(scope="module")
def under(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of two ranks that share the same four bins, by strategy. Launchers start two of them."""
    launchers = {"zero2": torchrun, "zero1": deepspeed}

    def launched(strategy: str) -> Path:
        launcher = launchers.get(strategy, run_chunked)
        return run_once(tmp_path_factory, strategy, 2, *flags, *TIMES_TWO, *STRATEGIES[strategy], launcher=launcher)

    return launched


@pytest.fixture(params=STRATEGIES)
def two_ranks(request: pytest.FixtureRequest, under: Callable[[str], Path]) -> Path:
    """Each of these runs in turn."""
    return under(request.param)


def test_in_every_micro_step_one_rank_has_text_and_the_other_an_image_and_a_video(
    shards: Path, tiny_checkpoint: Path
) -> None:
    index = open_shards(shards)
    costs = CostModel.of(read_config(tiny_checkpoint)).in_training(gradient_checkpointing=True)
    order = DataOrder(index.cost(costs), seed=0, global_batch=4)
    for step in range(NUM_STEPS):
        bins = order.bins_of_step(step, world_size=2, accumulation=2, per_device=1)[..., 0]
        assert index.num_patches[bins[:, 0]].tolist() == [0, 0]
        assert (index.num_images[bins[:, 1]].tolist(), index.num_videos[bins[:, 1]].tolist()) == ([1, 1], [1, 1])


def test_the_first_step_has_the_mean_loss_over_its_targets_and_the_norm_of_its_gradient(
    one_rank: Path, shards: Path, tiny_checkpoint: Path
) -> None:
    """Worked out without DeepSpeed, stream or target-only head: all logits of each bin, one mean over all targets."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    model = PackedQwen(hf, attn_implementation="sdpa")
    index = open_shards(shards)
    losses = []
    for bin_id in range(index.num_bins):
        micro = build_micro_batch([read_checked_bin(index, bin_id)])
        logits = hf.lm_head(model.target_states(micro))
        losses.append(functional.cross_entropy(logits, micro.targets, reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in hf.parameters()]).norm()
    first = read_metrics(one_rank)[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert first["num_targets"] == sum(len(part) for part in losses)


def test_two_ranks_have_the_losses_and_weights_of_one_with_twice_the_accumulation(
    one_rank: Path, two_ranks: Path
) -> None:
    """Under every sharding, and with AdamW fused or not."""
    assert_close_metrics(two_ranks, one_rank, "loss", "grad_norm", rel=1e-6)
    assert_close_weights(two_ranks, one_rank)


@pytest.fixture(scope="module")
def short_flags(flags: list[str]) -> list[str]:
    """Flags of a run whose second and last step has one bin for four slots, with an image and a video."""
    settings = dict(zip(flags[::2], flags[1::2]))
    del settings["--max_steps"], settings["--save_total_limit"]
    settings.update({"--num_train_epochs": "1.25", "--save_steps": "0"})
    return [part for setting in settings.items() for part in setting]


@pytest.fixture(scope="module")
def one_by_one(short_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run on one rank, one bin per forward pass."""
    return run_once(tmp_path_factory, "one-by-one", 1, *short_flags, *TIMES_FOUR, launcher=run_chunked)


@pytest.mark.parametrize(
    ("num_ranks", "per_device", "accumulation", "strategy"),
    [(2, 1, 2, "zero2"), (2, 1, 2, "zero3"), (2, 2, 1, "zero2"), (1, 2, 2, "zero2")],
)
def test_losses_and_weights_do_not_depend_on_how_a_step_is_dealt_even_with_empty_slots(
    short_flags: list[str],
    shards: Path,
    one_by_one: Path,
    tmp_path: Path,
    num_ranks: int,
    per_device: int,
    accumulation: int,
    strategy: str,
) -> None:
    """To ranks, to forward passes of several bins, and to micro-steps; in the last step a rank of two has no bin."""
    dealt = ("--per_device_train_batch_size", str(per_device), "--gradient_accumulation_steps", str(accumulation))
    done = run_chunked(num_ranks, *short_flags, *dealt, *STRATEGIES[strategy], "--output_dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    full, short = read_metrics(tmp_path)
    index = open_shards(shards)
    assert (full["num_tokens"], full["num_targets"]) == (index.num_tokens.sum(), index.num_targets.sum())
    assert (short["num_tokens"], short["num_targets"]) == (index.num_tokens[-1], index.num_targets[-1])
    assert_close_metrics(tmp_path, one_by_one, "loss", "grad_norm", "eval_loss", rel=1e-6)
    assert_close_weights(tmp_path, one_by_one)


def test_training_moves_every_weight_further_than_runs_may_differ(one_rank: Path, tiny_checkpoint: Path) -> None:
    """Training moved every tensor a hundred times further than the runs may differ."""
    before = load_file(tiny_checkpoint / "model.safetensors")
    after = read_weights(one_rank)
    assert after.keys() == before.keys()
    unmoved = [name for name, weight in before.items() if (after[name] - weight).abs().max() < 1e-3 / 5]
    assert unmoved == []


def test_the_trained_model_loads_with_its_tokenizer(two_ranks: Path, tiny_checkpoint: Path) -> None:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(two_ranks / "final", output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.json"):
        assert (two_ranks / "final" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@torch.no_grad()
def test_the_exported_model_has_the_losses_of_the_trained_engine(two_ranks: Path, shards: Path) -> None:
    """On the bins that the engine was evaluated on after its last step; training changed them by far more."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(two_ranks / "final")
    model, index = PackedQwen(hf, attn_implementation="sdpa").eval(), open_shards(shards)
    batches = [build_micro_batch([read_checked_bin(index, bin_id)]) for bin_id in range(index.num_bins)]
    scores = torch.cat([model(batch, scores=True) for batch in batches], dim=1).double()
    records = read_metrics(two_ranks)
    assert scores[0].mean().item() == pytest.approx(records[-1]["eval_loss"], rel=1e-6)
    assert scores[1].mean().item() == pytest.approx(records[-1]["eval_token_accuracy"], rel=1e-12)
    assert records[-1]["eval_loss"] < records[0]["loss"] - 1e-2


def test_old_checkpoints_are_removed_and_nothing_is_left_half_written(two_ranks: Path) -> None:
    names = sorted(path.name for path in two_ranks.iterdir())
    assert names == [".lock", "checkpoint-2", "checkpoint-3", "final", "metrics.jsonl", "settings.toml"]


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero3_offload"])
def test_a_resumed_run_equals_the_uninterrupted_run_to_the_bit(
    flags: list[str], under: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    launcher = run_ranks if strategy == "zero1" else run_chunked  # as many chunks as the run itself
    resume(under(strategy), tmp_path, 2, *flags, *TIMES_TWO, *STRATEGIES[strategy], launcher=launcher)
    assert_same_run(tmp_path, under(strategy))
    assert not (tmp_path / "checkpoint-3.tmp").exists()


def test_resuming_with_other_settings_is_refused(flags: list[str], under: Callable[[str], Path]) -> None:
    done = run_ranks(1, *flags, *TIMES_TWO, "--output_dir", str(under("zero2")))
    assert done.returncode == 2
    assert "checkpoint-3 was saved with bins of a step = 4, this run has 2" in done.stderr


@pytest.mark.parametrize("strategy", ["zero3", "zero3_offload"])
def test_one_rank_resumes_a_run_of_two_with_the_same_losses_and_weights(
    flags: list[str], under: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    resume(under(strategy), tmp_path, 1, *flags, *TIMES_FOUR, *STRATEGIES[strategy], launcher=run_chunked)
    assert_close_metrics(tmp_path, under(strategy), "loss", "grad_norm", "eval_loss", rel=1e-6)
    assert_close_weights(tmp_path, under(strategy))


@pytest.mark.parametrize("strategy", ["zero1", "zero3"])
def test_the_universal_form_is_that_of_deepspeed_without_fragments_on_the_disk(
    under: Callable[[str], Path], tmp_path: Path, strategy: str
) -> None:
    engine, out, expected = under(strategy) / "checkpoint-3" / "engine", tmp_path / "out", tmp_path / "expected"
    out.mkdir()
    (out / "tmp").touch()  # DeepSpeed's converter writes fragments into a folder of this name
    assert convert(engine, out) is None
    converter = (sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
    workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
    done = launch_forked(*converter, *workers, "--input_folder", str(engine), "--output_folder", str(expected))
    assert done.returncode == 0, done.stderr

    paths = sorted(path.relative_to(expected) for path in expected.rglob("*.pt"))
    assert paths == sorted(path.relative_to(out) for path in out.rglob("*.pt"))
    parameters = [path for path in paths if path.stem in ("fp32", "exp_avg", "exp_avg_sq")]
    assert len(parameters) > 200
    for path in parameters:
        values = [torch.load(folder / path, weights_only=False) for folder in (out, expected)]
        joined, expected_joined = (value["param"] if isinstance(value, dict) else value for value in values)
        assert joined.dtype == torch.float32 and torch.equal(joined, expected_joined), path
    assert (out / "zero" / "optimizer_state.pt").stat().st_size < 100_000, "the states of the first rank are left out"


def test_two_ranks_resume_a_run_of_one_with_the_same_losses_and_weights(
    flags: list[str], one_rank: Path, tmp_path: Path
) -> None:
    resume(one_rank, tmp_path, 2, *flags, *TIMES_TWO, *UNFUSED, launcher=run_chunked)
    assert_close_metrics(tmp_path, one_rank, "loss", "grad_norm", "eval_loss", rel=1e-6)
    assert_close_weights(tmp_path, one_rank)


def test_frozen_parts_keep_their_weights_to_the_bit(shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Without a launcher, in bfloat16, the merger alone."""
    settings = ("--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path))
    parts = ("--tune_mm_llm", "False", "--tune_mm_mlp", "True", "--tune_mm_vision", "False")
    length = ("--max_steps", "4", "--gradient_accumulation_steps", "1", "--logging_steps", "3")
    done = alone(*settings, *parts, *length, "--bf16", "--mm_projector_lr", "0.01")
    assert done.returncode == 0, done.stderr
    before, after = load_file(tiny_checkpoint / "model.safetensors"), read_weights(tmp_path)
    changed = {name for name, weight in before.items() if not torch.equal(after[name], weight.bfloat16())}
    assert changed == {name for name in before if name.startswith("visual.merger.")}
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 4]


def test_a_damaged_bin_on_one_rank_fails_the_launch(flags: list[str], shards: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(shards, tmp_path / "shards")
    location = open_shards(damaged).locate(0)
    with open(location.path, "r+b") as shard:
        shard.seek(location.offset + location.num_bytes // 2)
        byte = shard.read(1)
        shard.seek(-1, os.SEEK_CUR)
        shard.write(bytes([byte[0] ^ 1]))
    flags = [*flags, *TIMES_TWO, "--shards", str(damaged), "--output_dir", str(tmp_path / "run")]
    done = launch_forked(*torchrun_command(2, *flags))
    assert done.returncode == 1
    assert f"error (rank 1): {location}" in done.stderr
    assert not (tmp_path / "run" / "final").exists()
