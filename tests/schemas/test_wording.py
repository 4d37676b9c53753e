"""Counts, lists and names in messages read as a person would write them."""

from __future__ import annotations

from schemas.wording import counted, listed, source_name


def test_one_thing_is_singular() -> None:
    assert [counted(count, "shard") for count in (0, 1, 1024)] == ["0 shards", "1 shard", "1,024 shards"]
    assert [counted(count, "patch", "patches") for count in (1, 2)] == ["1 patch", "2 patches"]
    assert [listed("bin", bins) for bins in ((), [3], (3, 5))] == ["no bin", "bin 3", "bins 3, 5"]


def test_a_sample_is_named_by_its_file_and_line_and_by_its_id_if_it_has_one() -> None:
    where = {"dataset": "talk", "file": "a.jsonl", "line": 3, "record": 2}
    assert source_name(**where, id=None) == "talk, a.jsonl:3 (record 2)"
    assert source_name(**where, id="\x1b7") == "talk, a.jsonl:3 (record 2, id \\x1b7)"
