"""Faster kernels for the layers of the Hugging Face model: those of Liger, or those that ``torch.compile`` makes.

A model -> the same model with other forward functions in its layers; names and weights stay, so checkpoints do not
notice. The loss is not touched: ``lm_head`` has its own way, on target positions alone (:mod:`train.model.packed`).

Cost: Liger none; compiling takes about a minute at the first step, and again for evaluation.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from schemas.errors import ConfigError
from train.model.attention import FLASH_ATTENTION
from train.settings.arguments import TrainArguments

logger = logging.getLogger(__name__)

ATTENTION_MODULES = ("self_attn", "attn")
"""Names of attention in a layer of the language model and in a block of the vision tower."""


def check_kernels(args: TrainArguments, device: torch.device, deepspeed: Mapping[str, Any]) -> None:
    """Compare what is asked for with what there is.

    Args:
        args: the flags.
        device: where this rank computes.
        deepspeed: configuration of DeepSpeed.

    Raises:
        ConfigError: a package, a compiler or a GPU is missing, or ZeRO-3 is to be compiled.
    """
    has_triton = find_spec("triton") is not None
    if args.use_liger_kernel:
        if find_spec("liger_kernel") is None:
            raise ConfigError("--use_liger_kernel needs the liger-kernel package: pip install liger-kernel")
        if device.type != "cuda" or not has_triton:
            missing = "triton, which comes with CUDA builds of torch" if device.type == "cuda" else "a GPU"
            raise ConfigError(f"--use_liger_kernel needs {missing}: leave it out here.")
    if args.torch_compile:
        if deepspeed["zero_optimization"]["stage"] == 3:
            raise ConfigError(
                "--torch_compile cannot see the weights that ZeRO-3 gathers for each layer: give --deepspeed "
                "zero2.json, or leave it out."
            )
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cpu" and shutil.which(compiler) is None:
            raise ConfigError(f"--torch_compile needs a C++ compiler on a CPU, and {compiler} is not there.")
        if device.type == "cuda" and not has_triton:
            raise ConfigError("--torch_compile needs triton on a GPU, which comes with CUDA builds of torch.")


def use_liger(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    """Compute norms, gated MLPs and rotary embeddings of the language model, and norms of the vision tower, with Liger.

    Its own function for this model replaces a rotary function that transformers 5 no longer has: there sections are
    mixed before, and what is left is the plain rotation.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2_5_vl, liger_rotary_pos_emb

    apply_liger_kernel_to_qwen2_5_vl(
        rope=False, cross_entropy=False, fused_linear_cross_entropy=False, rms_norm=True, swiglu=True, model=hf
    )
    modeling_qwen2_5_vl.apply_rotary_pos_emb = liger_rotary_pos_emb
    logger.info("norms, MLPs and rotary embeddings are computed by Liger kernels")


def compile_layers(
    hf: Qwen2_5_VLForConditionalGeneration, *, attn_implementation: str, backend: str = "inductor"
) -> None:
    """Compile the layers of the language model and the blocks of the vision tower, for inputs of any length.

    They are compiled one by one, in place: layers are alike, so that the first one's code serves all, while the whole
    model would be compiled anew for every kind of bin. With SDPA attention is split at borders that are known at run
    time only, which no compiler sees through; there all their parts but attention are compiled.

    Args:
        hf: the model.
        attn_implementation: the one that the model has.
        backend: of ``torch.compile``.
    """
    modules = [*hf.model.language_model.layers, *hf.model.visual.blocks]
    if attn_implementation != FLASH_ATTENTION:
        modules = [part for layer in modules for name, part in layer.named_children() if name not in ATTENTION_MODULES]
    for module in modules:
        module.compile(dynamic=True, backend=backend)
    logger.info("layers are compiled at their first use")
