"""Does a recipe mean the same with packed samples? ``python -m tests.benchmarks.recipes``.

A tiny model is trained on the same samples in three ways, with the same rate and on as many samples:

- unpacked: a plain loop over the Hugging Face model. A step has B samples in forward passes of a few, padded
  to the longest. Its loss is the mean over the passes of the mean over their targets, as upstream has it;
- packed: steps of the trainer with ``--samples_per_step B``, which take the bins that hold as many in expectation;
- bins counted as samples: steps of the trainer with B bins.

A seed decides the start of the model and the order of the samples. The spread of two seeds is the distance of their
unpacked curves: the mean absolute difference of the losses, in equal shares of the run. If a recipe means the same,
packed and unpacked curves of a seed are not farther apart than that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLForConditionalGeneration

from demo.tiny_model import NUM_TOKENS, tiny_config
from prep.packing.best_fit import pack
from schemas.qwen import ENDOFTEXT, IGNORE_INDEX
from tests.benchmarks.machine import describe_machine
from tests.train.synthetic import Medium, Sample, as_bin, make_sample, write_shards
from train.batches.batch import MicroBatch, build_micro_batch
from train.batches.stream import BinStream
from train.model.packed import PackedQwen
from train.model.pixels import pixel_values
from train.order.dealing import DataOrder
from train.settings.batch import Batch, choose_batch
from train.settings.flags import parse_arguments
from train.settings.recipe import OTHER
from train.shards.index import ShardIndex, open_shards

VOCAB_SIZE = 512
NUM_KEYS, NUM_COLOURS = 48, 6
MAX_LENGTH = 256
SHARES = 20
"""Shares of a run, in each of which a curve has the mean loss."""

Curve = NDArray[np.float64]
"""(SHARES,) mean loss of a target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What is trained.

    Attributes:
        num_samples: samples of the data.
        samples_per_step: B.
        samples_per_pass: samples of an unpacked forward pass.
        steps: steps of B samples.
        learning_rate: constant rate of AdamW.
    """

    num_samples: int = 1600
    samples_per_step: int = 16
    samples_per_pass: int = 4
    steps: int = 200
    learning_rate: float = 2e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Losses of a run, one entry per step: sum over the targets, number of targets, number of samples."""

    losses: tuple[float, ...]
    num_targets: tuple[int, ...]
    num_samples: tuple[int, ...]

    def curve(self, num_samples: int) -> Curve:
        """Mean loss of a target in each share of the first ``num_samples`` samples.

        A step that spans shares counts in each of them, by its samples there.
        """
        ends = np.cumsum(self.num_samples)
        boundaries = np.linspace(0, num_samples, SHARES + 1)

        def at(values: Sequence[float]) -> Curve:
            """Sum of the values up to each boundary."""
            return np.interp(boundaries, [0, *ends], [0, *np.cumsum(values)])

        curve: Curve = np.diff(at(self.losses)) / np.diff(at(self.num_targets))
        return curve


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Curves by way of training, one per seed; steps of each way, and mean samples of a step."""

    curves: dict[str, list[Curve]]
    steps: dict[str, int]
    samples_per_step: dict[str, float]

    @property
    def spread(self) -> float:
        """Distance of the unpacked curves of two seeds."""
        first, second = self.curves["unpacked"]
        return distance(first, second)

    def distances(self, way: str) -> list[float]:
        """Distance of a way from unpacked steps, by seed."""
        return [distance(*curves) for curves in zip(self.curves[way], self.curves["unpacked"])]


def distance(first: Curve, second: Curve) -> float:
    """Mean absolute difference of two curves."""
    return float(np.abs(first - second).mean())


def draw_samples(num_samples: int) -> list[Sample]:
    """Questions of 4 to 60 tokens with answers of 1 to 24. A word of the question, or the colour of an image, decides
    the answer.
    """
    rng = np.random.default_rng(0)
    answers = [rng.integers(100, 200, rng.integers(1, 25)) for _ in range(NUM_KEYS + NUM_COLOURS)]
    colours = rng.integers(0, 256, (NUM_COLOURS, 3), dtype=np.uint8)
    samples = []
    for key in rng.integers(0, len(answers), num_samples).tolist():
        media = []
        if key >= NUM_KEYS:
            colour = colours[key - NUM_KEYS]
            height, width = (14 * rng.integers(1, 4, 2) * 2).tolist()
            media.append(Medium(np.broadcast_to(colour[:, None, None], (1, 3, height, width)).copy(), is_video=False))
        words = rng.integers(200, 260, rng.integers(3, 60))
        words[rng.integers(len(words))] = 10 + min(key, NUM_KEYS)
        num_targets = len(answers[key]) + 1  # the end of the turn, too
        sample = make_sample(rng, media, num_text=len(words) + len(answers[key]), num_targets=num_targets)
        sample.input_ids[-num_targets - len(words) : -1] = np.concatenate([words, answers[key]])
        sample.labels[-num_targets:] = sample.input_ids[-num_targets:]
        samples.append(sample)
    return samples


def write_bins(folder: Path, samples: Sequence[Sample]) -> ShardIndex:
    """Pack samples like ``vlprep build``, and open them as the trainer does."""
    bin_of = pack(np.array([len(sample.input_ids) for sample in samples]), MAX_LENGTH)
    bins = [[samples[at] for at in np.flatnonzero(bin_of == bin_id)] for bin_id in range(bin_of.max() + 1)]
    return open_shards(write_shards(folder, bins, codec="raw", bins_per_shard=64, max_length=MAX_LENGTH))


def make_model(seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The tiny model with a small vocabulary, in float32, from random weights."""
    torch.manual_seed(seed)
    return Qwen2_5_VLForConditionalGeneration(tiny_config(VOCAB_SIZE)).float().train()


