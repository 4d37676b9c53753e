"""Saving and resuming: state of the engine and the random generators <-> a checkpoint of :mod:`train.run.run_dir`.

A run may resume with another number of ranks as long as its steps use the same bins. The state is then resharded
through DeepSpeed's universal form, which is made once and kept in the checkpoint. DeepSpeed 0.19 has three bugs there,
which :func:`load` works around: ZeRO-3 gives every group the settings of the first one, ZeRO-3 shares one count of
steps among all parameters, and frozen parameters are not restored.

Checkpoints hold no frozen parameters. A run reads those from the checkpoint that it started from, which its settings
name, so checkpoints of a run that trains adapters are small.

Cost: 12 to 16 bytes per trained parameter, written by all ranks in parallel to a file system that all of them share.
"""

from __future__ import annotations

import logging
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from schemas.errors import ConfigError
from schemas.wording import counted
from storage.files import sync
from train.model.disk import writing
from train.run.engine import Engine
from train.run.process_group import Ranks, barrier
from train.run.run_dir import (
    ENGINE_TAG,
    RESUME_FROM_ANOTHER,
    STATE_FILE,
    UNIVERSAL_TAG,
    RunState,
    list_checkpoints,
    random_state_file,
)

logger = logging.getLogger(__name__)


def save(engine: Engine, run_dir: Path, state: RunState, ranks: Ranks, *, max_checkpoints: int | None) -> Path:
    """Write a checkpoint. Collective.

    Args:
        engine: the engine, between two steps.
        run_dir: folder of the run.
        state: contents of ``state.json``.
        ranks: position of this rank.
        max_checkpoints: remove older checkpoints so that this many remain; None keeps all.

    Returns:
        The folder of the checkpoint.
    """
    folder = run_dir / f"checkpoint-{state.step}"
    temporary = run_dir / f"{folder.name}.tmp"
    if ranks.is_first:
        with writing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
    barrier()
    with writing(temporary), _without_frozen(engine.module):
        engine.save_checkpoint(str(temporary), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=True)
        torch.save(_random_state(engine.device), temporary / random_state_file(ranks.rank))
    barrier()
    if ranks.is_first:
        _check_shared(temporary, ranks)
        with writing(temporary):
            (temporary / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
            _sync_tree(temporary)
            temporary.rename(folder)
            sync(run_dir)
        for _, old in list_checkpoints(run_dir)[: -max_checkpoints if max_checkpoints else 0]:
            _remove(old)
        logger.info("checkpoint written to %s", folder)
    barrier()
    return folder


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
    if random_state is None:
        for group, settings in zip(optimizer.param_groups, group_settings):
            group.update(settings)
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items() if key == "step"})
        return
    torch.set_rng_state(random_state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["device"], engine.device)


def reshard(folder: Path, ranks: Ranks) -> None:
    """Convert a checkpoint to the universal form, unless it has one. Collective.

    Raises:
        ConfigError: DeepSpeed cannot convert it.
    """
    out, temporary = folder / UNIVERSAL_TAG, folder / f"{UNIVERSAL_TAG}.tmp"
    if ranks.is_first and not out.is_dir():
        shutil.rmtree(temporary, ignore_errors=True)
        logger.info("resharding %s to %s", folder, counted(ranks.world, "rank"))
        command = [
            *(sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"),
            *("--input_folder", str(folder / ENGINE_TAG), "--output_folder", str(temporary)),
            *("--num_extract_workers", "1", "--num_merge_workers", "1"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"cannot reshard {folder} to {ranks.world} ranks: {reason}. Resume from another one.")
        _sync_tree(temporary)
        temporary.rename(out)
    barrier()


def _check_shared(temporary: Path, ranks: Ranks) -> None:
    """Check that all ranks have written to the same folder.

    Raises:
        ConfigError: the files of some ranks are elsewhere.
    """
    missing = [rank for rank in range(ranks.world) if not (temporary / random_state_file(rank)).is_file()]
    if missing:
        raise ConfigError(
            f"{temporary} has no files of ranks {missing}, which have just written theirs: the folder is on a disk "
            "that the machines do not share. Give an absolute --output_dir that they do."
        )


def _remove(old: Path) -> None:
    """Remove an outdated checkpoint. A failure does not end the run, since the newer checkpoint is complete."""
    temporary = old.with_name(f"{old.name}.tmp")
    try:
        old.rename(temporary)
        shutil.rmtree(temporary)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): remove it by hand", error.filename or old, error.strerror or error)


@contextmanager
def _without_frozen(module: torch.nn.Module) -> Iterator[None]:
    """Drop frozen parameters from ``state_dict`` under all their names: DeepSpeed drops tied ones under one name."""

    def drop(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in _frozen_names(module):
            state.pop(prefix + name, None)

    hooked: Any = module  # torch annotates this method only in part
    handle = hooked.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _load_trained(*, src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """Load the parameters that a checkpoint holds, which must be all but the frozen ones."""
    keys = dst.load_state_dict(src, strict=False)
    wrong = {*keys.missing_keys} ^ _frozen_names(dst) | {*keys.unexpected_keys}
    if wrong:
        raise ConfigError(
            "the checkpoint to resume from does not hold exactly the weights that this run trains "
            f"({', '.join(sorted(wrong)[:3])}): resume from another one."
        )


def _frozen_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _sync_tree(folder: Path) -> None:
    """Flush a folder and all its files to disk, so that a rename cannot become durable before them."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
