"""The commands reject every broken record with exactly its codes, count it, and keep all other records."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner, Result

from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.cli import main
from prep.engines import SerialEngine
from schemas.annotation import ReasonCode
from schemas.settings import BuildSettings, MediaSettings
from storage.shard_set import read_manifest
from tests.prep.broken import GOOD, MAX_LENGTH, MAX_SOURCE_BYTES, BrokenFolder, video, write_broken
from tests.prep.test_videos import write_video

SETTINGS = BuildSettings(max_length=MAX_LENGTH, media=MediaSettings(max_source_bytes=MAX_SOURCE_BYTES))
SLOW_S = 1e-6

CodesByLine = dict[tuple[str, int], list[list[str]]]
"""Codes of the annotations that start in a line of a file, sorted; several where the line is a packed record."""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> BrokenFolder:
    return write_broken(tmp_path_factory.mktemp("broken") / "root")


@pytest.fixture(scope="module")
def built(broken: BrokenFolder, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """One build of the complete folder, and of a video that exceeds the decode timeout of its dataset."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "slow.jsonl").write_text(json.dumps(slow_video(folder)) + "\n")
    files = [str(path) for path in broken.files]
    (folder / "datasets.toml").write_text(
        f'[broken]\nannotation_path = {json.dumps(files)}\nmedia_root = "{broken.root}"\n'
        f'[slow]\nannotation_path = "slow.jsonl"\nmedia_root = "."\nmedia.decode_timeout = {SLOW_S:f}\n'
    )
    sources = find_sources("broken,slow", registry=folder / "datasets.toml", media_root=None, media=SETTINGS.media)
    request = BuildRequest(
        sources=tuple(sources),
        out=folder / "out",
        settings=SETTINGS,
        model=str(tiny_checkpoint),
        max_rejected=Fraction(1),
    )
    build(request, SerialEngine())
    return folder / "out"


def slow_video(folder: Path) -> dict[str, Any]:
    """A record with a video of large frames: a small one may be probed before this process looks for the answer."""
    write_video(folder / "large.mp4", 2, 2, width=1920, height=1088)
    return video("large.mp4")


