"""Common errors of new users: each message names the cause and the fix."""

from __future__ import annotations

import gzip
import html
import io
import json
import pickle
import re
import shutil
import socket
import tarfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.annotations.records import index_file
from prep.cli import main
from prep.inspect.transcript import Span, SpanKind, visible
from schemas.errors import ConfigError, ShardError, VlprepError
from schemas.qwen import CONTROL_TOKENS
from storage.hub import unreachable_reason
from storage.shard_set import read_manifest
from train.shards.index import open_shards


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def validate(*arguments: object) -> Result:
    return run("validate", *arguments, "--workers", 1)


def build(model: Path, *arguments: object) -> Result:
    return run("build", *arguments, "--model", model, "--workers", 1)


def error_line(result: Result) -> str:
    """The error message, which is the only line on stderr besides progress."""
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("vlprep:")]
    return line


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


def test_problems_beyond_the_examples_are_counted_with_a_pointer_to_them(tmp_path: Path) -> None:
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


RECORDS = [image_record(f"{index}.png") for index in range(3)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS)
PRETTY = "\n".join(json.dumps(record, indent=2) for record in RECORDS)

WRONG_FILES = {
    "pretty.jsonl": (PRETTY.encode(), "spreads its first record over 13 lines", "jq -c ."),
    "pretty_crlf.jsonl": (PRETTY.replace("\n", "\r\n").encode(), "spreads its first record over 13 lines", "jq -c ."),
    "one_pretty.jsonl": (json.dumps(RECORDS[0], indent=1).encode(), "spreads its first record", "jq -c ."),
    "commas.jsonl": (LINES.replace("\n", ",\n").encode(), "a comma at the end of each line", "sed"),
    "commas_but_the_last.jsonl": (LINES.strip().replace("\n", ",\n").encode(), "a comma at the end", "sed"),
    "commas_inside.jsonl": (LINES.replace("}\n", ",}\n").encode(), "a comma before a closing brace", "JSON library"),
    "commas_in_lists.jsonl": (LINES.replace("]}", ",]}").encode(), "a comma before a closing brace", "JSON library"),
    "utf16.jsonl": (LINES.encode("utf-16"), "is UTF-16", "iconv -f UTF-16"),
    "utf16_unmarked.json": (json.dumps(RECORDS).encode("utf-16-be"), "is UTF-16", "iconv -f UTF-16"),
    "utf16.json": (json.dumps(RECORDS).encode("utf-16"), "is UTF-16", "iconv -f UTF-16"),
    "table.csv": (b'image,question,answer\n1.png,"what, then?",yes\n', "a table of comma-separated values", "per line"),
    "table_of_pandas.csv": (
        b",image,conversations\n0,1.png,\"[{'from': 'human', 'value': 'a'}\n {'from': 'gpt', 'value': 'b'}]\"\n",
        "a table of comma-separated values",
        "per line",
    ),
    "other_letters.csv": ("图像,问题\n1.png,什么\n".encode(), "a table of comma-separated values", "per line"),
    "quoted.csv": ('"image","question, long"\n"1.png","é"\n'.encode(), "a table of comma-separated", "per line"),
    "signs.csv": (b"File (path),Question?,Answer/Label\n1.png,what?,yes\n", "a table of comma-separated", "per line"),
    "table.jsonl": (b"image\tquestion\tanswer\n1.png\twhat?\tyes\n", "a table of tab-separated values", "per line"),
    "wrapped.json": (json.dumps({"data": RECORDS}).encode(), "in the field 'data'", "jq -c '.[\"data\"][]'"),
    "splits.json": (json.dumps({"train": RECORDS, "test": RECORDS}).encode(), "in the field 'train'", "jq -c"),
    "wrapped_pretty.json": (
        json.dumps({"version": 1.0, "info": {"by": "us"}, "annotations": RECORDS}, indent=2).encode(),
        "in the field 'annotations'",
        "jq -c '.[\"annotations\"][]'",
    ),
    "wrapped_large.json": (
        json.dumps({"version": "1", "rows": [image_record("x" * 1000)] * 20_000}).encode(),
        "in the field 'rows'",
        "jq -c",
    ),
    "marked.jsonl": (b"\xef\xbb\xbf\n" + PRETTY.encode(), "spreads its first record over 13 lines", "jq -c ."),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_another_format_is_reported_once_with_the_fix(tmp_path: Path, name: str) -> None:
    content, cause, mend = WRONG_FILES[name]
    file = tmp_path / name
    file.write_bytes(content)
    result = validate(file)
    assert result.exit_code == 1, result.output
    message = error_line(result)
    assert message.startswith(f"vlprep: annotation file {file} ")
    assert cause in message and mend in message
    assert "rejected" not in result.output


def encoded(kind: str) -> bytes:
    """An image of one colour, as a file."""
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, kind)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "{}")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("a.jsonl"))
    return buffer.getvalue()


