"""What a run needs of storage, and its efficiency, are computed before it starts, from the index alone."""

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
from tests.train.test_order import reference_permutation
from train.order.dealing import DataOrder
from train.order.simulate import dataset_tokens, mixture_variance, report, simulate
from train.shards.index import ShardIndex, open_shards


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return open_shards(write_shards(tmp_path / "set", make_bins(num_bins=16)))


def test_one_epoch_in_one_step_is_the_whole_set(index: ShardIndex) -> None:
    order = DataOrder(index.cost(), seed=0, global_batch=16, epochs=1)
    result = simulate(index, order, world_size=4, accumulation=4)
    assert result.num_steps == 1
    assert result.step.num_bytes == result.max_bytes == index.num_bytes.sum()
    assert result.step.num_tokens == index.num_tokens.sum()
    assert result.step.num_targets == index.num_targets.sum()
    # four ranks, four micro-steps: by hand from the sorted costs
    runs = np.sort(order.cost).reshape(4, 4)
    assert result.efficiency == pytest.approx((runs.mean(axis=1) / runs.max(axis=1)).mean())
    assert result.min_efficiency == pytest.approx((runs.mean(axis=1) / runs.max(axis=1)).min())
    assert result.random_efficiency < result.efficiency


def test_sizes_of_a_step_are_those_of_whole_steps(index: ShardIndex) -> None:
    """The second step has four bins and eight empty slots."""
    order = DataOrder(index.cost(), seed=0, global_batch=12, epochs=1)
    result = simulate(index, order, world_size=3, accumulation=4)
    assert result.num_steps == 2
    assert result.step.num_bytes == result.max_bytes == index.num_bytes[order.global_bins(0)].sum()
    assert result.step.num_tokens == index.num_tokens[order.global_bins(0)].sum()
    short = DataOrder(index.cost(), seed=0, global_batch=32, epochs=1)
    assert simulate(index, short, world_size=2, accumulation=4).step.num_bytes == index.num_bytes.sum()


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
    with pytest.raises(ShardError, match=r"samples\.parquet names bin 5, which does not exist"):
        dataset_tokens(index)


def test_variance_of_shares_worked_out_by_hand() -> None:
    """Shares of the first dataset 1/2, 1 and 0: variance 1/4, and as much for the second; a short step is left out."""
    composition = np.array([[4, 0], [0, 4], [2, 2]])
    steps = np.array([[0, 1], [0, 0], [1, 1], [2, -1]])
    assert mixture_variance(composition, steps) == pytest.approx(0.5)


def test_weights_make_the_mixture_vary_less_than_chance(tmp_path: Path) -> None:
    write_shards(tmp_path / "a", make_bins(seed=1, num_bins=8), dataset="first")
    write_shards(tmp_path / "b", make_bins(seed=2, num_bins=8), dataset="second")
    ratios = {}
    for shards in (f"{tmp_path / 'a'}:1,{tmp_path / 'b'}:1", str(tmp_path)):
        index = open_shards(shards)
        order = DataOrder(index.cost(), seed=0, global_batch=8, mixture=index.mixture)
        simulated = simulate(index, order, world_size=2, accumulation=4)
        ratios[shards] = simulated.mixture_variance / simulated.random_mixture_variance
    weighted, plain = ratios.values()
    assert weighted < plain


def test_a_report_says_bandwidth_and_length_of_an_epoch(index: ShardIndex) -> None:
    order = DataOrder(index.cost(), seed=0, global_batch=16, epochs=2.5)
    result = simulate(index, order, world_size=4, accumulation=4)
    tokens, num_bytes = int(index.num_tokens.sum()), int(index.num_bytes.sum())
    text = "\n".join(report(index, order, result, world_size=4, accumulation=4, tokens_per_s=tokens * 10**6))
    assert f"a step: {tokens:,} tokens" in text
    assert f"{num_bytes:,.1f} MB/s, {num_bytes / 4:,.1f} MB/s per rank" in text
    assert f"an epoch: 16 bins of 16 in the shards, 1.00 steps, {tokens:,} tokens" in text
    assert text.endswith("3 steps in all")
    with pytest.raises(ConfigError, match="not a multiple of 3 ranks"):
        simulate(index, order, world_size=3, accumulation=1)


