"""DeepSpeed: ranks, configuration file and flags -> a running engine, and a clean end.

A configuration file may leave values to the flags (``"auto"``, as in the files of ``train/configs``); one that says
something else than the flags is an error, as is a section that this trainer does not leave to DeepSpeed.

On a CPU two things of DeepSpeed 0.19 are worked around: it would compile a communication kernel at every start (27 s),
and processes that leave without a barrier abort now and then.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from schemas.errors import ConfigError
from train.arguments import TrainArguments
from train.model import FLASH_ATTENTION

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent / "configs"
AUTO = "auto"

STAGES = (1, 2, 3)
"""ZeRO stages. Without ZeRO (stage 0) DeepSpeed replaces the optimizer in bfloat16 and gives no gradient norm in
float32; stage 1 computes the same without either."""

OWN_SECTIONS = {
    "optimizer": "the trainer makes AdamW with a group for each part of the model (--learning_rate, --weight_decay, …)",
    "scheduler": "the trainer makes the schedule (--lr_scheduler_type, --warmup_ratio)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Place of this process among all. ``local`` counts on this machine."""

    rank: int
    local: int
    world: int

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0


def read_ranks(local_rank: int) -> Ranks:
    """Place of this process, from the environment that ``deepspeed`` and ``torchrun`` set.

    Without a launcher the process is the only one; the environment is then set for it.

    Args:
        local_rank: the flag that the ``deepspeed`` launcher appends; -1 where it was not given.

    Raises:
        ConfigError: flag and environment disagree, or the environment is incomplete.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not any(name in os.environ for name in names):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "LOCAL_RANK" not in os.environ and local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        rank, world, local = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the environment does not say which rank this is ({error}): start with `deepspeed` or `torchrun`, which "
            f"set {', '.join(names)}."
        ) from error
    if local_rank not in (-1, local):
        raise ConfigError(f"--local_rank is {local_rank}, but LOCAL_RANK is {local}: leave the flag to the launcher.")
    return Ranks(rank=rank, local=local, world=world)


def choose_device(ranks: Ranks) -> torch.device:
    """The device of this rank: an accelerator where there is one."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(ranks.local)
    return torch.device(accelerator.device_name(ranks.local))


def start(device: torch.device) -> None:
    """Join the process group; all ranks do.

    Raises:
        ConfigError: the ranks do not find each other.
    """
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed()
    except torch.distributed.DistNetworkError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the ranks cannot meet at {place} ({reason}): give the launcher another --master_port, or check its "
            "--master_addr."
        ) from error


