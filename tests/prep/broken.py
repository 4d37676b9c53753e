"""A folder of annotation files in which most records are broken, with the expected reason codes of each.

It has JSONL, intact and damaged arrays, Parquet with embedded images, and the media files, valid and invalid.
Valid records are between the broken ones, since a broken record must not affect its neighbours.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.prep.corpus import turn
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

MAX_SOURCE_BYTES = 1_000_000
"""Upper bound on the size of media files, for use with the folder."""

MAX_LENGTH = 1200
"""Upper bound on the tokens of a sample, for use with the folder."""

GOOD = json.dumps({"id": "good", "image": "good.png", "conversations": turn("<image>What?")}).encode()
TURNS = json.dumps(turn("hi"))[1:-1]


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected outcome of one annotation; ``codes`` is empty for a valid one.

    ``only_build``: whether only a build, which tokenizes, detects the problem.
    """

    file: str
    line: int
    codes: tuple[str, ...]
    only_build: bool = False


@dataclass(slots=True)
class BrokenFolder:
    """The folder, its annotation files, and the expected outcome of every annotation in the order of the files."""

    root: Path
    files: list[Path] = field(default_factory=list)
    expected: list[Expected] = field(default_factory=list)

    def add(self, name: str, content: bytes, expected: list[tuple[int, str]], *, only_build: bool = False) -> None:
        """Write a file; ``expected`` has the line and the codes (separated by spaces) of every annotation."""
        (self.root / name).write_bytes(content)
        self.files.append(self.root / name)
        self.expected += [Expected(name, line, tuple(codes.split()), only_build) for line, codes in expected]


def human(value: object, **fields: object) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "x"}], **fields}


def roles(*names: object) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": "x"} for name in names]}


def answer(value: str) -> dict[str, Any]:
    return {"conversations": turn("Why?", value)}


def image(name: object) -> dict[str, Any]:
    return {"image": name, "conversations": turn("<image>What?")}


def video(name: object) -> dict[str, Any]:
    return {"video": name, "conversations": turn("<video>What?")}


def nested(depth: int, inner: str) -> bytes:
    return f'{{"meta": {"[" * depth}{inner}{"]" * depth}, "conversations": [{TURNS}]}}'.encode()


def with_field(text: bytes) -> bytes:
    """A valid record with an additional field ``x`` that the reader ignores."""
    return b'{"x": ' + text + f', "conversations": [{TURNS}]}}'.encode()


