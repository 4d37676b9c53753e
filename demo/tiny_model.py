"""A tiny random Qwen2.5-VL checkpoint, so that the whole pipeline runs on a laptop.

seed -> the folder of a complete checkpoint. Tokenizer, chat template and processor files are those of the real
checkpoints. The weights are random and few (9.9 M parameters, of which 9.7 M are the tied embeddings).
``python -m train.tiny_model OUT`` writes one.

Cost: about 3 s for the tokenizer and 1 s for 40 MB of weights. A small vocabulary, for tests that need no tokenizer,
takes 0.1 s and 1 MB.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import click
import torch
from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextConfig

from demo.qwen_tokenizer import PLAIN_ADDED_TOKENS, write_json, write_tokenizer_files
from schemas import qwen
from schemas.errors import ConfigError, VlprepError
from train.exits import hide_library_output

VOCAB_SIZE = 151936
"""Rows of the embeddings, a few more than there are tokens. Source: ``config.json`` of Qwen2.5-VL-3B-Instruct."""

NUM_TOKENS = qwen.ENDOFTEXT + len(qwen.CONTROL_TOKENS) + len(PLAIN_ADDED_TOKENS)
"""Size of the real tokenizer: 151,665 tokens."""

MIN_VOCAB_SIZE = 64

EMBEDDING_STD = 0.25
"""Standard deviation of the embeddings, which are also the output layer.

The final norm returns vectors of length sqrt(64) = 8. Logits therefore start with a standard deviation of
8 * 0.25 = 2, and the loss at 12 to 14, slightly above that of a uniform guess, log(151936) = 11.9. With the usual 0.02
the logits start at 0.16. A confident answer in so large a vocabulary needs 10 or more, which a few dozen steps cannot
reach: on questions about the colour of a square, 60 AdamW steps (learning rate 2e-3) reduced the loss to 4.7 with 0.02,
to 1.4 with 0.125 and to 0.3 with 0.25.
"""

ADDED_TO_INPUT = ("attn.proj.weight", "o_proj.weight", "down_proj.weight")
"""Last matrices of attention and MLP, whose outputs are added to the residual stream."""

EDGES, BRIGHTNESS = 0.9, 0.03
"""Scales of the cosine filters of a patch and of the one for mean brightness.

Higher frequencies have larger weights because they are weaker in images. On the charts of the learning benchmark, the
outputs have a standard deviation of 4, and mean brightness contributes 2.
"""


def tiny_config(
    vocab_size: int = VOCAB_SIZE, *, hidden_size: int = 64, num_hidden_layers: int = 2, vision_hidden_size: int = 32
) -> Qwen2_5_VLConfig:
    """Return the configuration of the tiny model, which has every part of Qwen2.5-VL, both kinds of attention too.

    Args:
        vocab_size: Rows of the embeddings. Below 151,665 the control tokens of the real tokenizer do not fit. The last
            rows of the vocabulary then stand for them, in the same order (``image_token_id`` is ``vocab_size - 10``).
        hidden_size: Width of the language model, a multiple of 32: two heads of size 16 share keys and values.
        num_hidden_layers: Layers of the language model.
        vision_hidden_size: Width of the vision tower, a multiple of the head size of 16.

    Returns:
        A configuration with tied embeddings.

    Raises:
        ConfigError: If the vocabulary is too small for the control tokens and some text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size is {vocab_size}; allowed: {MIN_VOCAB_SIZE} or more.")
    shift = min(0, vocab_size - NUM_TOKENS)
    return Qwen2_5_VLConfig(
        text_config=_text_config(vocab_size, hidden_size, num_hidden_layers, shift),
        vision_config=_vision_config(vision_hidden_size, out_hidden_size=hidden_size),
        vision_start_token_id=qwen.VISION_START + shift,
        vision_end_token_id=qwen.VISION_END + shift,
        image_token_id=qwen.IMAGE_PAD + shift,
        video_token_id=qwen.VIDEO_PAD + shift,
        tie_word_embeddings=True,
    )


