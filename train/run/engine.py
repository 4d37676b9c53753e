"""DeepSpeed: ranks, configuration file and flags -> a running engine, and a clean end.

A configuration file may leave values to the flags (``"auto"``, as in the files of ``train/settings/configs``); one
that says something else than the flags is an error, as is a section that this trainer does not leave to DeepSpeed.

On a CPU two things of DeepSpeed 0.19 are worked around: it would compile a communication kernel at every start (27 s),
and processes that leave without a barrier abort now and then.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from schemas.errors import ConfigError
from train import settings
from train.model.attention import FLASH_ATTENTION, SDPA
from train.settings.arguments import TrainArguments
from train.settings.deepspeed_file import AUTO, check_sections
from train.settings.recipe import Recipe

logger = logging.getLogger(__name__)

CONFIGS = Path(settings.__file__).parent / "configs"

PATIENCE = timedelta(days=1)
"""How long ranks wait for what the first one does alone, such as writing a model of 140 GB. Whoever waits for a rank
that has ended is told at once all the same."""

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
    if not 0 <= rank < world or local < 0:
        raise ConfigError(
            f"the environment gives RANK {rank}, WORLD_SIZE {world} and LOCAL_RANK {local}; ranks count from 0 to "
            "WORLD_SIZE - 1: start with `deepspeed` or `torchrun`, which set them."
        )
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
    _patient_group()


@cache
def _patient_group() -> torch.distributed.ProcessGroup | None:
    """All ranks, with :data:`PATIENCE`; between steps they wait for each other no longer than DeepSpeed lets them."""
    group: torch.distributed.ProcessGroup | None = torch.distributed.new_group(backend="gloo", timeout=PATIENCE)
    return group


def wait_for_all() -> None:
    """Wait until all ranks have come here, however long one of them needs. All ranks call this together."""
    torch.distributed.barrier(group=_patient_group())


def seed_dropout(seed: int, ranks: Ranks, step: int) -> None:
    """Let this rank draw from numbers of its own. Only dropout draws at random, so a run without it draws nothing."""
    digest = hashlib.sha256(f"{seed}:{ranks.rank}:{step}:dropout".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little", signed=True))


def stop() -> None:
    """Leave the process group, all ranks together."""
    wait_for_all()
    torch.distributed.destroy_process_group()
    _patient_group.cache_clear()


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Read a configuration: a file of the user, else one of ``train/settings/configs``.

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
    zero = _section(config, "zero_optimization")
    checks = {"bf16.check_grad_overflow": _section(config, "bf16"), "zero_optimization.compute_grad_norm": zero}
    for name, in_file in checks.items():
        if in_file.get(name.partition(".")[2], True) is not True:
            raise ConfigError(f"--deepspeed {path} turns {name} off, by which steps with NaN are found: remove it.")
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.stage is {stage}; allowed: 1, 2 or 3 (1 where all fits one rank)."
        )
    check_sections(config, str(path))
    return config


def choose_dtype(args: TrainArguments, config: dict[str, Any], device: torch.device) -> torch.dtype:
    """What to compute in: as the flags say, else the configuration file, else bfloat16 where the accelerator can.

    Raises:
        ConfigError: flags and file disagree, or the device cannot compute so.
    """
    from deepspeed.accelerator import get_accelerator

    wanted: dict[str, bool | None] = {}
    for name, flag in (("bf16", args.bf16), ("fp16", args.fp16)):
        in_file = _section(config, name).get("enabled", AUTO)
        if flag is not None and in_file not in (AUTO, flag):
            raise _contradiction(args.deepspeed, f"{name}.enabled", in_file, f"--{name}", flag)
        wanted[name] = flag if in_file == AUTO else bool(in_file)
    if wanted["bf16"] and wanted["fp16"]:
        raise ConfigError(
            f"flags and --deepspeed {args.deepspeed} ask for bf16 and for fp16: leave out --bf16 or --fp16, or write "
            '"auto" for the other one in the file.'
        )
    if wanted["fp16"]:
        if not get_accelerator().is_fp16_supported():
            raise ConfigError(
                f"{device.type} cannot compute in float16: leave out --fp16, and fp16.enabled of --deepspeed "
                f"{args.deepspeed}."
            )
        return torch.float16
    if wanted["bf16"] is None:
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if wanted["bf16"] else torch.float32


def choose_attention(args: TrainArguments, device: torch.device, dtype: torch.dtype) -> str:
    """Flash attention where it is asked for, or can be had; else SDPA.

    Raises:
        ConfigError: flash attention is asked for where it cannot run.
    """
    possible = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    installed = find_spec("flash_attn") is not None
    if args.attn_implementation == "auto":
        return FLASH_ATTENTION if possible and installed else SDPA
    if args.attn_implementation == FLASH_ATTENTION:
        if not possible:
            raise ConfigError(
                f"--attn_implementation {FLASH_ATTENTION} needs a GPU and bfloat16 or float16: use sdpa here."
            )
        if not installed:
            raise ConfigError(
                f"--attn_implementation {FLASH_ATTENTION} needs the flash-attn package: "
                "pip install flash-attn --no-build-isolation"
            )
    return args.attn_implementation


def complete_config(
    config: dict[str, Any],
    args: TrainArguments,
    recipe: Recipe,
    *,
    world: int,
    dtype: torch.dtype,
    hidden_size: int,
) -> dict[str, Any]:
    """Fill in what a configuration leaves open, as transformers does, so that upstream files work as they are.

    Args:
        config: contents of the file; not changed.
        args: the flags.
        recipe: bins of a forward pass and forward passes of a step.
        world: number of ranks.
        dtype: what to compute in.
        hidden_size: width of the language model; bucket sizes follow from it.

    Raises:
        ConfigError: the file contradicts the flags, or leaves something open that they do not say.
    """
    done: dict[str, Any] = json.loads(json.dumps(config))
    per_device, accumulation = recipe.per_device, recipe.accumulation
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
    for name, named in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        section = {**_section(done, name), "enabled": dtype == named}
        done.pop(name, None)
        if dtype == named:
            done[name] = section
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
    config: dict[str, Any],
    *,
    is_converted: bool = False,
) -> Any:
    """Wrap the model into a DeepSpeed engine.

    Args:
        model: the model.
        optimizer: over its parameters; the learning rates are the caller's to set.
        config: complete configuration.
        is_converted: whether a checkpoint of another number of ranks is going to be loaded.
    """
    import deepspeed

    if is_converted:
        config = {**config, "checkpoint": {**_section(config, "checkpoint"), "load_universal": True}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if engine.fp16_enabled() and engine.optimizer.loss_scaler.dynamic:
        # What happens at the lowest scale is decided by the trainer, which knows the bins.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


def can_lower_scale(running: Any) -> bool:
    """Whether a gradient that overflows now would lower the scale of the loss, so that those after it may fit.

    In float16 that is so until the scale is ``min_loss_scale``, or never where the file gives a fixed ``loss_scale``.
    """
    if not running.fp16_enabled():
        return False
    scaler = running.optimizer.loss_scaler
    return bool(scaler.dynamic and scaler.cur_scale > scaler.min_scale)


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
