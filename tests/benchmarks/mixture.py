"""A realistic packed mixture, with sample sizes that follow from Qwen2.5-VL's settings, to measure balance.

Five kinds of samples (natural images, multi-page documents, charts, videos, text) with lengths and patches drawn from
plausible distributions and packed by the project's own packer -> the columns of an index of the bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.packing.best_fit import pack

KINDS = ("images", "documents", "charts", "videos", "text")


@dataclass(frozen=True)
class Mixture:
    """Samples, each array (N,) int64; ``kind`` is an index of :data:`KINDS`."""

    kind: NDArray[np.int64]
    num_tokens: NDArray[np.int64]
    num_targets: NDArray[np.int64]
    num_patches: NDArray[np.int64]
    num_images: NDArray[np.int64]
    num_videos: NDArray[np.int64]


@dataclass(frozen=True)
class PackedMixture:
    """Columns of ``bins.parquet`` by name, tokens of every kind in every bin (bins, 5), and how full bins are."""

    columns: dict[str, NDArray[np.int64]]
    composition: NDArray[np.int64]
    fill: float

    @property
    def num_bins(self) -> int:
        return len(self.composition)


def draw_mixture(*, num_samples: int, max_length: int, seed: int) -> Mixture:
    """Draw samples and drop those that are too long."""
    rng = np.random.default_rng(seed)
    kind = rng.choice(5, size=num_samples, p=[0.45, 0.15, 0.12, 0.08, 0.20])
    patches, text, images, videos = (np.zeros(num_samples, dtype=np.int64) for _ in range(4))

    def draw_text(kind_index: int, median: float, spread: float, max_tokens: int) -> None:
        of_kind = kind == kind_index
        text[of_kind] = np.clip(rng.lognormal(np.log(median), spread, of_kind.sum()), 30, max_tokens)

    draw_text(0, 148, 0.7, 1500)
    draw_text(1, 90, 0.5, 600)
    draw_text(2, 74, 0.4, 500)
    draw_text(3, 100, 0.5, 600)
    draw_text(4, 330, 1.0, 4000)
    # One token is four patches; an image has at most 576 tokens.
    patches[kind == 0] = 4 * np.clip(rng.normal(400, 120, (kind == 0).sum()), 64, 576).astype(np.int64)
    images[kind == 1] = rng.integers(1, 5, (kind == 1).sum())
    patches[kind == 1] = 4 * 540 * images[kind == 1]
    patches[kind == 2] = 4 * np.clip(rng.normal(320, 60, (kind == 2).sum()), 64, 576).astype(np.int64)
    images[(kind == 0) | (kind == 2)] = 1
    steps = rng.integers(2, 5, (kind == 3).sum())
    patches[kind == 3] = 4 * steps * np.clip(rng.normal(600, 150, steps.size), 256, 800).astype(np.int64)
    videos[kind == 3] = 1

    tokens = patches // 4 + text
    targets = (text * rng.uniform(0.2, 0.7, num_samples)).astype(np.int64)
    fits = tokens <= max_length
    return Mixture(*(values[fits] for values in (kind, tokens, targets, patches, images, videos)))


def packed_mixture(*, num_samples: int, max_length: int, max_patches: int | None, seed: int) -> PackedMixture:
    """Draw samples and pack them."""
    drawn = draw_mixture(num_samples=num_samples, max_length=max_length, seed=seed)
    tokens = drawn.num_tokens
    bins = pack(tokens, max_length, num_patches=drawn.num_patches, max_patches=max_patches, seed=seed)
    num_bins = int(bins.max()) + 1

    def summed(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(bins, weights=values, minlength=num_bins).astype(np.int64)

    return PackedMixture(
        columns={
            "num_tokens": summed(tokens),
            "sum_squared_lengths": summed(tokens * tokens),
            "num_targets": summed(drawn.num_targets),
            "num_patches": summed(drawn.num_patches),
            "num_images": summed(drawn.num_images),
            "num_videos": summed(drawn.num_videos),
        },
        composition=np.stack([summed(tokens * (drawn.kind == kind)) for kind in range(5)], axis=1),
        fill=float(tokens.sum() / num_bins / max_length),
    )
