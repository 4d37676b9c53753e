"""A finished set of shards for tests, and functions that change a set and keep its checksums valid."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.engines import SerialEngine
from schemas.settings import BuildSettings

SETTINGS = BuildSettings(max_length=1200, shard_bytes=1_500_000)

Members = dict[str, bytes]


def build_set(annotations: Path, out: Path, model: Path, settings: BuildSettings = SETTINGS) -> Path:
    """Build a set of shards from an annotation file."""
    sources = find_sources(str(annotations), registry=None, media_root=None, media=settings.media)
    request = BuildRequest(
        sources=tuple(sources), out=out, settings=settings, model=str(model), max_rejected=Fraction(1)
    )
    build(request, SerialEngine())
    return out


def place_of(folder: Path, bin_id: int) -> dict[str, Any]:
    """The row of a bin in ``bins.parquet``."""
    return next(row for row in pq.read_table(folder / "bins.parquet").to_pylist() if row["bin"] == bin_id)


def shard_of(folder: Path, bin_id: int) -> Path:
    return folder / f"bins-{place_of(folder, bin_id)['shard']:05d}.tar"


def members_of(folder: Path, bin_id: int) -> Members:
    """Contents of the members of a bin by name, read by :mod:`tarfile`."""
    with tarfile.open(shard_of(folder, bin_id)) as tar:
        return {
            info.name.partition(".")[2]: tar.extractfile(info).read()  # type: ignore[union-attr]
            for info in tar
            if info.name.startswith(f"{bin_id:08d}.")
        }


def array_of(folder: Path, bin_id: int, name: str) -> np.ndarray:
    return np.load(io.BytesIO(members_of(folder, bin_id)[f"{name}.npy"]))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def tar_bytes(key: str, members: Members, **fields: object) -> bytes:
    """A run of tar members as the writer lays them out; ``fields`` are set in every header."""
    parts = []
    for name, content in members.items():
        info = tarfile.TarInfo(f"{key}.{name}")
        info.size, info.mode = len(content), 0o644
        for field, value in fields.items():
            setattr(info, field, value)
        parts.append(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512))
    return b"".join(parts)


def replace_bin(folder: Path, bin_id: int, data: bytes) -> None:
    """Replace the bytes of a bin, and update offsets, checksums and the manifest."""
    rows = pq.read_table(folder / "bins.parquet").to_pylist()
    own = place_of(folder, bin_id)
    path = shard_of(folder, bin_id)
    shard = path.read_bytes()
    path.write_bytes(shard[: own["offset"]] + data + shard[own["offset"] + own["num_bytes"] :])
    for row in rows:
        if row["bin"] == bin_id:
            row["num_bytes"], row["xxh3"] = len(data), xxhash.xxh3_64_intdigest(data)
        elif row["shard"] == own["shard"] and row["offset"] > own["offset"]:
            row["offset"] += len(data) - own["num_bytes"]
    write_rows(folder, "bins.parquet", rows)


def change_members(folder: Path, bin_id: int, change: Callable[[Members], Members]) -> None:
    """Rewrite the members of a bin."""
    replace_bin(folder, bin_id, tar_bytes(f"{bin_id:08d}", change(members_of(folder, bin_id))))


def change_array(folder: Path, bin_id: int, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Rewrite an array of a bin; ``change`` may work in place."""

    def changed(members: Members) -> Members:
        array = np.load(io.BytesIO(members[f"{name}.npy"]))
        result = change(array)
        return {**members, f"{name}.npy": npy(array if result is None else result)}

    change_members(folder, bin_id, changed)


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    """Rewrite a table with its existing schema, and update the manifest."""
    schema = pq.read_schema(folder / name)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)
    reseal(folder)


def change_rows(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """Rewrite a table; ``change`` works in place."""
    rows = pq.read_table(folder / name).to_pylist()
    change(rows)
    write_rows(folder, name, rows)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest in the same layout; ``change`` works in place."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def reseal(folder: Path) -> None:
    """Update the sizes and SHA-256 sums in the manifest to those of the files on disk."""

    def seal(manifest: dict[str, Any]) -> None:
        for stored in (*manifest["shards"], *manifest["tables"]):
            data = (folder / stored["file"]).read_bytes()
            stored["num_bytes"], stored["sha256"] = len(data), hashlib.sha256(data).hexdigest()

    change_manifest(folder, seal)