def small_ids(ids: torch.Tensor) -> torch.Tensor:
    """Token ids in the small vocabulary, whose last ones are the control tokens."""
    return torch.where(ids < ENDOFTEXT, ids, ids - (NUM_TOKENS - VOCAB_SIZE))


def run_unpacked(samples: Sequence[Sample], setup: Setup, seed: int) -> Run:
    """Train with a plain loop over the Hugging Face model, on steps of B samples."""
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate, fused=True)
    rng = np.random.default_rng(seed)
    num_epochs = 1 + setup.steps * setup.samples_per_step // len(samples)
    order = np.concatenate([rng.permutation(len(samples)) for _ in range(num_epochs)])
    losses, targets = [], []
    for step in range(setup.steps):
        chosen = order[step * setup.samples_per_step :][: setup.samples_per_step]
        passes = np.split(chosen, len(chosen) // setup.samples_per_pass)
        loss_sum, num_targets = 0.0, 0
        for ids in passes:
            inputs, count = padded([samples[at] for at in ids])
            loss = model(**inputs, use_cache=False).loss
            (loss / len(passes)).backward()
            loss_sum += loss.item() * count
            num_targets += count
        update(model, optimizer)
        losses.append(loss_sum)
        targets.append(num_targets)
    return Run(losses=tuple(losses), num_targets=tuple(targets), num_samples=(setup.samples_per_step,) * setup.steps)


def padded(samples: Sequence[Sample]) -> tuple[dict[str, torch.Tensor], int]:
    """Inputs of the Hugging Face model for a batch of samples, padded to the longest, and its targets."""
    ids = [torch.from_numpy(sample.input_ids).long() for sample in samples]
    labels = [torch.from_numpy(sample.labels).long() for sample in samples]
    positions = [torch.from_numpy(sample.position_ids).long().T for sample in samples]
    inputs = {
        "input_ids": small_ids(pad_sequence(ids, batch_first=True, padding_value=ENDOFTEXT)),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": pad_sequence([torch.ones_like(of) for of in ids], batch_first=True),
        # (B, L, 3) -> (3, B, L)
        "position_ids": pad_sequence(positions, batch_first=True).permute(2, 0, 1),
    }
    inputs["labels"] = torch.where(inputs["labels"] == IGNORE_INDEX, IGNORE_INDEX, small_ids(inputs["labels"]))
    media = [medium for sample in samples for medium in sample.media]
    if media:
        vision = build_micro_batch([as_bin(list(samples), codec="raw")]).vision
        inputs["pixel_values"] = pixel_values(vision, torch.float32)
        inputs["image_grid_thw"] = torch.tensor([medium.grid for medium in media])
    return inputs, int((inputs["labels"] != IGNORE_INDEX).sum())


def run_packed(index: ShardIndex, batch: Batch, setup: Setup, seed: int) -> Run:
    """Train like the trainer, on steps of a batch, until as many samples are used."""
    model = PackedQwen(make_model(seed), attn_implementation="sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=setup.learning_rate, fused=True)
    losses, targets, num_samples = [], [], []
    order = DataOrder(index.cost(), seed=seed, global_batch=batch.bins)
    stream = BinStream(
        index, order, rank=0, world_size=1, accumulation=batch.accumulation, per_device=batch.per_device, num_threads=1
    )
    with stream:
        for step in stream:
            loss_sum = 0.0
            for micro in step.micro_batches:
                loss = model(in_small_vocabulary(micro))
                (loss / step.num_targets).backward()
                loss_sum += loss.item()
            update(model, optimizer)
            losses.append(loss_sum)
            targets.append(step.num_targets)
            num_samples.append(step.num_samples)
            if sum(num_samples) >= setup.steps * setup.samples_per_step:
                break
    return Run(losses=tuple(losses), num_targets=tuple(targets), num_samples=tuple(num_samples))


def in_small_vocabulary(micro: MicroBatch) -> MicroBatch:
    """A micro-batch with the ids of the small vocabulary."""
    return replace(micro, input_ids=small_ids(micro.input_ids), targets=small_ids(micro.targets))


def update(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Clip the gradient and step, as the trainer does."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def batches(index: ShardIndex, samples_per_step: int) -> dict[str, Batch]:
    """Batches of the two packed ways, as flags give them."""
    flags = {
        "packed": ["--samples_per_step", str(samples_per_step)],
        "bins counted as samples": ["--gradient_accumulation_steps", str(samples_per_step)],
    }
    return {
        way: choose_batch(
            parse_arguments(["--shards", "", *words]),
            OTHER,
            samples_per_bin=index.samples_per_bin,
            largest_bin=int(index.num_tokens.max()),
            world=1,
        )
        for way, words in flags.items()
    }


def compare(setup: Setup, folder: Path, seeds: Sequence[int] = (0, 1)) -> Comparison:
    """Train in all ways with every seed."""
    samples = draw_samples(setup.num_samples)
    index = write_bins(folder, samples)
    runs = {"unpacked": [run_unpacked(samples, setup, seed) for seed in seeds]}
    for way, batch in batches(index, setup.samples_per_step).items():
        runs[way] = [run_packed(index, batch, setup, seed) for seed in seeds]
    total = setup.steps * setup.samples_per_step
    return Comparison(
        curves={way: [run.curve(total) for run in of_way] for way, of_way in runs.items()},
        steps={way: len(of_way[0].losses) for way, of_way in runs.items()},
        samples_per_step={way: float(np.mean(of_way[0].num_samples)) for way, of_way in runs.items()},
    )


def report(comparison: Comparison) -> Iterator[str]:
    """The curves and their distances, line by line."""
    ways = list(comparison.curves)
    for way in ways:
        yield f"{way}: {comparison.steps[way]} steps of {comparison.samples_per_step[way]:.1f} samples on average"
    yield "share of the run | " + " | ".join(ways)
    for share in range(1, SHARES, 3):
        losses = (" and ".join(f"{curve[share]:.3f}" for curve in comparison.curves[way]) for way in ways)
        yield f"{(share + 1) / SHARES:.0%} | " + " | ".join(losses)
    yield f"spread of two seeds: {comparison.spread:.3f}"
    for way in islice(ways, 1, None):
        distances = " and ".join(f"{value:.3f}" for value in comparison.distances(way))
        yield f"distance from unpacked, {way}: {distances}"


@click.command()
@click.option("--steps", type=click.IntRange(min=SHARES), default=Setup().steps, show_default=True)
@click.option("--learning-rate", type=float, default=Setup().learning_rate, show_default=True)
def main(steps: int, learning_rate: float) -> None:
    """Compare the loss curves of unpacked and packed training."""
    torch.set_num_threads(1)
    click.echo(describe_machine("torch", "transformers"))
    with tempfile.TemporaryDirectory() as folder:
        for line in report(compare(Setup(steps=steps, learning_rate=learning_rate), Path(folder))):
            click.echo(line)


if __name__ == "__main__":
    main()
