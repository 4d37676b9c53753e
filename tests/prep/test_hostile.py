"""Input made to exhaust, mislead or outlive the program; and short cuts that must agree with the long way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner, Result
from hypothesis import example, given, settings
from hypothesis import strategies as st

from prep.annotations import array_scanner, validation
from prep.annotations.array_scanner import ArrayScanner, nesting_depth
from prep.annotations.chunks import Record
from prep.annotations.problems import MAX_OF_A_CODE
from prep.annotations.records import _unzstd, index_file, read_chunk
from prep.annotations.registry import Registry, find_sources
from prep.annotations.validation import MAX_TEXT_CHARACTERS, parse_record
from prep.build.pipeline import BuildRequest, build
from prep.cli import main
from prep.engines import SerialEngine
from prep.media.images import probe_image
from prep.media.sandbox import Sandbox
from prep.media.source import MediaSource
from prep.media.videos import MAX_DURATION_S, plan_video
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE
from schemas.errors import ConfigError, MediaError
from schemas.settings import BuildSettings, MediaSettings
from tests.prep import finished as sets
from tests.prep.corpus import turn
from tests.prep.packed import packed_samples
from tests.prep.test_images import random_image

SETTINGS = MediaSettings()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def records_of(path: Path) -> list[Record]:
    index = index_file(path, path.parent)
    return [record for chunk in index.chunks for record in read_chunk(index.data, chunk)]


# Exhausting: one record of 15 MB, just below the bound, in which everything counts.

BOUND_KB = 900_000
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
    ("start", "filler", "end", "codes"),
    [
        (b"[0", b",0", b"]", {"not_an_object"}),
        (b'{"conversations":[1', b",1", b"]}", {"bad_field"}),
        (b'{"conversations":[[]', b",[]", b"]}", {"bad_field"}),
        (
            b'{"conversations":[{"from":"","value":""}',
            b',{"from":"","value":""}',
            b"]}",
            {"unknown_role", "empty_turn"},
        ),
        (b'{"conversations":[{"from":"human","value":"1', b"1", b'"},{"from":"gpt","value":"b"}]}', {"too_long"}),
    ],
)
def test_a_record_wrong_in_a_million_places_is_rejected_in_bounded_memory(
    tmp_path: Path, start: bytes, filler: bytes, end: bytes, codes: set[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"7\n" + start + filler * (15_000_000 // len(filler)) + end + b"\n")
    command = [sys.executable, "-c", MEASURE, "validate", str(path), "--workers", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    path.unlink()
    assert result.returncode == 1, result.stderr
    assert "2 annotations: 0 valid, 2 rejected" in result.stdout
    counted = {line.partition(":")[0] for line in result.stdout.splitlines() if line.endswith((": 1", ": 2"))}
    assert counted == codes | {"not_an_object"}
    assert len(result.stdout) < 10_000
    assert int(result.stderr.split()[-1]) < BOUND_KB


def test_problems_left_out_of_a_long_list_are_counted_by_code() -> None:
    record = {"conversations": [{"from": "robot", "value": ""}] * 25, "id": 1.5}
    _, problems, *_ = parse_record(json.dumps(record).encode())
    by_code = {code: [problem.message for problem in problems if problem.code is code] for code in ReasonCode}
    assert len(by_code[ReasonCode.BAD_FIELD]) == 1
    for code in (ReasonCode.UNKNOWN_ROLE, ReasonCode.EMPTY_TURN):
        assert len(by_code[code]) == MAX_OF_A_CODE + 1
        assert by_code[code][-1] == f"… and 15 more of {code.value}"


def test_text_is_tokenized_up_to_the_bound_and_no_further() -> None:
    def problems(num_characters: int) -> list[ReasonCode]:
        record = {"conversations": turn("q" * (num_characters - 1), "a")}
        return [problem.code for problem in parse_record(json.dumps(record).encode())[1]]

    # The quick check counts the separators that it puts between turns; the bound is that of the slow one.
    assert problems(MAX_TEXT_CHARACTERS) == []
    assert problems(MAX_TEXT_CHARACTERS + 1) == [ReasonCode.TOO_LONG]


def test_a_zstd_bomb_is_decompressed_in_pieces(tmp_path: Path) -> None:
    size = 256 << 20
    (tmp_path / "bomb.zst").write_bytes(zstandard.compress(bytes(size)))
    assert (tmp_path / "bomb.zst").stat().st_size < size // 10_000
    with (tmp_path / "bomb.zst").open("rb") as file:
        pieces = [len(piece) for piece in _unzstd(file)]
    assert sum(pieces) == size
    assert max(pieces) <= 32 << 20


# Short cuts.


def slow_ends(data: bytes) -> tuple[list[int], int]:
    """Byte by byte: where the elements of an array end, and how many brackets are open at most."""
    ends: list[int] = []
    depth, deepest, in_string, escaped = 1, 1, False, False
    for at, byte in enumerate(data):
        if escaped and byte in b'\\"':
            escaped = False
            continue
        escaped = False
        if byte == 0x5C:
            escaped = True
        elif byte == 0x22:
            in_string = not in_string
        elif in_string:
            continue
        elif byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
            if depth == 0:
                return [*ends, at + 1], deepest
        elif byte == 0x2C and depth == 1:
            ends.append(at + 1)
    return ends, deepest


@settings(max_examples=400, deadline=None)
@given(
    data=st.lists(st.sampled_from([b"\\", b'"', b"[", b"]", b"{", b"}", b",", b"a", b"\n"]), max_size=60).map(b"".join),
    piece=st.integers(1, 9),
    cut=st.integers(0, 60),
)
def test_the_scanner_agrees_with_one_that_goes_byte_by_byte(data: bytes, piece: int, cut: int) -> None:
    expected, deepest = slow_ends(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(array_scanner, "_PIECE_BYTES", piece)
        scanner = ArrayScanner()
        first = scanner.element_ends(data[:cut]).tolist()
        second = scanner.element_ends(data[cut:]).tolist()
        assert first + [end + min(cut, len(data)) for end in second] == expected
        assert nesting_depth(data) == deepest - 1
    assert scanner.closed == (bool(expected) and data[expected[-1] - 1] in b"]}")


texts = st.lists(
    st.sampled_from(["<image>", "<video>", "<ima", "ge>", "<|im_end|>", "<|", "a", " ", "\n", "é", "<b>", ""]),
    max_size=4,
).map("".join)
spelled_turns = st.lists(
    st.fixed_dictionaries(
        {
            "from": st.sampled_from(["human", "gpt", "human", "gpt", "system", "user", "assistant", "bot"]),
            "value": texts,
        }
    ),
    max_size=5,
)
alternating = st.lists(st.tuples(texts, texts), min_size=1, max_size=3).map(
    lambda exchanges: [message for question, answer in exchanges for message in turn(question + "?", answer + ".")]
)
names = st.one_of(st.none(), st.just("a.png"), st.lists(st.just("a.png"), max_size=2))
annotations = st.fixed_dictionaries(
    {"conversations": st.one_of(spelled_turns, alternating)},
    optional={
        "image": names,
        "images": st.one_of(st.none(), st.lists(st.just("a.png"), max_size=2)),
        "video": names,
        "id": st.one_of(st.integers(), st.text(max_size=3)),
        "other": st.sampled_from(["é", 1e300, [[[]]]]),
    },
)


@settings(max_examples=600, deadline=None)
@given(record=annotations, reserved=st.sampled_from(["reject", "escape"]), ascii_only=st.booleans())
@example(record={"conversations": turn("a <ima") + turn("ge> b"), "image": "a.png"}, reserved="reject", ascii_only=True)
@example(
    record={"conversations": [{"from": "system", "value": "<image>"}, *turn("a")]}, reserved="reject", ascii_only=True
)
@example(
    record={"conversations": [{"from": "system", "value": "<image>"}, *turn("a")], "image": "a.png"},
    reserved="reject",
    ascii_only=True,
)
def test_the_quick_check_agrees_with_the_check_turn_by_turn(
    record: dict[str, Any], reserved: str, ascii_only: bool
) -> None:
    data = json.dumps(record, ensure_ascii=ascii_only).encode()
    result = parse_record(data, reserved=reserved)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "_is_plain", lambda *_: False)
        assert parse_record(data, reserved=reserved) == result


def test_the_nesting_of_an_unread_field_has_a_bound_of_its_own() -> None:
    """The interpreter's bound depends on how deep the caller is: the same record would pass here and fail there."""

    def problems(depth: int) -> list[str]:
        data = json.dumps({"conversations": turn("a")})[:-1] + f', "x": {"[" * depth}{"]" * depth}}}'
        return [problem.message for problem in parse_record(data.encode())[1]]

    assert problems(399) == []
    assert problems(400) == ["nested more than 400 levels deep"]


