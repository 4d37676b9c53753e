"""The work folder of a build: who holds it, and what an earlier run left there.

It is ``<out>/.build``; for an output that is a URL, a folder of the user's cache named after it, or ``--work-dir``.

::

    .build/
      lock            held while a build runs; says by whom
      index/          what was found out about annotation files, by path, size and time of change
      spool/          remote annotation files, what compressed ones decompress to; removed when the build is complete
      out/            what is on its way to an output that is a URL
      scan/           parts of the scan, by what they depend on
      write-<key>/    results of the shards of one plan; removed when the build is complete
      finished        key and manifest of the build that is complete

Whatever is written gets its name when it is complete, so a name that is there can be trusted; temporary files of a
run that was killed are removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import xxhash

import storage
from prep.annotations.records import FileIndex, index_file
from prep.build.output import FolderOutput, Output, open_output
from schemas.errors import ConfigError, VlprepError
from schemas.manifest import MANIFEST_FILE, WORK_FOLDER, Manifest, decode_manifest, encode_manifest
from storage.files import write_synced
from storage.urls import Location

_SHARD = re.compile(r"bins-\d{5,}\.tar")
_TEMPORARY = re.compile(r"\.(bins-\d{5,}\.tar|manifest\.json|build_metrics\.json|mark)(\.[0-9a-f]{16})?\.tmp")

_decoder = msgspec.msgpack.Decoder(FileIndex, dec_hook=lambda kind, value: kind(value))


class WorkFolder:
    """Paths below the work folder.

    Args:
        out: folder or URL of the shards.
        root: the work folder, or None for the one that belongs to ``out``.

    Attributes:
        output: where the shards go.
        scan: parts of the scan.
        spool: annotation files as they can be read here.
    """

    def __init__(self, out: Location, root: Path | None = None) -> None:
        self._root = root or default_root(out)
        self.output: Output = open_output(out, self._root / "out")
        self.scan = self._root / "scan"
        self.spool = self._root / "spool"
        self._index = self._root / "index"
        self._finished = self._root / "finished"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and hold it against other builds until the end of the block.

        Raises:
            ConfigError: it cannot be written, or the place of the shards is not there.
            VlprepError: another build holds it.
        """
        try:
            for folder in (self.scan, self.spool, self._index, self.output.folder):
                folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            named = f"--out {self.output}" if self._is_folder else f"the work folder {self._root} (--work-dir)"
            raise ConfigError(f"{named} cannot be written: {error.strerror}.") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                raise VlprepError(
                    f"{self.output} is being built by {holder}. Wait until it is done, stop it, or give another --out."
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._remove_temporary_files()
            self.output.check()
            try:
                yield
            finally:
                self._remove_temporary_files()
        finally:
            os.close(lock)

    def write_results(self, key: str) -> Path:
        """Folder of the shard results of one plan; results and shards of another plan are removed."""
        folder = self._root / f"write-{key}"
        if not folder.exists():
            for stale in self._root.glob("write-*"):
                shutil.rmtree(stale)
            self.keep_shards(set())
            folder.mkdir()
        return folder

    def keep_shards(self, names: set[str]) -> None:
        """Remove the shards of earlier plans, all but those in ``names``; other files are not touched."""
        self.output.remove(name for name in self.output.names() if _SHARD.fullmatch(name) and name not in names)

    def finished(self, key: str) -> Manifest | None:
        """The manifest of a build that is complete with the same inputs and settings, if there is one."""
        data = self.output.read(MANIFEST_FILE) if self._finished.exists() else None
        if data is None or self._finished.read_bytes() != _finish_line(key, data):
            return None
        manifest = decode_manifest(data, where=f"{self.output}, {MANIFEST_FILE}")
        files = {file.file: file.num_bytes for file in (*manifest.shards, *manifest.tables)}
        placed = self.output.placed(files)
        whole = all(name in placed and placed[name].num_bytes == num_bytes for name, num_bytes in files.items())
        return manifest if whole else None

    def finish(self, key: str, manifest: Manifest) -> None:
        """Note that the build is complete, and remove what only an unfinished build needs."""
        write_synced(self._finished, _finish_line(key, encode_manifest(manifest)))
        self.tidy()

    def tidy(self) -> None:
        """Remove what only an unfinished build needs."""
        for folder in [*self._root.glob("write-*"), self.spool]:
            shutil.rmtree(folder)

    def index(self, path: Location, *, needs_data: bool) -> FileIndex | None:
        """What an earlier run found out about an annotation file that has not changed since.

        Args:
            path: annotation file.
            needs_data: whether what was fetched of a remote file, or decompressed, must still be there.
        """
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = _decoder.decode(self._index_path(path).read_bytes())
            if found.data.exists() or not needs_data:
                return found
        return None

    def make_index(self, path: Location) -> FileIndex:
        """Walk an annotation file, and keep what was found out."""
        name = self._index_path(path)
        found = index_file(path, self.spool)
        write_synced(name, msgspec.msgpack.encode(found, enc_hook=str))
        return found

    @property
    def written_by_tasks(self) -> list[Path]:
        """Folders that workers write into; all of them must see them."""
        return [self._root, self.output.folder]

    @property
    def _is_folder(self) -> bool:
        return isinstance(self.output, FolderOutput)

    def _index_path(self, path: Location) -> Path:
        return self._index / xxhash.xxh3_128_hexdigest(_identity(path).encode())

    def _remove_temporary_files(self) -> None:
        if self._is_folder:
            own = [path for path in self.output.folder.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
        else:
            own = list(self.output.folder.iterdir())
        for folder in (self._root, self.scan, self.spool, self._index, *self._root.glob("write-*")):
            own.extend(folder.glob(".*.tmp"))
        for leftover in own:
            # Media that were fetched for one task lie in a folder.
            if leftover.is_dir():
                # A task that a cluster gave up, on a node that is cut off, may still write there.
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)


def default_root(out: Location) -> Path:
    """The work folder that belongs to an output: inside the folder, or for a URL below the user's cache folder."""
    if isinstance(out, Path):
        return out / WORK_FOLDER
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "vlprep" / "builds" / xxhash.xxh3_128_hexdigest(str(out).encode())


def _identity(path: Location) -> str:
    """What tells an annotation file from others, and from itself after a change."""
    if not isinstance(path, Path):
        stored = storage.stat(path)
        return f"{path.url}\0{stored.num_bytes}\0{stored.tag}"
    try:
        status = path.stat()
    except OSError as error:
        raise ConfigError(f"annotation file {path} cannot be read: {error.strerror}.") from error
    return f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"


def _finish_line(key: str, manifest: bytes) -> bytes:
    return f"{key} {xxhash.xxh3_128_hexdigest(manifest)}\n".encode()
