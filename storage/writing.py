"""Uploading and removing files behind URLs.

An upload appears completely or not at all, as object stores guarantee, and is then compared with the file: by size, and
by checksum where the store reports one. Cost: one pass over the file for its MD5, one request for each part of 8 MiB,
one for the comparison; 32 MiB of memory.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import DamagedUploadError, NotThereError
from storage.reading import PIECE_BYTES, Stored, ask, cat
from storage.request import S3, file_system, retry, time_limit
from storage.urls import Url

_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 4

_SLOWEST_BYTES_PER_S = 1 << 18
"""An upload may take the timeout of a request, and the time for its bytes at this rate."""


def upload(path: Path, url: Url) -> Stored:
    """Store a file.

    Raises:
        NotThereError: the bucket does not exist.
        RefusedError: the credentials are wrong or missing, or may not write there.
        StorageError: the store does not answer.
        OSError: ``path`` cannot be read.
    """
    digests = _Digests.of(path)

    def put() -> Stored:
        system, remote_path = file_system(url, uploads=True)
        limit = time_limit(system, plus_s=digests.num_bytes / _SLOWEST_BYTES_PER_S)
        system.put_file(str(path), remote_path, **_options(url), **limit)
        stored, info = ask(url)
        if stored.num_bytes != digests.num_bytes:
            raise DamagedUploadError(f"{stored.num_bytes} of {digests.num_bytes} bytes arrived")
        _check_digest(path, url, info, digests)
        return stored

    return retry(put, url)


def remove(url: Url) -> None:
    """Remove a file, if it exists.

    Raises:
        RefusedError, StorageError: as :func:`upload`.
    """

    def delete() -> None:
        system, path = file_system(url)
        system.rm_file(path, **time_limit(system))

    try:
        retry(delete, url)
    except NotThereError:
        return


@dataclass(frozen=True, slots=True)
class _Digests:
    """What stores may report of an upload.

    Attributes:
        num_bytes: size.
        md5: MD5 in hexadecimal.
        of_parts: the ETag that S3 gives an upload in parts of :data:`_PART_BYTES`.
    """

    num_bytes: int
    md5: str
    of_parts: str

    @staticmethod
    def of(path: Path) -> _Digests:
        of_file, of_parts, num_bytes, num_parts = _md5(), _md5(), 0, 0
        with path.open("rb") as file:
            while piece := file.read(_PART_BYTES):
                of_file.update(piece)
                of_parts.update(_md5(piece).digest())
                num_bytes += len(piece)
                num_parts += 1
        return _Digests(num_bytes, of_file.hexdigest(), f"{of_parts.hexdigest()}-{num_parts}")


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


_opaque_tags: set[str] = set()
"""Buckets whose ETags are not digests of the contents, as with customer-managed encryption."""


def _check_digest(path: Path, url: Url, info: dict[str, Any], digests: _Digests) -> None:
    """Compare the upload with the file.

    Raises:
        DamagedUploadError: they differ.
    """
    if "md5Hash" in info:
        if _hexadecimal(info["md5Hash"]) != digests.md5:
            raise DamagedUploadError("the store has another MD5 than the file")
    elif url.protocol in S3 and url.root not in _opaque_tags:
        if str(info.get("ETag", "")).strip('"') in (digests.md5, digests.of_parts):
            return
        with path.open("rb") as file:
            for at in range(0, digests.num_bytes, PIECE_BYTES):
                piece = file.read(PIECE_BYTES)
                if cat(url, at, at + len(piece)) != piece:
                    raise DamagedUploadError(f"other bytes than the file's arrived, from byte {at:,} on")
        # The contents are right, so the tag is not a digest. Reading everything back once is enough.
        _opaque_tags.add(url.root)


def _hexadecimal(text: str) -> str:
    try:
        return base64.b64decode(text).hex()
    except binascii.Error:
        return text


def _options(url: Url) -> dict[str, int]:
    """How a large file is split into parts."""
    if url.protocol in S3:
        return {"chunksize": _PART_BYTES, "max_concurrency": _PARTS_AT_ONCE}
    return {"chunksize": _PART_BYTES} if url.protocol in ("gs", "gcs") else {}