# Misleading.


def test_a_decoder_that_died_between_requests_is_not_blamed_on_the_medium(tmp_path: Path) -> None:
    random_image(40, 30).save(tmp_path / "x.png")
    source = MediaSource("x.png", tmp_path / "x.png")
    box = Sandbox()
    try:
        facts = box.probe(source, MEDIA_IMAGE, SETTINGS)
        child = box._child
        assert child is not None
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert box.probe(source, MEDIA_IMAGE, SETTINGS) == facts
        assert box._child is not child
    finally:
        box.close()


class ClaimedVideo:
    """A video whose header says how long it is."""

    num_frames, height, width = 8, 48, 64

    def __init__(self, fps: float) -> None:
        self.fps = fps

    def frames(self, indices: object) -> Any:
        raise AssertionError("a plan decodes nothing")


def test_a_video_that_claims_to_last_for_weeks_has_no_usable_duration() -> None:
    """Its temporal positions, two a second, would leave the range of int32 sooner or later."""
    slowest = 8 / MAX_DURATION_S
    plan = plan_video(ClaimedVideo(slowest * 1.001), "x", SETTINGS)
    assert plan.second_per_grid_t == pytest.approx(2 * MAX_DURATION_S / 8, rel=2e-3)
    for fps in (slowest / 1.01, float("inf"), float("nan"), 0.0, -1.0):
        with pytest.raises(MediaError) as caught:
            plan_video(ClaimedVideo(fps), "x", SETTINGS)
        assert caught.value.code is ReasonCode.MEDIA_UNREADABLE


