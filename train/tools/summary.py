"""The results of a run in four lines: a folder of shards and a run folder -> a text.

``python -m train.tools.summary SHARDS RUN`` is the last step of ``make demo``.

Cost: reading the manifests and ``metrics.jsonl``; most of its few seconds are spent importing the trainer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import click
import msgspec

from schemas.errors import ConfigError
from schemas.manifest import Manifest
from schemas.wording import counted
from train.exits import guarded
from train.run.metrics import METRICS_FILE
from train.run.run_dir import FINAL_DIR
from train.shards.index import open_shards


class LoggedStep(msgspec.Struct, frozen=True):
    """The fields of a line of ``metrics.jsonl`` that the summary uses."""

    step: int
    loss: float | None
    tokens_per_s: float


def summarise(shards: Path, run: Path) -> str:
    """Summarise samples packed and rejected, fill, speed, first and last loss, and the path of the model.

    Args:
        shards: a folder with a manifest, or one whose sub-folders have manifests.
        run: ``--output_dir`` of a finished run.

    Returns:
        Four lines, without a trailing newline.

    Raises:
        ShardError: the shards are incomplete.
        ConfigError: the run has no metrics, or is not finished.
    """
    manifests = open_shards(shards).manifests
    steps = read_metrics(run / METRICS_FILE)
    final = run / FINAL_DIR
    if not final.is_dir():
        raise ConfigError(f"{run} has no trained model ({final} is missing): the run is not finished. Resume it.")
    losses = [step.loss for step in steps if step.loss is not None] or [float("nan")]
    # The first logged step includes the warm-up of the process.
    speed = statistics.median(step.tokens_per_s for step in steps[1:] or steps)
    rows = [
        ("shards", f"{shards}: {_packed(manifests)}"),
        ("rejected", _rejected(manifests)),
        (
            "training",
            f"{counted(steps[-1].step, 'step')} at {speed:,.0f} tokens/s, loss {losses[0]:.3f} -> {losses[-1]:.3f}",
        ),
        ("model", str(final)),
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def read_metrics(path: Path) -> list[LoggedStep]:
    """Read the logged steps of a run; there is at least one.

    Raises:
        ConfigError: the file is missing or empty, or a line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path} ({error.strerror}): pass the --output_dir of a run.") from error
    steps = []
    for line_number, line in enumerate(lines, start=1):
        try:
            steps.append(msgspec.json.decode(line, type=LoggedStep))
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}:{line_number} is not a logged step: {error}.") from error
    if not steps:
        raise ConfigError(f"{path} is empty: the run has not logged a step yet. Resume it.")
    return steps


def _packed(manifests: tuple[Manifest, ...]) -> str:
    num_packed = sum(manifest.counts.num_packed for manifest in manifests)
    num_bins = sum(manifest.counts.num_bins for manifest in manifests)
    num_tokens = sum(manifest.counts.num_tokens for manifest in manifests)
    capacity = sum(manifest.counts.num_bins * manifest.settings.max_length for manifest in manifests)
    return f"{counted(num_packed, 'sample')} packed into {counted(num_bins, 'bin')}, {num_tokens / capacity:.1%} filled"


def _rejected(manifests: tuple[Manifest, ...]) -> str:
    num_rejected = sum(manifest.counts.num_rejected for manifest in manifests)
    codes: Counter[str] = Counter()
    for manifest in manifests:
        codes.update(manifest.counts.rejects_by_code)
    reasons = ", ".join(
        f"{code} {count:,}" for code, count in sorted(codes.items(), key=lambda item: (-item[1], item[0]))
    )
    return f"{num_rejected:,}" + (f" ({reasons})" if reasons else "")


@click.command(
    name="python -m train.tools.summary",
    epilog="\b\nExamples:\n"
    "  python -m train.tools.summary shards/mine runs/mine\n"
    "  python -m train.tools.summary shards/ runs/mine",
)
@click.argument("shards", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
@guarded
def main(shards: Path, run: Path) -> None:
    """Print the results of training on SHARDS; RUN is the --output_dir of the run."""
    click.echo(summarise(shards, run))


if __name__ == "__main__":
    main()
