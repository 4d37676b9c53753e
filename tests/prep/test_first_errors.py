"""The first errors that a newcomer makes: each message names the cause and the mend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.cli import main
from storage.shard_set import read_manifest


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def validate(*arguments: object) -> Result:
    return run("validate", *arguments, "--workers", 1)


def build(model: Path, *arguments: object) -> Result:
    return run("build", *arguments, "--model", model, "--workers", 1)


def text_record(answer: str = "b") -> dict[str, object]:
    return {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": answer}]}


def image_record(name: str) -> dict[str, object]:
    return {
        "image": name,
        "conversations": [{"from": "human", "value": "<image>what?"}, {"from": "gpt", "value": "a cell"}],
    }


def write_lines(path: Path, records: Sequence[object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_image(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (56, 56)).save(path)
    return path


def test_a_registered_dataset_finds_its_media_in_the_folder_of_its_file(tmp_path: Path) -> None:
    write_image(tmp_path / "data" / "cell.png")
    write_lines(tmp_path / "data" / "a.jsonl", [image_record("cell.png")])
    (tmp_path / "datasets.toml").write_text('[cells]\nannotation_path = "data/a.jsonl"\n')
    result = validate("cells", "--registry", tmp_path / "datasets.toml")
    assert result.exit_code == 0, result.output


def test_several_files_with_shares_are_datasets_named_by_their_stems(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_image(tmp_path / "one" / "cell.png")
    a = write_lines(tmp_path / "one" / "a.jsonl", [image_record("cell.png")] * 4)
    b = write_lines(tmp_path / "two" / "b.jsonl", [text_record()] * 3)
    result = build(tiny_checkpoint, f"{a}%50", b, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "7 annotations = 5 packed + 0 rejected + 2 not sampled" in result.stdout
    statistics = read_manifest(tmp_path / "out").statistics
    assert [(dataset.dataset, dataset.num_packed) for dataset in statistics] == [("a", 2), ("b", 3)]


def test_two_files_with_the_same_stem_are_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    files = [write_lines(tmp_path / name / "a.jsonl", [text_record()]) for name in ("one", "two")]
    result = build(tiny_checkpoint, *files, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "would both be the dataset 'a'. Rename one of the files" in result.stderr


@pytest.mark.parametrize("content", ["", "\n \n", "[]", "[\n]\n"])
def test_validate_of_an_empty_file_is_a_problem(tmp_path: Path, content: str) -> None:
    (tmp_path / "empty.json").write_text(content)
    good = write_lines(tmp_path / "good.jsonl", [text_record()])
    result = validate(tmp_path / "empty.json", good)
    assert result.exit_code == 1
    assert "1 annotation: 1 valid" in result.stdout
    assert f"{tmp_path / 'empty.json'}: the file holds no annotation" in result.stdout


def test_problems_beyond_the_examples_are_counted_and_told_where_they_are(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [text_record(" ")] * 8)
    assert "\n  … 5 more; --rejects FILE writes all" in validate(file).stdout
    rejects = tmp_path / "rejects.jsonl"
    assert f"\n  … 5 more; all are in {rejects}" in validate(file, "--rejects", rejects).stdout
    assert len(rejects.read_text().splitlines()) == 8
    assert "more;" not in validate(write_lines(tmp_path / "b.jsonl", [text_record(" ")] * 3)).stdout


def test_validate_prints_its_counts_as_json(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", [text_record()] * 2)
    bad = write_lines(tmp_path / "bad.jsonl", [text_record(" "), text_record()])
    result = validate(good, bad, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["num_annotations"], report["num_valid"], report["num_rejected"]) == (4, 3, 1)
    assert report["rejects_by_code"] == {"empty_turn": 1}
    assert report["files"] == {
        str(good): {"num_valid": 2, "num_rejected": 0},
        str(bad): {"num_valid": 1, "num_rejected": 1},
    }
    assert report["examples"]["empty_turn"][0].startswith(f"{bad}:1: ")