def test_a_file_that_changes_behind_the_index_is_noticed_at_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a":1}\n{"b":2}\n')
    index = index_file(path, tmp_path)
    path.write_bytes(b'{"a":1} {"b":2}\n')
    with pytest.raises(ConfigError, match="changed while it was being read"):
        list(read_chunk(index.data, index.chunks[0]))


@pytest.mark.parametrize("option", ["--rejects", "--fixed"])
def test_validate_does_not_write_over_what_it_reads(tmp_path: Path, option: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")
    (tmp_path / "link").symlink_to(path)
    for name in ("a.jsonl", "./a.jsonl", "link"):
        result = run("validate", path, option, f"{tmp_path}/{name}", "--workers", 1)
        assert result.exit_code == 2
        assert "would overwrite" in result.stderr
    assert path.read_text() == "{}\n"


def test_deep_validation_decodes_the_good_media_of_a_record_with_bad_ones(tmp_path: Path) -> None:
    random_image(300, 200).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:5000])
    record = {"images": ["none.png", "cut.png"], "conversations": turn("<image><image>")}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    result = run("validate", tmp_path / "a.jsonl", "--deep", "--workers", 1)
    assert "media_missing: 1" in result.stdout
    assert "media_unreadable: 1" in result.stdout


def test_a_folder_named_like_a_pattern_is_not_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "data[1]*"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("{}\n")
    (folder / "datasets.toml").write_text('[d]\nannotation_path = "*.jsonl"\nmedia_root = "."\n')
    (source,) = find_sources("d", registry=folder / "datasets.toml", media_root=None, media=SETTINGS)
    assert source.file_names == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize("rate", ["0.0", "-1.0", "10.5", "1e9", "inf", "nan"])
def test_a_sampling_rate_that_no_draw_can_hold_is_named_with_its_line(tmp_path: Path, rate: str) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    path = tmp_path / "datasets.toml"
    path.write_text(f'[d]\nannotation_path = "a.jsonl"\nmedia_root = "."\nsampling_rate = {rate}\n')
    with pytest.raises(ConfigError, match=r"datasets\.toml:4: sampling_rate"):
        Registry.read(path).source("d", Fraction(1), SETTINGS)


def test_datasets_that_share_their_annotations_keep_their_own_media(tmp_path: Path, tiny_checkpoint: Path) -> None:
    record = json.dumps({"id": "x", "image": "a.png", "conversations": turn("<image>")})
    text = ""
    for name, size in (("small", (56, 56)), ("large", (280, 280))):
        (tmp_path / name).mkdir()
        random_image(*size).save(tmp_path / name / "a.png")
        (tmp_path / name / "a.jsonl").write_text(record)
        text += f'[{name}]\nannotation_path = "{name}/a.jsonl"\nmedia_root = "{name}"\n'
    (tmp_path / "datasets.toml").write_text(text)
    media = MediaSettings(min_pixels=784)
    sources = find_sources("small,large", registry=tmp_path / "datasets.toml", media_root=None, media=media)
    request = BuildRequest(
        sources=tuple(sources),
        out=tmp_path / "out",
        settings=BuildSettings(media=media),
        model=str(tiny_checkpoint),
        max_rejected=Fraction(0),
    )
    build(request, SerialEngine())
    samples = packed_samples(tmp_path / "out")
    assert samples["small/0"][0].media[0][1] == (1, 4, 4)
    assert samples["large/0"][0].media[0][1] == (1, 20, 20)