def _text_config(vocab_size: int, hidden_size: int, num_hidden_layers: int, shift: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": hidden_size // 16,
        "num_key_value_heads": hidden_size // 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        # The sections (t, h, w) divide the 8 rotary frequencies of a head of size 16.
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        "bos_token_id": qwen.ENDOFTEXT + shift,
        "eos_token_id": qwen.IM_END + shift,
        "pad_token_id": qwen.ENDOFTEXT + shift,
        "tie_word_embeddings": True,
    }


def _vision_config(hidden_size: int, *, out_hidden_size: int) -> dict[str, Any]:
    return {
        "depth": 4,
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_heads": hidden_size // 16,
        "out_hidden_size": out_hidden_size,
        "patch_size": qwen.PATCH_SIZE,
        "spatial_merge_size": qwen.MERGE_SIZE,
        "temporal_patch_size": qwen.TEMPORAL_PATCH_SIZE,
        "tokens_per_second": qwen.TOKENS_PER_SECOND,
        "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }


def write_tiny_checkpoint(
    out: Path,
    *,
    seed: int = 0,
    vocab_size: int | None = None,
    num_hidden_layers: int = 2,
    vision_hidden_size: int = 32,
    cosines: bool = False,
    tokenizer: Path | None = None,
) -> None:
    """Write a tiny checkpoint that ``from_pretrained`` loads. The same seed gives the same bytes.

    ``preprocessor_config.json`` is written last: if it exists, the checkpoint is complete.

    Args:
        out: Output folder, created if missing. Files of the same names are replaced.
        seed: Seed of the weights, which are float32.
        vocab_size: Rows of the embeddings. Default: those of the real model. With fewer rows than the real tokenizer
            has tokens, no tokenizer files are written.
        num_hidden_layers: Layers of the language model.
        vision_hidden_size: Width of the vision tower, a multiple of the head size of 16.
        cosines: Whether patches are embedded by cosines and layers start with smaller outputs, for a model that has to
            learn to read: see :func:`patch_cosines`.
        tokenizer: A ``qwen.tiktoken`` file or its folder. Default: the one in the ``dashscope`` package.

    Raises:
        ConfigError: If there is no tokenizer vocabulary, or ``vocab_size`` is too small.
    """
    config = tiny_config(
        VOCAB_SIZE if vocab_size is None else vocab_size,
        num_hidden_layers=num_hidden_layers,
        vision_hidden_size=vision_hidden_size,
    )
    out.mkdir(parents=True, exist_ok=True)
    if vocab_size is None or vocab_size >= NUM_TOKENS:
        write_tokenizer_files(out, tokenizer)
    model = random_model(config, seed, cosines=cosines)
    model.generation_config = _generation_config(config)
    model.save_pretrained(out)
    write_json(out / "preprocessor_config.json", preprocessor_config())


def _generation_config(config: Qwen2_5_VLConfig) -> GenerationConfig:
    text = config.text_config
    assert isinstance(text, Qwen2_5_VLTextConfig)
    return GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.bos_token_id],
        pad_token_id=text.pad_token_id,
    )