@pytest.fixture(scope="module")
def validated(broken: BrokenFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    """One deep validation of the complete folder: the result of the command, and the folder of its output files."""
    out = tmp_path_factory.mktemp("validated")
    files = [path for path in broken.files if path.suffix != ".parquet"]
    options = ["--workers", 1, "--deep", "--max-source-bytes", MAX_SOURCE_BYTES, "--media-root", broken.root]
    fixed = ["--rejects", out / "rejects.jsonl", "--fixed", out / "fixed.jsonl"]
    return run("validate", *files, *options, *fixed), out


def ledger(built: Path, dataset: str = "broken") -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(built / "samples.parquet").to_pylist()
    return [row for row in rows if row["dataset"] == dataset]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_the_corpus_is_large_and_has_every_code(broken: BrokenFolder) -> None:
    """An answer always has its end token as a target, so no input gives ``no_targets``; ``decode_timeout`` has tests
    of its own.
    """
    codes = Counter(code for expected in broken.expected for code in expected.codes)
    assert sum(bool(expected.codes) for expected in broken.expected) >= 150
    assert set(codes) == {code.value for code in ReasonCode} - {"no_targets", "decode_timeout"}
    assert min(codes.values()) >= 2


def test_a_build_rejects_every_broken_record_with_exactly_its_codes(built: Path, broken: BrokenFolder) -> None:
    rows = ledger(built)
    actual = [(row["file"], row["line"], sorted(row["codes"])) for row in rows]
    assert actual == [(entry.file, entry.line, sorted(entry.codes)) for entry in broken.expected]
    for row in rows:
        assert row["status"] == ("rejected" if row["codes"] else "packed")
        assert bool(row["message"]) == bool(row["codes"])


def test_a_build_of_broken_records_balances(built: Path, broken: BrokenFolder) -> None:
    counts = read_manifest(built).counts
    good = sum(not expected.codes for expected in broken.expected)
    assert good >= 40
    assert counts.num_annotations == len(broken.expected) + 1
    assert (counts.num_packed, counts.num_not_sampled) == (good, 0)
    assert counts.num_rejected == counts.num_annotations - good


def test_messages_name_no_path_of_this_machine(built: Path, broken: BrokenFolder) -> None:
    assert not [row["message"] for row in ledger(built) if str(broken.root) in (row["message"] or "")]


def test_a_decoder_that_is_too_slow_costs_its_record(built: Path) -> None:
    assert [(row["status"], row["codes"]) for row in ledger(built, "slow")] == [("rejected", ["decode_timeout"])]


def test_validate_finds_exactly_the_same(validated: tuple[Result, Path], broken: BrokenFolder) -> None:
    result, out = validated
    assert result.exit_code == 1, result.output
    expected = [entry for entry in broken.expected if not entry.file.endswith(".parquet")]
    rejected = [entry for entry in expected if entry.codes and not entry.only_build]
    rejects = lines_of(out / "rejects.jsonl")
    actual = [
        (Path(reject["file"]).name, reject["line"], sorted({problem["code"] for problem in reject["problems"]}))
        for reject in rejects
    ]
    assert actual == [(entry.file, entry.line, sorted(entry.codes)) for entry in rejected]
    assert f"{len(expected):,} annotations: {len(expected) - len(rejected)} valid, {len(rejected)} rejected" in (
        result.stdout
    )
    assert len(lines_of(out / "fixed.jsonl")) == len(expected) - len(rejected)


def test_validate_reads_parquet(broken: BrokenFolder) -> None:
    table = next(path for path in broken.files if path.suffix == ".parquet")
    result = run("validate", table, "--workers", 1, "--deep", "--max-source-bytes", MAX_SOURCE_BYTES)
    expected = [entry.codes for entry in broken.expected if entry.file == table.name]
    assert result.exit_code == 1, result.output
    assert f"{len(expected)} annotations: {expected.count(())} valid" in result.stdout
    for code, count in Counter(code for codes in expected for code in codes).items():
        assert f"\n{code}: {count}\n" in result.stdout


def test_validate_with_too_short_a_time_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(slow_video(tmp_path)) + "\n")
    result = run("validate", tmp_path / "a.jsonl", "--workers", 1, "--decode-timeout", f"{SLOW_S:f}")
    assert result.exit_code == 1
    assert "decode_timeout: 1" in result.stdout


def test_what_validate_writes_is_one_line_a_record_whatever_the_layout(tmp_path: Path) -> None:
    """A number beyond the range of a float does not matter, since nothing reads its field."""
    record = {"conversations": [{"from": "human", "value": "a\nb"}, {"from": "gpt", "value": "é"}]}
    text = json.dumps([record, {**record, "id": [1]}], indent=1).replace(
        '"conversations"', '"n": 1e999,\n"conversations"'
    )
    (tmp_path / "a.json").write_text(text.replace("\n", "\r\n"))
    result = run(
        "validate", tmp_path / "a.json", "--workers", 1, "--fixed", tmp_path / "f", "--rejects", tmp_path / "r"
    )
    assert result.exit_code == 1, result.exception
    inf = float("inf")
    assert lines_of(tmp_path / "f") == [{"n": inf, **record}]
    assert [reject["annotation"] for reject in lines_of(tmp_path / "r")] == [{"n": inf, **record, "id": [1]}]


def test_names_of_media_that_leave_the_root_say_nothing_about_what_is_there(validated: tuple[Result, Path]) -> None:
    problems = [problem for reject in lines_of(validated[1] / "rejects.jsonl") for problem in reject["problems"]]
    outside = [problem["message"] for problem in problems if problem["code"] == "media_outside_root"]
    assert len(outside) >= 14
    assert all("outside the media root" in text or "not a path below" in text for text in outside)


