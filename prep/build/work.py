"""The work folder of a build: its lock, and the results of earlier runs.

It is ``<out>/.build``. For an output that is a URL, it is ``--work-dir``, or a folder of the user's cache.

::

    .build/
      lock            locked while a build runs; names its process and host
      index/          indexes of annotation files, by path, size and modification time
      spool/          copies of remote and of decompressed annotation files; removed when the build is complete
      out/            files on their way to an output that is a URL
      scan/           parts of the scan, by what they depend on
      write-<key>/    results of the shards of one plan; removed when the build is complete
      finished        key and manifest hash of the complete build
      inputs          hashes of the paths of its annotation files

A file gets its name when it is complete, so a file that exists can be trusted. The next run removes the temporary files
of a killed one.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import xxhash

import storage
from prep.annotations.records import FileIndex, index_file
from prep.build.output import FolderOutput, Output, open_output
from schemas.errors import ConfigError, VlprepError
from schemas.manifest import MANIFEST_FILE, WORK_FOLDER, Manifest, decode_manifest, encode_manifest
from storage.errors import StorageError
from storage.files import NO_LOCKS, user_cache, write_synced
from storage.urls import Location, location_key

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"bins-\d{5,}\.tar")
_TEMPORARY = re.compile(r"\.(bins-\d{5,}\.tar|manifest\.json|build_metrics\.json|mark)(\.[0-9a-f]{16})?\.tmp")

_decoder = msgspec.msgpack.Decoder(FileIndex, dec_hook=lambda kind, value: kind(value))


class WorkFolder:
    """The work folder of one output.

    Args:
        out: folder or URL of the shards.
        root: the work folder; None for the default one of ``out``.

    Attributes:
        output: destination of the shards.
        scan: folder of the parts.
        spool: folder of local copies of annotation files.
    """

    def __init__(self, out: Location, root: Path | None = None) -> None:
        self._root = root or default_root(out)
        self.output: Output = open_output(out, self._root / "out")
        self.scan = self._root / "scan"
        self.spool = self._root / "spool"
        self._index = self._root / "index"
        self._finished = self._root / "finished"
        self._inputs = self._root / "inputs"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and lock it against other builds; a context manager.

        If the build fails before it has written a shard, and would fail again, the folders that it created are removed.

        Raises:
            ConfigError: it cannot be written, or the destination of the shards does not exist.
            VlprepError: another build has locked it.
        """
        created = [folder for folder in (self._root, self.output.folder) if not folder.exists()]
        try:
            for folder in (self.scan, self.spool, self._index, self.output.folder):
                folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            named = f"--out {self.output}" if self._is_folder else f"the work folder {self._root} (--work-dir)"
            raise ConfigError(f"{named} cannot be written: {error.strerror}. Give another.") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                raise VlprepError(
                    f"{self.output} is being built by {holder}. Wait until it is done, stop it, or give another --out."
                ) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise ConfigError(f"{self._root} cannot be locked: {error.strerror}. Give another.") from error
                logger.warning(
                    "the file system of %s has no locks (%s): make sure that no other build writes to %s",
                    self._root,
                    error.strerror,
                    self.output,
                )
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._remove_temporary_files()
            self.output.check()
            try:
                yield
            except VlprepError as error:
                if not isinstance(error, StorageError) and not any(map(_SHARD.fullmatch, self.output.names())):
                    self._remove_created(created)
                raise
            finally:
                if self._root.exists():
                    self._remove_temporary_files()
        finally:
            os.close(lock)

    def write_results(self, key: str) -> Path:
        """Folder of the shard results of one plan. Removes results and shards of any other plan."""
        folder = self._root / f"write-{key}"
        if not folder.exists():
            for stale in self._root.glob("write-*"):
                shutil.rmtree(stale)
            self.keep_shards(set())
            folder.mkdir()
        return folder

    def keep_shards(self, names: set[str]) -> None:
        """Remove all shards except those in ``names``. Other files stay."""
        self.output.remove(name for name in self.output.names() if _SHARD.fullmatch(name) and name not in names)

    def finished(self, key: str) -> Manifest | None:
        """The manifest, if a build with the same inputs and settings is complete; else None."""
        data = self.output.read(MANIFEST_FILE) if self._finished.exists() else None
        if data is None or self._finished.read_bytes() != _finish_line(key, data):
            return None
        manifest = decode_manifest(data, where=f"{self.output}, {MANIFEST_FILE}")
        files = {file.file: file.num_bytes for file in (*manifest.shards, *manifest.tables)}
        placed = self.output.placed(files)
        is_complete = all(name in placed and placed[name].num_bytes == num_bytes for name, num_bytes in files.items())
        return manifest if is_complete else None

    def has_inputs(self, files: Iterable[Location]) -> bool | None:
        """Whether the complete build read one of these annotation files; None if that is not known."""
        if not self._inputs.exists():
            return None
        return not set(self._inputs.read_text().splitlines()).isdisjoint(map(_path_hash, files))

    def finish(self, key: str, manifest: Manifest, files: Iterable[Location]) -> None:
        """Record that the build is complete, and :meth:`tidy`.

        Args:
            key: of the build.
            manifest: as it was sealed.
            files: annotation files.
        """
        write_synced(self._inputs, "".join(f"{_path_hash(file)}\n" for file in files).encode())
        write_synced(self._finished, _finish_line(key, encode_manifest(manifest)))
        self.tidy()

    def tidy(self) -> None:
        """Remove what only an unfinished build needs."""
        for folder in [*self._root.glob("write-*"), self.spool]:
            shutil.rmtree(folder)

    def index(self, path: Location, *, needs_data: bool) -> FileIndex | None:
        """The index of an annotation file that an earlier run made, if the file has not changed since.

        Args:
            path: annotation file.
            needs_data: whether the local copy of a remote or compressed file must still exist.
        """
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            index = _decoder.decode(self._index_path(path).read_bytes())
            if index.data.exists() or not needs_data:
                return index
        return None

    def make_index(self, path: Location) -> FileIndex:
        """Index an annotation file, and keep the index."""
        kept = self._index_path(path)  # before reading, so that a change meanwhile gives another path
        index = index_file(path, self.spool)
        write_synced(kept, msgspec.msgpack.encode(index, enc_hook=str))
        return index

    @property
    def written_by_tasks(self) -> list[Path]:
        """Folders that workers write into. All workers must see them."""
        return [self._root, self.output.folder]

    @property
    def _is_folder(self) -> bool:
        return isinstance(self.output, FolderOutput)

    def _index_path(self, path: Location) -> Path:
        return self._index / xxhash.xxh3_128_hexdigest(_identity(path).encode())

    def _remove_created(self, created: Sequence[Path]) -> None:
        """Remove the folders in ``created``, but keep the output if it holds other files."""
        if self._root in created:
            shutil.rmtree(self._root)
            if self.output.folder in created and self._is_folder:
                with contextlib.suppress(OSError):
                    self.output.folder.rmdir()

    def _remove_temporary_files(self) -> None:
        if self._is_folder:
            leftovers = [path for path in self.output.folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
        else:
            leftovers = list(self.output.folder.iterdir())
        for folder in (self._root, self.scan, self.spool, self._index, *self._root.glob("write-*")):
            leftovers.extend(folder.glob(".*.tmp"))
        for leftover in leftovers:
            # A folder holds media that were fetched for one task.
            if leftover.is_dir():
                # A task on a node that the cluster lost may still be writing there.
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def default_root(out: Location) -> Path:
    """The default work folder of an output: inside a folder; for a URL, below the user's cache folder."""
    if isinstance(out, Path):
        return out / WORK_FOLDER
    return user_cache() / "builds" / xxhash.xxh3_128_hexdigest(str(out).encode())


def _identity(path: Location) -> str:
    """Identifies a state of an annotation file: path, size, and times or tag.

    The inode's own change time also tells of an edit after which the modification time was restored, as by
    ``touch -r`` or ``rsync --times``. A file of which only that time changed is read again, with the same result.
    """
    if not isinstance(path, Path):
        stored = storage.stat(path)
        return f"{path.url}\0{stored.num_bytes}\0{stored.tag}"
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"annotation file {path} cannot be read: {error.strerror}. Check its permissions.") from error
    return f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_ctime_ns}"


def _path_hash(file: Location) -> str:
    return xxhash.xxh3_128_hexdigest(os.fsencode(location_key(file)))


def _finish_line(key: str, manifest: bytes) -> bytes:
    return f"{key} {xxhash.xxh3_128_hexdigest(manifest)}\n".encode()
