"""What tests of the trainer share: the tiny checkpoint, with a tokenizer that is quick to read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.nn import functional

from tests.train.launching import made_once

NUM_TOKENS = 300


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with the first and the control tokens of its tokenizer only. Read-only: tests share it.

    The trainer encodes no text, but every rank works out the fingerprint of the tokenizer. With 151,665 tokens that
    takes as long as the rest of a short run.
    """

    def make(out: Path) -> None:
        shutil.copytree(tiny_checkpoint, out)
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
