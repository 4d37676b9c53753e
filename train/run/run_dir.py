"""The folder of a run: its lock, the checkpoints in it, and which of them to resume from.

``checkpoint-N`` holds the state after N steps::

    state.json          what the run is and how far it has come, see :class:`RunState`
    engine/             DeepSpeed's files, one of optimizer states per rank
    random-00000.pt …   random state of each rank
    universal/          DeepSpeed's universal form, made when the checkpoint is resharded

A checkpoint is written as ``checkpoint-N.tmp`` and renamed when all ranks have finished, so a folder named
``checkpoint-N`` is complete.
"""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import zipfile
from pathlib import Path
from typing import IO

import msgspec

from schemas.errors import ConfigError
from schemas.wording import counted
from storage.files import NO_LOCKS
from train.settings.batch import Aim
from train.settings.declarations import UNFUSED

logger = logging.getLogger(__name__)

FINAL_DIR, ADAPTER_DIR = "final", "adapter"
"""Folders of the trained model, and of its adapters alone."""

STATE_FILE = "state.json"
ENGINE_TAG = "engine"
UNIVERSAL_TAG = "universal"

RESUME_FROM_ANOTHER = (
    "Resume from another checkpoint, or remove this one: --resume auto then resumes from the one before."
)

BINS_OF_A_STEP = "bins of a step"
"""Name of the setting that flags count, or that follows from the samples of a step."""

ZERO_STAGE = "ZeRO stage"
"""Name of the setting that a run keeps when it resumes without naming a DeepSpeed file."""

_NAME = re.compile(r"checkpoint-(\d+)")

Setting = str | int | float | bool | None

UNRECORDED_SETTINGS: dict[str, Setting] = {
    "warmup_steps": None,
    "optim": UNFUSED,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "tf32": None,
}
"""Settings that checkpoints of older versions do not record, with the values that these had."""


