"""The benchmark of a GPU runs, small, on a CPU, so that it will run where there is a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from functools import partial
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner
from transformers import Qwen2_5_VLForConditionalGeneration

from demo.tiny_model import tiny_config
from schemas.qwen import FACTOR
from tests.benchmarks._unreliable import crash_in, hang
from tests.benchmarks.gpu import supervisor
from tests.benchmarks.gpu.__main__ import main
from tests.benchmarks.gpu.attention import kernel_for
from tests.benchmarks.gpu.contenders import content_of
from tests.benchmarks.gpu.corpus import REPOSITORY, draw_cut
from tests.benchmarks.gpu.measure import busy_and_gap, flops_of
from tests.benchmarks.gpu.scale import REAL, official_config
from tests.benchmarks.gpu.tables import COLUMNS
from tests.train.synthetic import as_bin, make_medium, make_sample
from tests.train.varlen_on_cpu import attend_in_parts
from train.arithmetic.dimensions import OFFICIAL, Dimensions
from train.batches.batch import build_micro_batch
from train.model import attention
from train.model.flops import ModelFlops
from train.model.packed import PackedQwen

CONTENDERS = (
    "ours, varlen",
    "ours, sdpa",
    "upstream, padded, 1 worker",
    "upstream, padded, 2 workers",
    "upstream, flattened, 2 workers",
)


@pytest.fixture(scope="module")
def output(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gpu") / "work"
    done = CliRunner().invoke(main, ["--smoke", "--checkpoint", str(tiny_checkpoint), "--folder", str(folder)])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.slow
def test_every_contender_has_all_figures_that_a_cpu_can_give(output: str) -> None:
    lines = output.splitlines()
    head = next(row for row, line in enumerate(lines) if line.split("  ")[-1].strip() == COLUMNS[-1])
    for name, line in zip(CONTENDERS, lines[head + 1 :]):
        assert line.startswith(name)
        cells = dict(zip(COLUMNS[1:], re.split(r" {2,}", line.removeprefix(name).strip())))
        assert {column for column, cell in cells.items() if cell == "-"} == {"MFU", "peak GiB"}
        assert int(cells["steps"]) >= 2
    assert "memory: train.memory says" in output
    assert len(re.findall(r"^kernel: ", output, flags=re.MULTILINE)) == 5
    assert len(re.findall(r"^bar: ", output, flags=re.MULTILINE)) == 2


def is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_when_the_time_is_over_all_processes_end_and_the_figures_so_far_are_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = SimpleNamespace(s=0.0)
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=lambda: now.s))
    lines, pids = [], []
    for line in supervisor.supervise(hang, until_s=530.0):
        lines.append(line)
        if line.startswith("hanging beside "):
            pids = [int(line.split()[-1]), *(child.pid for child in active_children())]
            now.s = 530.0
    assert lines[:2] == ["figures of data", "figures of first"]
    assert lines[3:] == [
        "\nsecond: the time is over; measured until then:\nturns of second: 2",
        "\nnot reached: third (the time is over)",
    ]
    until_s = time.monotonic() + 30
    while any(map(is_running, pids)) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert [pid for pid in pids if is_running(pid)] == []


def test_the_program_that_keeps_the_time_imports_nothing_that_takes_some() -> None:
    program = "import sys, tests.benchmarks.gpu.__main__; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (
            "first",
            [
                "figures of data",
                "\nfirst: its process failed (exit code -9); measured until then:\nnothing",
                "figures of second",
                "\nnot reached: third (no time to start it)",
            ],
        ),
        (
            "data",
            [
                "\ndata: its process failed (exit code -9); measured until then:\nnothing",
                "\nnot reached: first; second; third (its process failed (exit code -9))",
            ],
        ),
    ],
)
def test_after_a_crash_a_new_process_does_the_parts_that_are_left_unless_they_have_no_data(
    part: str, expected: list[str]
) -> None:
    assert list(supervisor.supervise(partial(crash_in, part), until_s=time.monotonic() + 300)) == expected


def test_data_of_an_earlier_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    done = CliRunner().invoke(main, ["--smoke", "--folder", str(tmp_path)])
    assert done.exit_code == 1 and done.output.endswith("is not empty: give another one\n")


@pytest.mark.slow
def test_all_contenders_compute_the_same_loss(output: str) -> None:
    """Packed, padded and flattened; they differ by roundings in bfloat16."""
    losses = dict(re.findall(r"^loss: (.+): ([\d.]+)", output, flags=re.MULTILINE))
    assert tuple(losses) == CONTENDERS
    assert np.ptp([float(loss) for loss in losses.values()]) < 5e-3 * float(losses[CONTENDERS[0]])


def attend_as_in_torch_2_11(*args: Any, scale: float | None, window_size: tuple[int, int]) -> torch.Tensor:
    """The arguments that torch 2.11 knows. Its kernel takes fewer heads of keys and values without a flag."""
    return attend_in_parts(*args, scale=scale, window_size=window_size, enable_gqa=True)


def test_a_kernel_without_a_flag_for_grouped_queries_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = torch.randn(1, 4, 6, 16), torch.randn(1, 2, 6, 16)
    boundaries = torch.tensor([0, 2, 6], dtype=torch.int32)
    results = []
    for kernel in (attend_in_parts, attend_as_in_torch_2_11):
        monkeypatch.setattr(attention, "varlen_attn", kernel)
        with kernel_for(torch.device("cuda")):
            output, _ = attention.attend_varlen(
                torch.nn.Module(), query, key, key, None, cu_seq_lens_q=boundaries, max_length_q=4, is_causal=True
            )
        assert attention.varlen_attn is kernel
        results.append(output)
    assert torch.equal(*results)


def test_the_formula_over_contents_is_that_of_the_trainer() -> None:
    rng = np.random.default_rng(0)
    samples = [make_sample(rng, [make_medium(rng, 12, 20)]), make_sample(rng, [make_medium(rng, 4, 4)], num_text=90)]
    micro = build_micro_batch([as_bin(samples)])
    model = PackedQwen(Qwen2_5_VLForConditionalGeneration(tiny_config(2048)), attn_implementation="sdpa")
    flops = ModelFlops.of(model)
    assert flops_of(flops, content_of(micro)) == flops.count(micro)


@pytest.mark.parametrize(
    ("spans", "busy", "gap"),
    [
        ([], 0.0, 0),
        ([(10, 20)], 1.0, 0),
        ([(30, 40), (10, 20)], 2 / 3, 10),
        ([(0, 100), (20, 30), (90, 110), (140, 150)], 120 / 150, 30),
    ],
)
def test_overlapping_operations_count_once(spans: list[tuple[int, int]], busy: float, gap: int) -> None:
    assert busy_and_gap(spans) == (pytest.approx(busy), gap)


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_the_models_have_the_official_dimensions(size: str) -> None:
    assert Dimensions.of(official_config(size).to_dict()) == Dimensions.of(OFFICIAL[size])


def test_images_have_as_many_tokens_as_the_scale_says() -> None:
    rng = np.random.default_rng(0)
    cuts = [draw_cut(rng, REAL, 1536) for _ in range(500)]
    tokens = np.array([height * width // FACTOR**2 for _, _, height, width in cuts])
    assert 120 <= tokens.min() < 200
    assert 1300 < tokens.max() <= 1500
    assert all(0 <= top <= 1536 - height and 0 <= left <= 1536 - width for top, left, height, width in cuts)
