"""Greedy answers of a model to the questions in shards.

Bins -> :class:`Answer`. The model gets what training gives it: the stored tokens, pixels and positions. Positions of
the answer continue after the largest one of the prompt, as in training.

Cost: a forward pass of the vision tower for each bin with media; for each question, a forward pass of the prompt and
one of each generated token, with a cache of keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from schemas.bins import Bin
from schemas.checkpoints import TOKENIZER_FILE
from schemas.qwen import ENDOFTEXT, IM_END, IMAGE_PAD, VIDEO_PAD
from storage.pixels import decode_frames
from train.batches.batch import build_micro_batch
from train.generate.questions import Question, questions_of, readable
from train.model import pretrained
from train.model.attention import SDPA
from train.model.pixels import pixel_values
from train.order.explain import SourceSample, source_samples
from train.shards.index import ShardIndex
from train.shards.reader import read_checked_bin

ENDS = (IM_END, ENDOFTEXT)
MAX_NEW_TOKENS = 256
"""Default length at which an answer is cut off."""

_LOOKUP_BINS = 64
"""Bins whose samples are looked up in one pass over the ledgers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What a model says.

    Attributes:
        question: the question, with the answer that is wanted.
        generated: the answer of the model.
        is_complete: whether the model ended it, rather than the limit of tokens.
        frames: stored frames of each medium of the prompt, (frames, 3, H, W) uint8 in R G B.
    """

    question: Question
    generated: str
    is_complete: bool
    frames: Sequence[NDArray[np.uint8]]

    @property
    def is_exact(self) -> bool:
        """Whether it is the wanted answer, to the character."""
        return self.is_complete and self.generated == self.question.expected


class Answerer:
    """A model that answers the questions of bins."""

    def __init__(self, model: Path, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        """Load a model, onto the GPU if there is one. On a CPU it computes in float32.

        Args:
            model: folder of a checkpoint.
            max_new_tokens: length at which an answer is cut off.

        Raises:
            ConfigError: the folder holds no complete model.
        """
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype: torch.dtype | Literal["auto"] = "auto" if self._device.type == "cuda" else torch.float32
        hf = pretrained.load_model(model, dtype=dtype, attn_implementation=SDPA)
        self._hf: Qwen2_5_VLForConditionalGeneration = hf.to(self._device).eval()  # type: ignore[arg-type]
        self._tokenizer = Tokenizer.from_file(str(model / TOKENIZER_FILE))
        self._max_new_tokens = max_new_tokens

    def answer_shards(self, index: ShardIndex) -> Iterator[Answer]:
        """Answer all questions of shards, bin by bin.

        Raises:
            ShardError: a bin or a ledger is damaged.
        """
        for start in range(0, index.num_bins, _LOOKUP_BINS):
            bins = range(start, min(start + _LOOKUP_BINS, index.num_bins))
            for bin_id, samples in source_samples(index, bins).items():
                yield from self.answer_bin(read_checked_bin(index, bin_id), samples, where=str(index.locate(bin_id)))

    @torch.inference_mode()
    def answer_bin(self, bin_: Bin, samples: Sequence[SourceSample], *, where: str) -> Iterator[Answer]:
        """Answer all questions of a bin.

        Args:
            bin_: the bin.
            samples: where its samples come from, in order.
            where: how messages name it.
        """
        embeddings = self._embed(bin_, where)
        frames = decode_frames(bin_, where=where)
        for question in questions_of(bin_, samples, self._tokenizer):
            prompt = slice(question.start, question.end)
            # (L, H) -> (1, P, H), (3, L) -> (3, 1, P)
            positions = torch.from_numpy(bin_.position_ids[:, None, prompt].astype(np.int64)).to(self._device)
            ids = self._generate(embeddings[None, prompt], positions)
            is_complete = ids[-1] in ENDS
            text = readable(np.array(ids[:-1] if is_complete else ids, dtype=np.int32), self._tokenizer)
            shown = [frames[medium] for medium in question.media]
            yield Answer(question=question, generated=text, is_complete=is_complete, frames=shown)

    def _embed(self, bin_: Bin, where: str) -> torch.Tensor:
        """Embeddings of all tokens of a bin, with the features of its media: (L, H)."""
        ids = torch.from_numpy(bin_.input_ids.astype(np.int64)).to(self._device)
        embeddings: torch.Tensor = self._hf.model.language_model.embed_tokens(ids)
        is_pad = (ids == IMAGE_PAD) | (ids == VIDEO_PAD)
        if bool(is_pad.any()):
            vision = build_micro_batch([bin_], where=[where]).to(self._device).vision
            grids = torch.tensor([grid for grid, _ in vision.media], device=self._device)
            visual = self._hf.model.visual
            # pixel_values (N, 1176) -> one row for each merged 2 x 2 block of patches (N/4, H)
            features = visual(pixel_values(vision, visual.dtype), grid_thw=grids).pooler_output
            embeddings[is_pad] = features.to(embeddings.dtype)
        return embeddings

    def _generate(self, embeddings: torch.Tensor, positions: torch.Tensor) -> list[int]:
        """Continue a prompt with the likeliest tokens.

        Args:
            embeddings: (1, P, H) of the prompt.
            positions: (3, 1, P) int64, mRoPE.

        Returns:
            At least one token. The last one ends the answer, unless the answer is cut off.
        """
        cache = DynamicCache()
        ids: list[int] = []
        next_position = int(positions.max()) + 1
        while True:
            hidden = self._hf.model.language_model(
                inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
            # hidden (1, P, H) -> logits (V,)
            token = int(self._hf.lm_head(hidden[0, -1]).argmax())
            ids.append(token)
            if token in ENDS or len(ids) == self._max_new_tokens:
                return ids
            embeddings = self._hf.model.language_model.embed_tokens(torch.tensor([[token]], device=self._device))
            positions = torch.full((3, 1, 1), next_position, device=self._device)
            next_position += 1
