"""What a run came to, in four lines: a folder of shards and the folder of a run -> a text.

``python -m train.tools.summary SHARDS RUN`` ends ``make demo``.

Cost: the manifests and ``metrics.jsonl``; most of its seconds go into importing the trainer.
"""

from __future__ import annotations

import statistics
from collections import Counter
from pathlib import Path

import click
import msgspec

from schemas.errors import ConfigError, VlprepError
from schemas.manifest import Manifest
from train.run.metrics import METRICS_FILE
from train.run.plan import FINAL_DIR
from train.shards.index import open_shards


class LoggedStep(msgspec.Struct, frozen=True):
    """What the summary reads of a line of ``metrics.jsonl``; it has more fields."""

    step: int
    loss: float | None
    tokens_per_s: float


def summarise(shards: Path, run: Path) -> str:
    """Samples packed and rejected, fill, speed, first and last loss, where the model lies.

    Args:
        shards: a folder with a manifest, or one whose sub-folders have one.
        run: ``--output_dir`` of a finished training.

    Returns:
        Four lines, without a newline at the end.

    Raises:
        ShardError: the shards are incomplete.
        ConfigError: the run has no metrics, or did not end.
    """
    manifests = open_shards(shards).manifests
    steps = read_metrics(run / METRICS_FILE)
    final = run / FINAL_DIR
    if not final.is_dir():
        raise ConfigError(f"{run} has no trained model ({final} is missing): the training did not end. Start it again.")
    losses = [step.loss for step in steps if step.loss is not None] or [float("nan")]
    # the first window holds the warm-up of the process
    speed = statistics.median(step.tokens_per_s for step in steps[1:] or steps)
    rows = [
        ("shards", f"{shards}: {_packed(manifests)}"),
        ("rejected", _rejected(manifests)),
        ("training", f"{steps[-1].step} steps at {speed:,.0f} tokens/s, loss {losses[0]:.3f} -> {losses[-1]:.3f}"),
        ("model", str(final)),
    ]
    return "\n".join(f"{name:<10}{text}" for name, text in rows)


def read_metrics(path: Path) -> list[LoggedStep]:
    """Read the logged steps of a run, at least one.

    Raises:
        ConfigError: there is no such file, it is empty, or a line is damaged.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}): give the --output_dir of a training.") from error
    steps = []
    for number, line in enumerate(lines, start=1):
        try:
            steps.append(msgspec.json.decode(line, type=LoggedStep))
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{path}:{number} is not a logged step: {error}.") from error
    if not steps:
        raise ConfigError(f"{path} is empty: the training did not end its first step. Start it again.")
    return steps


def _packed(manifests: tuple[Manifest, ...]) -> str:
    num_packed = sum(manifest.counts.num_packed for manifest in manifests)
    num_bins = sum(manifest.counts.num_bins for manifest in manifests)
    num_tokens = sum(manifest.counts.num_tokens for manifest in manifests)
    capacity = sum(manifest.counts.num_bins * manifest.settings.max_length for manifest in manifests)
    return f"{num_packed:,} samples packed into {num_bins:,} bins, {num_tokens / capacity:.1%} filled"


def _rejected(manifests: tuple[Manifest, ...]) -> str:
    num_rejected = sum(manifest.counts.num_rejected for manifest in manifests)
    codes: Counter[str] = Counter()
    for manifest in manifests:
        codes.update(manifest.counts.rejects_by_code)
    reasons = ", ".join(
        f"{code} {number:,}" for code, number in sorted(codes.items(), key=lambda item: (-item[1], item[0]))
    )
    return f"{num_rejected:,}" + (f" ({reasons})" if reasons else "")


@click.command(name="python -m train.tools.summary")
@click.argument("shards", type=click.Path(path_type=Path))
@click.argument("run", type=click.Path(path_type=Path))
def main(shards: Path, run: Path) -> None:
    """Print what a training of SHARDS, written to RUN (its --output_dir), came to."""
    try:
        click.echo(summarise(shards, run))
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
