"""The summary of a run shows what was packed, how the loss fell, and where the model is."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from schemas.errors import ConfigError
from schemas.manifest import encode_manifest
from storage.shard_set import read_manifest
from tests.train.synthetic import make_bins, write_shards
from train.tools.summary import main, read_metrics, summarise


def _write_run(folder: Path, steps: list[tuple[int, float, float]]) -> Path:
    folder.mkdir()
    lines = [
        json.dumps({"step": step, "loss": loss, "tokens_per_s": speed, "epoch": 1.0}) for step, loss, speed in steps
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (folder / "final").mkdir()
    return folder


def _with_counts(folder: Path, **counts: object) -> Path:
    """Write shards whose manifest has these counts."""
    write_shards(folder, make_bins(num_bins=2))
    manifest = read_manifest(folder)
    changed = msgspec.structs.replace(manifest, counts=msgspec.structs.replace(manifest.counts, **counts))
    (folder / "manifest.json").write_bytes(encode_manifest(changed))
    return folder


def test_summary_of_a_run(tmp_path: Path) -> None:
    shards = _with_counts(
        tmp_path / "shards",
        num_packed=1390,
        num_rejected=3,
        rejects_by_code={"bad_json": 1, "media_missing": 2, "tag_mismatch": 1},
        num_bins=10,
        num_tokens=39_000,
    )
    run = _write_run(tmp_path / "run", [(1, 11.94, 10.0), (5, 8.0, 1000.0), (10, 4.0, 3000.0), (15, 2.5, 2000.0)])
    assert summarise(shards, run).splitlines() == [
        f"shards    {shards}: 1,390 samples packed into 10 bins, 95.2% filled",
        "rejected  3 (media_missing 2, bad_json 1, tag_mismatch 1)",
        "training  15 steps at 2,000 tokens/s, loss 11.940 -> 2.500",
        f"model     {run / 'final'}",
    ]


def test_counts_of_mixed_folders_are_added(tmp_path: Path) -> None:
    counts = {"num_bins": 10, "num_tokens": 20_480, "num_packed": 30}
    _with_counts(tmp_path / "shards" / "a", num_rejected=1, rejects_by_code={"bad_json": 1}, **counts)
    _with_counts(tmp_path / "shards" / "b", num_rejected=2, rejects_by_code={"bad_json": 2}, **counts)
    run = _write_run(tmp_path / "run", [(1, 3.0, 5.0)])
    lines = summarise(tmp_path / "shards", run).splitlines()
    assert lines[0].endswith("60 samples packed into 20 bins, 50.0% filled")
    assert lines[1] == "rejected  3 (bad_json 3)"
    assert lines[2] == "training  1 step at 5 tokens/s, loss 3.000 -> 3.000"


def test_an_unfinished_run_is_an_error(tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=2))
    run = _write_run(tmp_path / "run", [(1, 3.0, 5.0)])
    (run / "final").rmdir()
    with pytest.raises(ConfigError, match="is not finished"):
        summarise(shards, run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        ("", "is empty"),
        ('{"step": 1, "loss": 2.0, "tokens_per_s": 3.0}\n{"step": 2', ":2 is not a logged step"),
        (
            '{"step": 1, "loss": "low", "tokens_per_s": 3.0}\n',
            r":1 is not a logged step: Expected `float \| null`, got `str`",
        ),
    ],
)
def test_damaged_metrics_are_rejected_with_their_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_metrics(path)


def test_command_without_shards_prints_one_sentence(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path / "none"), str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and len(result.output.splitlines()) == 1
