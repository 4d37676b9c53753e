"""Memory of a build with millions of annotations: ``python -m tests.benchmarks.memory --annotations 1000000``.

Text-only annotations of one short exchange -> ``vlprep build`` with some workers, watched from outside: peak memory of
its workers, and of the planning process in every stage, in total and per annotation. Memory is the proportional set
size (a page shared by several processes is divided among them). A build of tiny samples without media has more samples
per byte than any real one, so this is the worst case for everything that is held per sample.

The table of bins grows with bins, not with samples. ``--max-length`` makes bins as small as you like.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import click
import msgspec
import psutil

from demo.tiny_model import write_tiny_checkpoint
from prep.build.metrics import BuildMetrics
from schemas.manifest import METRICS_FILE
from storage.shard_set import read_manifest
from tests.benchmarks.machine import describe_machine

_PERIOD_S = 0.5
_BLOCK = 100_000


def write_annotations(path: Path, num_annotations: int) -> None:
    """Write annotations of one exchange, all different, of about 40 tokens each."""
    with path.open("w", encoding="ascii") as file:
        for first in range(0, num_annotations, _BLOCK):
            file.writelines(
                f'{{"id": "chat-{index:09d}", "conversations": [{{"from": "human", "value": "What follows {index}?"'
                f'}}, {{"from": "gpt", "value": "{index + 1}{", and so on" * (index % 7)}."}}]}}\n'
                for index in range(first, min(first + _BLOCK, num_annotations))
            )


class Watch:
    """Memory of a process and of its children, while it runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._start = time.perf_counter()
        self.planner: list[tuple[float, int]] = []
        self.workers: dict[int, int] = defaultdict(int)

    def look(self) -> None:
        """Record the memory used now."""
        try:
            self.planner.append((time.perf_counter() - self._start, self._process.memory_full_info().pss))
            for child in self._process.children(recursive=True):
                if "resource_tracker" not in " ".join(child.cmdline()):
                    self.workers[child.pid] = max(self.workers[child.pid], child.memory_full_info().pss)
        except psutil.Error:
            return

    def peaks(self, stages_s: dict[str, float]) -> dict[str, int]:
        """Peak bytes of the planning process in each stage, by their durations. The last stage ends last."""
        end = self.planner[-1][0]
        peaks: dict[str, int] = {}
        for stage, seconds in reversed(stages_s.items()):
            start = max(0.0, end - seconds)
            # A stage between two samples gets the earlier one.
            peaks[stage] = max(
                [num for at, num in self.planner if start <= at <= end]
                or [num for at, num in self.planner if at <= end][-1:]
            )
            end = start
        return dict(reversed(peaks.items()))


def build(annotations: Path, out: Path, model: Path, options: Sequence[str]) -> Watch:
    """Run ``vlprep build`` and watch it.

    Raises:
        RuntimeError: it fails.
    """
    program = Path(sys.executable).with_name("vlprep")
    command = [str(program), "build", str(annotations), "--out", str(out), "--model", str(model)]
    with (out.parent / "build.log").open("wb") as log:
        process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
        watch = Watch(process.pid)
        while process.poll() is None:
            watch.look()
            time.sleep(_PERIOD_S)
    if process.returncode:
        raise RuntimeError((out.parent / "build.log").read_text()[-2000:])
    return watch


@click.command(name="python -m tests.benchmarks.memory")
@click.option("--annotations", "num_annotations", type=click.IntRange(min=1), default=200_000, show_default=True)
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True)
@click.option("--max-length", type=click.IntRange(min=64), default=4096, show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where files are written.  [default: a temporary one]")
def main(num_annotations: int, workers: int, max_length: int, folder: Path | None) -> None:
    """Build from many tiny annotations and measure the memory of every process."""
    click.echo(describe_machine("numpy", "pyarrow", "tokenizers"))
    with tempfile.TemporaryDirectory(dir=folder) as name:
        root = Path(name)
        write_tiny_checkpoint(root / "model", vocab_size=None)
        write_annotations(root / "annotations.jsonl", num_annotations)
        options = ["--workers", str(workers), "--max-length", str(max_length)]
        watch = build(root / "annotations.jsonl", root / "out", root / "model", options)
        metrics = msgspec.json.decode((root / "out" / METRICS_FILE).read_bytes(), type=BuildMetrics)
        counts = read_manifest(root / "out").counts
    click.echo(
        f"{num_annotations:,} annotations of {counts.num_tokens / counts.num_packed:.0f} tokens, {counts.num_bins:,} "
        f"bins, {workers} workers"
    )
    for stage, peak in watch.peaks(metrics.stages_s).items():
        click.echo(
            f"planning process, {stage:<6} {metrics.stages_s[stage]:7.1f} s  peak {peak / 1e6:7,.0f} MB  "
            f"{peak / num_annotations:7.1f} bytes per annotation"
        )
    for peak in sorted(watch.workers.values(), reverse=True)[:workers]:
        click.echo(f"worker                           peak {peak / 1e6:7,.0f} MB")


if __name__ == "__main__":
    main()
