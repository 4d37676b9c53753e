"""The work folder of a build, ``<out>/.build``: who holds it, and what an earlier run left there.

::

    .build/
      lock            held while a build runs; says by whom
      index/          what was found out about annotation files, by path, size and time of change
      spool/          what compressed annotation files decompress to; removed when the build is complete
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

from prep.files import write_synced
from prep.records import FileIndex, index_file
from schemas.errors import ConfigError, VlprepError
from schemas.manifest import MANIFEST_FILE, Manifest, encode_manifest, read_manifest

WORK_FOLDER = ".build"

_SHARD = re.compile(r"bins-\d{5,}\.tar")
_TEMPORARY = re.compile(r"\.(bins-\d{5,}\.tar|manifest\.json|build_metrics\.json)\.tmp")

_decoder = msgspec.msgpack.Decoder(FileIndex, dec_hook=lambda kind, value: kind(value))


class WorkFolder:
    """Paths below ``<out>/.build``.

    Args:
        out: folder of the shards.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self._root = out / WORK_FOLDER
        self.scan = self._root / "scan"
        self.spool = self._root / "spool"
        self._index = self._root / "index"
        self._finished = self._root / "finished"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, and hold it against other builds until the end of the block.

        Raises:
            ConfigError: it cannot be written.
            VlprepError: another build holds it.
        """
        try:
            for folder in (self.scan, self.spool, self._index):
                folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._root / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(f"--out {self.out} cannot be written: {error.strerror}.") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                raise VlprepError(
                    f"{self.out} is being built by {holder}. Wait until it is done, stop it, or give another --out."
                ) from None
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
            self._remove_temporary_files()
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
        for path in self.out.glob("bins-*.tar"):
            if _SHARD.fullmatch(path.name) and path.name not in names:
                path.unlink()

    def finished(self, key: str) -> Manifest | None:
        """The manifest of a build that is complete with the same inputs and settings, if there is one."""
        path = self.out / MANIFEST_FILE
        if not self._finished.exists() or not path.exists():
            return None
        if self._finished.read_bytes() != _finish_line(key, path.read_bytes()):
            return None
        manifest = read_manifest(self.out)
        stored = [(self.out / file.file, file.num_bytes) for file in (*manifest.shards, *manifest.tables)]
        whole = all(path.is_file() and path.stat().st_size == num_bytes for path, num_bytes in stored)
        return manifest if whole else None

    def finish(self, key: str, manifest: Manifest) -> None:
        """Note that the build is complete, and remove what only an unfinished build needs."""
        write_synced(self._finished, _finish_line(key, encode_manifest(manifest)))
        for folder in [*self._root.glob("write-*"), self.spool]:
            shutil.rmtree(folder)

    def index(self, path: Path, *, needs_data: bool) -> FileIndex | None:
        """What an earlier run found out about an annotation file that has not changed since.

        Args:
            path: annotation file.
            needs_data: whether what a compressed file decompresses to must still be there.
        """
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found = _decoder.decode(self._index_path(path).read_bytes())
            if found.data.exists() or not needs_data:
                return found
        return None

    def make_index(self, path: Path) -> FileIndex:
        """Walk an annotation file, and keep what was found out."""
        name = self._index_path(path)
        found = index_file(path, self.spool)
        write_synced(name, msgspec.msgpack.encode(found, enc_hook=str))
        return found

    def _index_path(self, path: Path) -> Path:
        try:
            status = path.stat()
        except OSError as error:
            raise ConfigError(f"annotation file {path} cannot be read: {error.strerror}.") from error
        identity = f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}"
        return self._index / xxhash.xxh3_128_hexdigest(identity.encode())

    def _remove_temporary_files(self) -> None:
        own = [path for path in self.out.glob(".*.tmp") if _TEMPORARY.fullmatch(path.name)]
        for folder in (self._root, self.scan, self.spool, self._index, *self._root.glob("write-*")):
            own.extend(folder.glob(".*.tmp"))
        for leftover in own:
            leftover.unlink(missing_ok=True)


def _finish_line(key: str, manifest: bytes) -> bytes:
    return f"{key} {xxhash.xxh3_128_hexdigest(manifest)}\n".encode()
