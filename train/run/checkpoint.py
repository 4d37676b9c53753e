"""Checkpoints to resume from: engine, random state and position in the stream -> ``<run>/checkpoint-N``.

A checkpoint is written under a temporary name and renamed when all ranks are done, so a folder named ``checkpoint-N``
is complete. ``state.json`` says what the run was; going on with settings that would make another run of it is an error.

A run may go on with another number of ranks that makes the same steps of as many bins: the state is then dealt out anew
from DeepSpeed's universal form, which is made once, beside the state. Three things that DeepSpeed 0.19 gets wrong there
are mended: ZeRO-3 gives all groups the settings of the first one and one common count of steps, and frozen parameters
are not restored.

Frozen parameters are in no checkpoint: they are those of the checkpoint that the run started from, which the settings
name. So a run that trains adapters has small ones.

Cost: 12 to 16 bytes a trained parameter, written by all ranks in parallel; the folder must be on a file system that all
ranks share.
"""

from __future__ import annotations

import fcntl
import logging
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import torch

from schemas.errors import ConfigError
from storage.disk import writing
from storage.files import sync
from train.run.engine import Ranks, wait_for_all

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
ENGINE_TAG = "engine"
UNIVERSAL_TAG = "universal"
_NAME = re.compile(r"checkpoint-(\d+)")
_RESUME_FROM_ANOTHER = (
    "Resume from another checkpoint, or remove this one: --resume auto then goes on from the one before."
)

Setting = str | int | float | bool | None


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a run is, and what it is.

    Attributes:
        stream: state of the stream of bins, see :meth:`train.order.dealing.DataOrder.state_dict`.
        ranks: number of ranks that saved it.
        settings: those that must be the same when the run goes on.
    """

    stream: dict[str, int]
    ranks: int
    settings: dict[str, Setting]

    @property
    def step(self) -> int:
        """Optimizer steps done, which is the step that the stream goes on with."""
        return self.stream["step"]


def hold(run_dir: Path) -> IO[bytes]:
    """Make the folder of a run and hold it against other runs, until the returned file is closed or the process ends.

    Raises:
        ConfigError: the folder cannot be written, or another run holds it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("ab")
    except OSError as error:
        raise ConfigError(f"--output_dir {run_dir} cannot be written: {error.strerror}. Give another one.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"--output_dir {run_dir} is in use by another run: stop it, or give another folder."
        ) from None
    return lock


def remove_unfinished(run_dir: Path) -> None:
    """Remove what a run that was killed or ran out of space while it saved has left: it is of no use to any."""
    for path in run_dir.glob("checkpoint-*.tmp"):
        logger.info("%s was not finished and is removed", path)
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run with their steps, oldest first."""
    found = ((_NAME.fullmatch(path.name), path) for path in run_dir.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in found if match)


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, as ``--resume`` asks for it: ``auto``, ``none`` or a path.

    Returns:
        Folder of a checkpoint, or None to start anew.

    Raises:
        ConfigError: there is no such checkpoint, or the folder has newer ones, which a later ``auto`` would mistake for
            those of this run.
    """
    existing = list_checkpoints(run_dir)
    if resume == "auto":
        return existing[-1][1] if existing else None
    chosen = None if resume == "none" else Path(resume)
    step = 0 if chosen is None else read_state(chosen).step
    if existing and existing[-1][0] > step:
        raise ConfigError(
            f"--resume {resume} starts at step {step}, but {existing[-1][1]} is of a later one. Resume from it, "
            "remove it, or give another --output_dir."
        )
    return chosen


def read_state(folder: Path) -> RunState:
    """Read ``state.json`` of a checkpoint.

    Raises:
        ConfigError: the folder is no complete checkpoint.
    """
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
        if "step" not in state.stream:
            raise msgspec.ValidationError("no step in stream")
        return state
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(
            f"{folder} is no complete checkpoint to resume from ({path.name}: {error}). Give a checkpoint-N of a run."
        ) from error


