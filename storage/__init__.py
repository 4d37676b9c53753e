"""Files behind URLs (S3, GCS, the Hugging Face hub, HTTP and what else fsspec knows).

Every request has a time limit and is made again after growing, random pauses when it fails in a way that may pass
(:mod:`~storage.request`, :mod:`~storage.errors`); an answer that another attempt would not change is a clear
error at once. :mod:`~storage.reading` and :mod:`~storage.writing` are what the rest of the preparation uses.
"""

from __future__ import annotations

from storage.errors import FolderError, NotThereError, RefusedError, StorageError
from storage.reading import (
    Stored,
    check_folder,
    download,
    in_parallel,
    listing,
    local_copy,
    matches,
    open_file,
    read,
    read_range,
    stat,
)
from storage.writing import remove, upload

__all__ = [
    "FolderError",
    "NotThereError",
    "RefusedError",
    "StorageError",
    "Stored",
    "check_folder",
    "download",
    "in_parallel",
    "listing",
    "local_copy",
    "matches",
    "open_file",
    "read",
    "read_range",
    "remove",
    "stat",
    "upload",
]