def parquet() -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), buffer)
    return buffer.getvalue()


def arrow() -> bytes:
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, pa.schema([("a", pa.int64())])):
        pass
    return buffer.getvalue()


OTHER_KINDS = {
    **{
        f"a.{kind}": (encoded(kind), f"is a {name} image", "whose records name it")
        for kind, name in {
            "jpeg": "JPEG",
            "png": "PNG",
            "gif": "GIF",
            "webp": "WebP",
            "bmp": "BMP",
            "tiff": "TIFF",
        }.items()
    },
    "image.jsonl": (encoded("jpeg"), "is a JPEG image", "whose records name it"),
    "image.parquet": (encoded("png"), "is a PNG image", "whose records name it"),
    "clip.mp4": (b"\0\0\0\x20ftypisom\0\0\2\0", "is an MP4 video", "whose records name it"),
    "clip.webm": (b"\x1aE\xdf\xa3\x9fB\x86", "is a WebM or Matroska video", "whose records name it"),
    "pages.pdf": (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "is a PDF", "an image of each page"),
    "all.zip": (zipped("a.jsonl"), "is an archive", "Unpack it"),
    "table.xlsx": (zipped("[Content_Types].xml"), "is an Office document", "as JSONL or Parquet"),
    "all.tar": (tarred(), "is an archive", "Unpack it"),
    "all.json.gz": (gzip.compress(tarred()), "is an archive", "Unpack it"),
    "squeezed.jsonl": (gzip.compress(LINES.encode()), "is gzip", "ends in .jsonl.gz"),
    "plain.jsonl.gz": (LINES.encode(), "is not compressed", "give it another name"),
    "rows.jsonl": (parquet(), "is Parquet", "ends in .parquet"),
    "data.arrow": (arrow(), "is Arrow", "to_parquet"),
    "model.pkl": (pickle.dumps([1]), "is binary data", "as JSONL or Parquet"),
    "zeros.jsonl": (bytes(100), "is binary data", "expected JSON, JSONL or Parquet"),
    "error.json": (b"<!DOCTYPE html><html>404</html>", "is a web page", "Fetch it again"),
    "pointer.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "of Git LFS", "git lfs pull"),
    "notes.txt": (b"# Notes\n\nSee a.png\n", "is not JSON: it begins with '# Notes'", "one JSON object per line"),
    "run.yaml": (b"model: a\ndata:\n  - b\n", "is not JSON: it begins with 'model: a'", "one JSON object per line"),
}


@pytest.mark.parametrize("name", OTHER_KINDS)
def test_a_file_that_is_no_annotation_file_is_named_for_what_it_is(tmp_path: Path, name: str) -> None:
    content, kind, mend = OTHER_KINDS[name]
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(VlprepError) as raised:
        index_file(file, tmp_path)
    assert str(raised.value).startswith(f"annotation file {file} {kind}" if kind.startswith("is") else "annotation")
    assert kind in str(raised.value) and mend in str(raised.value)


