"""How much of everything the benchmark runs: the real scale, and a small one that proves on a CPU that it works."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Qwen2_5_VLConfig

from demo.tiny_model import tiny_config
from schemas import qwen
from train.arithmetic.dimensions import OFFICIAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A model, how long its bins are, and what a step does.

    Attributes:
        model: key of :attr:`Scale.configs`.
        max_length: tokens of a bin.
        trains_vision: whether the vision tower is trained, besides the merger and the language model.
    """

    model: str
    max_length: int
    trains_vision: bool

    @property
    def title(self) -> str:
        """The case in words."""
        return f"{self.model}, {self.max_length} tokens, vision {'trained' if self.trains_vision else 'frozen'}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """How much of everything.

    Attributes:
        num_samples: samples of the corpus.
        text_tokens: fewest and most words of a sample, which are about as many tokens.
        image_tokens: fewest and most tokens of an image.
        configs: models by name.
        optimized: names of the models whose steps include AdamW; the others run forward and backward.
        cases: what is compared.
        num_workers: worker processes of the upstream trainer: few, and many.
        num_rounds: turns of every contender.
        num_profiled: steps under the profiler.
        num_compared: bins whose losses are compared.
        reserve_s: seconds before the end in which no turn starts.
        min_turn_s: seconds of a turn, at least.
        max_turn_s: seconds of a turn, at most.
        num_patches: patches of the benchmarks of single kernels.
    """

    num_samples: int
    text_tokens: tuple[int, int]
    image_tokens: tuple[int, int]
    configs: dict[str, Callable[[], Qwen2_5_VLConfig]]
    optimized: tuple[str, ...]
    cases: tuple[Case, ...]
    num_workers: tuple[int, int]
    num_rounds: int
    num_profiled: int
    num_compared: int
    reserve_s: float
    min_turn_s: float
    max_turn_s: float
    num_patches: int

    @property
    def lengths(self) -> tuple[int, ...]:
        """Lengths of bins over all cases."""
        return tuple(sorted({case.max_length for case in self.cases}))


def official_config(size: str) -> Qwen2_5_VLConfig:
    """The configuration of an official checkpoint."""
    text: dict[str, Any] = {key: value for key, value in OFFICIAL[size].items() if key != "vision_config"}
    text |= {
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": qwen.ENDOFTEXT,
        "eos_token_id": qwen.IM_END,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config={**OFFICIAL[size]["vision_config"], "tokens_per_second": qwen.TOKENS_PER_SECOND},
        image_token_id=qwen.IMAGE_PAD,
        video_token_id=qwen.VIDEO_PAD,
        vision_start_token_id=qwen.VISION_START,
        vision_end_token_id=qwen.VISION_END,
        tie_word_embeddings=text["tie_word_embeddings"],
    )


def _cases(model: str, short: int, long: int) -> tuple[Case, ...]:
    return tuple(
        Case(model=model, max_length=length, trains_vision=trains_vision)
        for length in (short, long)
        for trains_vision in (False, True)
    )


REAL = Scale(
    num_samples=2000,
    text_tokens=(60, 2000),
    image_tokens=(150, 1500),
    configs={"3B": lambda: official_config("3B"), "7B": lambda: official_config("7B")},
    optimized=("3B",),
    cases=(*_cases("3B", 4096, 16384), *_cases("7B", 4096, 16384)),
    num_workers=(4, max(1, os.cpu_count() or 1)),
    num_rounds=2,
    num_profiled=2,
    num_compared=2,
    reserve_s=50.0,
    min_turn_s=1.0,
    max_turn_s=20.0,
    num_patches=32768,
)

SMOKE = Scale(
    num_samples=24,
    text_tokens=(20, 60),
    image_tokens=(4, 16),
    configs={"tiny": tiny_config},
    optimized=("tiny",),
    cases=(Case(model="tiny", max_length=256, trains_vision=True),),
    num_workers=(1, 2),
    num_rounds=1,
    num_profiled=1,
    num_compared=1,
    reserve_s=0.0,
    min_turn_s=0.0,
    max_turn_s=0.0,
    num_patches=64,
)
