"""Faster kernels for the layers of the Hugging Face model: Liger's, or those that ``torch.compile`` generates.

A model -> the same model with other forward functions in its layers. Names and weights stay, so checkpoints are not
affected. Neither is the loss: :mod:`train.model.packed` computes it on target positions only.

Cost: none for Liger. Compiling takes about a minute at the first step, and again at the first evaluation.
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
from train.model.attention import SDPA
from train.settings.arguments import TrainArguments

logger = logging.getLogger(__name__)

ATTENTION_MODULES = ("self_attn", "attn")
"""Names of the attention module in a language model layer and in a vision tower block."""


def check_kernels(args: TrainArguments, device: torch.device, deepspeed: Mapping[str, Any]) -> None:
    """Check that the requested kernels can run here.

    Args:
        args: settings of the run.
        device: compute device of this rank.
        deepspeed: DeepSpeed configuration.

    Raises:
        ConfigError: a package, compiler or GPU is missing, or ``--torch_compile`` meets ZeRO-3.
    """
    has_triton = find_spec("triton") is not None
    if args.use_liger_kernel:
        if find_spec("liger_kernel") is None:
            raise ConfigError("--use_liger_kernel needs the liger-kernel package: pip install liger-kernel")
        if device.type != "cuda" or not has_triton:
            missing = "triton, which comes with CUDA builds of torch" if device.type == "cuda" else "a GPU"
            raise ConfigError(f"--use_liger_kernel needs {missing}: drop the flag on this machine.")
    if args.torch_compile:
        if deepspeed["zero_optimization"]["stage"] == 3:
            raise ConfigError(
                "--torch_compile does not work with the weights that ZeRO-3 gathers per layer: use --deepspeed "
                "zero2.json, or drop the flag."
            )
        compiler = os.environ.get("CXX", "g++")
        if device.type == "cpu" and shutil.which(compiler) is None:
            raise ConfigError(f"--torch_compile needs a C++ compiler on a CPU, but {compiler} is not installed.")
        if device.type == "cuda" and not has_triton:
            raise ConfigError("--torch_compile needs triton on a GPU, which comes with CUDA builds of torch.")


def use_liger(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    """Use Liger for the norms, gated MLPs and rotary embeddings of the language model, and for the vision norms.

    Liger 0.8.5's function for this model imports a class that is built on one that transformers 5.23 no longer has, and
    patches a rotary function that transformers 5 no longer calls. So its patches of single modules are applied here.
    transformers 5 merges the mRoPE sections beforehand: the remaining rotation is the plain one, and Liger's plain
    function replaces it.
    """
    from liger_kernel.transformers.monkey_patch import _patch_rms_norm_module, _patch_swiglu_module
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    language_model = hf.model.language_model
    norms = [norm for block in hf.model.visual.blocks for norm in (block.norm1, block.norm2)]
    for layer in language_model.layers:
        norms += (layer.input_layernorm, layer.post_attention_layernorm)
    for norm in (*norms, language_model.norm):
        _patch_rms_norm_module(norm)
    for layer in language_model.layers:
        _patch_swiglu_module(layer.mlp, LigerSwiGLUMLP)
    modeling_qwen2_5_vl.apply_rotary_pos_emb = liger_rotary_pos_emb
    logger.info("using Liger kernels for norms, MLPs and rotary embeddings")


def compile_layers(
    hf: Qwen2_5_VLForConditionalGeneration, *, attn_implementation: str, backend: str = "inductor"
) -> None:
    """Compile the language model layers and the vision tower blocks in place, for inputs of any length.

    Layers are compiled one by one: they are alike, so the code of the first serves all, whereas the whole model would
    be recompiled for every kind of bin. SDPA splits at sample boundaries that are known only at run time, which breaks
    the graph; with SDPA everything but attention is compiled.

    Args:
        hf: the model.
        attn_implementation: attention implementation of the model.
        backend: backend of ``torch.compile``.
    """
    modules = [*hf.model.language_model.layers, *hf.model.visual.blocks]
    if attn_implementation == SDPA:
        modules = [
            child for layer in modules for name, child in layer.named_children() if name not in ATTENTION_MODULES
        ]
    for module in modules:
        module.compile(dynamic=True, backend=backend)
    logger.info("layers will be compiled at their first use")