WHOLE = b"\n".join([GOOD] * 2000)
DAMAGED = {
    "cut.jsonl.gz": gzip.compress(WHOLE)[:-30],
    "checksum.jsonl.gz": gzip.compress(WHOLE)[:-8] + bytes(8),
    "flipped.jsonl.gz": gzip.compress(WHOLE)[:40] + b"\xff\xff\xff\xff" + gzip.compress(WHOLE)[44:],
    "plain.jsonl.gz": GOOD,
    "empty.jsonl.gz": b"",
    "tail.jsonl.gz": gzip.compress(WHOLE) + b"and more",
    "cut.jsonl.zst": zstandard.compress(WHOLE)[:-5],
    "plain.jsonl.zst": GOOD,
    "empty.jsonl.zst": b"",
    "tail.jsonl.zst": zstandard.compress(WHOLE) + b"and more",
    "plain.parquet": GOOD,
    "empty.parquet": b"",
    "cut.parquet": b"PAR1" + bytes(100),
    "footer.parquet": b"PAR1" + bytes(100) + b"\xff\xff\x00\x00PAR1",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_sentence_and_nothing_is_sealed(tmp_path: Path, tiny_checkpoint: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    for arguments in (["validate", tmp_path / name], ["build", tmp_path / name, "--out", tmp_path / "out"]):
        model = ["--model", tiny_checkpoint] if arguments[0] == "build" else []
        result = run(*arguments, *model, "--workers", 1)
        assert result.exit_code == 1, result.exception
        fault = "not compressed, though" if name.startswith("plain.jsonl") else "damaged: "
        assert f"annotation file {tmp_path / name} is {fault}" in result.stderr
        assert "Fetch or write it again" in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damage_behind_the_footer_of_a_parquet_file_stops_the_build(
    tmp_path: Path, tiny_checkpoint: Path, broken: BrokenFolder
) -> None:
    data = bytearray((broken.root / "table.parquet").read_bytes())
    data[4:400] = bytes(396)
    (tmp_path / "a.parquet").write_bytes(data)
    result = run("build", tmp_path / "a.parquet", "--out", tmp_path / "out", "--model", tiny_checkpoint, "--workers", 1)
    assert result.exit_code == 1, result.exception
    assert "is damaged" in result.stderr


LONG_BYTES = 100_000_000
BOUND_KB = 450_000
MEASURE = """
import re, sys
from pathlib import Path
from prep.cli import main
try:
    main(sys.argv[1:])
finally:
    # Not getrusage: its peak starts with that of the process that started this one.
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "start", "filler", "end"),
    [
        ("text.jsonl", b'{"conversations": [{"from": "human", "value": "', b"x", b'"}]}\n'),
        ("brackets.jsonl", b"{", b"[", b"\n"),
        ("list.jsonl", b"", b"[", b"\n"),
        ("quotes.json", b'{"id": "', b"\\", b'"},\n'),
    ],
)
def test_a_line_of_100_mb_is_rejected_in_bounded_memory(
    tmp_path: Path, name: str, start: bytes, filler: bytes, end: bytes
) -> None:
    """It is between two valid records, whose image file is empty so that no decoder starts."""
    opening, separator, closing = (b"[", b",\n", b"]") if name.endswith(".json") else (b"", b"\n", b"\n")
    path = tmp_path / name
    with path.open("wb") as file:
        file.write(opening + GOOD + separator + start)
        for _ in range(100):
            file.write(filler * (LONG_BYTES // 100))
        file.write(end + GOOD + closing)
    (tmp_path / "good.png").touch()
    command = [sys.executable, "-c", MEASURE, "validate", str(path), "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    path.unlink()
    assert result.returncode == 1, result.stderr
    assert "3 annotations: 0 valid, 3 rejected" in result.stdout
    assert "bad_json: 1" in result.stdout
    assert f"{path}:2: the record is longer than" in result.stdout
    assert "media_empty: 2" in result.stdout
    assert 50_000 < int(result.stderr.split()[-1]) < BOUND_KB