def stop() -> None:
    """Leave the process group, all ranks together."""
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Read a configuration: a file of the user, else one of ``train/configs``.

    Raises:
        ConfigError: there is none, it is not a JSON object, or it asks for what this trainer does not do.
    """
    places = (Path(name), CONFIGS / name)
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        own = ", ".join(sorted(place.name for place in CONFIGS.glob("*.json")))
        raise ConfigError(f"--deepspeed {name}: there is no such file, nor is it one of {own}.")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path} holds no JSON object.")
    for section, instead in OWN_SECTIONS.items():
        if section in config:
            raise ConfigError(f"--deepspeed {path} has a section {section!r}: remove it, {instead}.")
    if _section(config, "fp16").get("enabled", False) not in (False, AUTO):
        raise ConfigError(f"--deepspeed {path} turns fp16 on: this trainer computes in bfloat16 (--bf16) or float32.")
    stage = _section(config, "zero_optimization").get("stage", 0)
    if stage not in STAGES:
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.stage is {stage}; allowed: 1, 2 or 3 (1 where all fits one rank)."
        )
    return config


def choose_bf16(args: TrainArguments, config: dict[str, Any], device: torch.device) -> bool:
    """Whether to compute in bfloat16: the flag, else the configuration file, else what the accelerator can.

    Raises:
        ConfigError: flag and file disagree.
    """
    in_file = _section(config, "bf16").get("enabled", AUTO)
    if args.bf16 is not None:
        if in_file not in (AUTO, args.bf16):
            raise _contradiction(args.deepspeed, "bf16.enabled", in_file, "--bf16", args.bf16)
        return args.bf16
    if in_file != AUTO:
        return bool(in_file)
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def choose_attention(args: TrainArguments, device: torch.device, *, bf16: bool) -> str:
    """Flash attention where it is asked for, or can be had; else SDPA.

    Raises:
        ConfigError: flash attention is asked for where it cannot run.
    """
    possible = device.type == "cuda" and bf16
    installed = find_spec("flash_attn") is not None
    if args.attn_implementation == "auto":
        return FLASH_ATTENTION if possible and installed else "sdpa"
    if args.attn_implementation == FLASH_ATTENTION:
        if not possible:
            raise ConfigError(f"--attn_implementation {FLASH_ATTENTION} needs a GPU and bfloat16: use sdpa here.")
        if not installed:
            raise ConfigError(
                f"--attn_implementation {FLASH_ATTENTION} needs the flash-attn package: "
                "pip install flash-attn --no-build-isolation"
            )
    return args.attn_implementation


def complete_config(
    config: dict[str, Any], args: TrainArguments, *, world: int, bf16: bool, hidden_size: int
) -> dict[str, Any]:
    """Fill in what a configuration leaves open, as transformers does, so that upstream files work as they are.

    Args:
        config: contents of the file; not changed.
        args: the flags.
        world: number of ranks.
        bf16: whether to compute in bfloat16.
        hidden_size: width of the language model; bucket sizes follow from it.

    Raises:
        ConfigError: the file contradicts the flags, or leaves something open that they do not say.
    """
    done: dict[str, Any] = json.loads(json.dumps(config))
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    flags = {
        "train_micro_batch_size_per_gpu": (per_device, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
        "train_batch_size": (per_device * accumulation * world, "the number of bins in a step"),
        "gradient_clipping": (args.max_grad_norm, "--max_grad_norm"),
    }
    for key, (value, flag) in flags.items():
        if done.get(key, AUTO) not in (AUTO, value):
            raise _contradiction(args.deepspeed, key, done[key], flag, value)
        done[key] = value
    done["bf16"] = {**_section(done, "bf16"), "enabled": bf16}
    done.pop("fp16", None)
    done.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    zero = done["zero_optimization"]
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})
    if "offload_optimizer" in zero:
        done.setdefault("zero_force_ds_cpu_optimizer", False)
    if (open_key := _find_auto(done)) is not None:
        raise ConfigError(f'--deepspeed {args.deepspeed}: {open_key} is "auto", which no flag decides: write a value.')
    return done


def keep_for_zero3(config: dict[str, Any]) -> object:
    """Tell transformers how to load weights: under ZeRO-3, straight into partitions.

    Returns:
        An object that must be kept alive as long as models are loaded or saved (transformers holds it weakly).
    """
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    kept: object = HfDeepSpeedConfig(config)
    return kept


def initialize(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    config: dict[str, Any],
) -> Any:
    """Wrap the model into a DeepSpeed engine."""
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=config)
    return engine


def gather_weights(module: torch.nn.Module, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Whole weights on the CPU of the first rank, by name, tied ones once. Other ranks take part and get nothing."""
    import deepspeed

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if ranks.is_first:
                weights[name] = parameter.detach().to("cpu", copy=True)
    return weights


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"the DeepSpeed configuration has {name} = {section!r}; a section in braces is expected.")
    return section


def _contradiction(path: str, key: str, in_file: object, flag: str, value: object) -> ConfigError:
    return ConfigError(
        f'--deepspeed {path} says {key} = {in_file}, but {flag} is {value}: write "auto" in the file, or change one.'
    )


def _find_auto(value: object, path: str = "") -> str | None:
    if isinstance(value, dict):
        found = (_find_auto(item, f"{path}.{key}" if path else key) for key, item in value.items())
        return next((key for key in found if key is not None), None)
    return path if value == AUTO else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
