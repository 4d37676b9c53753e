"""What tests of the trainer share: the tiny checkpoint, narrower and with a tokenizer that is quick to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.nn import functional
from transformers import GenerationConfig

from demo.tiny_model import random_model, tiny_config
from tests.train.launching import made_once

HIDDEN_SIZE, NUM_TOKENS = 32, 300


@pytest.fixture(scope="session")
def tiny_checkpoint(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint of half the width, with the first and the control tokens only. Read-only: tests share it.

    Its embeddings are almost all of its weights. They decide what a step, a checkpoint and the loss of a target cost.
    The trainer encodes no text, but every rank works out the fingerprint of the tokenizer. With 151,665 tokens that
    takes as long as the rest of a short run.
    """

    def make(out: Path) -> None:
        shutil.copytree(demo_checkpoint, out)
        model = random_model(tiny_config(hidden_size=HIDDEN_SIZE), seed=0)
        model.generation_config = GenerationConfig.from_pretrained(demo_checkpoint)
        model.save_pretrained(out)
        path = out / "tokenizer.json"
        tokenizer = json.loads(path.read_bytes())
        model = tokenizer["model"]
        model["vocab"] = {token: id_ for token, id_ in model["vocab"].items() if id_ < NUM_TOKENS}
        model["merges"] = model["merges"][: NUM_TOKENS - 256]
        path.write_text(json.dumps(tokenizer))

    return made_once(tmp_path_factory, "tiny-checkpoint", make)


@pytest.fixture(autouse=True, scope="module")
def _plain_linear() -> Iterator[None]:
    """ZeRO-3 replaces ``torch.nn.functional.linear`` for the whole process; the next module gets torch's own again."""
    linear = functional.linear
    yield
    functional.linear = linear
