"""Evaluation is exact: the metrics of each sample run alone, whatever its bin and the number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ShardError
from tests.train.launching import as_flags, fingerprint_of, made_once, read_metrics, run_ranks
from tests.train.synthetic import Sample, as_bin, make_bins, make_medium, make_sample, write_shards
from train.batches.batch import build_micro_batch
from train.model.packed import PackedQwen
from train.order.dealing import DataOrder
from train.run import evaluation
from train.run.evaluation import format_evaluation, is_due, sum_by_sample
from train.shards.index import open_shards
from train.shards.ledger import sample_datasets


def bins_of(seed: int) -> list[list[Sample]]:
    """Few targets, so that an untrained model gets some right answers by chance of the fixture below."""
    rng = np.random.default_rng(seed)
    return [
        [make_sample(rng, [make_medium(rng, 4, 6)], num_targets=2), make_sample(rng, num_targets=1)],
        [make_sample(rng, num_targets=3) for _ in range(3)],
        [make_sample(rng, [make_medium(rng, 4, 4, steps=2)], num_targets=1)],
    ]


def likeliest(model: PackedQwen, sample: Sample) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of a sample run alone."""
    micro = build_micro_batch([as_bin([sample])])
    return model.hf.lm_head(model.target_states(micro)), micro.targets


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> PackedQwen:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    return PackedQwen(hf, attn_implementation="sdpa")


@pytest.fixture(scope="module")
def data(model: PackedQwen) -> dict[str, list[list[Sample]]]:
    """Two datasets. In every second sample of the first, the model itself predicts the targets."""
    datasets = {"a": bins_of(1), "b": bins_of(2)}
    rng = np.random.default_rng(3)
    datasets["b"].append([make_sample(rng, num_targets=2), make_sample(rng, [make_medium(rng, 2, 4)], num_targets=3)])
    for sample in [sample for bins in datasets["a"] for sample in bins][::2]:
        for index, position in enumerate(np.flatnonzero(sample.labels != -100)):
            with torch.no_grad():
                logits, _ = likeliest(model, sample)
            sample.input_ids[position] = sample.labels[position] = logits[index].argmax().item()
    return datasets


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, data: dict[str, list[list[Sample]]], tmp_path_factory: pytest.TempPathFactory) -> Any:
    fingerprint = fingerprint_of(tiny_checkpoint)

    def write(out: Path) -> None:
        write_shards(out / "train", make_bins(num_bins=4), tokenizer=fingerprint)
        for name, bins in data.items():
            write_shards(out / "eval" / name, bins, tokenizer=fingerprint, dataset=name)

    shards = made_once(tmp_path_factory, "eval-shards", write)
    settings = {
        "shards": shards / "train",
        "eval_shards": shards / "eval",
        "model_name_or_path": tiny_checkpoint,
        "learning_rate": 1e-30,  # training that changes nothing
        "max_steps": 2,
        "save_steps": 0,
        "logging_steps": 10,
    }
    return as_flags(settings)


def evaluations(run: Path) -> list[dict[str, Any]]:
    return [
        {"step": record["step"], **{name: value for name, value in record.items() if name.startswith("eval_")}}
        for record in read_metrics(run)
        if "eval_loss" in record
    ]


