"""Packers compared: fill, speed and memory. ``python -m tests.benchmarks.packing``.

For several distributions of lengths and every packer: the fill of the binding budget, samples per second, and peak
memory beyond the inputs. Each packer runs in its own process. Packers that place one sample at a time are slow, so all
run on a subset. The project's own also runs on ten million samples. *At most* is the fill at the lower bound on bins.

The other packers: *best fit decreasing* and *binpacking* in windows, as upstream tools use them; *first fit* in windows
(each sample goes into the first bin that has room); and *next fit* (the first sample that does not fit closes the bin,
which is concatenating and cutting at boundaries).
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from prep.packing.best_fit import best_fit_decreasing, constant_volume, pack
from prep.packing.bin_slack import min_bins
from prep.packing.two_budgets import singly_in_windows
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.mixture import draw_mixture

MAX_LENGTH = 4096
LARGE_WINDOW = 1000
"""Samples in a window of best-fit-decreasing and first fit."""

BUDGETS = (8192, 11_700, 12_288, 13_000, 14_000)

Ints = NDArray[np.int64]
Samples = tuple[Ints, Ints]
Packer = Callable[[Ints, Ints, int], Ints]


def _mixture(num: int) -> Samples:
    drawn = draw_mixture(num_samples=num, max_length=MAX_LENGTH, seed=1)
    return drawn.num_tokens, drawn.num_patches


def _text(draw: Callable[[np.random.Generator, int], NDArray[np.generic]], num: int) -> Samples:
    lengths = draw(np.random.default_rng(0), num).astype(np.int64).clip(1, MAX_LENGTH)
    return lengths, np.zeros_like(lengths)


DISTRIBUTIONS: dict[str, Callable[[int], Samples]] = {
    "mixture of images, documents, charts, videos, text": _mixture,
    "chats: lognormal, median 330": partial(_text, lambda rng, num: rng.lognormal(np.log(330), 1.0, num).clip(20)),
    "chats and long documents, half each": partial(
        _text,
        lambda rng, num: np.where(
            rng.random(num) < 0.5, rng.lognormal(np.log(200), 0.7, num).clip(20), rng.normal(2300, 500, num).clip(20)
        ),
    ),
    "uniform": partial(_text, lambda rng, num: rng.integers(1, MAX_LENGTH + 1, num)),
    "narrow, none short: normal, 420 +- 90": partial(_text, lambda rng, num: rng.normal(420, 90, num).clip(60, 700)),
    "narrower: normal, 620 +- 60": partial(_text, lambda rng, num: rng.normal(620, 60, num).clip(300, 900)),
}


def best_fit_in_windows(lengths: Ints, capacity: int) -> Ints:
    """Best-fit-decreasing over consecutive windows of 1000 samples."""
    bins = np.empty(lengths.size, dtype=np.int64)
    num_bins = 0
    for start in range(0, lengths.size, LARGE_WINDOW):
        window = best_fit_decreasing(lengths[start : start + LARGE_WINDOW], capacity)
        bins[start : start + LARGE_WINDOW] = num_bins + window
        num_bins += int(window.max()) + 1
    return bins


def _first_fit(lengths: Ints, patches: Ints, max_patches: int) -> Ints:
    """First fit in windows of 1000, within both budgets."""
    bins = np.empty(lengths.size, dtype=np.int64)
    num_bins = 0
    for start in range(0, lengths.size, LARGE_WINDOW):
        rooms = np.tile([[MAX_LENGTH], [max_patches]], LARGE_WINDOW)
        window = slice(start, start + LARGE_WINDOW)
        window_bins = []
        for size in np.stack([lengths[window], patches[window]], axis=1):
            chosen = int(np.argmax((rooms >= size[:, None]).all(axis=0)))
            rooms[:, chosen] -= size
            window_bins.append(chosen)
        bins[window] = num_bins + np.asarray(window_bins)
        num_bins += max(window_bins) + 1
    return bins


def _next_fit(lengths: Ints, patches: Ints, max_patches: int) -> Ints:
    bins = []
    current, sum_tokens, sum_patches = 0, 0, 0
    for num_tokens, num_patches in zip(lengths.tolist(), patches.tolist()):
        if sum_tokens + num_tokens > MAX_LENGTH or sum_patches + num_patches > max_patches:
            current, sum_tokens, sum_patches = current + 1, 0, 0
        sum_tokens, sum_patches = sum_tokens + num_tokens, sum_patches + num_patches
        bins.append(current)
    return np.asarray(bins)


def _one_size(lengths: Ints, patches: Ints, max_patches: int) -> Ints:
    """Best fit decreasing of the larger share of the two budgets."""
    shares = np.maximum(lengths, -(-patches * MAX_LENGTH // max_patches))
    return best_fit_decreasing(shares, MAX_LENGTH)


ONE_BUDGET: dict[str, Packer] = {
    "vlprep": lambda lengths, patches, _: pack(lengths, MAX_LENGTH),
    "best fit decreasing, windows of 1000": lambda lengths, patches, _: best_fit_in_windows(lengths, MAX_LENGTH),
    "binpacking, windows of 256": lambda lengths, patches, _: constant_volume(lengths, MAX_LENGTH),
    "first fit, windows of 1000": lambda lengths, patches, _: _first_fit(lengths, 0 * lengths, 1),
    "next fit": lambda lengths, patches, _: _next_fit(lengths, 0 * lengths, 1),
}

TWO_BUDGETS: dict[str, Packer] = {
    "vlprep": lambda lengths, patches, budget: pack(lengths, MAX_LENGTH, num_patches=patches, max_patches=budget),
    "best fit decreasing of both, windows of 1000": lambda lengths, patches, budget: singly_in_windows(
        (lengths, patches), (MAX_LENGTH, budget)
    ),
    "best fit decreasing of the larger share": _one_size,
    "binpacking of the larger share, windows of 256": lambda lengths, patches, budget: pack(
        lengths, MAX_LENGTH, num_patches=patches, max_patches=budget, packer="binpacking"
    ),
    "first fit of both, windows of 1000": _first_fit,
    "next fit of both": _next_fit,
}


def _measure(path: Path, packer: str, max_patches: int | None) -> tuple[int, float, float, float]:
    """Bins, share of the binding budget that is filled, seconds of processor time, bytes per sample. Own process."""
    lengths, patches = np.load(path)
    bytes_before = _peak_bytes()
    start = time.process_time()
    bins = (ONE_BUDGET if max_patches is None else TWO_BUDGETS)[packer](lengths, patches, max_patches or 0)
    seconds = time.process_time() - start
    num_bytes = _peak_bytes() - bytes_before
    num_bins = int(bins.max()) + 1
    if np.bincount(bins, weights=lengths).max() > MAX_LENGTH or (
        max_patches is not None and np.bincount(bins, weights=patches).max() > max_patches
    ):
        raise RuntimeError(f"{packer} breaks a budget")
    bound = lengths.sum() / MAX_LENGTH
    if max_patches is not None:
        bound = max(bound, patches.sum() / max_patches)
    return num_bins, bound / num_bins, seconds, num_bytes / lengths.size


def _peak_bytes() -> int:
    """Peak memory of this process. ``getrusage`` would also count the memory of its parent at the start."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def _compare(distribution: str, packers: Sequence[str], num: int, max_patches: int | None = None) -> None:
    lengths, patches = DISTRIBUTIONS[distribution](num)
    if max_patches is not None:
        # Every packer gives a sample with more patches its own bin.
        fits = patches <= max_patches
        lengths, patches = lengths[fits], patches[fits]
    budgets = f"{MAX_LENGTH} tokens" + (f" and {max_patches:,} patches" if max_patches else "")
    possible = "" if max_patches else f"; fill at most {lengths.sum() / MAX_LENGTH / min_bins(lengths, MAX_LENGTH):.4f}"
    click.echo(f"{distribution}; {num:,} samples, bins of {budgets}{possible}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "samples.npy"
        np.save(path, np.stack([lengths, patches]))
        for packer in packers:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                num_bins, fill, seconds, num_bytes = pool.apply(_measure, (path, packer, max_patches))
            click.echo(
                f"  {packer:<48}{num_bins:>12,} bins  fill {fill:.4f}  {num / seconds:>12,.0f} samples/s"
                f"  {seconds:7.2f} s" + (f"  {num_bytes:5.0f} bytes per sample" if num >= 1_000_000 else "")
            )


@click.command(name="python -m tests.benchmarks.packing")
@click.option("--samples", type=click.IntRange(min=1000), default=100_000, show_default=True, help="For all packers.")
@click.option("--many", type=click.IntRange(min=0), default=10_000_000, show_default=True, help="For vlprep; 0: none.")
def main(samples: int, many: int) -> None:
    """Compare packers under one budget and under two."""
    click.echo(describe_machine("numpy", "binpacking"))
    for distribution in DISTRIBUTIONS:
        _compare(distribution, list(ONE_BUDGET), samples)
    mixture = next(iter(DISTRIBUTIONS))
    for max_patches in BUDGETS:
        _compare(mixture, list(TWO_BUDGETS), samples, max_patches)
    if many:
        for distribution in list(DISTRIBUTIONS)[1:]:
            _compare(distribution, ["vlprep"], many)
        for budget in (None, *BUDGETS):
            _compare(mixture, ["vlprep"], many, budget)


if __name__ == "__main__":
    main()
