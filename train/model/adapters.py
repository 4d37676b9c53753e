"""LoRA: small trained matrices beside frozen weights (:mod:`peft`), chosen, put in, written and merged.

Flags and the names of a model's layers -> :class:`Adapters`, before weights are loaded; a model -> the same with
adapters in those layers; weights after training -> an adapter in the format of peft, or whole weights with the adapters
added in.

A layer ``W`` becomes ``W + (alpha / r) B A`` with ``A`` (r, in) random and ``B`` (out, r) zero, so training starts from
the model as it was (Hu et al. 2021, https://arxiv.org/abs/2106.09685).

Cost: r (in + out) parameters a layer; merging takes one product of the two matrices a layer, on the CPU.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
import shutil
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
from storage.disk import writing
from train.model import optim
from train.model.pretrained import copy_companions
from train.settings.arguments import TrainArguments

logger = logging.getLogger(__name__)

DEFAULT_RANK, DEFAULT_ALPHA, DEFAULT_DROPOUT = 64, 128, 0.0
"""Rank and alpha are those of the upstream fine-tuning script."""

ALL_LINEAR = "all-linear"
"""Every linear layer but ``lm_head``; the word is peft's."""

HEAD = "lm_head"
NAME = "default"
"""What peft calls the only adapter of a model."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FILE_PREFIX = "base_model.model."
"""What stands before the name of a layer in a file of peft."""

_A, _B, _BASE = ".lora_A.weight", ".lora_B.weight", ".base_layer."


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapters:
    """Which layers get adapters, and of what kind.

    Attributes:
        rank: rank of the product of the two matrices.
        alpha: the product is multiplied by ``alpha / rank``.
        dropout: share of the inputs of an adapter that is dropped in training.
        modules: names of the layers in the Hugging Face model.
    """

    rank: int
    alpha: int
    dropout: float
    modules: tuple[str, ...]

    @property
    def scaling(self) -> float:
        """What the product of the two matrices is multiplied by."""
        return self.alpha / self.rank

    def describe(self) -> str:
        """All of it in one line, for comparing runs."""
        digest = hashlib.sha256("\n".join(self.modules).encode()).hexdigest()[:16]
        return (
            f"r {self.rank}, alpha {self.alpha}, dropout {self.dropout:g}, {len(self.modules)} layers (sha256 {digest})"
        )


def choose_adapters(args: TrainArguments, config: Mapping[str, Any]) -> Adapters | None:
    """What the flags ask for; None without ``--lora_enable``.

    The parts that ``--tune_mm_*`` names get adapters, and none of the model's own weights are trained.

    Args:
        args: the flags.
        config: contents of the ``config.json`` of the checkpoint.

    Raises:
        ConfigError: peft is not installed, or ``--lora_target_modules`` names nothing in a part that is to be tuned.
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
    """Check that peft is there.

    Raises:
        ConfigError: it is not.
    """
    if find_spec("peft") is None:
        raise ConfigError("LoRA needs the peft package: pip install peft")


def linear_layers(config: Mapping[str, Any]) -> dict[str, str]:
    """Names of the linear layers that can have adapters, each with its part of the model; no weights are made."""
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(dict(config)))
    return {
        name: optim.part_of(f"hf.{name}.")
        for name, module in hf.named_modules()
        if isinstance(module, nn.Linear) and name != HEAD
    }


def choose_modules(layers: Mapping[str, str], wanted: str | None, tuned: set[str]) -> tuple[str, ...]:
    """Layers of the tuned parts whose names end as wanted.

    Args:
        layers: name of every linear layer -> its part.
        wanted: names separated by commas, as ``q_proj,v_proj`` or ``self_attn.q_proj``; each may be a regular
            expression. None or ``all-linear``: every layer.
        tuned: the parts that get adapters.

    Returns:
        Names of layers, in the order of the model.

    Raises:
        ConfigError: a name fits no layer of these parts, or a part has no layer that fits.
    """
    eligible = [name for name, part in layers.items() if part in tuned]
    if wanted in (None, ALL_LINEAR):
        return tuple(eligible)
    assert wanted is not None
    chosen: set[str] = set()
    for item in wanted.split(","):
        try:
            pattern = re.compile(rf"(.*\.)?({item.strip()})")
        except re.error as error:
            raise ConfigError(f"--lora_target_modules: {item!r} is no regular expression ({error}).") from error
        found = {name for name in eligible if pattern.fullmatch(name)}
        if not found:
            raise ConfigError(_explain_no_match(item, pattern, layers, tuned))
        chosen |= found
    for part in sorted(tuned):
        if not any(layers[name] == part for name in chosen):
            raise ConfigError(
                f"{part} is to be tuned, but --lora_target_modules {wanted} names none of its layers "
                f"({_endings(layers, {part})}): name some, or freeze it with its --tune_mm flag."
            )
    return tuple(name for name in eligible if name in chosen)


