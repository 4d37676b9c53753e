"""LoRA: small trained matrices beside frozen weights (:mod:`peft`): choosing, injecting, writing and merging them.

Before weights are loaded: settings and the layer names of a model -> :class:`Adapters`. Then: a model -> the model with
adapters in those layers. After training: its weights -> an adapter in peft's format, or merged weights.

A layer ``W`` becomes ``W + (alpha / r) B A`` with ``A`` (r, in) random and ``B`` (out, r) zero, so training starts from
the original model (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Cost: r (in + out) parameters per layer; merging multiplies the two matrices of each layer on the CPU.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from schemas.seeds import seed_for
from train.model import optim
from train.model.pretrained import copy_companions, replacing
from train.model.processors import ShardMedia
from train.settings.arguments import TrainArguments

logger = logging.getLogger(__name__)

DEFAULT_RANK, DEFAULT_ALPHA, DEFAULT_DROPOUT = 64, 128, 0.0
"""Rank and alpha of the upstream fine-tuning script."""

ALL_LINEAR = "all-linear"
"""Every linear layer except ``lm_head``; peft uses the same word."""

HEAD = "lm_head"
ADAPTER_NAME = "default"
"""peft's name of a model's only adapter."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FILE_PREFIX = "base_model.model."
"""Prefix of layer names in an adapter file of peft."""

_A, _B, _BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer."


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """Which layers get adapters, and their settings.

    Attributes:
        rank: rank r of the update.
        alpha: the update is scaled by ``alpha / rank``.
        dropout: dropout probability of an adapter's inputs.
        modules: names of the layers in the Hugging Face model.
    """

    rank: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """Factor of the update."""
        return self.alpha / self.rank

    def describe(self) -> str:
        """Describe the adapters in one line, to compare runs."""
        digest = hashlib.sha256("\n".join(self.modules).encode()).hexdigest()[:16]
        return (
            f"r {self.rank}, alpha {self.alpha}, dropout {self.dropout:g}, {len(self.modules)} layers (sha256 {digest})"
        )


def choose_adapters(args: TrainArguments, config: Mapping[str, Any]) -> Adapters | None:
    """Return the adapters that the settings define; None without ``--lora_enable``.

    The parts selected by ``--tune_mm_*`` get adapters; the model's own weights are all frozen.

    Args:
        args: settings of the run.
        config: contents of the checkpoint's ``config.json``.

    Raises:
        ConfigError: peft is not installed, or ``--lora_target_modules`` matches nothing in a tuned part.
    """
    if not args.lora_enable:
        return None
    require_peft()
    tuned = {part for part, rate in optim.learning_rates(args, 1.0).items() if rate is not None}
    return Adapters(
        rank=DEFAULT_RANK if args.lora_r is None else args.lora_r,
        alpha=DEFAULT_ALPHA if args.lora_alpha is None else args.lora_alpha,
        dropout=DEFAULT_DROPOUT if args.lora_dropout is None else args.lora_dropout,
        modules=choose_modules(linear_layers(config), args.lora_target_modules, tuned),
    )


def require_peft() -> None:
    """Check that peft is installed.

    Raises:
        ConfigError: it is not installed.
    """
    if find_spec("peft") is None:
        raise ConfigError("LoRA needs the peft package: pip install peft")


def linear_layers(config: Mapping[str, Any]) -> dict[str, str]:
    """Map every linear layer that can have an adapter, by name, to its part of the model. No weights are allocated."""
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    return {
        name: optim.part_of(f"hf.{name}.")
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and name != HEAD
    }


def choose_modules(layers: Mapping[str, str], targets: str | None, tuned: set[str]) -> tuple[str, ...]:
    """Select the layers of the tuned parts whose names end in one of the targets.

    Args:
        layers: name of every linear layer -> its part.
        targets: names separated by commas, like ``q_proj,v_proj`` or ``self_attn.q_proj``; each may be a regular
            expression. None or ``all-linear`` selects every layer.
        tuned: the parts that get adapters.

    Returns:
        Names of layers, in the order of the model.

    Raises:
        ConfigError: a target matches no layer of these parts, or a part has no matching layer.
    """
    eligible = [name for name, part in layers.items() if part in tuned]
    if targets in (None, ALL_LINEAR):
        return tuple(eligible)
    assert targets is not None
    chosen: set[str] = set()
    for target in targets.split(","):
        try:
            pattern = re.compile(rf"(.*\.)?({target.strip()})")
        except re.error as error:
            raise ConfigError(
                f"--lora_target_modules: {target!r} is not a valid regular expression ({error})."
            ) from error
        matches = {name for name in eligible if pattern.fullmatch(name)}
        if not matches:
            raise ConfigError(_explain_no_match(target, pattern, layers, tuned))
        chosen |= matches
    for part in sorted(tuned):
        if not any(layers[name] == part for name in chosen):
            raise ConfigError(
                f"{part} is tuned, but --lora_target_modules {targets} matches none of its layers "
                f"({_endings(layers, {part})}): add one of them, or freeze the part with its --tune_mm flag."
            )
    return tuple(name for name in eligible if name in chosen)


