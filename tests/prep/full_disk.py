"""Builds onto a small disk that becomes full or read-only; for ``test_faults``.

``unshare --user --map-root-user --mount python -m tests.prep.full_disk ANNOTATIONS MODEL FOLDER`` mounts file systems
in memory in its own namespace, one for each of :data:`MODES`. It builds onto them, prints the outcomes of all runs by
mode (JSON), and copies the shards to ``FOLDER/MODE/shards``.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from click.testing import CliRunner

import prep.build.pipeline
import prep.build.seal
from prep.cli import main as vlprep

STAGES = {
    "scan": "prep.build.pipeline.scan_chunk",
    "write": "prep.build.pipeline.write_shard",
    "ledger": "prep.build.pipeline.Ledger.write",
    "bins": "prep.build.pipeline.seal",
    "manifest": "prep.build.seal.write_synced",
}
"""The function of each stage before which the disk becomes full."""


class Disk:
    """A file system in memory, mounted at ``path``."""

    def __init__(self, path: Path, size: str) -> None:
        self.path = path
        self._ballast = path / "ballast"
        path.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True)

    def fill(self) -> None:
        """Use up all free space."""
        with self._ballast.open("ab", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    @contextmanager
    def full_before(self, name: str) -> Iterator[None]:
        """Fill the disk when a function is called; free the space at the end of the block."""
        real: Callable[..., Any] = functools.reduce(getattr, name.split(".")[1:], prep)

        def called(*arguments: Any, **named: Any) -> Any:
            self.fill()
            return real(*arguments, **named)

        with patch(name, called):
            yield
        self._ballast.unlink()


MODES = ("stages", "workers", "read-only")
"""Full before each of the stages, full under worker processes, read-only."""


def build_onto_disk(mode: str, annotations: str, model: str, folder: Path) -> list[dict[str, Any]]:
    """Build onto a disk with a fault, then without; returns the outcome of every run."""
    disk = Disk(folder / "disk", "64m")
    runs: list[dict[str, Any]] = []

    def run(name: str, workers: int = 1) -> None:
        command = ["build", annotations, "--out", str(disk.path), "--model", model, "--max-length", "1200"]
        command += ["--shard-bytes", "1500000", "--workers", str(workers)]
        result = CliRunner().invoke(vlprep, command)
        left = sorted(str(path.relative_to(disk.path)) for path in disk.path.rglob("*.tmp"))
        sealed = (disk.path / "manifest.json").exists()
        runs.append({"run": name, "code": result.exit_code, "says": result.output, "left": left, "sealed": sealed})

    if mode == "stages":
        for stage, function in STAGES.items():
            with disk.full_before(function):
                run(stage)
    elif mode == "workers":
        disk.remount("size=200k")
        run("small", workers=2)
        disk.remount("size=64m")
    else:
        disk.remount("ro")
        run("read-only")
        disk.remount("rw")
    run("last", workers=2 if mode == "workers" else 1)
    shutil.copytree(disk.path, folder / "shards")
    return runs


def main(annotations: str, model: str, folder: str) -> None:
    json.dump({mode: build_onto_disk(mode, annotations, model, Path(folder) / mode) for mode in MODES}, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
