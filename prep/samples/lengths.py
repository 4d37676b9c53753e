"""Checks that need the length of a sample: it must fit into a bin, and have targets.

Input: annotations with probed media. Output: problems. Cost: tokenization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prep.annotations.annotation import Annotation
from prep.samples.grounding import in_resized_pixels
from prep.samples.media import Medium
from prep.samples.sample import Measured, measure
from prep.samples.text import build_templates
from prep.samples.tokenizer import find_model_files, load_tokenizer, read_fingerprints
from schemas.annotation import Problem, ReasonCode

NO_TARGETS = Problem(ReasonCode.NO_TARGETS, "no token of the answers is a target; write an answer")


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthCheck:
    """Capacity of a bin in tokens, and the path and fingerprint of the ``tokenizer.json`` that counts them."""

    max_length: int
    tokenizer: Path
    tokenizer_hash: str


def open_length_check(model: str, max_length: int) -> LengthCheck:
    """Open the tokenizer of a checkpoint folder or hub id.

    Raises:
        ConfigError: the checkpoint does not exist, or is not Qwen2.5-VL.
    """
    files = find_model_files(model)
    fingerprint = read_fingerprints(files).tokenizer
    return LengthCheck(max_length=max_length, tokenizer=files.tokenizer, tokenizer_hash=fingerprint)


def too_long(num_tokens: int, max_length: int) -> Problem:
    """The problem of a sample that does not fit into a bin."""
    return Problem(
        ReasonCode.TOO_LONG,
        f"the sample has {num_tokens} tokens; a bin holds {max_length} (--max-length). Shorten it, raise "
        "--max-length or lower the pixel bounds",
    )


def length_problems(samples: Sequence[tuple[Annotation, list[Medium]]], check: LengthCheck) -> list[list[Problem]]:
    """The problems of records that have no others.

    Args:
        samples: annotations and their probed media, images first.
        check: what to check against.
    """
    resized = [in_resized_pixels(annotation, media) for annotation, media in samples]
    templates = build_templates(resized, load_tokenizer(check.tokenizer, check.tokenizer_hash))
    return [_problems(measure(template, media), check.max_length) for template, (_, media) in zip(templates, samples)]


def _problems(sample: Measured, max_length: int) -> list[Problem]:
    if not sample.num_targets:
        return [NO_TARGETS]
    return [too_long(sample.num_tokens, max_length)] if sample.num_tokens > max_length else []
