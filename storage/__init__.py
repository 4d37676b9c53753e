"""Bytes anywhere: paths, and URLs of S3, GCS, the Hugging Face hub, HTTP and whatever else fsspec knows.

In: a :data:`~storage.urls.Location`. Out: sizes, ranges, listings and uploads, or one clear error. Every request has a
timeout and is retried after growing, random pauses if it fails in a way that may pass (:mod:`~storage.request`,
:mod:`~storage.errors`).
"""

from __future__ import annotations

from storage.errors import FolderError, NotThereError, RefusedError, StorageError
from storage.folders import check_folder, file_names, file_sizes, listing, matches, sub_folders
from storage.reading import Stored, download, in_parallel, local_copy, open_file, read, read_into, read_range, stat
from storage.writing import remove, upload

__all__ = [
    "FolderError",
    "NotThereError",
    "RefusedError",
    "StorageError",
    "Stored",
    "check_folder",
    "download",
    "file_names",
    "file_sizes",
    "in_parallel",
    "listing",
    "local_copy",
    "matches",
    "open_file",
    "read",
    "read_into",
    "read_range",
    "remove",
    "stat",
    "sub_folders",
    "upload",
]
