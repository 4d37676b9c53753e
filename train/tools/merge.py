"""Adds an adapter into the model that it was trained for: ``python -m train.tools.merge ADAPTER --out DIR``.

The folder of an adapter in the format of peft, and its model -> a checkpoint that ``from_pretrained`` loads, with
tokenizer and processor files. A run with LoRA writes the same checkpoint to ``final``; this is for an adapter that was
kept without it. peft itself is not needed.

Cost: the weights once in memory, on the CPU.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import click
from safetensors import SafetensorError
from safetensors.torch import load_file

from schemas.errors import ConfigError, VlprepError
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
"""Settings of peft under which an adapter is ``(alpha / r) B A`` and nothing else."""


def merge_adapter(adapter: Path, out: Path, *, model: str | None = None) -> Path:
    """Write a model with an adapter added in; a model that was at ``out`` before is replaced.

    Args:
        adapter: folder of the adapter.
        out: folder to write.
        model: folder or hub id of the model, by default the one that the adapter names.

    Returns:
        Folder of the model that the adapter was added to.

    Raises:
        ConfigError: the adapter is incomplete, of another kind or of another model, or ``out`` holds something that is
            not to be replaced.
        VlprepError: the model cannot be written.
    """
    config = read_adapter_config(adapter)
    try:
        of_adapters = load_file(adapter / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{adapter / WEIGHTS_FILE} cannot be read: {error}. Give the folder of an adapter."
        ) from error
    source = pretrained.find_checkpoint(model or config["base_model_name_or_path"])
    check_out(out, adapter, source)
    pretrained.read_shape(source)
    hf = pretrained.load_model(source, dtype="auto", attn_implementation=SDPA)
    own = {name: weight.detach() for name, weight in hf.named_parameters()}
    weights = merge_weights(own, of_adapters, config["lora_alpha"] / config["r"])
    pretrained.write_checkpoint(out, hf, weights, source=source)
    return source


def check_out(out: Path, adapter: Path, source: Path) -> None:
    """See that writing a model to a folder would remove nothing but an earlier model there.

    Raises:
        ConfigError: it would.
    """
    place = out.resolve()
    for kept in (adapter.resolve(), source.resolve()):
        if kept.is_relative_to(place):
            raise ConfigError(f"--out {out} would replace what is merged ({kept}): give another folder.")
    if out.exists() and not (out / "config.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is there and holds no model, so it is not replaced: give another folder.")


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """Contents of ``adapter_config.json``.

    Raises:
        ConfigError: it cannot be read, or is not that of plain LoRA.
    """
    path = adapter / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(path.read_bytes())
        wrong = [name for name, allowed in PLAIN.items() if config.get(name, allowed[0]) not in allowed]
        complete = isinstance(config["base_model_name_or_path"], str) and config["lora_alpha"] > 0 and config["r"] > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}). Give the folder of an adapter.") from error
    if wrong or not complete:
        what = ", ".join(f"{name} {config[name]!r}" for name in wrong) or "no base model, r or lora_alpha"
        raise ConfigError(f"{path} has {what}: that is no plain LoRA adapter. Merge it with peft's merge_and_unload.")
    return config


@click.command(name="python -m train.tools.merge")
@click.argument("adapter", type=click.Path(file_okay=False, path_type=Path))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--model_name_or_path",
    "model",
    help="The model that the adapter was trained for: a folder or a hub id.  [default: the one that it names]",
)
def main(adapter: Path, out: Path, model: str | None) -> None:
    """Write the model of ADAPTER with the adapter added in: a checkpoint that from_pretrained loads."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        source = merge_adapter(adapter, out, model=model)
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
    except OSError as error:
        click.echo(f"error: {error.filename or out}: {error.strerror or error}", err=True)
        raise SystemExit(ConfigError.exit_code) from None
    click.echo(f"{out}: {source} with {adapter}")


if __name__ == "__main__":
    main()
