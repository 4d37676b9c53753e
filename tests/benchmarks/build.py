"""Speed of a full build compared with the reference's image processor: ``python -m tests.benchmarks.build``.

The corpus is photographs (generated, about a megapixel each, or ``--images DIR``), each with a question and an answer.
In turns, in one run, on the same files and cores, each in a fresh process:

- the Pillow pipeline of transformers: open the image, run ``Qwen2VLImageProcessorPil``, with a process per core;
- ``vlprep build``: index, scan, plan, write, seal, with a worker per core, into an empty folder.

Starting the interpreter and importing are not counted. Start-up that does not depend on size (decoders, workers,
tables) is counted, and also measured alone by a build of one image. Wall seconds are the best of the rounds. Processor
seconds of all processes together are shown too, because other programs disturb these less.

``--profile`` needs perf. It shows in which libraries workers and decoders spend their processor time, for images,
document pages, large images, videos and texts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from demo.tiny_model import write_tiny_checkpoint
from schemas.wording import counted
from storage.shard_set import read_manifest
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.photographs import write_photographs
from tests.benchmarks.profiling import profile_builds

REPOSITORY = Path(__file__).resolve().parents[2]
SHARD_BYTES = 1 << 26
"""An eighth of the default, so that a small corpus still fills enough shards to keep all workers busy."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Wall seconds and seconds of processor time of all processes, of one run."""

    wall_s: float
    cpu_s: float

    def minimum(self, other: Cost) -> Cost:
        """The smaller of both figures."""
        return Cost(min(self.wall_s, other.wall_s), min(self.cpu_s, other.cpu_s))


def _timed(program: Sequence[str]) -> Cost:
    done = subprocess.run(program, capture_output=True, text=True, cwd=REPOSITORY)
    if done.returncode:
        raise click.ClickException(f"{' '.join(program)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def reference(python: str, paths: Path, cores: int) -> Cost:
    """Cost of the reference on all images, with as many processes as cores."""
    return _timed([python, "-m", "tests.benchmarks.timed_reference", str(cores), str(paths)])


def build(annotations: Path, media_root: Path, out: Path, model: Path, cores: int) -> Cost:
    """Cost of ``vlprep build`` with as many workers as cores."""
    program = [sys.executable, "-m", "tests.benchmarks.timed_build", str(cores), str(annotations), "--out", str(out)]
    program += ["--media-root", str(media_root), "--model", str(model), "--workers", str(cores)]
    program += ["--shard-bytes", str(SHARD_BYTES)]
    return _timed(program)


def annotate(images: Path, folder: Path, num_samples: int) -> Path:
    """Write annotations for the JPEG files below ``images``."""
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.jp*g"))[:num_samples]
    turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A photograph."}]
    path = folder / "annotations.jsonl"
    path.write_text("".join(json.dumps({"image": name, "conversations": turns}) + "\n" for name in names))
    return path


def compare(annotations: Path, images: Path, folder: Path, model: Path, rounds: int, reference_python: str) -> None:
    """Measure both on one core and on all, and print the table."""
    names = [json.loads(line)["image"] for line in annotations.read_text().splitlines()]
    paths = [images / name for name in names]
    listed = folder / "paths.json"
    listed.write_text(json.dumps([str(path.absolute()) for path in paths]))
    single = folder / "single.jsonl"
    single.write_text(annotations.read_text().splitlines()[0] + "\n")
    cores = sorted({1, len(os.sched_getaffinity(0))})
    best: dict[tuple[str, int], Cost] = {}
    for turn in range(rounds):
        for num_cores in cores:
            runs = {
                "reference": reference(reference_python, listed, num_cores),
                "build": build(annotations, images, folder / f"{turn}-{num_cores}", model, num_cores),
                "build of one": build(single, images, folder / f"single-{turn}-{num_cores}", model, num_cores),
            }
            for name, cost in runs.items():
                key = (name, num_cores)
                best[key] = cost.minimum(best.get(key, cost))
    counts = read_manifest(folder / f"0-{cores[0]}").counts
    megapixels = sum(_megapixels(path) for path in paths) / len(paths)
    size = f"{len(paths)} images of {megapixels:.2f} megapixels, {counts.num_tokens:,} tokens in {counts.num_bins} bins"
    click.echo(f"{size}; best of {counted(rounds, 'round')}, load {os.getloadavg()[0]:.1f} at the end\n")
    click.echo(f"{'':<22}{'cores':>6}{'wall ms/image':>15}{'cpu ms/image':>14}{'images/s':>10}{'tokens/s':>10}")
    for (name, num_cores), cost in best.items():
        if name != "build of one":
            click.echo(
                f"{name:<22}{num_cores:>6}{cost.wall_s / len(paths) * 1e3:>15.2f}{cost.cpu_s / len(paths) * 1e3:>14.2f}"
                f"{len(paths) / cost.wall_s:>10.1f}{counts.num_tokens / cost.wall_s:>10,.0f}"
            )
    for num_cores in cores:
        ours, theirs, fixed = (best[name, num_cores] for name in ("build", "reference", "build of one"))
        click.echo(
            f"build / reference, {counted(num_cores, 'core')}: wall {ours.wall_s / theirs.wall_s:.2f}, processor time "
            f"{ours.cpu_s / theirs.cpu_s:.2f} (without start-up, {fixed.wall_s:.1f} s and "
            f"{fixed.cpu_s:.1f} s: {(ours.wall_s - fixed.wall_s) / theirs.wall_s:.2f}, "
            f"{(ours.cpu_s - fixed.cpu_s) / theirs.cpu_s:.2f})"
        )
    if len(cores) > 1:
        serial, parallel = best["build", cores[0]], best["build", cores[-1]]
        speed_up = best["reference", cores[0]].wall_s / best["reference", cores[-1]].wall_s
        click.echo(
            f"1 to {cores[-1]} workers: {serial.wall_s / parallel.wall_s:.2f} times as fast (the reference: "
            f"{speed_up:.2f})"
        )


def _megapixels(path: Path) -> float:
    from PIL import Image

    with Image.open(path) as image:
        return image.width * image.height / 1e6


@click.command()
@click.option("--samples", "num_samples", type=click.IntRange(min=8), default=800, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of JPEG files.")
@click.option("--reference-python", help="Interpreter of the reference, with another Pillow.  [default: this one]")
@click.option("--profile", is_flag=True, help="Show where the processor time goes instead.")
def main(num_samples: int, rounds: int, images: Path | None, reference_python: str | None, profile: bool) -> None:
    """Compare a full build with the reference's image processor."""
    click.echo(describe_machine("numpy", "transformers", "tokenizers", "zstandard"))
    from prep.engines.software import software_versions

    click.echo(
        "software of the build: " + ", ".join(f"{name} {version}" for name, version in software_versions().items())
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        write_tiny_checkpoint(model)
        if images is None:
            images = folder / "images"
            annotations = write_photographs(images, num_samples)
        else:
            annotations = annotate(images, folder, num_samples)
        if profile:
            profile_builds(annotations, images, folder, model)
        else:
            compare(annotations, images, folder, model, rounds, reference_python or sys.executable)


if __name__ == "__main__":
    main()