@pytest.mark.slow
@torch.no_grad()
def test_metrics_are_those_of_samples_run_alone_on_any_number_of_ranks(
    flags: list[str], model: PackedQwen, data: dict[str, list[list[Sample]]], tmp_path: Path
) -> None:
    """Seven bins on one rank and, with ZeRO-3, on two, one of which has none in the last pass."""
    often = ("--eval_strategy", "steps", "--eval_steps", "1")
    done = run_ranks(1, *flags, *often, "--gradient_accumulation_steps", "4", "--output_dir", str(tmp_path / "one"))
    assert done.returncode == 0, done.stderr
    two = ("--deepspeed", "zero3.json", "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "two"))
    done = run_ranks(2, *flags, *two)
    assert done.returncode == 0, done.stderr

    first, last = evaluations(tmp_path / "one")
    assert (first["step"], last["step"]) == (1, 2)
    assert {**first, "step": 2} == last
    assert evaluations(tmp_path / "two") == [last]
    (message,) = [line for line in done.stderr.splitlines() if "evaluation after step 2: " in line]
    assert message.endswith(format_evaluation(last))
    assert f"loss {last['eval_loss']:.4f}, {last['eval_token_accuracy']:.1%} of the tokens and " in message
    assert f"; b: loss {last['eval_datasets']['b']['loss']:.4f}, " in message
    assert f"evaluating on 7 bins with {last['eval_num_samples']} samples of " in done.stderr
    assert "train: 4 bins, share 100 %" in done.stderr

    of_all = []
    for name, bins in data.items():
        of_dataset = []
        for sample in itertools.chain.from_iterable(bins):
            logits, targets = likeliest(model, sample)
            right = logits.argmax(dim=1) == targets
            of_dataset.append((functional.cross_entropy(logits, targets, reduction="sum").item(), right.tolist()))
        assert last["eval_datasets"][name] == expected_of(of_dataset)
        of_all += of_dataset
    assert {name.removeprefix("eval_"): last[name] for name in last if name.startswith("eval_")} == {
        **expected_of(of_all),
        "datasets": last["eval_datasets"],
    }
    assert last["eval_datasets"]["a"]["exact_match"] >= 0.5 > last["eval_datasets"]["b"]["exact_match"]


def expected_of(samples: list[tuple[float, list[bool]]]) -> dict[str, Any]:
    rights = [right for _, right in samples]
    num_targets = sum(map(len, rights))
    return {
        "loss": pytest.approx(sum(loss for loss, _ in samples) / num_targets, rel=1e-5),
        "token_accuracy": sum(map(sum, rights)) / num_targets,
        "exact_match": sum(map(all, rights)) / len(rights),
        "num_samples": len(rights),
    }


def test_scores_are_summed_by_sample() -> None:
    rng = np.random.default_rng(0)
    bin_ = as_bin([make_sample(rng, num_targets=2), make_sample(rng, num_targets=1), make_sample(rng, num_targets=3)])
    micro = build_micro_batch([bin_], bin_ids=[7])
    scores = np.array([[0.5, 1.5, 4.0, 1.0, 2.0, 3.0], [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]])
    assert sum_by_sample(micro, scores).tolist() == [(7, 0, 2, 1, 2.0), (7, 1, 1, 1, 4.0), (7, 2, 3, 3, 6.0)]
    assert sum_by_sample(build_micro_batch([]), np.zeros((2, 0))).size == 0


def test_datasets_of_samples_are_those_of_the_ledgers(tmp_path: Path) -> None:
    for name in ("x", "y"):
        write_shards(tmp_path / name, bins_of(0), dataset=name)
    datasets = sample_datasets(open_shards(tmp_path))
    assert datasets.names == ("x", "y")
    assert datasets.of_sample.tolist() == [0] * 6 + [1] * 6


def test_a_ledger_that_does_not_fit_the_bins_is_an_error(tmp_path: Path) -> None:
    index = open_shards(write_shards(tmp_path / "set", bins_of(0)))
    path = tmp_path / "set" / "samples.parquet"
    rows = pq.read_table(path).to_pylist()
    pq.write_table(pa.Table.from_pylist(rows[:-1], schema=pq.read_schema(path)), path)
    with pytest.raises(ShardError, match=r"samples\.parquet does not have the samples of its bins"):
        sample_datasets(index)
    path.unlink()
    with pytest.raises(ShardError, match=r"samples\.parquet is missing"):
        sample_datasets(index)


@pytest.mark.parametrize(
    ("strategy", "eval_steps", "expected"),
    [("no", None, [10]), ("steps", 4, [4, 8, 10]), ("steps", None, [10]), ("epoch", None, [3, 5, 8, 10])],
)
def test_a_run_evaluates_at_the_steps_of_its_strategy(
    strategy: str, eval_steps: int | None, expected: list[int]
) -> None:
    """Steps of four bins, ten in all: epochs end inside step 3, with step 5, inside step 8, with step 10."""
    plan: Any = SimpleNamespace(
        args=SimpleNamespace(eval_strategy=strategy, eval_steps=eval_steps),
        num_steps=10,
        order=DataOrder(np.ones(10), seed=0, global_batch=4),
    )
    assert [step for step in range(1, 11) if is_due(plan, step)] == expected


def test_an_evaluation_loss_that_is_not_finite_is_null() -> None:
    """``NaN`` is not JSON."""
    results = np.zeros(2, dtype=evaluation._RESULT)
    results["num_targets"], results["num_right"], results["loss"] = 4, (4, 1), (1.0, np.nan)
    summary = evaluation._summarise(results)
    assert summary == {"loss": None, "token_accuracy": 5 / 8, "exact_match": 0.5, "num_samples": 2}
    metrics = {f"eval_{name}": value for name, value in summary.items()}
    assert format_evaluation({**metrics, "eval_datasets": {"one": summary}}).startswith("loss not finite, 62.5% of the")