def add_adapters(hf: Qwen2_5_VLForConditionalGeneration, adapters: Adapters, *, seed: int) -> None:
    """Inject adapters into a model, in its dtype. They depend on the seed only, not on the rank or the ZeRO stage.

    Args:
        hf: the model, modified in place; its weights may be partitioned.
        adapters: layers and settings.
        seed: seed of the random matrices.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_peft_config(adapters), hf, adapter_name=ADAPTER_NAME)
    for name, parameter in hf.named_parameters():
        if not optim.is_adapter(name):
            continue
        parameter.data = parameter.data.to(hf.dtype)
        if name.endswith(f".lora_A.{ADAPTER_NAME}.weight"):
            generator = torch.Generator().manual_seed(seed_for(seed, "lora", name) % 2**64)
            # peft's distribution, but from a seeded generator per matrix
            bound = 1 / math.sqrt(parameter.shape[1])
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Split the weights of a model with adapters.

    Returns:
        The model's own weights, by their names in the model without adapters; and the adapter weights, by their names
        in an adapter file of peft.
    """
    own = {name.replace(_BASE, "."): weight for name, weight in weights.items() if not optim.is_adapter(name)}
    adapter_weights = {
        f"{FILE_PREFIX}{name.replace(f'.{ADAPTER_NAME}.', '.')}": weight
        for name, weight in weights.items()
        if optim.is_adapter(name)
    }
    return own, adapter_weights


@torch.no_grad()
def merge_weights(own: Mapping[str, torch.Tensor], adapter_weights: Mapping[str, torch.Tensor], scaling: float) -> None:
    """Add adapters to the weights of their model in place, so that no second copy of the model takes memory.

    The sum is made in float32 and rounded once to the dtype of the weight.

    Args:
        own: weights of the model, by name, which are changed.
        adapter_weights: weights of the adapters, by their names in an adapter file of peft.
        scaling: see :class:`Adapters`.

    Raises:
        ConfigError: an adapter does not belong to this model, or is not a pair of LoRA matrices.
    """
    remaining = dict(adapter_weights)
    for name in adapter_weights:
        if not name.endswith(_A):
            continue
        stem = name.removesuffix(_A)
        target = f"{stem.removeprefix(FILE_PREFIX)}.weight"
        a, b = remaining.pop(name), remaining.pop(f"{stem}{_B}", None)
        weight = own.get(target)
        if b is None or weight is None or not _fits(a, b, weight):
            raise ConfigError(f"{stem} does not match a layer of this model: use the model that it was trained for.")
        # weight (out, in) + b (out, r) @ a (r, in)
        weight.copy_(weight.float() + scaling * (b.float() @ a.float()))
    if remaining:
        raise ConfigError(f"the adapter holds {next(iter(remaining))}, which is not a LoRA matrix: merge it with peft.")


def _fits(a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of ``b`` and ``a`` exists and has the shape of ``weight``."""
    can_multiply = a.dim() == b.dim() == 2 and b.shape[1] == a.shape[0]
    return can_multiply and weight.shape == (b.shape[0], a.shape[1])


def write_adapter(
    out: Path,
    adapter_weights: Mapping[str, torch.Tensor],
    adapters: Adapters,
    *,
    model: str,
    source: Path,
    media: ShardMedia | None = None,
) -> None:
    """Write the adapters in peft's format: ``PeftModel.from_pretrained(model, out)`` loads them.

    Args:
        out: the folder to write. Its previous contents are replaced once the new ones are complete.
        adapter_weights: the matrices on the CPU, by their names in an adapter file of peft.
        adapters: layers and settings.
        model: name or path of the base checkpoint, as recorded for users of the adapter.
        source: folder of the base checkpoint, whose tokenizer and processor files are copied.
        media: settings to write into the processor files; None keeps those of ``source``.

    Raises:
        VlprepError: the folder cannot be written.
    """
    config = _peft_config(adapters)
    config.base_model_name_or_path = model
    config.inference_mode = True
    config.target_modules = list(adapters.modules)  # peft makes it a set, whose order varies between runs
    with replacing(out) as folder:
        config.save_pretrained(str(folder))
        save_file(dict(adapter_weights), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_companions(source, folder, media)
    logger.info("adapter written to %s", out)


def _peft_config(adapters: Adapters) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules=list(adapters.modules),
        bias="none",
        task_type="CAUSAL_LM",
    )


def _explain_no_match(target: str, pattern: re.Pattern[str], layers: Mapping[str, str], tuned: set[str]) -> str:
    elsewhere = sorted({part for name, part in layers.items() if pattern.fullmatch(name)})
    where = ", ".join(sorted(tuned))
    if elsewhere:
        return (
            f"--lora_target_modules: {target} is in {', '.join(elsewhere)}, which is frozen: tune it with its "
            "--tune_mm flag, or drop the name."
        )
    if pattern.fullmatch(HEAD):
        return f"--lora_target_modules: {HEAD} cannot have an adapter, because it may be tied to the embeddings."
    return f"--lora_target_modules: {target} matches no linear layer of {where}; allowed: {_endings(layers, tuned)}."


def _endings(layers: Mapping[str, str], parts: set[str]) -> str:
    """Names of the layers of these parts, without the block numbers before them."""
    names = [re.split(r"\.\d+\.", name)[-1] for name, part in layers.items() if part in parts]
    return ", ".join(dict.fromkeys(name.removeprefix("model.visual.") for name in names))