def test_validate_and_build_say_that_an_image_is_no_annotation_file(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_image(tmp_path / "a.jpg")
    for result in (validate(tmp_path / "a.jpg"), build(tiny_checkpoint, tmp_path / "a.jpg", "--out", tmp_path / "out")):
        assert result.exit_code == 1
        assert error_line(result).startswith(f"vlprep: annotation file {tmp_path / 'a.jpg'} is a JPEG image; expected")


def test_validate_and_build_say_what_a_folder_holds(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without a registry, and as a relative and an absolute path."""
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "b.png"):
        write_image(tmp_path / "mine" / name)
    write_lines(tmp_path / "mine" / "list.jsonl", [text_record()])
    said = "is a folder with 2 images and 1 JSON or Parquet file; expected JSON, JSONL or Parquet with a record"
    for registry in ("", "[other]\n"):
        (tmp_path / "datasets.toml").unlink(missing_ok=True)
        if registry:
            (tmp_path / "datasets.toml").write_text(registry)
        for folder in ("mine", f"{tmp_path}/mine/"):
            for result in (validate(folder), build(tiny_checkpoint, folder, "--out", "out")):
                assert result.exit_code == 2
                assert said in error_line(result) and "list.jsonl" in error_line(result)


def test_a_hint_about_lengths_is_for_samples_that_are_too_long(tmp_path: Path, tiny_checkpoint: Path) -> None:
    empty, long = (
        write_lines(tmp_path / name, [text_record(text)]) for name, text in (("a.json", " "), ("b.json", "w " * 99))
    )
    results = [build(tiny_checkpoint, file, "--max-length", 64, "--out", tmp_path / "out") for file in (empty, long)]
    assert [result.exit_code for result in results] == [1, 1]
    assert ["too_long depends on" in error_line(result) for result in results] == [False, True]
    assert "none of 1 annotation can be packed (empty_turn 1)" in error_line(results[0])


def test_a_build_of_a_file_of_another_format_stops_with_the_same_sentence(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    file = tmp_path / "pretty.jsonl"
    file.write_text(PRETTY)
    result = build(tiny_checkpoint, file, "--out", tmp_path / "out")
    assert (result.exit_code, error_line(result)) == (1, error_line(validate(file)))


def test_the_cause_is_found_in_compressed_files(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(PRETTY.encode()))
    assert "a.jsonl.gz spreads its first record over 13 lines" in validate(tmp_path / "a.jsonl.gz").stderr


@pytest.mark.parametrize(
    ("content", "num_rejected"),
    [
        (LINES.replace("\n", ",\n", 1), 1),
        (LINES.replace(", ", ",\n", 1), 2),
        ("image,question\n" + LINES, 1),
        ('{"id": 1}\n' + LINES, 1),
        ('{"id": 1,}\n' + LINES, 1),
        ('{"rounds": [{"q": 1}]}\n', 1),
        (json.dumps({"conversations": RECORDS[0]["conversations"]}), 1),
        (json.dumps(RECORDS[0]), 0),
        (json.dumps(RECORDS, indent=2), 0),
    ],
)
def test_a_few_broken_records_do_not_condemn_their_file(tmp_path: Path, content: str, num_rejected: int) -> None:
    for index in range(3):
        write_image(tmp_path / f"{index}.png")
    (tmp_path / "a.jsonl").write_text(content)
    report = json.loads(validate(tmp_path / "a.jsonl", "--json").stdout)
    assert report["num_rejected"] == num_rejected
    assert report["num_annotations"] > 0


def test_a_wrong_media_root_is_named_with_the_folder_that_holds_the_media(tmp_path: Path) -> None:
    """A media root one level up, one level down, and next to the annotation file."""
    names = ["cells/a.png", "cells/b.png"]
    for where in ("lists", "lists/media", ".", "media"):
        folder = tmp_path / where.replace("/", "-") / "data"
        file = write_lines(folder / "lists" / "a.jsonl", [text_record(), *map(image_record, names)])
        for name in names:
            write_image(folder / where / name)
        (folder / "empty").mkdir()
        result = validate(file, "--media-root", folder / "empty")
        assert result.exit_code == 1
        assert (
            f"{file}: all 2 media are missing below the media root {folder / 'empty'}, but cells/a.png lies in "
            f"{(folder / where).resolve()}. Give --media-root {(folder / where).resolve()}"
        ) in result.stdout
        assert validate(file, "--media-root", (folder / where).resolve()).exit_code == 0


def test_media_named_relative_to_another_folder_are_located(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png")
    file = write_lines(tmp_path / "a.jsonl", [image_record("train/2017/a.png")])
    assert f"a.png lies in {tmp_path / 'images'}, but the annotations name train/2017/a.png" in validate(file).stdout


def test_the_root_that_was_searched_is_named_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(tmp_path / "one" / "two" / "three" / "a.jsonl", [image_record("a.png")])
    monkeypatch.chdir(tmp_path / "one" / "two" / "three")
    assert (
        f"the only medium is missing below the media root {Path.cwd()}, for example a.png."
        in validate("a.jsonl").stdout
    )


def test_media_that_are_nowhere_near_are_reported_as_missing_from_the_root(tmp_path: Path) -> None:
    folder = tmp_path / "one" / "two" / "three"  # the search goes two folders up, where other tests must not be
    folder.mkdir(parents=True)
    file = write_lines(folder / "a.jsonl", [image_record("a.png"), image_record("b.png")])
    report = json.loads(validate(file, "--json").stdout)
    (hint,) = report["hints"]
    assert f"all 2 media are missing below the media root {folder}, for example a.png." in hint


def test_the_root_is_not_blamed_if_one_medium_exists(tmp_path: Path) -> None:
    write_image(tmp_path / "b.png")
    write_image(tmp_path / "images" / "a.png")
    file = write_lines(tmp_path / "a.jsonl", [image_record("a.png"), image_record("b.png")])
    assert json.loads(validate(file, "--json").stdout)["hints"] == []


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("images\\cell.png", "images/cell.png"),
        ("Images/CELL.PNG", "images/cell.png"),
        ("images/cel.png", "images/cell.png"),
        ("imgaes/cell.png", "images/cell.png"),
        ("images/Astronaut.PNG", "images/astronaut.png"),
        ("images/other.png", None),
        ("../outside/CELL.png", None),
        ("link/CELL.png", None),
        ("images", None),
    ],
)
def test_a_misspelled_name_of_a_medium_gets_a_suggestion(tmp_path: Path, name: str, near: str | None) -> None:
    for path in ("root/images/cell.png", "root/images/astronaut.png", "outside/cell.png"):
        write_image(tmp_path / path)
    (tmp_path / "root" / "link").symlink_to(tmp_path / "outside")
    result = validate(write_lines(tmp_path / "root" / "a.jsonl", [image_record(name)]))
    assert result.exit_code == 1
    assert ("did you mean" in result.stdout) == (near is not None)
    assert near is None or f"does not exist below the media root; did you mean {near}?" in result.stdout


def test_a_build_names_the_media_root_without_media(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_image(tmp_path / "media" / "a.png")
    file = write_lines(tmp_path / "a.jsonl", [image_record("a.png"), text_record()])
    other = write_lines(tmp_path / "b.jsonl", [image_record("media/a.png"), image_record("a.png")])
    result = build(tiny_checkpoint, file, other, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert [message for message in caplog.messages if "missing" in message] == [
        f"{file}: media of each record that names some (1) are missing below the media root {tmp_path}, but "
        f"a.png lies in {tmp_path / 'media'}. Give --media-root {tmp_path / 'media'} (or set media_root in the "
        "registry)."
    ]


def test_a_finished_set_of_other_annotation_files_is_replaced_with_overwrite_only(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Files of the same name in different folders are different files."""
    first = write_lines(tmp_path / "one" / "a.jsonl", [text_record("first")])
    second = write_lines(tmp_path / "two" / "a.jsonl", [text_record("second"), text_record()])
    third = write_lines(tmp_path / "two" / "b.jsonl", [text_record("third")])
    out = tmp_path / "out"
    assert build(tiny_checkpoint, first, "--out", out).exit_code == 0
    sealed = (out / "manifest.json").read_bytes()
    for other, name in ((second, "a (a.jsonl)"), (third, "b (b.jsonl)")):
        result = build(tiny_checkpoint, other, "--out", out)
        assert result.exit_code == 2
        assert f"--out {out} holds a finished set of a (a.jsonl), not of {name}." in error_line(result)
        assert "--overwrite" in error_line(result)
        assert (out / "manifest.json").read_bytes() == sealed
    assert build(tiny_checkpoint, second, "--out", out, "--overwrite").exit_code == 0
    assert read_manifest(out).counts.num_packed == 2


def test_the_same_files_are_rebuilt_with_other_settings_contents_and_neighbours(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    a = write_lines(tmp_path / "a.jsonl", [text_record()] * 2)
    b = write_lines(tmp_path / "b.jsonl", [text_record()])
    out = tmp_path / "out"
    for arguments, num_packed in (([a], 2), ([a, "--max-length", 64], 2), ([a, b], 3), ([b], 1)):
        result = build(tiny_checkpoint, *arguments, "--out", out)
        assert (result.exit_code, read_manifest(out).counts.num_packed) == (0, num_packed), result.output
    write_lines(b, [text_record("edited")] * 4)
    assert build(tiny_checkpoint, b, "--out", out).exit_code == 0
    moved = b.rename(tmp_path / "moved.jsonl")
    shutil.rmtree(out / ".build")
    assert build(tiny_checkpoint, moved, "--out", out).exit_code == 0
    assert read_manifest(out).counts.num_packed == 4


def test_a_build_that_fails_before_its_first_shard_leaves_no_folder(tmp_path: Path, tiny_checkpoint: Path) -> None:
    bad = write_lines(tmp_path / "a.jsonl", [text_record(" ")])
    out = tmp_path / "shards" / "a"
    assert build(tiny_checkpoint, bad, "--out", out).exit_code == 1
    assert not out.exists()
    out.mkdir()
    (out / "mine.txt").touch()
    assert build(tiny_checkpoint, bad, "--out", out).exit_code == 1
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_interrupted_build_keeps_its_work_and_readers_of_the_shards_name_it(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_lines(tmp_path / "a.jsonl", [text_record()])
    shards = tmp_path / "shards"
    assert build(tiny_checkpoint, file, "--out", shards / "good").exit_code == 0

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("prep.build.pipeline.make_plan", stopped)
        assert build(tiny_checkpoint, file, "--out", shards / "stopped").exit_code == 130
    message = f"{shards / 'stopped'} holds no manifest.json: a build into it failed, was interrupted, or still runs. "
    with pytest.raises(ShardError, match=re.escape(message) + r".* again to finish it, or remove the folder"):
        open_shards(shards)
    assert message in run("verify", shards / "stopped", "--workers", 1).stderr
    assert build(tiny_checkpoint, file, "--out", shards / "stopped").exit_code == 0
    assert open_shards(shards).num_bins == 2


@pytest.fixture
def lookups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Hosts looked up without a network: name servers do not answer within 1.5 s, and the hub's cache is empty."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)

    hosts: list[object] = []

    def silent(host: object, *_: object, **__: object) -> None:
        hosts.append(host)
        time.sleep(5)
        raise socket.gaierror("no answer")

    monkeypatch.setattr("socket.getaddrinfo", silent)
    return hosts


def test_without_a_network_a_hub_id_costs_one_line_within_two_seconds(tmp_path: Path, lookups: list[object]) -> None:
    file = write_lines(tmp_path / "a.jsonl", [text_record()])
    result = run("build", file, "--out", tmp_path / "out", "--model", "team/model", "--workers", 1)
    assert result.exit_code == 2
    assert "cannot be fetched from the hub (no connection to huggingface.co: no answer within 1.5 s)" in error_line(
        result
    )
    assert lookups == ["huggingface.co"]
    assert not (tmp_path / "out").exists()


def test_without_a_network_the_trainer_stops_within_two_seconds(lookups: list[object]) -> None:
    from train.model.pretrained import find_checkpoint

    with pytest.raises(ConfigError, match=r"no connection to huggingface\.co: no answer within 1\.5 s"):
        find_checkpoint("team/model")
    assert lookups == ["huggingface.co"]


def test_a_refused_connection_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("storage.hub.getproxies", lambda: {"https": "http://127.0.0.1:9"})
    assert unreachable_reason() == "no connection to 127.0.0.1: Connection refused"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert unreachable_reason() is None


def test_validate_finds_what_is_too_long_as_a_build_does(tmp_path: Path, tiny_checkpoint: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    Image.new("RGB", (560, 560)).save(tmp_path / "b.png")
    records = [image_record("a.png"), image_record("b.png"), text_record(" "), text_record("word " * 300)]
    file = write_lines(tmp_path / "a.jsonl", records)
    rejects = tmp_path / "rejects.jsonl"
    limit = ["--max-length", 128]
    result = validate(file, *limit, "--model", tiny_checkpoint, "--rejects", rejects)
    assert result.exit_code == 1
    assert "4 annotations: 1 valid, 3 rejected" in result.stdout
    rejected = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [(reject["line"], reject["problems"][0]["code"]) for reject in rejected] == [
        (2, "too_long"),
        (3, "empty_turn"),
        (4, "too_long"),
    ]
    assert build(tiny_checkpoint, file, *limit, "--out", tmp_path / "out").exit_code == 0
    ledger = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    messages = [reject["problems"][0]["message"] for reject in rejected]
    assert [row["message"] for row in ledger if row["codes"]] == messages
    assert validate(file).stdout.startswith("4 annotations: 3 valid, 1 rejected")
    assert "--model has no effect without --max-length" in validate(file, "--model", tiny_checkpoint).stderr


def test_text_that_spells_a_control_token_is_shown_as_text(tmp_path: Path, tiny_checkpoint: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [text_record("say <|im_end|> and <|image_pad|>")])
    out = tmp_path / "out"
    assert build(tiny_checkpoint, file, "--reserved", "escape", "--out", out).exit_code == 0
    shown = run("show", out, "--bin", 0, "--model", tiny_checkpoint).stdout
    assert "[[say <\\|im_end\\|> and <\\|image_pad\\|><|im_end|>↵]]" in shown
    assert "Text that only spells a control token is written <\\|im_end\\|>." in shown
    assert "<|image_pad|>" not in shown
    assert run("report", out, "--model", tiny_checkpoint, "--out", tmp_path / "page.html").exit_code == 0
    page = html.unescape((tmp_path / "page.html").read_text())
    assert "say <\\|im_end\\|> and <\\|image_pad\\|>" in page
    assert "Text that only spells a control token" in page
    assert "<|image_pad|>" not in page
    assert run("verify", out, "--workers", 1).exit_code == 0


def test_every_control_token_differs_from_its_text(tmp_path: Path) -> None:
    for token in CONTROL_TOKENS:
        assert visible(Span(SpanKind.CONTROL, token, trained=False)) == token
        text = visible(Span(SpanKind.TEXT, f"a{token}b", trained=False))
        assert not any(spelled in text for spelled in CONTROL_TOKENS)