def preprocessor_config() -> dict[str, object]:
    """Return ``preprocessor_config.json`` of the Qwen2.5-VL-Instruct checkpoints, the same for all sizes."""
    return {
        "min_pixels": 4 * qwen.FACTOR**2,
        "max_pixels": 16384 * qwen.FACTOR**2,
        "patch_size": qwen.PATCH_SIZE,
        "temporal_patch_size": qwen.TEMPORAL_PATCH_SIZE,
        "merge_size": qwen.MERGE_SIZE,
        "image_mean": list(qwen.IMAGE_MEAN),
        "image_std": list(qwen.IMAGE_STD),
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def random_model(config: Qwen2_5_VLConfig, seed: int, *, cosines: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """Return a model whose matrices preserve the scale of their input (std 1 / sqrt(fan-in)). Norms are 1, biases 0.

    The usual standard deviation of 0.02 suits thousands of inputs. With 32 to 128 inputs it would shrink every signal
    tenfold in each layer. With ``cosines``, residual branches start smaller: together they add about as much as the
    input of the first layer.
    """
    with torch.random.fork_rng(devices=[]):
        model = Qwen2_5_VLForConditionalGeneration(config)
    embeddings = model.get_input_embeddings().weight
    visual, language_model = model.model.visual, model.model.language_model
    # (vision hidden size, 3 channels, 2 frames, 14, 14)
    patches = visual.patch_embed.proj.weight
    depths = {"visual": len(visual.blocks), "language_model": len(language_model.layers)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            std = EMBEDDING_STD if parameter is embeddings else 1 / math.sqrt(parameter[0].numel())
            part, _, layer = name.removeprefix("model.").partition(".")
            if cosines and layer.endswith(ADDED_TO_INPUT):
                std /= math.sqrt(2 * depths[part])
            parameter.normal_(0.0, std, generator=generator)
        if cosines:
            patches.copy_(patch_cosines(len(patches)))
    return model


def patch_cosines(num_filters: int) -> torch.Tensor:
    """Return filters for the patch embedding: low-frequency cosines, half of brightness, half of colour differences.

    With random weights, words are hardly learned. White paper has values near 2 everywhere, so a random projection of a
    patch depends more on its brightness than on what is drawn on it. Shifted by a pixel, the same stroke would give an
    unrelated projection. In a trial on words cropped from charts, a tiny model knew half of 25 words after 25,000
    images with cosines, and none after 30,000 with random weights.

    Args:
        num_filters: H, the vision hidden size.

    Returns:
        (H, 3, 2, 14, 14) float32, orthogonal. The filter of mean brightness comes first and is scaled down.
    """
    side = torch.arange(qwen.PATCH_SIZE)
    # (14 frequencies, 14 pixels), orthonormal: the DCT-II of JPEG
    waves = torch.cos(math.pi / qwen.PATCH_SIZE * side[:, None] * (side + 0.5))
    waves /= waves.norm(dim=1, keepdim=True)
    frequencies = sorted(
        itertools.product(range(qwen.PATCH_SIZE), repeat=2), key=lambda pair: (math.hypot(*pair), pair)
    )
    # (filter type, R G B): brightness, R - G, R + G - 2 B
    channels = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]])
    channels /= channels.norm(dim=1, keepdim=True)
    filters = []
    for channel, count in zip(channels, (num_filters - 2 * (num_filters // 4), num_filters // 4, num_filters // 4)):
        for row, column in frequencies[:count]:
            wave = torch.outer(waves[row], waves[column]) * EDGES * (1 + row + column)
            filters.append(channel[:, None, None, None] * wave.expand(1, qwen.TEMPORAL_PATCH_SIZE, -1, -1))
    filters[0] *= BRIGHTNESS / EDGES
    return torch.stack(filters) / math.sqrt(qwen.TEMPORAL_PATCH_SIZE)


@click.command(
    name="python -m train.tiny_model",
    epilog="\b\nExamples:\n"
    "  python -m train.tiny_model checkpoints/tiny\n"
    "  python -m train.tiny_model checkpoints/other --seed 1",
)
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the weights.")
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="A qwen.tiktoken file or its folder.  [default: the one in the dashscope package]",
)
def main(out: Path, seed: int, tokenizer: Path | None) -> None:
    """Write a tiny random Qwen2.5-VL checkpoint with the real tokenizer and processor files to OUT."""
    hide_library_output()
    try:
        write_tiny_checkpoint(out, seed=seed, tokenizer=tokenizer)
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    click.echo(f"{out}: a tiny random Qwen2.5-VL (seed {seed}) with the real tokenizer and processor files")


if __name__ == "__main__":
    main()