def check_files(folder: Path) -> None:
    """See that a checkpoint has a file of each rank that saved it, and that none is cut short.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    state = read_state(folder)
    states = sorted((folder / ENGINE_TAG).glob("*_states.pt"))
    of_optimizer = [path for path in states if path.name.endswith("_optim_states.pt")]
    if len(of_optimizer) != state.ranks or len(states) == len(of_optimizer):
        raise ConfigError(
            f"{folder} is incomplete: {folder / ENGINE_TAG} has {len(of_optimizer)} files of optimizer states and "
            f"{len(states) - len(of_optimizer)} of the model, but {state.ranks} ranks saved it. {_RESUME_FROM_ANOTHER}"
        )
    for path in (*states, *(folder / _random_file(rank) for rank in range(state.ranks))):
        # torch writes zip archives, whose directory is at the end
        if not path.is_file() or not zipfile.is_zipfile(path):
            found = "cut short or damaged" if path.is_file() else "missing"
            raise ConfigError(f"{path} is {found}. {_RESUME_FROM_ANOTHER}")


def check_settings(folder: Path, saved: RunState, settings: dict[str, Setting]) -> None:
    """Compare the settings of a checkpoint with those of this run.

    Raises:
        ConfigError: one differs.
    """
    for name, value in settings.items():
        before = saved.settings.get(name, "nothing")
        if before != value:
            raise ConfigError(
                f"{folder} was saved with {name} = {before}, this run has {value}: it would not be the same run. "
                "Give the same setting, or --resume none with another --output_dir."
            )


def save(engine: Any, run_dir: Path, state: RunState, ranks: Ranks, *, keep: int | None) -> Path:
    """Write a checkpoint; all ranks call this together.

    Args:
        engine: the DeepSpeed engine, between two steps.
        run_dir: folder of the run.
        state: what ``state.json`` is to say.
        ranks: place of this rank.
        keep: remove older checkpoints so that this many are left; None keeps all.

    Returns:
        The folder of the checkpoint.
    """
    folder = run_dir / f"checkpoint-{state.step}"
    part = run_dir / f"{folder.name}.tmp"
    if ranks.is_first:
        with writing(part):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
    wait_for_all()
    with writing(part), _without_frozen(engine.module):
        engine.save_checkpoint(str(part), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=True)
        torch.save(_random_state(engine.device), part / _random_file(ranks.rank))
    wait_for_all()
    if ranks.is_first:
        _check_shared(part, ranks)
        with writing(part):
            (part / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
            _flush(part)
            part.rename(folder)
            sync(run_dir)
        for _, old in list_checkpoints(run_dir)[: -keep if keep else 0]:
            _remove(old)
        logger.info("checkpoint written to %s", folder)
    wait_for_all()
    return folder


def _check_shared(part: Path, ranks: Ranks) -> None:
    """See that all ranks have written to the same folder.

    Raises:
        ConfigError: they have not.
    """
    missing = [rank for rank in range(ranks.world) if not (part / _random_file(rank)).is_file()]
    if missing:
        raise ConfigError(
            f"{part} has no files of the ranks {missing}, which have just written theirs: it lies on a disk that not "
            "all machines share. Give an absolute --output_dir that they do."
        )


def _remove(old: Path) -> None:
    """Remove a checkpoint that newer ones replace. The run does not end where that fails: the new one is complete."""
    leaving = old.with_name(f"{old.name}.tmp")
    try:
        old.rename(leaving)
        shutil.rmtree(leaving)
    except OSError as error:
        place = error.filename or old
        logger.warning("%s cannot be removed (%s): remove it by hand", place, error.strerror or error)


def load(engine: Any, optimizer: torch.optim.Optimizer, folder: Path, ranks: Ranks, *, is_converted: bool) -> None:
    """Bring engine and random state to where a checkpoint left them; all ranks call this together.

    Args:
        engine: the DeepSpeed engine, new.
        optimizer: the optimizer that the engine was made with.
        folder: the checkpoint.
        ranks: place of this rank.
        is_converted: whether to load what :func:`convert` made.

    Raises:
        ConfigError: parts of the checkpoint are missing.
    """
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        path, _ = engine.load_checkpoint(
            str(folder), tag=UNIVERSAL_TAG if is_converted else ENGINE_TAG, custom_load_fn=_load_trained
        )
        random_state = None if is_converted else torch.load(folder / _random_file(ranks.rank), weights_only=True)
    except FileNotFoundError as error:
        raise ConfigError(f"{folder} is incomplete: {error}. {_RESUME_FROM_ANOTHER}") from error
    except (pickle.UnpicklingError, EOFError, KeyError) as error:
        raise ConfigError(
            f"{folder} is damaged: a file does not hold what a checkpoint has there ({error}). {_RESUME_FROM_ANOTHER}"
        ) from error
    if path is None:
        raise ConfigError(f"{folder} holds no state of the engine. Resume from another checkpoint.")
    if random_state is None:  # of other ranks: it stays what it was before
        for group, own in zip(optimizer.param_groups, options):
            group.update(own)
        for state in optimizer.state.values():
            state.update({key: value.clone() for key, value in state.items() if key == "step"})
        return
    torch.set_rng_state(random_state["cpu"])
    if engine.device.type == "cuda":
        torch.cuda.set_rng_state(random_state["device"], engine.device)


def convert(folder: Path, ranks: Ranks) -> None:
    """Make the universal form of a checkpoint where it is not there yet; all ranks call this together.

    Raises:
        ConfigError: DeepSpeed cannot convert it.
    """
    out, part = folder / UNIVERSAL_TAG, folder / f"{UNIVERSAL_TAG}.tmp"
    if ranks.is_first and not out.is_dir():
        shutil.rmtree(part, ignore_errors=True)
        logger.info("%s is of another number of ranks: its state is dealt out anew", folder)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        options = {"input_folder": folder / ENGINE_TAG, "output_folder": part}
        workers = {"num_extract_workers": 1, "num_merge_workers": 1}
        for name, value in {**options, **workers}.items():
            command += [f"--{name}", str(value)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ConfigError(f"{folder} cannot be dealt out to {ranks.world} ranks: {last}. Resume from another one.")
        _flush(part)
        part.rename(out)
    wait_for_all()


@contextmanager
def _without_frozen(module: torch.nn.Module) -> Iterator[None]:
    """Leave frozen parameters out of ``state_dict``, under all their names: DeepSpeed knows one of a tied one."""

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
    """Load what a checkpoint holds of a model: all but the frozen parameters."""
    found = dst.load_state_dict(src, strict=False)
    wrong = {*found.missing_keys} ^ _frozen_names(dst) | {*found.unexpected_keys}
    if wrong:
        raise ConfigError(
            "the checkpoint to resume from does not hold exactly the weights that are trained "
            f"({', '.join(sorted(wrong)[:3])}): resume from another one."
        )


def _frozen_names(module: torch.nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters(remove_duplicate=False) if not parameter.requires_grad}


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _random_file(rank: int) -> str:
    return f"random-{rank:05d}.pt"


def _flush(folder: Path) -> None:
    """Bring a folder with all its files to the disk, so that the rename cannot get there before them."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
