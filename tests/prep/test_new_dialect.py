"""A dialect is declared in one place: with a function in the dialect module alone, every program knows its fields."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import prep.annotations.dialects as dialects
from prep.annotations.file_faults import whole_file_fault
from prep.annotations.records import index_file, read_chunk
from prep.annotations.turns import TurnReader
from prep.annotations.validation import check_record, parse_record
from prep.cli import main
from schemas.annotation import ReasonCode
from schemas.json_schema import json_schemas
from tests.prep.dialect_corpus import llava
from tests.prep.test_formats import write_jsonl

RECORD = {"rounds": [["Hi", "Hello"], ["And?", "Bye"]], "opening": "Be kind."}
CANONICAL = llava("Be kind.\nHi", "Hello", "And?", "Bye")


def read_rounds(record: dict[str, Any], turns: TurnReader) -> None:
    """Rounds of question and answer, with an opening before the first question."""
    opening = turns.text(record, "opening", "$") + "\n"
    for index, (question, answer) in enumerate(record["rounds"]):
        turns.add("human", question if index else opening + question, f"$.rounds[{index}][0]")
        turns.add("gpt", answer, f"$.rounds[{index}][1]")


@pytest.fixture(autouse=True)
def toy_dialect() -> Iterator[None]:
    """Declare it as the module itself would, and take it back."""
    before = set(dialects.FIELDS)
    with patch.dict(dialects._DIALECTS):
        dialects.dialect("rounds", "opening")(read_rounds)
        yield
    dialects.FIELDS.intersection_update(before)


def validate(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["validate", *map(str, arguments), "--workers", "1"])


def test_its_records_are_read_and_checked() -> None:
    checked, expected = parse_record(json.dumps(RECORD).encode()), parse_record(json.dumps(CANONICAL).encode())
    assert checked.annotation is not None and checked.problems == [] and checked.unused == ()
    assert expected.annotation is not None
    assert [(turn.role, turn.value) for turn in checked.annotation.turns] == [
        (turn.role, turn.value) for turn in expected.annotation.turns
    ]
    (problem,) = parse_record(json.dumps({**RECORD, "opening": 3}).encode()).problems
    assert (problem.code, problem.message) == (
        ReasonCode.BAD_FIELD,
        "$.opening is of type number; expected a string",
    )
    (problem,) = parse_record(json.dumps({**RECORD, "rounds": [["Hi", " "]]}).encode()).problems
    assert problem.code is ReasonCode.EMPTY_TURN and problem.message.startswith("$.rounds[0][1] ")


def test_its_fields_count_as_used(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [RECORD, {**RECORD, "openings": "Be kind."}])
    assert "fields not used: openings ×1 (did you mean opening?)" in validate(file).stdout
    report = json.loads(validate(file, "--strict-fields", "--json").stdout)
    assert (report["num_valid"], report["rejects_by_code"]) == (1, {"unsupported_field": 1})


def test_a_file_of_one_such_record_is_one_and_a_list_of_them_inside_an_object_is_found(tmp_path: Path) -> None:
    one, inside = tmp_path / "one.json", tmp_path / "inside.json"
    one.write_text(json.dumps({"rounds": [{"image": "a.png"}]}))
    inside.write_text(json.dumps({"data": [RECORD]}))
    assert whole_file_fault(one, one) is None
    assert "in the field 'data'" in (whole_file_fault(inside, inside) or "")


def test_its_columns_are_read_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{**RECORD, "width": 3}]), tmp_path / "a.parquet")
    (chunk,) = index_file(tmp_path / "a.parquet", tmp_path).chunks
    (record,) = read_chunk(tmp_path / "a.parquet", chunk)
    checked = check_record(record, "reject")
    assert checked.annotation is not None and checked.problems == [] and checked.unused == ("width",)


def test_the_schema_for_editors_accepts_its_records_and_checks_what_they_share() -> None:
    validator = jsonschema.Draft202012Validator(json.loads(json_schemas()["annotation.schema.json"]))
    assert validator.is_valid(RECORD) and validator.is_valid({**RECORD, "images": ["a.png"]})
    assert not validator.is_valid({**RECORD, "images": "a.png"})
