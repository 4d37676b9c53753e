"""A disk that cannot be written to is one sentence, whichever library notices it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from schemas.errors import VlprepError
from train.model.disk import writing

FULL = Path("/dev/full")
"""A Linux device on which every write fails for lack of space."""


def test_a_full_disk_under_the_file_system_is_named_with_its_free_space(tmp_path: Path) -> None:
    with pytest.raises(VlprepError) as caught, writing(tmp_path), FULL.open("wb", buffering=0) as file:
        file.write(b"x")
    assert f"{tmp_path} cannot be written (No space left on device; " in str(caught.value)
    assert "GB are free there" in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_a_full_disk_under_torch_is_named(tmp_path: Path) -> None:
    with pytest.raises(VlprepError, match=f"{tmp_path / 'part'} cannot be written"), writing(tmp_path / "part"):
        torch.save({"weight": torch.zeros(100_000)}, FULL)


def test_a_full_disk_under_safetensors_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(VlprepError, match=f"{tmp_path} cannot be written"), writing(tmp_path):
        save_file({"weight": torch.zeros(10)}, tmp_path / "model.safetensors")


def test_a_path_that_cannot_be_created_is_named_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    path = tmp_path / "file" / "checkpoint-1.tmp"
    with pytest.raises(VlprepError, match=f"{path} cannot be written"), writing(tmp_path):
        os.mkdir(path)


def test_another_failure_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path):
        raise RuntimeError("shapes do not agree")