def add_adapters(hf: Qwen2_5_VLForConditionalGeneration, adapters: Adapters, *, seed: int) -> None:
    """Put adapters into a model, in its dtype; the same ones for a seed on any rank and at any ZeRO stage.

    Args:
        hf: the model, in place; its weights may be partitioned.
        adapters: which.
        seed: decides the random matrices.
    """
    from peft import inject_adapter_in_model

    inject_adapter_in_model(_peft_config(adapters), hf, adapter_name=NAME)
    for name, parameter in hf.named_parameters():
        if not optim.is_adapter(name):
            continue
        parameter.data = parameter.data.to(hf.dtype)
        if name.endswith(f".lora_A.{NAME}.weight"):
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            bound = 1 / math.sqrt(parameter.shape[1])  # what peft draws from, with a generator of its own
            parameter.data.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def split_weights(weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights of a model with adapters, by their names in it -> those of the model alone, and those of the adapters.

    Returns:
        The first by their names in the model without adapters, the second by their names in a file of peft.
    """
    own = {name.replace(_BASE, "."): weight for name, weight in weights.items() if not optim.is_adapter(name)}
    of_adapters = {
        f"{FILE_PREFIX}{name.replace(f'.{NAME}.', '.')}": weight
        for name, weight in weights.items()
        if optim.is_adapter(name)
    }
    return own, of_adapters


def merge_weights(
    own: Mapping[str, torch.Tensor], of_adapters: Mapping[str, torch.Tensor], scaling: float
) -> dict[str, torch.Tensor]:
    """Weights with the adapters added in: sums are made in float32 and rounded once to the dtype of the weight.

    Args:
        own: weights of the model, by name.
        of_adapters: those of its adapters, by their names in a file of peft.
        scaling: see :class:`Adapters`.

    Raises:
        ConfigError: an adapter is not of this model, or there is something else than pairs of matrices.
    """
    merged, rest = dict(own), dict(of_adapters)
    for name in of_adapters:
        if not name.endswith(_A):
            continue
        stem = name.removesuffix(_A)
        target = f"{stem.removeprefix(FILE_PREFIX)}.weight"
        first, second = rest.pop(name), rest.pop(f"{stem}{_B}", None)
        weight = own.get(target)
        if second is None or weight is None or not _is_pair(first, second, weight):
            raise ConfigError(f"{stem} is no adapter of a layer of this model: give the model that it was trained for.")
        merged[target] = (weight.float() + scaling * (second.float() @ first.float())).to(weight.dtype)
    if rest:
        raise ConfigError(f"the adapter holds {next(iter(rest))}, which is no matrix of LoRA: merge it with peft.")
    return merged


def _is_pair(first: torch.Tensor, second: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the product of two matrices has the shape of a weight."""
    are_matrices = first.dim() == second.dim() == 2 and second.shape[1] == first.shape[0]
    return are_matrices and weight.shape == (second.shape[0], first.shape[1])


def write_adapter(
    out: Path, of_adapters: Mapping[str, torch.Tensor], adapters: Adapters, *, model: str, source: Path
) -> None:
    """Write the adapters alone, as peft does: ``PeftModel.from_pretrained(model, out)`` loads them.

    Args:
        out: the folder to write; what was there before is replaced when the new one is complete.
        of_adapters: the matrices on the CPU, by their names in a file of peft.
        adapters: which.
        model: the checkpoint that they are for, as a user of the adapter is to find it.
        source: folder of that checkpoint, whose tokenizer and processor files are copied.

    Raises:
        VlprepError: it cannot be written.
    """
    part = out.with_name(f"{out.name}.tmp")
    config = _peft_config(adapters)
    config.base_model_name_or_path = model
    config.inference_mode = True
    config.target_modules = list(adapters.modules)  # peft makes it a set, whose order changes from run to run
    with writing(part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        config.save_pretrained(str(part))
        save_file(dict(of_adapters), part / WEIGHTS_FILE, metadata={"format": "pt"})
        copy_companions(source, part)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
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


def _explain_no_match(item: str, pattern: re.Pattern[str], layers: Mapping[str, str], tuned: set[str]) -> str:
    elsewhere = sorted({part for name, part in layers.items() if pattern.fullmatch(name)})
    where = ", ".join(sorted(tuned))
    if elsewhere:
        return (
            f"--lora_target_modules: {item} is in {', '.join(elsewhere)}, which is frozen: tune it with its --tune_mm "
            "flag, or leave the name out."
        )
    if pattern.fullmatch(HEAD):
        return f"--lora_target_modules: {HEAD} can have no adapter, since it may be tied to the embeddings."
    return f"--lora_target_modules: {item} is no linear layer of {where}; allowed: {_endings(layers, tuned)}."


def _endings(layers: Mapping[str, str], parts: set[str]) -> str:
    """How layers of these parts are called, without the numbers of blocks before."""
    names = [re.split(r"\.\d+\.", name)[-1] for name, part in layers.items() if part in parts]
    return ", ".join(dict.fromkeys(name.removeprefix("model.visual.") for name in names))
