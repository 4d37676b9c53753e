"""Thousands of damaged records and media, the same in every run: no crash, no hang, and counts that balance."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prep.annotations import json_records
from prep.annotations.file_faults import whole_file_fault
from prep.annotations.records import index_file, read_chunk
from prep.annotations.registry import find_sources
from prep.annotations.validation import check_record, parse_record, read_id
from prep.build.pipeline import BuildRequest, build
from prep.engines import SerialEngine
from prep.media.decode import MediaInfo
from prep.media.sandbox import Sandbox
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import MediaError
from schemas.settings import BuildSettings, MediaSettings
from storage.shard_set import read_manifest
from tests.prep.broken import encoded
from tests.prep.corpus import turn
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

Rng = np.random.Generator

NUM_RECORDS = 3000
NUM_FILES = 600
NUM_OF_A_KIND = 100
NUM_BUILT = 22

SETTINGS = MediaSettings(
    min_pixels=784, max_pixels=3136, video_min_frame_pixels=784, video_max_frame_pixels=3136, max_source_pixels=1 << 22
)
MEDIA_CODES = {
    ReasonCode.MEDIA_UNREADABLE,
    ReasonCode.MEDIA_EMPTY,
    ReasonCode.UNSUPPORTED_MEDIA,
    ReasonCode.BAD_ASPECT_RATIO,
    ReasonCode.MEDIA_TOO_LARGE,
}

SEEDS = [
    json.dumps(record).encode()
    for record in (
        {"id": "a", "image": "a.png", "conversations": turn("<image>\nWhat is this?", 'A "cat" \\ dog.')},
        {"id": 7, "images": ["a.png", "b.png"], "conversations": turn("<image><image>", "é 猫 \U0001f408")},
        {
            "video": "a.mp4",
            "messages": [{"role": "user", "content": "<video>?"}, {"role": "assistant", "content": "x"}],
        },
        {"texts": [{"user": "Why?", "assistant": "So."}], "images": [], "meta": {"a": [1, 2.5e3, None, True]}},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]},
                {"role": "assistant", "content": "x"},
            ]
        },
        [{"conversations": turn("a")}, {"conversations": turn("b")}, 3],
    )
]
PIECES = b'"\\{}[],:\n\r <\x00\xff\xc3-.e9'
WORDS = [
    b"NaN", b"null", b"true", b"1e999", b"-", b'""', b"[]", b"{}", b"[[[[", b"]]]]", b'"conversations"', b'"messages"',
    b'"texts"', b'"image":', b"<image>", b"<|im_end|>", b"\\ud800", b"\\u0000", b"\xef\xbb\xbf", b"\xed\xa0\x80",
    b"9" * 400, b"[" * 500, b'{"a":' * 500,
]  # fmt: skip


def mutated(rng: Rng, text: bytes) -> bytes:
    """A few random changes: bytes inserted, removed, replaced or repeated, or the end cut off."""
    data = bytearray(text)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(data) + 1))
        end = at + int(rng.integers(1, 12))
        kind = rng.integers(0, 12)
        if kind == 0:
            data[at:end] = b""
        elif kind == 1:
            data[at:at] = WORDS[rng.integers(0, len(WORDS))]
        elif kind == 2:
            data[at : at + 1] = bytes([PIECES[rng.integers(0, len(PIECES))]])
        elif kind == 3:
            data[at:at] = data[at:end]
        elif kind == 4:
            data[at:end] = rng.bytes(end - at)
        elif kind == 5:
            del data[at:]
        else:
            data[at : at + 1] = bytes([b"abcAZ 019"[rng.integers(0, 9)]])
    return bytes(data)


def is_json(data: bytes) -> bool:
    """Whether Python's own parser accepts a text as JSON in UTF-8."""
    try:
        json.loads(data.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def test_any_text_is_a_good_record_or_has_problems() -> None:
    """Never an exception; and what passes is JSON to another reader too, with a conversation and a medium a tag."""
    rng = np.random.default_rng(1)
    codes: Counter[str] = Counter()
    for index in range(NUM_RECORDS):
        data = mutated(rng, SEEDS[index % len(SEEDS)])
        annotation, problems, *_ = parse_record(data)
        read_id(data)
        codes.update({problem.code.value for problem in problems} or {"good"})
        if problems:
            assert all(problem.message for problem in problems)
            if ReasonCode.BAD_JSON in {problem.code for problem in problems}:
                assert annotation is None
            continue
        assert annotation is not None
        assert is_json(data)
        text = "".join(turn.value for turn in annotation.turns)
        assert (text.count("<image>"), text.count("<video>")) == (len(annotation.images), len(annotation.videos))
    assert codes["good"] > NUM_RECORDS // 50
    assert codes["bad_json"] > NUM_RECORDS // 5
    assert {"bad_field", "missing_conversations", "not_an_object", "unknown_role", "tag_mismatch"} <= set(codes)


@pytest.mark.parametrize("opening", [b"", b"["])
def test_any_file_gives_as_many_records_as_were_counted(
    tmp_path: Path, opening: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any text, blocks and chunks, all records are in order, and each is checked without an exception."""
    rng = np.random.default_rng(2)
    path = tmp_path / "annotations"
    total = num_refused = 0
    for _ in range(NUM_FILES // 2):
        monkeypatch.setattr(json_records, "_BLOCK_BYTES", int(rng.integers(1, 800)))
        monkeypatch.setattr(json_records, "CHUNK_RECORDS", int(rng.integers(1, 5)))
        monkeypatch.setattr(json_records, "MAX_RECORD_BYTES", int(rng.choice([100, 1000, 1 << 24])))
        picked = [SEEDS[index] for index in rng.integers(0, len(SEEDS), int(rng.integers(1, 8)))]
        text = opening + (b",\n" if opening else b"\n").join(picked) + (b"]" if opening else b"\n")
        path.write_bytes(mutated(rng, text))
        if whole_file_fault(path, path) is not None:
            num_refused += 1
            continue
        index = index_file(path, tmp_path)
        records = [record for chunk in index.chunks for record in read_chunk(index.data, chunk)]
        assert [record.index for record in records] == list(range(index.num_records))
        lines = [record.line for record in records]
        assert lines == sorted(lines)
        assert lines[-1:] <= [path.read_bytes().count(b"\n") + 1]
        for record in records:
            assert record.data is not None or record.fault
            check_record(record, "reject")
        total += len(records)
    assert total > NUM_FILES
    assert num_refused < NUM_FILES // 60


def damaged(rng: Rng, data: bytes) -> bytes:
    """Cut off the end, zero or insert bytes, or flip bits (more often in the header)."""
    kind = int(rng.integers(0, 5))
    at = int(rng.integers(0, len(data)))
    if kind == 0:
        return data[:at]
    changed = bytearray(data)
    if kind == 1:
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    elif kind == 2:
        changed[at:at] = rng.bytes(16)
    else:
        reach = len(data) if kind == 3 else min(len(data), 256)
        for position in rng.integers(0, reach, int(rng.integers(1, 9))).tolist():
            changed[position] ^= 1 << int(rng.integers(0, 8))
    return bytes(changed)


def encoded_video(codec: str, name: str, folder: Path) -> bytes:
    return write_video(folder / name, 6, 2, width=32, height=32, codec=codec).read_bytes()


def animated(kind: str) -> Callable[[Path], bytes]:
    def make(folder: Path) -> bytes:
        out = io.BytesIO()
        random_image(40, 30).save(out, kind, save_all=True, append_images=[random_image(40, 30, seed=1)])
        return out.getvalue()

    return make


def still(kind: str) -> Callable[[Path], bytes]:
    return lambda folder: encoded(kind, 40, 30)


KINDS: dict[str, tuple[int, Callable[[Path], bytes]]] = {
    "jpg": (MEDIA_IMAGE, still("JPEG")),
    "png": (MEDIA_IMAGE, still("PNG")),
    "webp": (MEDIA_IMAGE, still("WEBP")),
    "gif": (MEDIA_IMAGE, animated("GIF")),
    "tif": (MEDIA_IMAGE, still("TIFF")),
    "avif": (MEDIA_IMAGE, still("AVIF")),
    "mp4": (MEDIA_VIDEO, lambda folder: encoded_video("mpeg4", "seed.mp4", folder)),
    "mkv": (MEDIA_VIDEO, lambda folder: encoded_video("libx264", "seed.mkv", folder)),
}


def attempt(action: Callable[[], Any]) -> Any:
    """The result of an action, or its MediaError."""
    try:
        return action()
    except MediaError as error:
        return error


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_media_are_used_or_have_a_code(tmp_path: Path, kind: str) -> None:
    """Probe and decode raise nothing but a MediaError, do not time out, and return valid results.

    A decoder that hangs would be stopped with ``decode_timeout``, which is not among the codes.
    """
    media_type, make = KINDS[kind]
    content = make(tmp_path)
    rng = np.random.default_rng(list(kind.encode()))
    codes: Counter[str] = Counter()
    box = Sandbox()
    try:
        for index in range(NUM_OF_A_KIND):
            path = tmp_path / f"x.{kind}"
            path.write_bytes(damaged(rng, content) if index else content)
            source = MediaSource(path.name, path)
            facts = attempt(lambda source=source: box.probe(source, media_type, SETTINGS))  # type: ignore[misc]
            result = attempt(lambda source=source: box.decode(source, media_type, SETTINGS))  # type: ignore[misc]
            for outcome in (facts, result):
                if isinstance(outcome, MediaError):
                    assert outcome.code in MEDIA_CODES, (index, outcome.message)
                    assert str(tmp_path) not in outcome.message
            if isinstance(result, MediaError):
                codes[result.code.value] += 1
                continue
            codes["good"] += 1
            decoded, frames = result
            assert isinstance(decoded, MediaInfo)
            steps = 2 * decoded.grid.t if media_type == MEDIA_VIDEO else 1
            assert frames.shape == (steps, 3, 14 * decoded.grid.h, 14 * decoded.grid.w)
    finally:
        box.close()
    assert codes["good"] >= 1
    assert NUM_OF_A_KIND - codes["good"] >= NUM_OF_A_KIND // 10, codes


def test_a_build_over_damaged_media_balances(tmp_path: Path, tiny_checkpoint: Path) -> None:
    rng = np.random.default_rng(4)
    records = []
    for kind, (media_type, make) in KINDS.items():
        content = make(tmp_path)
        for index in range(NUM_BUILT):
            name = f"{index}.{kind}"
            (tmp_path / name).write_bytes(damaged(rng, content) if index % 8 else content)
            field = "video" if media_type == MEDIA_VIDEO else "image"
            records.append({"id": name, field: name, "conversations": turn(f"<{field}>What?")})
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = BuildSettings(max_length=256, shard_bytes=100_000, media=SETTINGS)
    sources = find_sources(str(tmp_path / "a.jsonl"), registry=None, media_root=None, media=SETTINGS)
    request = BuildRequest(
        sources=tuple(sources),
        out=tmp_path / "out",
        settings=settings,
        model=str(tiny_checkpoint),
        max_rejected=Fraction(1),
    )
    build(request, SerialEngine())
    rows = pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist()
    counts = read_manifest(tmp_path / "out").counts
    assert [row["id"] for row in rows] == [record["id"] for record in records]
    statuses = Counter(row["status"] for row in rows)
    assert statuses == {"packed": counts.num_packed, "rejected": counts.num_rejected}
    assert counts.num_packed + counts.num_rejected == counts.num_annotations == len(records)
    assert {row["id"] for row in rows if row["status"] == "packed"} >= {
        f"{index}.{kind}" for kind in KINDS for index in range(0, NUM_BUILT, 8)
    }
    assert counts.num_rejected > NUM_BUILT
    assert {code for row in rows for code in row["codes"]} <= {code.value for code in MEDIA_CODES}
