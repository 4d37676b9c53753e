"""Saving: state of the engine and the random generators -> a checkpoint of :mod:`train.run.run_dir`.

The files of a rank are written while training waits, or serialized to host memory at once and written by a thread
while training continues. In both cases, the file with a rank's random state comes last and says that the rank's files
are complete. When all ranks have theirs, a thread of the first rank names the checkpoint. DeepSpeed 0.19's own
background writer would not do: it loses files without an error if its process ends, and gives up after five minutes.

Checkpoints hold no frozen parameters. A run reads those from the checkpoint that it started from, which its settings
name, so checkpoints of a run that trains adapters are small.

Cost: 12 to 16 bytes per trained parameter, written by all ranks in parallel to a file system that all of them share.
In the background, each rank holds its part in host memory until it is written.
"""

from __future__ import annotations

import io
import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch

from schemas.errors import ConfigError
from schemas.wording import listed
from storage.files import sync, sync_tree, write_synced
from train.model.disk import writing
from train.run.engine import Engine, frozen_names
from train.run.process_group import Ranks, barrier
from train.run.run_dir import ENGINE_TAG, STATE_FILE, RunState, list_checkpoints, random_state_file

logger = logging.getLogger(__name__)

_LOOK_AGAIN_S = 0.5
"""Time between two looks for the files of other ranks."""


class Saver:
    """Writes the checkpoints of a run, one at a time. All ranks make the same calls."""

    def __init__(self, run_dir: Path, ranks: Ranks, *, max_checkpoints: int | None) -> None:
        """Start without a checkpoint to write.

        Args:
            run_dir: folder of the run.
            ranks: position of this rank.
            max_checkpoints: remove older checkpoints so that this many remain; None keeps all.
        """
        self._run_dir = run_dir
        self._ranks = ranks
        self._max_checkpoints = max_checkpoints
        self._writer: _Writer | None = None

    def save(self, engine: Engine, state: RunState, *, in_background: bool) -> None:
        """Write a checkpoint. Collective.

        Args:
            engine: the engine, between two steps.
            state: contents of ``state.json``.
            in_background: return when the state is in host memory. :meth:`check` and :meth:`finish` then report errors.

        Raises:
            VlprepError: this checkpoint, or the one before, cannot be written.
        """
        self.finish()
        folder = self._run_dir / f"checkpoint-{state.step}"
        temporary = folder.with_name(f"{folder.name}.tmp")
        if self._ranks.is_first:
            with writing(temporary):
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        barrier()
        with writing(temporary), _without_frozen(engine.module), _captured(engine, in_background) as files:
            engine.save_checkpoint(str(temporary), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=True)
        marker = temporary / random_state_file(self._ranks.rank)
        files.append((marker, _serialize(_random_state(engine.device))))
        name = partial(self._name, temporary, folder, state) if self._ranks.is_first else None
        self._writer = _Writer(temporary, files, self._ranks, name)
        self._writer.start()
        if not in_background:
            self.finish()

    def check(self) -> None:
        """Raise what went wrong in the background.

        Raises:
            VlprepError: the checkpoint cannot be written.
        """
        if self._writer is not None:
            self._writer.check()

    def finish(self) -> None:
        """Wait until the checkpoint is complete, if one is being written. Collective.

        Raises:
            VlprepError: it cannot be written.
        """
        if self._writer is None:
            return
        self._writer.wait_written()
        barrier()
        self._writer.wait_named()
        barrier()
        self._writer = None

    def _name(self, temporary: Path, folder: Path, state: RunState) -> None:
        """Give a checkpoint its name, now that all its files are there, and remove old ones."""
        (temporary / STATE_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2) + b"\n")
        sync_tree(temporary)  # so that the rename cannot become durable before it
        temporary.rename(folder)
        sync(self._run_dir)
        logger.info("checkpoint written to %s", folder)
        for _, old in list_checkpoints(self._run_dir)[: -self._max_checkpoints if self._max_checkpoints else 0]:
            _remove(old)


