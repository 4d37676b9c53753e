"""Annotation files are cut into records exactly, whatever their layout and wherever the blocks end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prep.annotations import json_records
from prep.annotations.chunks import Record
from prep.annotations.records import index_file, read_chunk

nasty = st.text(alphabet='a"\\{}[],:é\n ', max_size=20)
values = st.recursive(
    st.one_of(st.none(), st.integers(), nasty),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(nasty, inner, max_size=3)),
    max_leaves=6,
)
objects = st.lists(st.dictionaries(nasty, values, max_size=3), max_size=12)


def read_all(path: Path) -> list[Record]:
    index = index_file(path, path.parent)
    records = [record for chunk in index.chunks for record in read_chunk(index.data, chunk)]
    assert len(records) == index.num_records
    assert [record.index for record in records] == list(range(len(records)))
    return records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "annotations"


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=objects, indent=st.sampled_from([None, 1]), block=st.integers(1, 60), chunk=st.integers(1, 4))
def test_arrays_give_their_elements_with_lines_for_any_block_size(
    path: Path, records: list[dict[str, Any]], indent: int | None, block: int, chunk: int
) -> None:
    text = json.dumps(records, indent=indent)
    path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_BLOCK_BYTES", block)
        patch.setattr(json_records, "CHUNK_RECORDS", chunk)
        elements = read_all(path)
    assert [json.loads(element.data or b"") for element in elements] == records
    lines = text.split("\n")
    for element in elements:
        assert (
            lines[element.line - 1].strip().startswith((element.data or b"").decode().split("\n")[0]) or indent is None
        )


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=objects, block=st.integers(1, 60), blank=st.sampled_from(["\n", "\n\n", "\r\n", "\n \n"]))
def test_lines_give_their_records_for_any_block_size(
    path: Path, records: list[dict[str, Any]], block: int, blank: str
) -> None:
    text = blank.join(json.dumps(record) for record in records)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_records, "_BLOCK_BYTES", block)
        lines = read_all(path)
    assert [json.loads(line.data or b"") for line in lines] == records
    for line in lines:
        assert text.split("\n")[line.line - 1].strip().encode() == line.data


@pytest.mark.parametrize(("num_records", "num_chunks"), [(64, 1), (65, 2), (800, 13), (4096, 64), (10_000, 64)])
def test_a_small_file_has_chunks_for_many_workers(path: Path, num_records: int, num_chunks: int) -> None:
    path.write_text("".join(f'{{"id": {index}}}\n' for index in range(num_records)))
    assert len(index_file(path, path.parent).chunks) == num_chunks
    assert [json.loads(record.data or b"")["id"] for record in read_all(path)] == list(range(num_records))


def test_a_record_that_is_a_list_counts_as_its_annotations(path: Path) -> None:
    path.write_text('{"id": 1}\n[{"id": 2}, {"id": 3}]\n{"id": 4}\n')
    records = read_all(path)
    assert [(json.loads(record.data or b"")["id"], record.line) for record in records] == [
        (1, 1),
        (2, 2),
        (3, 2),
        (4, 3),
    ]


def test_lists_inside_an_array_count_as_their_annotations(path: Path) -> None:
    path.write_text('[[{"id": 1}, {"id": 2}],\n {"id": 3}]')
    assert [json.loads(record.data or b"")["id"] for record in read_all(path)] == [1, 2, 3]


def test_a_record_that_is_not_json_does_not_spoil_its_neighbours(path: Path) -> None:
    path.write_text('[{"id": 1},\n {"id": },\n {"id": 3}]\n')
    assert [record.data for record in read_all(path)] == [b'{"id": 1}', b'{"id": }', b'{"id": 3}']


@pytest.mark.parametrize("text", ["", "\n\n", "[]", "[ ]\n", "  [\n]  "])
def test_empty_files_have_no_records(path: Path, text: str) -> None:
    path.write_text(text)
    assert read_all(path) == []


def test_text_after_an_array_is_one_bad_record(path: Path) -> None:
    path.write_text('[{"id": 1}] {"id": 2}')
    assert [record.data for record in read_all(path)] == [b'{"id": 1}', b'{"id": 2}']


def test_an_array_that_is_cut_short_keeps_its_last_piece(path: Path) -> None:
    path.write_text('[{"id": 1}, {"id"')
    assert [record.data for record in read_all(path)] == [b'{"id": 1}', b'{"id"']


def test_byte_order_mark_and_blank_lines_are_skipped(path: Path) -> None:
    path.write_bytes(b'\xef\xbb\xbf{"id": 1}\n\n   \n{"id": 2}')
    assert [(record.data, record.line) for record in read_all(path)] == [(b'{"id": 1}', 1), (b'{"id": 2}', 4)]


@pytest.mark.parametrize("layout", ["[%s,%s,%s]", "%s\n%s\n%s"])
def test_a_record_beyond_the_limit_is_counted_but_not_read(
    path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(json_records, "_BLOCK_BYTES", 300)
    path.write_text(layout % ('{"id": 1}', json.dumps({"id": "x" * 5000}), '{"id": 3}'))
    assert [record.data for record in read_all(path)] == [b'{"id": 1}', None, b'{"id": 3}']
