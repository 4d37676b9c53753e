"""The tiny checkpoint is a complete Qwen2.5-VL checkpoint with few weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo.tiny_model import EDGES, main, patch_cosines, tiny_config, write_tiny_checkpoint
from schemas.errors import ConfigError


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_from_pretrained_loads_every_weight_and_no_other(tiny_checkpoint: Path) -> None:
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, output_loading_info=True)
    assert {key: list(names) for key, names in info.items() if names} == {}
    assert 9.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 10.5e6
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.dtype == torch.float32


def test_the_command_writes_the_same_bytes_for_the_same_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "new" / "tiny")], catch_exceptions=False)
    assert result.exit_code == 0
    assert _contents(tmp_path / "new" / "tiny") == _contents(tiny_checkpoint)


def test_a_checkpoint_has_all_its_files(tiny_checkpoint: Path) -> None:
    assert set(_contents(tiny_checkpoint)) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.json",
    }


def test_another_seed_changes_the_weights_and_nothing_else(tiny_vocab_checkpoint: Path, tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path, seed=1, vocab_size=2048)
    before, after = _contents(tiny_vocab_checkpoint), _contents(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert set(before) == set(after)


def test_writing_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    write_tiny_checkpoint(tmp_path, vocab_size=64)
    assert torch.equal(torch.rand(3), expected)


def test_special_ids_are_those_of_the_real_model(tiny_checkpoint: Path) -> None:
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    assert [config[name] for name in names] == [151652, 151653, 151655, 151656]
    text = config["text_config"]
    assert [text[name] for name in ("eos_token_id", "pad_token_id", "vocab_size")] == [151645, 151643, 151936]
    assert config["vision_config"]["tokens_per_second"] == 2
    generation = json.loads((tiny_checkpoint / "generation_config.json").read_text())
    assert [generation[name] for name in ("eos_token_id", "pad_token_id")] == [[151645, 151643], 151643]


def test_a_small_vocabulary_has_the_special_ids_in_its_last_rows(tiny_vocab_checkpoint: Path) -> None:
    config = tiny_config(2048)
    assert (config.image_token_id, config.video_token_id) == (2038, 2039)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (2035, 2036)
    assert (config.text_config.eos_token_id, config.text_config.pad_token_id) == (2028, 2026)
    assert not (tiny_vocab_checkpoint / "tokenizer.json").exists()
    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint, output_loading_info=True)
    assert {key: list(names) for key, names in info.items() if names} == {}


def test_a_vocabulary_too_small_for_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size is 63; allowed: 64 or more"):
        tiny_config(63)


def test_the_image_processor_reads_the_official_settings(tiny_checkpoint: Path) -> None:
    processor = Qwen2VLImageProcessorPil.from_pretrained(tiny_checkpoint)
    assert processor.size == {"shortest_edge": 3136, "longest_edge": 12845056}
    image = Image.fromarray(np.zeros((56, 84, 3), dtype=np.uint8))
    features = processor(image, return_tensors="np")
    assert features["image_grid_thw"].tolist() == [[1, 4, 6]]
    assert features["pixel_values"].shape == (24, 1176)
    # Black, normalised with the mean and standard deviation of CLIP: -mean / std of red.
    np.testing.assert_allclose(features["pixel_values"][0, 0], -0.48145466 / 0.26862954, rtol=1e-6)
    raw = json.loads((tiny_checkpoint / "preprocessor_config.json").read_text())
    assert (raw["min_pixels"], raw["max_pixels"]) == (3136, 12845056)
    assert (raw["processor_class"], raw["image_processor_type"]) == ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor")


def test_the_untrained_loss_is_that_of_a_guess(tiny_vocab_checkpoint: Path) -> None:
    """An untrained model knows nothing: the loss is about log(vocabulary), plus the spread of its logits."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2000, (1, 128), generator=generator)
    ids[0, 3:7] = config.image_token_id
    pixels = torch.randn(16, 1176, generator=generator)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
            mm_token_type_ids=(ids == config.image_token_id).int(),
        ).logits
    loss = torch.nn.functional.cross_entropy(logits[0, 7:-1], ids[0, 8:]).item()
    assert math.log(2048) - 0.5 < loss < math.log(2048) + 4


def test_an_image_changes_the_answer(tiny_vocab_checkpoint: Path) -> None:
    """The signal of an image must reach the output at full scale, or nothing can be learned from it quickly."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint)
    ids = torch.full((1, 6), 5)
    ids[0, 1:5] = model.config.image_token_id
    generator = torch.Generator().manual_seed(0)
    logits = []
    with torch.no_grad():
        for _ in range(2):
            output = model(
                input_ids=ids,
                pixel_values=torch.randn(16, 1176, generator=generator),
                image_grid_thw=torch.tensor([[1, 4, 4]]),
                mm_token_type_ids=(ids == model.config.image_token_id).int(),
            )
            logits.append(output.logits[0, -1])
    assert (logits[0] - logits[1]).std().item() > 0.1


def test_the_command_without_a_vocabulary_is_wrong_use(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "out"), "--tokenizer", str(tmp_path / "none")])
    assert result.exit_code == 2
    assert result.output.startswith("error: no tokenizer vocabulary at")
    assert "Traceback" not in result.output


def test_cosine_filters_respond_to_drawings_and_not_to_white_paper() -> None:
    """White paper leaves one output, of the scale of the others. No filter repeats what another one measures."""
    filters = patch_cosines(32)
    assert filters.shape == (32, 3, 2, 14, 14)
    flat = filters.flatten(1)
    lengths = flat.norm(dim=1)
    torch.testing.assert_close(flat @ flat.T, torch.diag(lengths**2), rtol=0, atol=1e-4)
    seen = (filters * 2.0).sum(dim=(1, 2, 3, 4))
    assert 1 < seen[0] < 4
    assert seen[1:].abs().max() < 1e-3


def cosine_transform(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the orthonormal DCT-II of each row, from the Fourier transform of the row and its mirror image."""
    size = values.shape[1]
    frequencies = np.arange(size)
    spectrum = np.fft.fft(np.concatenate([values, values[:, ::-1]], axis=1))[:, :size]
    sums = (spectrum * np.exp(-0.5j * np.pi * frequencies / size)).real / 2
    return sums * np.sqrt(np.where(frequencies == 0, 1, 2) / size)


def test_a_model_with_cosines_embeds_patches_by_the_transform_of_jpeg(tmp_path: Path) -> None:
    """The outputs are the lowest cosines of a patch that is the same in both frames and all channels."""
    write_tiny_checkpoint(tmp_path, vocab_size=64, cosines=True)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    patch = np.random.default_rng(0).normal(size=(14, 14))
    pixels = torch.from_numpy(patch.astype(np.float32)).expand(1, 3, 2, 14, 14)
    seen = model.model.visual.patch_embed.proj(pixels).flatten().detach().numpy()
    coefficients = cosine_transform(cosine_transform(patch).T).T
    # Sixteen filters of brightness, ordered by frequency: horizontal before vertical.
    scale = EDGES * math.sqrt(3 * 2)
    for i, (row, column) in ((1, (0, 1)), (2, (1, 0)), (3, (1, 1)), (4, (0, 2)), (5, (2, 0))):
        expected = coefficients[row, column] * scale * (1 + row + column)
        np.testing.assert_allclose(seen[i], expected, rtol=1e-4)
    assert abs(seen[16:]).max() < 1e-3, "gray has no colour"