def test_an_epoch_of_a_mixture_has_the_tokens_of_all_uses(tmp_path: Path) -> None:
    """Each bin of one folder twice and each of the other once; with weights 3:1, bins of average size."""
    a, b = (write_shards(tmp_path / name, make_bins(seed=n, num_bins=4 + n)) for n, name in enumerate("ab"))
    in_a, in_b = (int(open_shards(folder).num_tokens.sum()) for folder in (a, b))
    for shards, tokens, num_bins in (
        (f"{a}:2epochs,{b}:1epochs", 2 * in_a + in_b, 13),
        (f"{a}:3,{b}:1", 9 * (0.75 * in_a / 4 + 0.25 * in_b / 5), 9),
    ):
        index = open_shards(shards)
        order = DataOrder(index.cost(), seed=0, global_batch=4, mixture=index.mixture)
        result = simulate(index, order, world_size=2, accumulation=2)
        text = "\n".join(report(index, order, result, world_size=2, accumulation=2, tokens_per_s=0.5))
        assert (
            f"an epoch: {num_bins} bins of 9 in the shards, {num_bins / 4:,.2f} steps, {tokens:,.0f} tokens, " in text
        )
        duration = f"{2 * tokens:,.1f} s" if tokens < 500 else f"{tokens / 1800:,.2f} hours"
        assert text.endswith(f"{duration}; no end")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train.order", "--global-batch", "8", "--world-size", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


FORWARD_OF_7B = {
    # 28 layers of queries and output (3584 wide), keys and values (512), and the gated MLP
    "num_tokens": 28 * 2 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944),
    "sum_squared_lengths": 28 * 2 * 3584,
    "num_targets": 2 * 3584 * 152064,
}
# 32 layers of the vision tower, windows of 64 patches in 28 of them, patch embedding, merger for each four patches
PATCH_OF_7B = 2 * (32 * (4 * 1280**2 + 3 * 1280 * 3420) + 28 * 2 * 64 * 1280 + 1176 * 1280 + 5120 * (5120 + 3584) // 4)
SQUARED_PATCHES_OF_7B = 4 * 4 * 1280


def test_what_the_command_line_says_follows_from_the_table_of_bins_alone(tmp_path: Path) -> None:
    """Worked out in plain Python: three epochs of 130 bins in steps of 24 on four ranks, the last of which has six."""
    folder = write_shards(tmp_path / "set", make_bins(num_bins=130))
    rows = pq.read_table(folder / "bins.parquet").to_pylist()
    costs = []
    for row in rows:
        frames = max(1, row["num_images"] + 4 * row["num_videos"])
        vision = PATCH_OF_7B * row["num_patches"] + SQUARED_PATCHES_OF_7B * row["num_patches"] ** 2 / frames
        # recomputed, and with gradients of activations and weights; the vision tower is frozen
        costs.append(4 * sum(flops * row[name] for name, flops in FORWARD_OF_7B.items()) + vision)
    sequence = [bin_id for epoch in range(3) for bin_id in reference_permutation(130, 0, epoch)]
    steps = [sequence[start : start + 24] for start in range(0, len(sequence), 24)]
    efficiencies = []
    for step in steps:
        loads = sorted([0.0] * (24 - len(step)) + [costs[bin_id] for bin_id in step])
        runs = [loads[start : start + 4] for start in range(0, 24, 4)]
        efficiencies += [sum(run) / 4 / max(run) if max(run) else 1.0 for run in runs]

    def of_whole_steps(column: str) -> list[int]:
        return [sum(rows[bin_id][column] for bin_id in step) for step in steps if len(step) == 24]

    def mean(values: list[float] | list[int]) -> float:
        return sum(values) / len(values)

    num_bytes, tokens, targets = (of_whole_steps(name) for name in ("num_bytes", "num_tokens", "num_targets"))
    mb_per_s = mean(num_bytes) / mean(tokens) * 5e6 / 1e6
    total = sum(row["num_tokens"] for row in rows)
    command = [
        sys.executable,
        "-m",
        "train.order",
        "--shards",
        str(folder),
        "--global-batch",
        "24",
        "--world-size",
        "4",
    ]
    done = subprocess.run(
        [*command, "--simulate", "--epochs", "3", "--tokens-per-s", "5e6"], capture_output=True, text=True, check=True
    )
    for expected in (
        "all 17 steps of the run, each of 24 bins, 4 ranks, 6 micro-steps, seed 0",
        f"efficiency: mean {mean(efficiencies):.4f}, lowest {min(efficiencies):.4f} (",
        f"a step: {mean(tokens):,.0f} tokens, {mean(targets):,.0f} of them targets, "
        f"{mean(num_bytes) / 1e6:,.1f} MB on average and {max(num_bytes) / 1e6:,.1f} MB at most",
        f"bandwidth at 5,000,000 tokens/s: {mb_per_s:,.1f} MB/s, {mb_per_s / 4:,.1f} MB/s per rank; a step every ",
        f"an epoch: 130 bins of 130 in the shards, 5.42 steps, {total:,} tokens, {total / 5e6:.1f} s; 17 steps in all",
    ):
        assert expected in done.stdout, expected


@pytest.mark.slow
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
    for speed in ("nan", "inf", "0", "-1"):
        wrong = run("--shards", a, "--simulate", "--tokens-per-s", speed)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("error: --tokens-per-s is ")
