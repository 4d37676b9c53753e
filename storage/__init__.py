"""Bytes anywhere (paths, and URLs of any store that fsspec knows), and finished sets of shards.

In: a :data:`~storage.urls.Location`. Out: sizes, ranges, listings, downloads and uploads, or one clear error. A request
has a timeout. If it fails in a way that may pass, it is retried (:mod:`~storage.request`, :mod:`~storage.errors`).
:mod:`~storage.shard_set` opens a set: manifest and tables. :mod:`~storage.bins` reads a bin and checks its structure.
Sets may come from strangers, so :mod:`~storage.tables` bounds what a file makes a reader allocate.
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
