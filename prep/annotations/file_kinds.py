"""Recognizes by its first bytes a file that is no annotation file at all: an image, a video, an archive, a document.

Input: a file, or a folder in place of one. Output: what it is, what was expected, and what to give instead. Cost: the
first 2 KiB of a file, or the names in a folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from storage.folder_contents import describe_folder

EXPECTED = "expected JSON, JSONL or Parquet with a record for each sample"
_HEAD_BYTES = 2048

_IN_A_RECORD = "Give the file whose records name it (docs/annotations.md)"
_UNPACK = "Unpack it, and give the annotation file in it"
_CONVERT = "Write its rows as JSONL or Parquet"


class _Kind(NamedTuple):
    """A kind of file: how it begins, what it is, what to do, and the suffix with which it is an annotation file."""

    start: re.Pattern[bytes]
    name: str
    hint: str
    suffix: str = ""


def _kind(start: bytes, name: str, hint: str, suffix: str = "") -> _Kind:
    return _Kind(re.compile(start, re.DOTALL), name, hint, suffix)


_KINDS = (
    _kind(rb"\xff\xd8\xff", "a JPEG image", _IN_A_RECORD),
    _kind(rb"\x89PNG\r\n\x1a\n", "a PNG image", _IN_A_RECORD),
    _kind(rb"GIF8[79]a", "a GIF image", _IN_A_RECORD),
    _kind(rb"RIFF.{4}WEBP", "a WebP image", _IN_A_RECORD),
    _kind(rb"BM.{4}\0{4}", "a BMP image", _IN_A_RECORD),
    _kind(rb"II\*\0|MM\0\*", "a TIFF image", _IN_A_RECORD),
    _kind(rb".{4}ftyp(?:heic|heix|mif1|avif)", "a HEIF or AVIF image", _IN_A_RECORD),
    _kind(rb".{4}ftyp", "an MP4 video", _IN_A_RECORD),
    _kind(rb"\x1aE\xdf\xa3", "a WebM or Matroska video", _IN_A_RECORD),
    _kind(rb"RIFF.{4}AVI |\0\0\x01[\xb3\xba]", "a video", _IN_A_RECORD),
    _kind(rb"RIFF.{4}WAVE|ID3|OggS|fLaC", "a sound file", "Qwen2.5-VL has no audio. Give the file of records"),
    _kind(rb"%PDF-", "a PDF", "Make an image of each page, and records that name them (docs/examples.md)"),
    _kind(rb"PK\x03\x04.{26}\[Content_Types\]", "an Office document", _CONVERT),
    _kind(rb"PK(?:\x03\x04|\x05\x06)|Rar!\x1a|7z\xbc\xaf'\x1c|.{257}ustar", "an archive", _UNPACK),
    _kind(rb"\x1f\x8b", "gzip", "Give it a name that ends in .jsonl.gz", ".gz"),
    _kind(rb"\x28\xb5\x2f\xfd", "zstd", "Give it a name that ends in .jsonl.zst", ".zst"),
    _kind(rb"BZh[1-9]1AY&SY|\xfd7zXZ\0", "bzip2 or xz", "Decompress it"),
    _kind(rb"PAR1", "Parquet", "Give it a name that ends in .parquet", ".parquet"),
    _kind(rb"ARROW1|\xff{4}.{4}\x10\0", "Arrow", "Write it as Parquet: `Dataset.to_parquet` of datasets"),
    _kind(rb"\x89HDF\r\n|SQLite format 3\0|\x93NUMPY|\x80[\x02-\x05]", "binary data", _CONVERT),
    _kind(rb"version https://git-lfs", "a pointer of Git LFS", "Fetch its contents: `git lfs pull`"),
    _kind(
        rb"(?i)\s*<(?:!doctype|html|\?xml)", "a web page or XML", "Fetch it again: a page may have come in its place"
    ),
)


def kind_fault(path: Path) -> str | None:
    """What a file is, if that is no kind of annotation file, and what to give instead; None if it may be one."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    kind = next((kind for kind in _KINDS if kind.start.match(head)), None)
    if kind is None:
        is_plain = path.suffix in (".gz", ".zst") and bool(head)
        fault = "is not compressed, though its name says so. Fetch or write it again, or give it another name"
        return fault if is_plain else None
    if kind.suffix and kind.suffix == path.suffix:
        return None
    return f"is {kind.name}; {EXPECTED}. {kind.hint}"


def folder_fault(path: Path) -> str:
    """The same for a folder."""
    contents = describe_folder(path)
    if contents.data_files:
        hint = f"Give a file in it, such as {path / contents.data_files[0]}"
    elif contents.is_shards:
        hint = f"Its samples are built already: `vlprep show {path} --bin 0` shows some"
    else:
        hint = "Give the path of a file (docs/annotations.md)"
    return f"is {contents.what}; {EXPECTED}. {hint}"
