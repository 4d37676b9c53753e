"""A corpus for benchmarks: images with the statistics of photographs, each with a question and an answer.

A seed -> JPEG files of about a megapixel and ``annotations.jsonl``. Their spectrum falls like that of natural
scenes (amplitude as 1/f, D. Field, 1987), colours are correlated, and there is some sensor noise.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WORDS = ("the", "a", "red", "green", "small", "large", "house", "tree", "person", "walks", "behind", "water", "sky")


def write_photographs(folder: Path, num_samples: int, seed: int = 0) -> Path:
    """Write a corpus of ``num_samples`` images and return the annotation file."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(num_samples):
        height, width = (768, 1024) if rng.random() < 0.7 else (1152, 864)
        Image.fromarray(photograph(rng, height, width)).save(folder / f"{index}.jpg", quality=90)
        question, answer = (" ".join(rng.choice(WORDS, size)) for size in rng.integers(10, 120, 2))
        lines.append(
            json.dumps(
                {
                    "id": str(index),
                    "image": f"{index}.jpg",
                    "conversations": [
                        {"from": "human", "value": f"<image>\n{question}?"},
                        {"from": "gpt", "value": f"{answer}."},
                    ],
                }
            )
        )
    path = folder / "annotations.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def photograph(rng: np.random.Generator, height: int, width: int) -> NDArray[np.uint8]:
    """One image, (height, width, 3) uint8."""
    down, across = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None]
    amplitude = 1 / np.maximum(np.hypot(down, across), 1 / max(height, width))

    def field() -> NDArray[np.float64]:
        phase = rng.uniform(0, 2 * np.pi, amplitude.shape)
        values = np.fft.irfft2(amplitude * np.exp(1j * phase), s=(height, width))
        return values / values.std()

    light = field()
    colours = np.stack([light + 0.25 * field() for _ in range(3)], axis=2)
    return (127 + 48 * colours + rng.normal(0, 1.5, colours.shape)).clip(0, 255).astype(np.uint8)
