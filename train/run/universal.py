"""DeepSpeed's universal form of a checkpoint: ``python -m train.run.universal ENGINE OUT``, without fragments on disk.

DeepSpeed 0.19's own converter reads every rank's file, writes each rank's fragment of each parameter to a file, reads
these back to join them, and removes them at the end. This program runs the same converter, but its fragments are views
of the ranks' files, which are mapped into memory. Worker processes join them, and only the joined parameters are
written. The files are equal.

Cost: the trained states are read once and written once. The disk holds as much again as the checkpoint, and no more at
any time. Memory: one parameter per worker.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

MAX_WORKERS = 16
"""More workers would wait for the file system, and hold a parameter of memory each."""

_ROOT = Path(__file__).resolve().parents[2]


def convert(engine: Path, out: Path) -> str | None:
    """Convert a checkpoint in a process of its own.

    Args:
        engine: the files of DeepSpeed's engine.
        out: folder to write; it does not exist.

    Returns:
        What went wrong; None if nothing did.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "train.run.universal", str(engine.resolve()), str(out.resolve())],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def main(engine: str, out: str, num_workers: int) -> None:
    """Convert a checkpoint in this process, whose torch and converter are changed."""
    import multiprocessing

    import torch
    from deepspeed.checkpoint import ds_to_universal
    from torch.utils.serialization import config

    multiprocessing.set_start_method("fork")  # workers share the fragments
    config.load.mmap = True
    # By folder and state of a parameter: the pieces of its ranks, and whole states such as its number of steps.
    fragments: defaultdict[tuple[str, str], dict[int, Any]] = defaultdict(dict)

    def note_fragment(
        folder: str, tp_index: int, dp_index: int, state: str, flat: Any, name: str, offset: int, size: int
    ) -> None:
        piece = flat.narrow(0, offset, size) if state != "step" and torch.is_tensor(flat) else flat
        fragments[os.path.join(folder, name), state][dp_index] = piece

    def join_fragments(folder: str, state: str, tp_degree: int, slice_shapes: Any = None) -> list[Any]:
        pieces = [piece for _, piece in sorted(fragments[folder, state].items())]
        if not pieces or state == "step":
            assert all(piece == pieces[0] for piece in pieces), f"{folder} has several counts of steps"
            return pieces[:1]
        joined = torch.cat(pieces)
        return [joined if slice_shapes is None else joined.reshape(slice_shapes[0])]

    def save(path: str, state: Any) -> None:
        # For ZeRO-3, the converter writes all states of the first rank into this file.
        save_any(path, _without_arrays(state) if path.endswith("optimizer_state.pt") else state)

    save_any = ds_to_universal._save_checkpoint
    ds_to_universal._save_checkpoint = save
    ds_to_universal.dump_param_fragment = note_fragment
    ds_to_universal._merge_zero_shards = join_fragments
    ds_to_universal.main(
        SimpleNamespace(
            input_folder=engine,
            output_folder=out,
            num_extract_workers=1,  # notes the fragments in this process
            num_merge_workers=num_workers,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def _without_arrays(state: Any) -> Any:
    """A copy of nested dicts and lists without the tensors in them that have a dimension."""
    if isinstance(state, dict):
        return {key: _without_arrays(value) for key, value in state.items() if not getattr(value, "ndim", 0)}
    if isinstance(state, list):
        return [_without_arrays(value) for value in state if not getattr(value, "ndim", 0)]
    return state


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], min(MAX_WORKERS, len(os.sched_getaffinity(0))))
