"""Resuming: a checkpoint of :mod:`train.run.saving` -> state of the engine and the random generators.

A run may resume with another number of ranks as long as its steps use the same bins. The state is then resharded
through DeepSpeed's universal form, which is made once and kept in the checkpoint. DeepSpeed 0.19 has three bugs there,
which :func:`load` works around: ZeRO-3 gives every group the settings of the first one, ZeRO-3 shares one count of
steps among all parameters, and frozen parameters are not restored.

Cost: each rank reads its part of the checkpoint. Resharding reads the checkpoint and writes it once more.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils.serialization import config

from schemas.errors import ConfigError
from schemas.wording import counted
from storage.files import sync_tree
from train.run.engine import Engine, frozen_names
from train.run.process_group import Ranks, barrier
from train.run.run_dir import ENGINE_TAG, RESUME_FROM_ANOTHER, UNIVERSAL_TAG, random_state_file
from train.run.universal import convert

logger = logging.getLogger(__name__)


def load(engine: Engine, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks, *, is_resharded: bool) -> None:
    """Restore engine and random state from a checkpoint. Collective.

    Args:
        engine: the engine, not used yet.
        optimizer: the optimizer that the engine wraps.
        folder: the checkpoint.
        ranks: position of this rank.
        is_resharded: whether to load what :func:`reshard` made. The random state then stays as it is: the saved ones
            are of other ranks.

    Raises:
        ConfigError: the checkpoint is incomplete or damaged.
    """
    group_settings = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    tag = UNIVERSAL_TAG if is_resharded else ENGINE_TAG
    try:
        with _mapped() if is_resharded else nullcontext():
            path, _ = engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=_load_trained)
        random_state = None if is_resharded else torch.load(folder / random_state_file(ranks.rank), weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is incomplete: {error}. {RESUME_FROM_ANOTHER}") from error
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ConfigError(
            f"{folder} is damaged: a file does not hold what a checkpoint has there ({error}). {RESUME_FROM_ANOTHER}"
        ) from error
    if path is None:
        raise ConfigError(f"{folder} holds no state of the engine. Resume from another checkpoint.")
    restore_step_counts(optimizer)
    if random_state is None:
        for group, settings in zip(optimizer.param_groups, group_settings):
            group.update(settings)
        return
    torch.set_rng_state(random_state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["device"], engine.device)


def restore_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter a step count of its own, on the device where AdamW looks for it.

    DeepSpeed loads one count for several parameters, pads it, or leaves it on the device where it was saved. A fused
    kernel reads it beside the parameter, the other one on the host.
    """
    for parameter, state in optimizer.state.items():
        if "step" in state:
            device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
            count = torch.as_tensor(state["step"], dtype=torch.float32).flatten()[0]
            state["step"] = count.to(device, copy=True)


def reshard(folder: Path, ranks: Ranks) -> None:
    """Convert a checkpoint to the universal form, unless it has one. Collective.

    Raises:
        ConfigError: DeepSpeed cannot convert it.
    """
    out, temporary = folder / UNIVERSAL_TAG, folder / f"{UNIVERSAL_TAG}.tmp"
    if ranks.is_first and not out.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        logger.info("resharding %s to %s", folder, counted(ranks.world, "rank"))
        problem = convert(folder / ENGINE_TAG, temporary)
        if problem is not None:
            world = counted(ranks.world, "rank")
            raise ConfigError(f"cannot reshard {folder} to {world}: {problem}. Resume from another one.")
        sync_tree(temporary)
        temporary.rename(out)
    barrier()


@contextmanager
def _mapped() -> Iterator[None]:
    """Map files that torch loads into memory: DeepSpeed opens all of each parameter to copy a rank's part of it."""
    before, config.load.mmap = config.load.mmap, True
    try:
        yield
    finally:
        config.load.mmap = before


def _load_trained(*, src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load the parameters that a checkpoint holds, which must be all but the frozen ones."""
    keys = dst.load_state_dict(src, strict=False)
    wrong = {*keys.missing_keys} ^ frozen_names(dst) | {*keys.unexpected_keys}
    if wrong:
        raise ConfigError(
            "the checkpoint to resume from does not hold exactly the weights that this run trains "
            f"({', '.join(sorted(wrong)[:3])}): resume from another one."
        )
