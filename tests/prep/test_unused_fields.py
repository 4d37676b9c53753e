"""Fields without effect are counted by name, or rejected with ``--strict-fields``."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from click.testing import CliRunner, Result

from prep.cli import main
from storage.shard_set import read_manifest
from tests.prep.dialect_corpus import HELLO, TWO
from tests.prep.test_formats import write_jsonl

UNUSED = [
    {**HELLO, "width": 1, "img": "a.png"},
    {**HELLO, "width": 2},
    {"conversations": [{"from": "human", "value": "Hi", "name": "Ann"}, {"from": "gpt", "value": "Hello"}]},
    {**TWO, "width": None, "note": ""},
]
UNUSED_TEXT = "fields not used: width ×2, conversations[].name ×1, img ×1 (did you mean image?)"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_fields_without_effect_are_counted_by_validate_build_and_report(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A field that is null or empty says nothing."""
    file = write_jsonl(tmp_path / "a.jsonl", UNUSED)
    counts = {"width": 2, "conversations[].name": 1, "img": 1}
    assert UNUSED_TEXT in run("validate", "--workers", 1, file).stdout
    assert json.loads(run("validate", "--workers", 1, file, "--json").stdout)["unused_fields"] == counts
    built = run(
        "build", file, "--out", tmp_path / "out", "--model", tiny_checkpoint, "--engine", "local", "--workers", 1
    )
    assert built.exit_code == 0 and UNUSED_TEXT in built.stdout
    assert read_manifest(tmp_path / "out").statistics[0].unused_fields == counts
    assert run("report", tmp_path / "out", "--out", tmp_path / "report.html").exit_code == 0
    page = (tmp_path / "report.html").read_text()
    assert UNUSED_TEXT in page
    assert run("verify", tmp_path / "out", "--workers", 1).exit_code == 0


def test_strict_fields_reject_records_with_fields_without_effect(tmp_path: Path, tiny_checkpoint: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", UNUSED)
    report = json.loads(run("validate", "--workers", 1, file, "--strict-fields", "--json").stdout)
    assert report["num_valid"] == 1 and report["rejects_by_code"] == {"unsupported_field": 3}
    assert "img (did you mean image?)" in report["examples"]["unsupported_field"][0]
    for options, num_packed in (([], 4), (["--strict-fields"], 1)):
        out = tmp_path / "out"
        built = run("build", file, "--out", out, "--model", tiny_checkpoint, "--workers", 1, *options)
        assert built.exit_code == 0, built.output
        assert read_manifest(out).counts.num_packed == num_packed


def test_columns_without_effect_are_counted_and_refused_ones_reject(tmp_path: Path) -> None:
    """Parquet: unknown columns are not read, and one that is null in all rows says nothing."""
    turns = HELLO["conversations"]
    rows = {"conversations": [turns, turns], "width": [1, 2], "empty": [None, None], "loss_scale": [None, "x"]}
    columns = pa.table({**rows, "null": pa.array([None, None], pa.string())})
    pq.write_table(columns, tmp_path / "a.parquet")
    report = json.loads(run("validate", "--workers", 1, tmp_path / "a.parquet", "--json").stdout)
    assert report["unused_fields"] == {"width": 2}
    assert report["rejects_by_code"] == {"unsupported_field": 1}
