"""What a run will ask for is told before it starts, from the index alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError, ShardError
from tests.train.synthetic import make_bins, write_shards
from train.index import ShardIndex, open_shards
from train.order import DataOrder
from train.simulate import dataset_tokens, mixture_variance, report, simulate


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return open_shards(write_shards(tmp_path / "set", make_bins(num_bins=16)))


def test_one_epoch_in_one_step_is_the_whole_set(index: ShardIndex) -> None:
    order = DataOrder(index.cost(), seed=0, global_batch=16, epochs=1)
    found = simulate(index, order, world_size=4, accumulation=4)
    assert found.num_steps == 1
    assert found.bytes_per_step == found.most_bytes == index.num_bytes.sum()
    assert found.tokens_per_step == index.num_tokens.sum()
    assert found.targets_per_step == index.num_targets.sum()
    # four ranks, four micro-steps: by hand from the sorted costs
    runs = np.sort(order.cost).reshape(4, 4)
    assert found.efficiency == pytest.approx((runs.mean(axis=1) / runs.max(axis=1)).mean())
    assert found.lowest_efficiency == pytest.approx((runs.mean(axis=1) / runs.max(axis=1)).min())
    assert found.random_efficiency < found.efficiency


def test_sizes_of_a_step_are_those_of_whole_steps(index: ShardIndex) -> None:
    """The second step has four bins and eight empty places."""
    order = DataOrder(index.cost(), seed=0, global_batch=12, epochs=1)
    found = simulate(index, order, world_size=3, accumulation=4)
    assert found.num_steps == 2
    assert found.bytes_per_step == found.most_bytes == index.num_bytes[order.global_bins(0)].sum()
    assert found.tokens_per_step == index.num_tokens[order.global_bins(0)].sum()
    short = DataOrder(index.cost(), seed=0, global_batch=32, epochs=1)
    assert simulate(index, short, world_size=2, accumulation=4).bytes_per_step == index.num_bytes.sum()


def test_tokens_of_datasets_are_those_of_the_ledger(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", make_bins(seed=1, num_bins=3), dataset="first")
    write_shards(tmp_path / "b", make_bins(seed=2, num_bins=4), dataset="second")
    index = open_shards(tmp_path)
    tokens = dataset_tokens(index)
    assert tokens[:, 0].tolist() == [*index.num_tokens[:3].tolist(), 0, 0, 0, 0]
    assert tokens[:, 1].tolist() == [0, 0, 0, *index.num_tokens[3:].tolist()]
    (tmp_path / "b" / "samples.parquet").write_bytes(b"no table")
    with pytest.raises(ShardError, match=r"b/samples\.parquet cannot be read"):
        dataset_tokens(index)


def test_tokens_are_counted_for_the_right_bins_where_numbers_are_absent(tmp_path: Path) -> None:
    """Bins 0, 2 and 5 of a build in which all samples of bins 1, 3 and 4 turned out to be unusable."""
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=3)))
    path = tmp_path / "set" / "samples.parquet"
    rows = [{**row, "bin": [0, 2, 5][row["bin"]]} for row in pq.read_table(path).to_pylist()]
    pq.write_table(pa.Table.from_pylist(rows, schema=pq.read_schema(path)), path)
    with_gaps = dataclasses.replace(index, local_bin=np.array([0, 2, 5]))
    assert dataset_tokens(with_gaps)[:, 0].tolist() == index.num_tokens.tolist()
    with pytest.raises(ShardError, match=r"samples\.parquet names bin 5, which is not there"):
        dataset_tokens(index)


def test_variance_of_shares_worked_out_by_hand() -> None:
    """Shares of the first dataset 1/2, 1 and 0: variance 1/4, and as much for the second; a short step is left out."""
    composition = np.array([[4, 0], [0, 4], [2, 2]])
    steps = np.array([[0, 1], [0, 0], [1, 1], [2, -1]])
    assert mixture_variance(composition, steps) == pytest.approx(0.5)


def test_weights_make_the_mixture_vary_less_than_chance(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", make_bins(seed=1, num_bins=8), dataset="first")
    write_shards(tmp_path / "b", make_bins(seed=2, num_bins=8), dataset="second")
    found = {}
    for shards in (f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:1", str(tmp_path)):
        index = open_shards(shards)
        order = DataOrder(index.cost(), seed=0, global_batch=8, mixture=index.mixture)
        simulated = simulate(index, order, world_size=2, accumulation=4)
        found[shards] = simulated.mixture_variance / simulated.random_mixture_variance
    weighted, plain = found.values()
    assert weighted < plain


def test_a_report_says_bandwidth_and_length_of_an_epoch(index: ShardIndex) -> None:
    order = DataOrder(index.cost(), seed=0, global_batch=16, epochs=2.5)
    found = simulate(index, order, world_size=4, accumulation=4)
    tokens, num_bytes = int(index.num_tokens.sum()), int(index.num_bytes.sum())
    text = "\n".join(report(index, order, found, world_size=4, accumulation=4, tokens_per_s=tokens * 10**6))
    assert f"a step: {tokens:,} tokens" in text
    assert f"{num_bytes:,.1f} MB/s, {num_bytes / 4:,.1f} MB/s a rank" in text
    assert f"an epoch: 16 bins of 16 in the shards, 1.00 steps, {tokens:,} tokens" in text
    assert text.endswith("3 steps in all")
    with pytest.raises(ConfigError, match="not a multiple of 3 ranks"):
        simulate(index, order, world_size=3, accumulation=1)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train.order", "--global-batch", "8", "--world-size", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_line_simulates(tmp_path: Path, tiny_vocab_checkpoint: Path) -> None:
    a, b = (str(write_shards(tmp_path / name, make_bins(num_bins=8))) for name in "ab")
    done = run(
        "--shards", f"{a}:0.7,{b}:0.3", "--simulate", "--group-steps", "2", "--model", str(tiny_vocab_checkpoint)
    )
    assert done.returncode == 0, done.stderr
    for word in (
        "efficiency: mean 0.",
        "mixture of datasets",
        "a step: ",
        "bandwidth at 100,000 tokens/s",
        "an epoch: ",
    ):
        assert word in done.stdout, word
    for arguments in (["--simulate", "--step", "1"], []):
        wrong = run("--shards", a, *arguments)
        assert (wrong.returncode, wrong.stderr) == (2, "error: give either --step N or --simulate.\n")