NOT_JSON = [
    b"{not json",
    b"{",
    b"}",
    b'"an unfinished string',
    GOOD[: len(GOOD) // 2],
    GOOD + b" " + GOOD,
    GOOD[:-1] + b",}",
    GOOD.replace(b'"', b"'"),
    b"// a comment",
    b"id,conversations",
    with_field(b"NaN"),
    with_field(b"-Infinity"),
    with_field(b"01"),
    with_field(b"tru"),
    with_field(b'"\\q"'),
    with_field(b'"a\x00b"'),
    with_field(b'"\xff"'),
    with_field(b'"\xed\xa0\x80"'),
    with_field(b'"\\ud800"'),
    json.dumps(human("before \ud800 after")).encode(),
    json.dumps(human("\ud83dA")).encode(),
    GOOD.replace(b"What", b"Wh\xe9t"),
    GOOD.replace(b"What", b"Wh\tt"),
    b'{"id": ' + b"9" * 5000 + b", " + GOOD[1:].replace(b'"id"', b'"name"'),
    nested(100_000, "1"),
    nested(401, ""),
    b"[" * 100_000,
    b"[" * 100_000 + b"]" * 100_000,
    b'{"a":' * 100_000,
    b"]" * 1000,
    b"\x00" * 100,
]
"""Lines that are ``bad_json``."""

RECORDS: list[tuple[object, str]] = [
    ([], "not_an_object"),
    ([[]], "not_an_object"),
    (7, "not_an_object"),
    (1.5, "not_an_object"),
    ("a string", "not_an_object"),
    (None, "not_an_object"),
    (True, "not_an_object"),
    ({}, "missing_conversations"),
    ({"image": "good.png"}, "missing_conversations"),
    ({"conversation": turn("hi")}, "missing_conversations"),
    ({"conversations": None}, "missing_conversations"),
    ({"conversations": []}, "missing_conversations"),
    ({"messages": []}, "missing_conversations"),
    ({"texts": []}, "missing_conversations"),
    ({**human("hi"), "rejected_response": "no"}, "unsupported_field"),
    ({**human("hi"), "audios": ["a.wav"]}, "unsupported_field"),
    ({**human("<bbox>"), "objects": {"bbox": [[1, 2, 3]]}}, "bad_box"),
    ({**human("<bbox>"), "objects": {"bbox": [[1, 2, 3, "4"]]}}, "bad_box"),
    ({**human("<bbox>"), "objects": {"bbox": [[1, 2, 3, 4]]}}, "ambiguous_box"),
    ({**human("<bbox>"), "objects": {"bbox": [[1, 2]]}}, "ambiguous_box"),
    ({"conversations": "hi"}, "bad_field"),
    ({"conversations": {}}, "bad_field"),
    ({"conversations": ["hi", "x"]}, "bad_field"),
    ({"conversations": [{"from": "human"}, {"value": "x"}]}, "bad_field"),
    (
        {"messages": [{"role": "user", "content": [{"type": "sound"}]}, {"role": "assistant", "content": "x"}]},
        "bad_field",
    ),
    ({"messages": [{"role": "user", "content": {"text": "hi"}}, {"role": "assistant", "content": "x"}]}, "bad_field"),
    ({"texts": [{"user": "hi"}]}, "bad_field"),
    ({"texts": ["hi"]}, "bad_field"),
    (human(3), "bad_field"),
    (human(None), "bad_field"),
    (human("hi", id=[1]), "bad_field"),
    (human("hi", id=True), "bad_field"),
    (human("hi", id=1.5), "bad_field"),
    (image(3), "bad_field"),
    (image({"bytes": "iVBOR"}), "bad_field"),
    (image(["good.png", None]), "bad_field"),
    (human("<image>", images="good.png"), "bad_field"),
    (human("<image>", image="good.png", images=["good.png"]), "bad_field"),
    (video(["clip.mp4", 1]), "bad_field"),
    (roles("human", "bot"), "unknown_role"),
    (roles("Humans", "gpt"), "unknown_role"),
    (roles("", "gpt"), "unknown_role"),
    ({"messages": [{"role": "tool", "content": "a"}, {"role": "assistant", "content": "x"}]}, "bad_turn_order"),
    (roles("gpt", "human"), "bad_turn_order"),
    (roles("human"), "bad_turn_order"),
    (roles("human", "human", "gpt"), "bad_turn_order"),
    (roles("human", "gpt", "human"), "bad_turn_order"),
    (roles("system"), "bad_turn_order"),
    (roles("human", "system", "gpt"), "bad_turn_order"),
    (human(""), "empty_turn"),
    (human(" \n\t\u3000"), "empty_turn"),
    (answer(""), "empty_turn"),
    ({"texts": [{"user": "hi", "assistant": " "}]}, "empty_turn"),
    (human("<image>"), "tag_mismatch"),
    (human("hi", image="good.png"), "tag_mismatch"),
    (human("<image><image>", image="good.png"), "tag_mismatch"),
    (human("<image>", images=[]), "tag_mismatch"),
    (human("<video>", image=None, videos=[]), "tag_mismatch"),
    (human("<image>", video="clip.mp4"), "tag_mismatch"),
    (answer("<image>"), "tag_in_answer"),
    (answer("see <video> there"), "tag_in_answer"),
    ({"conversations": [{"from": "system", "value": "<image>"}, *turn("hi")]}, "tag_in_answer"),
    (human("<|im_start|>system"), "reserved_token"),
    (human("<|image_pad|>"), "reserved_token"),
    (human("a <|endoftext|>"), "reserved_token"),
    (answer("<|im_end|>"), "reserved_token"),
    (answer("<|video_pad|>"), "reserved_token"),
    (human("x" * (1 << 20)), "too_long"),
    # Several problems at once: all of them are reported.
    (roles("human", "human") | {"image": 3, "id": True}, "bad_field bad_turn_order"),
    (human("<image> <|im_start|>", image=["none.png", "none.png"]), "reserved_token tag_mismatch media_missing"),
    (human("<image><image>", images=["none.png", "empty.png"]), "media_missing media_empty"),
    (human("<image><video>", image="../secret.png", video="empty.mp4"), "media_outside_root media_empty"),
    (
        {"conversations": [{"from": "robot", "value": ""}, {"from": "gpt", "value": "<image> <|im_end|>"}]},
        "unknown_role empty_turn tag_in_answer reserved_token",
    ),
]

MEDIA: list[tuple[dict[str, Any], str]] = [
    *[
        (image(name), "media_outside_root")
        for name in (
            "../secret.png",
            "sub/../../secret.png",
            "{outside}/secret.png",
            "/etc/passwd",
            "link.png",
            "link/secret.png",
            "chain.png",
            "http://example.com/a.png",
            "s3://bucket/a.png",
            "file:///etc/passwd",
            "good.png\0.jpg",
            "..",
        )
    ],
    (video("../secret.mp4"), "media_outside_root"),
    (video("https://example.com/a.mp4"), "media_outside_root"),
    *[
        (image(name), "media_missing")
        for name in ("none.png", "", " ", "%2e%2e/secret.png", "~/a.png", "good.png/a.png", "x" * 5000, "dangling.png")
    ],
    (image("..\\secret.png"), "media_missing"),
    (video("none.mp4"), "media_missing"),
    (image("loop.png"), "media_unreadable"),
    (image("empty.png"), "media_empty"),
    (video("empty.mp4"), "media_empty"),
    *[
        (image(name), "unsupported_media")
        for name in (
            "sub",
            "fifo.png",
            "text.png",
            "page.pdf",
            "drawing.svg",
            "drawing.eps",
            "magic.jpg",
            "clip.mp4",
            "float.tif",
        )
    ],
    *[
        (video(name), "unsupported_media")
        for name in ("good.png", "text.png", "list.m3u8", "list.mp4", "list.ffconcat", "list.sdp", "list.mpd")
    ],
    *[(image(name), "bad_aspect_ratio") for name in ("wide.png", "high.png", "wide.gif")],
    (video("wide.mp4"), "bad_aspect_ratio"),
    *[(image(name), "media_too_large") for name in ("huge.png", "huge.gif", "sparse.png")],
    (video("sparse.mp4"), "media_too_large"),
    *[
        (image(name), "media_unreadable")
        for name in ("head.png", "half.jpg", "half.png", "half.webp", "half.tif", "half.avif", "flipped.png")
    ],
    *[(video(name), "media_unreadable") for name in ("half.mp4", "head.mp4", "sound.mp4", "half.mkv", "noise.mp4")],
]


def write_broken(root: Path) -> BrokenFolder:
    """Write everything below ``root``, and two files beside it that must not be read."""
    root.mkdir()
    _write_media(root)
    folder = BrokenFolder(root)
    outside = str(root.parent)
    lines: list[tuple[bytes, str]] = [(line, "bad_json") for line in NOT_JSON]
    lines += [(json.dumps(record).encode(), codes) for record, codes in RECORDS]
    lines += [(json.dumps(record).replace("{outside}", outside).encode(), codes) for record, codes in MEDIA]
    mixed = [pair for index, line in enumerate(lines) for pair in ([line] if index % 4 else [(GOOD, ""), line])]
    mark = b"\xef\xbb\xbf"
    folder.add(
        "lines.jsonl",
        mark + b"\r\n".join(line for line, _ in mixed),
        [(line_number, codes) for line_number, (_, codes) in enumerate(mixed, start=1)],
    )
    folder.add(
        "array.json",
        mark + b"[" + GOOD + b',\n{"id": },\n7,\n' + GOOD + b"]\n",
        [(1, ""), (2, "bad_json"), (3, "not_an_object"), (4, "")],
    )
    folder.add("cut.json", b"[" + GOOD + b",\n" + GOOD[:60], [(1, ""), (2, "bad_json")])
    folder.add("unclosed.json", b"[" + GOOD + b",\n" + GOOD + b"\n", [(1, ""), (2, ""), (3, "bad_json")])
    folder.add(
        "unbalanced.json",
        b"[" + GOOD + b",\n[" + GOOD + b",\n" + GOOD + b"]\n",
        [(1, ""), (2, ""), (2, ""), (4, "bad_json")],
    )
    folder.add("behind.json", b"[\n" + GOOD + b"\n]\nand more", [(2, ""), (4, "bad_json")])
    folder.add(
        "packed.jsonl", b"[" + GOOD + b", 7, {}]\n", [(1, ""), (1, "not_an_object"), (1, "missing_conversations")]
    )
    folder.add("long.jsonl", json.dumps(human("long " * 3000)).encode() + b"\n", [(1, "too_long")], only_build=True)
    folder.add("table.parquet", _table(), [(row_number, codes) for row_number, (_, codes) in enumerate(_ROWS, start=1)])
    return folder


def _png(width: int, height: int) -> bytes:
    """A PNG whose header states a size for which it has too little pixel data."""
    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(100))),
        (b"IEND", b""),
    ):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def encoded(kind: str, width: int = 90, height: int = 60) -> bytes:
    """An image file as bytes."""
    out = io.BytesIO()
    random_image(width, height).save(out, kind)
    return out.getvalue()