class _Writer(threading.Thread):
    """Writes the files of this rank; on the first rank, then waits for those of the others and names the checkpoint."""

    def __init__(
        self, folder: Path, files: list[tuple[Path, io.BytesIO]], ranks: Ranks, name: Callable[[], None] | None
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)  # a run that fails does not wait for it
        self._folder, self._files, self._ranks, self._give_name = folder, files, ranks, name
        self._is_written = threading.Event()
        self._are_all_written = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            with writing(self._folder):
                while self._files:
                    path, contents = self._files.pop(0)
                    write_synced(path, contents.getbuffer())
                    del contents
                self._is_written.set()
                if self._give_name is not None:
                    self._wait_for_ranks()
                    self._give_name()
        except BaseException as error:  # noqa: BLE001 - the training thread raises it, whatever it is
            self._error = error
        finally:
            self._is_written.set()

    def check(self) -> None:
        """Raise what went wrong so far."""
        if self._error is not None:
            raise self._error

    def wait_written(self) -> None:
        """Wait until the files of this rank are written."""
        self._is_written.wait()
        self.check()

    def wait_named(self) -> None:
        """Wait until the checkpoint has its name, if this rank gives it. All ranks have written their files."""
        self._are_all_written.set()
        self.join()
        self.check()

    def _wait_for_ranks(self) -> None:
        """Wait until the files of all ranks are here.

        Raises:
            ConfigError: the files of some ranks are elsewhere.
        """
        while True:
            must_be_here = self._are_all_written.is_set()
            # Listing a folder of a network file system sees new files; looking for a file may remember that it was not.
            names = {path.name for path in self._folder.iterdir()}
            missing = [rank for rank in range(self._ranks.world) if random_state_file(rank) not in names]
            if not missing:
                return
            if must_be_here:
                raise ConfigError(
                    f"{self._folder} has no files of {listed('rank', missing)}, though they were just written: the "
                    "folder is on a disk that the machines do not share. Give an absolute --output_dir that they do."
                )
            self._are_all_written.wait(_LOOK_AGAIN_S)


class _Memory:
    """Stands in for DeepSpeed's checkpoint engine, and serializes files to host memory instead of writing them."""

    def __init__(self, usual: Any, files: list[tuple[Path, io.BytesIO]]) -> None:
        self._usual, self._files = usual, files

    def __getattr__(self, name: str) -> Any:
        return getattr(self._usual, name)

    def save(self, state_dict: Any, path: str) -> None:
        """Serialize a file."""
        self._files.append((Path(path), _serialize(state_dict)))


@contextmanager
def _captured(engine: Engine, in_background: bool) -> Iterator[list[tuple[Path, io.BytesIO]]]:
    """Yield the files that the engine serializes in the ``with`` block; if not in the background, it writes them."""
    files: list[tuple[Path, io.BytesIO]] = []
    usual = engine.checkpoint_engine
    if in_background:
        engine.checkpoint_engine = _Memory(usual, files)
    try:
        yield files
    finally:
        engine.checkpoint_engine = usual


@contextmanager
def _without_frozen(module: torch.nn.Module) -> Iterator[None]:
    """Drop frozen parameters from ``state_dict`` under all their names: DeepSpeed drops tied ones under one name."""

    def drop(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
        for name in frozen_names(module):
            state.pop(prefix + name, None)

    hooked: Any = module  # torch annotates this method only in part
    handle = hooked.register_state_dict_post_hook(drop)
    try:
        yield
    finally:
        handle.remove()


def _serialize(state: Any) -> io.BytesIO:
    contents = io.BytesIO()
    torch.save(state, contents)
    return contents


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def _remove(old: Path) -> None:
    """Remove an outdated checkpoint. A failure does not end the run, since the newer checkpoint is complete."""
    temporary = old.with_name(f"{old.name}.tmp")
    try:
        old.rename(temporary)
        shutil.rmtree(temporary)
    except OSError as error:
        logger.warning("%s cannot be removed (%s): remove it by hand", error.filename or old, error.strerror or error)
