"""Merges an adapter into its base model: ``python -m train.tools.merge ADAPTER --out DIR``.

An adapter folder in peft's format, and its base model -> a checkpoint that ``from_pretrained`` loads, with tokenizer
and processor files. A run with LoRA already writes the same checkpoint to ``final``; this command is for an adapter
that was kept without it. It does not need peft.

Cost: memory for one copy of the weights, on the CPU.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import ConfigError
from train.exits import guarded, hide_library_output
from train.model import pretrained
from train.model.adapters import CONFIG_FILE, WEIGHTS_FILE, merge_weights
from train.model.attention import SDPA

PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}
"""Allowed values of peft's settings; with these, an adapter is exactly ``(alpha / r) B A``."""


def merge_adapter(adapter: Path, out: Path, *, model: str | None = None) -> Path:
    """Merge an adapter into its base model and write the result, overwriting a model at ``out``.

    Args:
        adapter: folder of the adapter.
        out: folder to write.
        model: folder or hub id of the base model; default: the one that the adapter names.

    Returns:
        Folder of the base model.

    Raises:
        ConfigError: the adapter is incomplete, of another kind or of another model, or ``out`` holds anything but a
            model.
        VlprepError: the model cannot be written.
    """
    config = read_adapter_config(adapter)
    try:
        adapter_weights = load_file(adapter / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read {adapter / WEIGHTS_FILE}: {error}. Pass the folder of an adapter.") from error
    source = pretrained.find_checkpoint(model or config["base_model_name_or_path"])
    check_out(out, adapter, source)
    pretrained.read_shape(source)
    hf = pretrained.load_model(source, dtype="auto", attn_implementation=SDPA)
    weights = {name: weight.detach() for name, weight in hf.named_parameters()}
    merge_weights(weights, adapter_weights, config["lora_alpha"] / config["r"])
    pretrained.write_checkpoint(out, hf, weights, source=source)
    for path in sorted(adapter.glob("*processor_config.json")):  # of a run: they say how its shards were made
        shutil.copyfile(path, out / path.name)
    return source


def check_out(out: Path, adapter: Path, source: Path) -> None:
    """Check that writing a model to ``out`` overwrites nothing but an earlier model.

    Raises:
        ConfigError: ``out`` contains the adapter, the base model, or anything but a model.
    """
    target = out.resolve()
    for folder in (adapter.resolve(), source.resolve()):
        if folder.is_relative_to(target):
            raise ConfigError(f"--out {out} would overwrite an input of the merge ({folder}): choose another folder.")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} exists and holds no model, so it is not overwritten: choose another folder.")


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        ConfigError: the file cannot be read, or the adapter is not plain LoRA.
    """
    path = adapter / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        unsupported = [name for name, allowed in PLAIN.items() if config.get(name, allowed[0]) not in allowed]
        is_complete = (
            isinstance(config["base_model_name_or_path"], str) and config["lora_alpha"] > 0 and config["r"] > 0
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        raise ConfigError(f"cannot read {path} ({reason}). Pass the folder of an adapter.") from error
    if unsupported or not is_complete:
        problem = ", ".join(f"{name} {config[name]!r}" for name in unsupported) or "no base model, r or lora_alpha"
        raise ConfigError(
            f"{path} has {problem}, so it is not a plain LoRA adapter. Use peft's merge_and_unload instead."
        )
    return config


@click.command(
    name="python -m train.tools.merge",
    epilog="\b\nExamples:\n"
    "  python -m train.tools.merge runs/mine/adapter --out models/mine\n"
    "  python -m train.tools.merge runs/mine/adapter --out models/mine --model_name_or_path checkpoints/base",
)
@click.argument("adapter", type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--model_name_or_path",
    "model",
    help="Base model of the adapter: a folder or a hub id.  [default: the one that the adapter names]",
)
@guarded
def main(adapter: Path, out: Path, model: str | None) -> None:
    """Merge ADAPTER into its base model and write a checkpoint that from_pretrained loads."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    hide_library_output()
    source = merge_adapter(adapter, out, model=model)
    click.echo(f"{out}: {source} merged with {adapter}")


if __name__ == "__main__":
    main()
