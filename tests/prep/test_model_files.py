"""Files of a checkpoint on the hub: the processor is found under either of its two names."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from prep.samples.tokenizer import find_model_files, read_fingerprints
from schemas.checkpoints import PROCESSOR_FILES, TOKENIZER_FILE
from schemas.errors import ConfigError
from schemas.qwen import IMAGE_MEAN

PROCESSOR, IMAGE_PROCESSOR = PROCESSOR_FILES
MEAN = [0.1, 0.2, 0.3]


@pytest.fixture
def hub(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands in for the repository ``team/model``. Downloads go to another folder."""
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    remote.mkdir()
    cache.mkdir()
    (remote / TOKENIZER_FILE).write_bytes((tiny_checkpoint / TOKENIZER_FILE).read_bytes())

    def download(model: str, name: str) -> str:
        assert model == "team/model"
        if not (remote / name).exists():
            raise LocalEntryNotFoundError(f"{name} does not exist")
        (cache / name).write_bytes((remote / name).read_bytes())
        return str(cache / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return remote


@pytest.mark.parametrize(
    ("files", "mean"),
    [
        ({IMAGE_PROCESSOR: {}}, list(IMAGE_MEAN)),
        ({PROCESSOR: {"image_processor": {"image_mean": MEAN}}}, MEAN),
        ({PROCESSOR: {"processor_class": "Qwen2_5_VLProcessor"}, IMAGE_PROCESSOR: {"image_mean": MEAN}}, MEAN),
        ({PROCESSOR: {"image_processor": {"image_mean": MEAN}}, IMAGE_PROCESSOR: {}}, MEAN),
    ],
)
def test_a_processor_is_found_on_the_hub_under_either_name(
    hub: Path, files: dict[str, dict[str, object]], mean: list[float]
) -> None:
    for name, content in files.items():
        (hub / name).write_text(json.dumps(content))
    assert list(read_fingerprints(find_model_files("team/model")).image_mean) == mean


def test_a_repository_without_a_processor_is_an_error(hub: Path) -> None:
    (hub / PROCESSOR).write_text("{}")
    with pytest.raises(ConfigError, match=r"team/model cannot be fetched from the hub \(preprocessor_config\.json"):
        find_model_files("team/model")