class RunState(msgspec.Struct, frozen=True, kw_only=True):
    """What a run is, and how far it has come.

    Attributes:
        stream: state of the stream of bins, see :meth:`train.order.dealing.DataOrder.state_dict`.
        ranks: number of ranks that saved it.
        settings: those that must be the same when the run is resumed.
        shards: ``--shards`` of that run, without signatures; empty in checkpoints of older versions.
        aim: the samples that a step should have, with which the run began; None if flags count bins.
    """

    stream: dict[str, int]
    ranks: int
    settings: dict[str, Setting]
    shards: str = ""
    aim: Aim | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done, which is the index of the next step of the stream."""
        return self.stream["step"]


def lock_run_dir(run_dir: Path) -> IO[bytes]:
    """Create the folder of a run and lock it until the returned file is closed or the process ends.

    Raises:
        ConfigError: the folder is not writable, or another run has locked it.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = (run_dir / ".lock").open("ab")
    except OSError as error:
        reason = "it is not a folder" if isinstance(error, FileExistsError) else error.strerror
        raise ConfigError(f"--output_dir {run_dir} cannot be written: {reason}. Give another one.") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise ConfigError(
            f"--output_dir {run_dir} is in use by another run: stop it, or give another folder."
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            lock.close()
            raise ConfigError(
                f"--output_dir {run_dir} cannot be locked: {error.strerror}. Give another one."
            ) from error
        logger.warning(
            "the file system of --output_dir %s has no locks (%s): make sure that no other run writes to it",
            run_dir,
            error.strerror,
        )
    return lock


def remove_unfinished(run_dir: Path) -> None:
    """Remove checkpoints that a run left unfinished because it was killed or the disk was full."""
    for path in run_dir.glob("checkpoint-*.tmp"):
        logger.info("removing %s: it was never finished", path)
        shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the complete checkpoints of a run, oldest first."""
    matches = ((_NAME.fullmatch(path.name), path) for path in run_dir.glob("checkpoint-*") if path.is_dir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def choose_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """The checkpoint that ``--resume`` selects: ``auto``, ``none`` or a path.

    Returns:
        Folder of a checkpoint, or None to start from the beginning.

    Raises:
        ConfigError: there is no such checkpoint, or the run has newer ones, which a later ``auto`` would mistake for
            checkpoints of this run.
    """
    existing = list_checkpoints(run_dir)
    if resume == "auto":
        return existing[-1][1] if existing else None
    chosen = None if resume == "none" else Path(resume)
    step = 0 if chosen is None else read_state(chosen).step
    if existing and existing[-1][0] > step:
        raise ConfigError(
            f"--resume {resume} starts at step {step}, but {existing[-1][1]} is later. Resume from it, remove it, or "
            "give another --output_dir."
        )
    return chosen


def read_state(folder: Path) -> RunState:
    """Read ``state.json`` of a checkpoint.

    Raises:
        ConfigError: the folder is not a complete checkpoint.
    """
    path = folder / STATE_FILE
    try:
        state = msgspec.json.decode(path.read_bytes(), type=RunState)
        if "step" not in state.stream:
            raise msgspec.ValidationError("no step in stream")
        return state
    except (OSError, msgspec.MsgspecError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(
            f"{folder} is not a complete checkpoint to resume from ({path.name}: {reason}). "
            "Give a checkpoint-N of a run."
        ) from error


def check_files(folder: Path) -> None:
    """Check that a checkpoint has the files of every rank that saved it, and that none is truncated.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    state = read_state(folder)
    files = sorted((folder / ENGINE_TAG).glob("*_states.pt"))
    num_optimizer_files = sum(path.name.endswith("_optim_states.pt") for path in files)
    num_model_files = len(files) - num_optimizer_files
    if num_optimizer_files != state.ranks or num_model_files == 0:
        raise ConfigError(
            f"{folder} is incomplete: {folder / ENGINE_TAG} has {counted(num_optimizer_files, 'file')} of optimizer "
            f"states and {num_model_files} of the model, but {counted(state.ranks, 'rank')} saved it. "
            f"{RESUME_FROM_ANOTHER}"
        )
    for path in (*files, *(folder / random_state_file(rank) for rank in range(state.ranks))):
        # torch writes zip archives, which end with their directory: a truncated one has none.
        if not path.is_file() or not zipfile.is_zipfile(path):
            problem = "truncated or damaged" if path.is_file() else "missing"
            raise ConfigError(f"{path} is {problem}. {RESUME_FROM_ANOTHER}")


def check_shards(folder: Path, saved: RunState, fingerprint: Setting, shards: str) -> None:
    """Compare the shards of a checkpoint with those of this run, and name both.

    Args:
        folder: the checkpoint.
        saved: its state.
        fingerprint: identifies the bins of this run.
        shards: its ``--shards``, without signatures.

    Raises:
        ConfigError: the shards differ.
    """
    if saved.shards and saved.settings.get("shards") != fingerprint:
        problem = f"this run has --shards {shards}"
        if saved.shards == shards:
            problem = "they were built again since then, with other bins"
        raise ConfigError(
            f"{folder} was saved with --shards {saved.shards}, but {problem}: it would not be the same run. "
            "Give the same shards, or --resume none with another --output_dir."
        )


def check_settings(folder: Path, saved: RunState, settings: dict[str, Setting]) -> None:
    """Compare the settings of a checkpoint with those of this run.

    Raises:
        ConfigError: a setting differs.
    """
    for name, value in settings.items():
        before = saved.settings.get(name, UNRECORDED_SETTINGS.get(name, "nothing"))
        if before != value:
            same = _same_bins(saved.aim, before) if name == BINS_OF_A_STEP else "the same setting"
            raise ConfigError(
                f"{folder} was saved with {name} = {shown(before)}, this run has {shown(value)}: it would not be the "
                f"same run. Give {same}, or --resume none with another --output_dir."
            )


def shown(value: object) -> object:
    """A setting as messages show it."""
    return "none" if value is None else value


def _same_bins(aim: Aim | None, bins: Setting) -> str:
    """Flags that give a step the bins that it began with."""
    if aim is not None:
        return f"--samples_per_step {aim.samples}"
    return f"--per_device_train_batch_size and --gradient_accumulation_steps whose product, times the ranks, is {bins}"


def random_state_file(rank: int) -> str:
    """Name of the file with the random state of a rank."""
    return f"random-{rank:05d}.pt"
