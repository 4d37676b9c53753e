"""What a rank computes on and in: the flags, the DeepSpeed file and the hardware -> device, precision and attention."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from schemas.errors import ConfigError
from train.model.attention import AMPERE, FLASH_ATTENTION, SDPA, VARLEN
from train.model.flops import peak_tflops
from train.run.process_group import Ranks
from train.settings.arguments import TrainArguments
from train.settings.deepspeed_file import AUTO, contradiction, section


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """How a rank computes.

    Attributes:
        device: device of the rank.
        dtype: bfloat16, float16 or float32.
        attention: attention implementation.
        peak_tflops: peak of the device in 10^12 operations per second, if known.
        capacity: bytes of the device, or of the smallest device of all ranks; None if that is not known.
    """

    device: torch.device
    dtype: torch.dtype
    attention: str
    peak_tflops: float | None
    capacity: int | None


def choose_compute(args: TrainArguments, deepspeed: dict[str, Any], ranks: Ranks) -> Compute:
    """Choose device, precision and attention of a rank.

    Raises:
        ConfigError: the device cannot compute as the flags say.
    """
    set_tf32(args)
    device = choose_device(ranks)
    dtype = choose_dtype(args, deepspeed, device)
    return Compute(
        device=device,
        dtype=dtype,
        attention=choose_attention(args, device, dtype),
        peak_tflops=args.peak_tflops or peak_tflops(device, dtype),
        capacity=device_capacity(device),
    )


def device_capacity(device: torch.device) -> int | None:
    """Bytes of a GPU, free or not, so that equal GPUs have equal plans. None on a CPU, whose memory ranks share."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def choose_device(ranks: Ranks) -> torch.device:
    """The accelerator of this rank if the machine has one, else the CPU."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(ranks.local)
    return torch.device(accelerator.device_name(ranks.local))


def choose_dtype(args: TrainArguments, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """The precision of the flags, else of the DeepSpeed file, else bfloat16 if the accelerator supports it.

    Raises:
        ConfigError: the flags contradict the file, or the device does not support the precision.
    """
    from deepspeed.accelerator import get_accelerator

    is_enabled: dict[str, bool | None] = {}
    for name, flag in (("bf16", args.bf16), ("fp16", args.fp16)):
        in_file = section(config, name, args.deepspeed_file).get("enabled", AUTO)
        if flag is not None and in_file not in (AUTO, flag):
            raise contradiction(args.deepspeed_file, f"{name}.enabled", in_file, f"--{name}", flag)
        is_enabled[name] = flag if in_file == AUTO else bool(in_file)
    if is_enabled["bf16"] and is_enabled["fp16"]:
        raise ConfigError(
            f"the flags and --deepspeed {args.deepspeed_file} enable both bf16 and fp16: drop --bf16 or --fp16, or "
            'write "auto" for the other one in the file.'
        )
    if is_enabled["fp16"]:
        if not get_accelerator().is_fp16_supported():
            raise ConfigError(
                f"{device.type} does not support float16: drop --fp16, and fp16.enabled of --deepspeed "
                f"{args.deepspeed_file}."
            )
        return torch.float16
    if is_enabled["bf16"] is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if is_enabled["bf16"] else torch.float32


def set_tf32(args: TrainArguments) -> None:
    """Apply ``--tf32`` to the matrix multiplications of this process."""
    if args.tf32 is not None:
        torch.backends.cuda.matmul.allow_tf32 = args.tf32
        torch.backends.cudnn.allow_tf32 = args.tf32


def choose_attention(args: TrainArguments, device: torch.device, dtype: torch.dtype) -> str:
    """The attention of ``--attn_implementation``.

    ``auto`` is, on a GPU since Ampere in half precision, flash-attn 2 where it works, else torch's variable-length
    attention; elsewhere SDPA, as none of the other kernels runs there.

    Raises:
        ConfigError: the flag requests an implementation that cannot run here.
    """
    is_half_on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    is_possible = is_half_on_gpu and torch.cuda.get_device_capability(device) >= AMPERE
    name = args.attn_implementation
    if name == "auto":
        if not is_possible:
            return SDPA
        return FLASH_ATTENTION if flash_problem(FLASH_ATTENTION) is None else VARLEN
    if name == SDPA:
        return name
    if not is_possible:
        since = "since Ampere (compute capability 8.0)" if is_half_on_gpu else "and bfloat16 or float16"
        raise ConfigError(f"--attn_implementation {name} needs a GPU {since}: use sdpa here.")
    if name != VARLEN and (problem := flash_problem(name)) is not None:
        raise ConfigError(f"--attn_implementation {name} cannot run: {problem}. {VARLEN} needs no package.")
    return name


def flash_problem(attn_implementation: str) -> str | None:
    """Why flash-attn 2 or 3 cannot be used here, or None if it can.

    A package of the right name is not enough: flash-attn 4 alone provides ``flash_attn`` too, and a build for another
    torch fails at import.
    """
    if attn_implementation == FLASH_ATTENTION:
        is_available, module, package = is_flash_attn_2_available, "flash_attn", "flash-attn"
        mend = "pip install flash-attn --no-build-isolation"
    else:
        is_available, module, package = is_flash_attn_3_available, "flash_attn_interface", "flash-attn 3"
        mend = "build it from the hopper folder of its repository"
    if not is_available():
        return f"{package} is not installed ({mend})"
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # a build for another torch or CUDA
        return f"{package} cannot be imported ({type(error).__name__}: {error})"
    return None
