"""Speed of checking records and of indexing files: ``python -m tests.benchmarks.validation``.

Records of one exchange like those of LLaVA's instruction data, drawn from a seed -> records per second of
:func:`prep.annotations.validation.parse_record` on one core, next to those of ``json.loads`` alone, taken in turns in
one run, and megabytes per second of indexing an array and JSONL of the same records. The figures are the best of
several rounds, because other programs only ever slow a round down, and the median. Seconds are of processor time, so
that waiting for a busy core does not count.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import click
import numpy as np

from prep.annotations.records import index_file
from prep.annotations.validation import parse_record
from tests.benchmarks.machine import describe_machine

_WORDS = (
    "the a of in on with and is are what where how many picture shows left right behind front large small red green "
    "blue wooden table chair street person people dog cat car bicycle window standing holding wearing background"
)


def llava_record(rng: np.random.Generator, index: int) -> bytes:
    """One record: an image, a question of about ten words, an answer of about forty."""

    def words(mean: int) -> str:
        return " ".join(rng.choice(_WORDS.split(), int(rng.poisson(mean)) + 1))

    image = f"coco/train2017/{index:012d}.jpg"
    turns = [
        {"from": "human", "value": f"<image>\n{words(10)}?"},
        {"from": "gpt", "value": f"{words(40).capitalize()}."},
    ]
    return json.dumps({"id": f"{index:012d}", "image": image, "conversations": turns}).encode()


def _seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def _check_all(records: Sequence[bytes]) -> None:
    for record in records:
        annotation, problems, *_ = parse_record(record)
        if annotation is None or problems:
            raise RuntimeError(f"a record of the benchmark is not good: {problems}")


def _load_all(records: Sequence[bytes]) -> None:
    for record in records:
        json.loads(record)


def _line(name: str, seconds: Sequence[float], amount: float, unit: str) -> str:
    return f"{name:<34}{amount / min(seconds):>12,.0f}{amount / median(seconds):>12,.0f}  {unit}"


@click.command()
@click.option("--records", "num_records", type=click.IntRange(min=1), default=50_000, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--copies", type=click.IntRange(min=1), default=10, show_default=True, help="Size of the files.")
def main(num_records: int, rounds: int, copies: int) -> None:
    """Measure checking and indexing of records of one exchange."""
    rng = np.random.default_rng(0)
    records = [llava_record(rng, index) for index in range(num_records)]
    click.echo(describe_machine("msgspec", "numpy"))
    num_bytes = sum(map(len, records))
    click.echo(f"{num_records:,} records of one exchange, {num_bytes / num_records:.0f} bytes each; one core\n")
    click.echo(f"{'':<34}{'best':>12}{'median':>12}")
    checking, loading = [], []
    for _ in range(rounds):
        checking.append(_seconds(lambda: _check_all(records)))
        loading.append(_seconds(lambda: _load_all(records)))
    click.echo(_line("parse_record", checking, num_records, "records/s"))
    click.echo(_line("json.loads alone", loading, num_records, "records/s"))
    ratio = min(loading) / min(checking)
    click.echo(f"{'parse_record / json.loads':<34}{ratio:>12.2f}\n")
    with tempfile.TemporaryDirectory() as folder:
        for name, start, separator, end in (("a.jsonl", b"", b"\n", b"\n"), ("a.json", b"[", b",\n", b"]\n")):
            path = Path(folder) / name
            path.write_bytes(start + separator.join(records * copies) + end)
            size = path.stat().st_size
            indexing = [_seconds(partial(index_file, path, path.parent)) for _ in range(rounds)]
            num_indexed = index_file(path, path.parent).num_records
            if num_indexed != num_records * copies:
                raise RuntimeError(f"{num_indexed} records were counted in {path.name}")
            click.echo(_line(f"index_file {name} ({size / 1e6:.0f} MB)", indexing, size / 1e6, "MB/s"))


if __name__ == "__main__":
    main()