def _sound() -> bytes:
    """An MP4 file with an audio stream only."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return out.getvalue()


def _write_media(root: Path) -> None:
    png, mp4 = encoded("PNG"), write_video(root / "clip.mp4", 12, 2).read_bytes()
    mkv = write_video(root / "clip.mkv", 12, 2, codec="libx264").read_bytes()
    (root.parent / "secret.png").write_bytes(png)
    (root.parent / "secret.mp4").write_bytes(mp4)
    (root / "sub").mkdir()
    os.mkfifo(root / "fifo.png")
    for name, target in (
        ("link.png", root.parent / "secret.png"),
        ("link", root.parent),
        ("chain.png", root / "link.png"),
        ("dangling.png", root / "nowhere.png"),
        ("loop.png", root / "loop.png"),
    ):
        (root / name).symlink_to(target)
    for name in ("sparse.png", "sparse.mp4"):
        (root / name).touch()
        os.truncate(root / name, MAX_SOURCE_BYTES + 1)
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    write_video(root / "wide.mp4", 4, 2, width=4032, height=16)
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:6\n#EXTINF:6,\n{root.parent}/secret.mp4\n#EXT-X-ENDLIST\n".encode()
    files = {
        "good.png": png,
        "empty.png": b"",
        "empty.mp4": b"",
        "text.png": b"no picture, but words " * 20,
        "page.pdf": b"%PDF-1.7\n" + bytes(200),
        "drawing.svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "drawing.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "magic.jpg": b"\x00\x00" + encoded("JPEG")[2:],
        "wide.png": encoded("PNG", 300, 1),
        "high.png": encoded("PNG", 2, 500),
        "wide.gif": encoded("GIF", 201, 1),
        "huge.png": _png(100_000, 100_000),
        "huge.gif": encoded("GIF")[:6] + struct.pack("<HH", 65535, 65535) + encoded("GIF")[10:],
        "head.png": png[:20],
        "half.png": png[: len(png) // 2],
        "flipped.png": bytes(flipped),
        "half.mp4": mp4[: len(mp4) // 2],
        "head.mp4": mp4[:40],
        "noise.mp4": mp4[:32] + np.random.default_rng(0).bytes(3000),
        "half.mkv": mkv[:300],
        "sound.mp4": _sound(),
        "list.m3u8": playlist,
        "list.mp4": playlist,
        "list.ffconcat": f"ffconcat version 1.0\nfile '{root.parent}/secret.mp4'\n".encode(),
        "list.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "list.mpd": b'<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>',
    }
    for kind, name in (("JPEG", "half.jpg"), ("WEBP", "half.webp"), ("TIFF", "half.tif"), ("AVIF", "half.avif")):
        files[name] = encoded(kind)[: len(encoded(kind)) // 2]
    for name, content in files.items():
        (root / name).write_bytes(content)
    Image.fromarray(np.full((60, 60), 0.5, dtype=np.float32)).save(root / "float.tif")


_TURNS = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
_ROWS: list[tuple[dict[str, Any], str]] = [
    ({"conversations": _TURNS, "images": [{"bytes": encoded("PNG"), "path": None}]}, ""),
    ({"conversations": _TURNS, "images": [{"bytes": b"", "path": "a.png"}]}, "media_empty"),
    ({"conversations": _TURNS, "images": [{"bytes": b"no picture", "path": "a.png"}]}, "unsupported_media"),
    ({"conversations": _TURNS, "images": [{"bytes": encoded("PNG")[:300], "path": None}]}, "media_unreadable"),
    ({"conversations": _TURNS, "images": [{"bytes": _png(90_000, 90_000), "path": None}]}, "media_too_large"),
    ({"conversations": _TURNS, "images": [{"bytes": bytes(MAX_SOURCE_BYTES + 1), "path": None}]}, "media_too_large"),
    ({"conversations": _TURNS, "images": [{"bytes": None, "path": "../secret.png"}]}, "media_outside_root"),
    ({"conversations": _TURNS, "images": [{"bytes": None, "path": "none.png"}]}, "media_missing"),
    ({"conversations": _TURNS, "images": [{"bytes": None, "path": None}]}, "bad_field"),
    ({"conversations": _TURNS, "images": []}, "tag_mismatch"),
    ({"conversations": None, "images": None}, "missing_conversations"),
    ({"conversations": [None], "images": None}, "bad_field"),
    ({"conversations": _TURNS, "images": [{"bytes": None, "path": "good.png"}]}, ""),
]


def _table() -> bytes:
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    out = io.BytesIO()
    schema = pa.schema([("conversations", turns), ("images", images)])
    pq.write_table(pa.Table.from_pylist([row for row, _ in _ROWS], schema=schema), out)
    return out.getvalue()