def parquet(path: Path, columns: dict[str, Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_text_that_a_writer_stored_as_bytes_is_text(tmp_path: Path) -> None:
    kind = pa.list_(pa.struct([("from", pa.binary()), ("value", pa.binary())]))
    rows = [[{"from": role.encode(), "value": "é".encode()} for role in ("human", "gpt")]]
    path = parquet(tmp_path / "a.parquet", {"conversations": pa.array(rows, type=kind)})
    (record,) = records_of(path)
    annotation, problems, *_ = parse_record(record.data or b"")
    assert problems == []
    assert annotation is not None
    assert [message.value for message in annotation.turns] == ["é", "é"]


def test_text_of_a_row_that_is_not_utf_8_costs_that_row(tmp_path: Path) -> None:
    offsets = b"".join(offset.to_bytes(4, "little") for offset in (0, 2, 4, 6))
    broken = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(offsets), pa.py_buffer(b"ab\xff\xfecd")])
    rows = [[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]] * 3
    path = parquet(tmp_path / "a.parquet", {"id": broken, "conversations": rows})
    result = run("validate", path, "--workers", 1)
    assert result.exit_code == 1
    assert "3 annotations: 2 valid, 1 rejected" in result.stdout
    assert "bad_json: 1" in result.stdout
    assert f"{path}:2: text that is not UTF-8" in result.stdout


# Parquet files with columns that JSON has no values for.

CONVERSATIONS = pa.array([turn("Hi", "yes")] * 2)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2], pa.timestamp("ns")),
        pa.array([1, 2], pa.duration("ns")),
        pa.array([1, 2], pa.time64("ns")),
        pa.array([2**62, 2**62], pa.duration("s")),
        pa.array([2**30, 2**30], pa.date32()),
        pa.StructArray.from_arrays([pa.array([1, 2])] * 2, names=["a", "a"]),
    ],
    ids=lambda column: str(column.type),
)
def test_a_value_that_json_cannot_express_is_a_reject(tmp_path: Path, column: pa.Array) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([CONVERSATIONS, column], names=["conversations", "objects"]), path)
    records = records_of(path)
    assert [record.data for record in records] == [None, None]
    assert all("a value that JSON cannot express, in column 'objects'" in record.fault for record in records)


def test_several_columns_of_one_name_are_an_error_if_a_record_would_have_the_field(tmp_path: Path) -> None:
    path, numbers = tmp_path / "a.parquet", pa.array([1, 2])
    pq.write_table(pa.Table.from_arrays([CONVERSATIONS, numbers, numbers], names=["conversations", "x.y", "x.y"]), path)
    assert {record.unread for record in records_of(path)} == {("x.y",)}
    pq.write_table(pa.Table.from_arrays([CONVERSATIONS, numbers, numbers], names=["conversations", "id", "id"]), path)
    result = run("validate", path, "--workers", 1)
    assert result.exit_code == 1
    assert f"annotation file {path} has several columns named 'id'. Remove or rename all but one." in result.output


def test_an_edit_of_the_same_size_with_its_time_restored_is_seen(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As by ``touch -r`` or ``rsync --times``. A file of which only the times changed gives the same set."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": turn("Hi", "yes")}))
    before = sets.build_set(path, tmp_path / "out", tiny_checkpoint)
    manifest, status = (before / "manifest.json").read_bytes(), path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    sets.build_set(path, tmp_path / "out", tiny_checkpoint)
    assert (before / "manifest.json").read_bytes() == manifest
    path.write_text(path.read_text().replace("yes", "no!"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    sets.build_set(path, tmp_path / "out", tiny_checkpoint)
    assert (before / "manifest.json").read_bytes() != manifest


def test_a_png_with_a_hole_of_gigabytes_behind_its_end_is_an_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    random_image(56, 28).save(path)
    expected = probe_image(MediaSource("a.png", path=path), SETTINGS)
    os.truncate(path, 1 << 40)
    started = time.process_time()
    assert probe_image(MediaSource("a.png", path=path), SETTINGS) == expected
    assert time.process_time() - started < 1


def test_a_manifest_at_the_output_that_is_a_pipe_is_replaced(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": turn("Hi", "no")}))
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / "manifest.json")
    sets.build_set(tmp_path / "a.jsonl", tmp_path / "out", tiny_checkpoint)
    assert (tmp_path / "out" / "manifest.json").is_file()
