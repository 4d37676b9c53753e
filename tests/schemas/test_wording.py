"""Counts, lists and names in messages read as a person would write them."""

from __future__ import annotations

from schemas.wording import counted, kinds_text, listed, source_name


def test_one_thing_is_singular() -> None:
    assert [counted(count, "shard") for count in (0, 1, 1024)] == ["0 shards", "1 shard", "1,024 shards"]
    assert [counted(count, "patch", "patches") for count in (1, 2)] == ["1 patch", "2 patches"]
    assert [listed("bin", bins) for bins in ((), [3], (3, 5))] == ["no bin", "bin 3", "bins 3, 5"]


def test_a_sample_is_named_by_its_file_and_line_and_by_its_id_if_it_has_one() -> None:
    where = {"dataset": "talk", "file": "a.jsonl", "line": 3, "record": 2}
    assert source_name(**where, id=None) == "talk, a.jsonl:3 (record 2)"
    assert source_name(**where, id="\x1b7") == "talk, a.jsonl:3 (record 2, id \\x1b7)"


def test_kinds_of_samples_read_alike_in_validate_and_in_a_set() -> None:
    assert (
        kinds_text({"image": 10, "image+video": 2, "text": 15})
        == "10 with images, 2 with images and videos, 15 text only"
    )
    assert kinds_text({"text only": 3, "image + video": 1}) == "3 text only, 1 with images and videos"
