"""Sets of shards from strangers: whatever was changed, each reader answers soon, in little memory, in a sentence.

A tiny set is changed 1,000 times, in its manifest, tables, tar headers and members, mostly with checksums that match.
Four readers read each: ``verify``, ``show``, ``report`` and the trainer's.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from prep.engines import SerialEngine
from prep.inspect.drawing import shapes_by_image
from prep.inspect.report.writer import render_report
from prep.inspect.show import show
from prep.inspect.transcript import Transcriber
from prep.inspect.verify import verify
from schemas.annotation import SampleBox
from schemas.errors import VlprepError
from schemas.manifest import WORK_FOLDER
from schemas.memory import lacks_memory
from schemas.settings import BuildSettings, MediaSettings
from schemas.tables import SAMPLES_COLUMNS
from storage.pixels import decode_frames
from storage.shard_set import open_set
from tests.prep.corpus import turn
from tests.prep.finished import build_set, npy, tar_bytes
from train.shards.index import open_shards
from train.shards.reader import BinReader

Files = dict[str, bytes]
Rng = np.random.Generator

NUM_MUTATIONS = 1000
LIMIT_S, LIMIT_BYTES = 10, 1 << 30
SHARD, TABLES = "bins-00000.tar", ("bins.parquet", "samples.parquet")
ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "grid_thw", "media_type")

VALUES = [
    None, True, -1, 0, 1, 2**31, 2**62, 2**63, 10**30, 1e308, -0.5, "", "x" * 5000, "../../x", SHARD, [], {}, [[]],
]  # fmt: skip
"""What takes the place of a value of a manifest."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A set of one shard with an image, a text and a rejected record."""
    root = tmp_path_factory.mktemp("hostile")
    pixels = np.random.default_rng(0).integers(0, 255, (28, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "a.png")
    records = [
        {"id": "a", "image": "a.png", "conversations": turn("<image>?", "yes")},
        {"id": "b", "conversations": turn("Hi", "no")},
        {"id": "c", "image": "none.png", "conversations": turn("<image>", "x")},
    ]
    (root / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    settings = BuildSettings(max_length=32, media=MediaSettings(min_pixels=784))
    out = build_set(root / "a.jsonl", root / "set", tiny_checkpoint, settings)
    shutil.rmtree(out / WORK_FOLDER)
    return out


def picked(rng: Rng, items: list[Any]) -> Any:
    return items[int(rng.integers(len(items)))]


def with_damaged_bytes(rng: Rng, data: bytes) -> bytes:
    """Cut off, inserted, or flipped bytes."""
    at = int(rng.integers(len(data) + 1))
    kind = int(rng.integers(3))
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]
    changed = bytearray(data)
    for position in rng.integers(len(data), size=int(rng.integers(1, 5))).tolist():
        changed[position] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def with_damaged_manifest(rng: Rng, files: Files) -> Files:
    """Another value, a missing or an additional one anywhere; deep nesting; damaged bytes."""
    if rng.random() < 0.15:
        return {"manifest.json": with_damaged_bytes(rng, files["manifest.json"])}
    manifest = json.loads(files["manifest.json"])
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((node, key))
            if isinstance(value, (dict, list)):
                walk(value)

    walk(manifest)
    node, key = picked(rng, places)
    kind = rng.random()
    if kind < 0.7:
        node[key] = picked(rng, VALUES)
    elif kind < 0.85:
        del node[key]
    elif isinstance(node, dict):
        node["another"] = picked(rng, VALUES)
    else:
        node.append(node[key])
    return {"manifest.json": json.dumps(manifest, indent=2).encode() + b"\n"}


@functools.cache
def rows_of(data: bytes) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(data)).to_pylist()


def parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), out, compression="zstd")
    return out.getvalue()


def with_damaged_table(rng: Rng, files: Files) -> Files:
    """Nulls, extremes, other texts; rows or columns more or less, in another order or type; damaged bytes."""
    name = picked(rng, list(TABLES))
    rows = [dict(row) for row in rows_of(files[name])]
    schema = pq.read_schema(io.BytesIO(files[name]))
    kind = rng.random()
    if kind < 0.2:
        return {name: with_damaged_bytes(rng, files[name])}
    row, field = picked(rng, rows), picked(rng, list(schema))
    if kind < 0.75:
        if field.type == pa.string():
            values: list[Any] = [None, "", "packed", "\0", "x" * 100_000]
        elif pa.types.is_list(field.type):
            values = [None, [], [None], ["bad_luck"], ["too_long"] * 1000]
        else:
            high = np.iinfo(field.type.to_pandas_dtype()).max
            values = [None, 0, 1, int(high), int(high) // 2, *([] if field.type == pa.uint64() else [-1, -int(high)])]
        row[field.name] = picked(rng, values)
    elif kind < 0.9:
        picked(rng, [rows.reverse, rows.pop, lambda: rows.append(dict(row)), rows.clear])()
    else:
        at = schema.get_field_index(field.name)
        schema = schema.remove(at) if rng.random() < 0.5 else schema.set(at, pa.field(field.name, pa.null()))
        rows = [{key: value for key, value in row.items() if key != field.name} for row in rows]
    return {name: parquet(rows, schema)}


def with_bin(files: Files, data: bytes) -> Files:
    """The first bin of the shard has other bytes; offsets and checksums follow."""
    rows = [dict(row) for row in rows_of(files["bins.parquet"])]
    size = rows[0]["num_bytes"]
    rows[0].update(num_bytes=len(data), xxh3=xxhash.xxh3_64_intdigest(data))
    for row in rows[1:]:
        row["offset"] += len(data) - size
    schema = pq.read_schema(io.BytesIO(files["bins.parquet"]))
    return {SHARD: data + files[SHARD][size:], "bins.parquet": parquet(rows, schema)}


def first_bin(files: Files) -> bytes:
    return files[SHARD][: rows_of(files["bins.parquet"])[0]["num_bytes"]]


def members_of(data: bytes) -> dict[str, bytes]:
    """Members of the first bin, without its key."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
    return {name.partition(".")[2]: content for name, content in members.items() if name.startswith("00000000.")}


def with_damaged_header(rng: Rng, files: Files) -> Files:
    """Other bytes in the tar header of a member, often with the right checksum."""
    data = bytearray(first_bin(files))
    with tarfile.open(fileobj=io.BytesIO(bytes(data))) as tar:
        at = picked(rng, [info.offset for info in tar])
    field = picked(rng, [(0, 100), (100, 108), (124, 136), (136, 148), (148, 156), (156, 157), (257, 265), (265, 512)])
    for position in rng.integers(*field, size=int(rng.integers(1, 4))).tolist():
        data[at + position] = picked(rng, [0, 32, 48, 55, 45, 128, 255])
    if rng.random() < 0.7:
        header = bytes(data[at : at + 148]) + b" " * 8 + bytes(data[at + 156 : at + 512])
        data[at + 148 : at + 156] = b"%06o\0 " % sum(header)
    return with_bin(files, bytes(data))


def with_damaged_member(rng: Rng, files: Files) -> Files:
    """Other values or shapes of an array; another, no or a second member; damaged bytes."""
    members = members_of(first_bin(files))
    name = picked(rng, list(members))
    kind = rng.random()
    if kind < 0.5 and name.endswith(".npy"):
        array = np.load(io.BytesIO(members[name]))
        limits = np.iinfo(array.dtype)
        if array.size:
            values = [0, 1, 2, limits.max, limits.min, 28, 151655, 151656]
            array.flat[int(rng.integers(array.size))] = np.array(picked(rng, values)).astype(array.dtype)
        members[name] = npy(array)
    elif kind < 0.65 and name.endswith(".npy"):
        shape = picked(rng, [b"(99999999999999999999,)", b"(4294967296, 4294967296)", b"(0,)", b"()", b"(1, 1)"])
        members[name] = re.sub(rb"\(.*?\)", shape, members[name], count=1)
    elif kind < 0.75:
        del members[name]
    elif kind < 0.8:
        members["pixels.raw"] = bytes(28 * 56 * 3)
    else:
        members[name] = with_damaged_bytes(rng, members[name])
    return with_bin(files, tar_bytes("00000000", members))


KINDS: list[Callable[[Rng, Files], Files]] = [
    with_damaged_manifest,
    with_damaged_table,
    with_damaged_header,
    with_damaged_member,
]


def resealed(files: Files) -> Files:
    """The manifest has the sizes and digests of the files."""
    manifest = json.loads(files["manifest.json"])
    for stored in (*manifest["shards"], *manifest["tables"]):
        data = files[stored["file"]]
        stored["num_bytes"], stored["sha256"] = len(data), hashlib.sha256(data).hexdigest()
    return {**files, "manifest.json": json.dumps(manifest, indent=2).encode() + b"\n"}


def mutation(index: int, files: Files) -> Files:
    rng = np.random.default_rng([7, index])
    changed = {**files, **KINDS[index % len(KINDS)](rng, files)}
    is_sealed = index % len(KINDS) == 0 or rng.random() < 0.1
    return changed if is_sealed else resealed(changed)


def verified(folder: Path) -> bool:
    """Whether nothing was found."""
    return not verify(folder, SerialEngine()).findings


def shown(folder: Path) -> str:
    return show(open_set(folder), 0, Transcriber(None), colour=False)


def reported(folder: Path) -> str:
    return render_report(open_set(folder), Transcriber(None))


def trained(folder: Path) -> list[dict[str, Any]]:
    """Arrays of all bins, as the trainer reads them."""
    index = open_shards(folder)
    bins = [BinReader(index).read(bin_id).bin for bin_id in range(index.num_bins)]
    return [
        {name: getattr(bin_, name) for name in ARRAYS} | {"frames": decode_frames(bin_, where="bin")} for bin_ in bins
    ]


READERS: dict[str, Callable[[Path], Any]] = {
    "verify": verified,
    "show": shown,
    "report": reported,
    "train": trained,
}


def answer(read: Callable[[Path], Any], folder: Path) -> Any:
    """The result of a reader, or its sentence. Any other exception is a finding of this test."""
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        return read(folder)
    except VlprepError as error:
        assert str(error)
        return error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """No reader may take longer or allocate more."""

    def out_of_time(*_: object) -> None:
        raise TimeoutError

    num_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, out_of_time)
    resource.setrlimit(resource.RLIMIT_AS, (num_bytes + LIMIT_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGALRM, handler)


def assert_as_in_the_files(bins: Any, folder: Path) -> None:
    """The trainer reads what the standard tools find in the tar file."""
    assert not isinstance(bins, VlprepError), bins
    for bin_, row in zip(bins, pq.read_table(folder / "bins.parquet").to_pylist(), strict=True):
        with tarfile.open(folder / SHARD) as tar:
            names = [info.name for info in tar]
            assert len(set(names)) == len(names)
            for name in ARRAYS:
                member = tar.extractfile(f"{row['bin']:08d}.{name}.npy")
                assert np.array_equal(bin_[name], np.load(io.BytesIO(member.read())))  # type: ignore[union-attr]


@pytest.mark.slow
def test_every_reader_answers_each_of_1000_mutations_and_what_verify_passes_is_read_as_it_is(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    folder = tmp_path / "set"
    shutil.copytree(tiny, folder)
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    for read in READERS.values():  # starts the threads of libraries
        assert not isinstance(answer(read, folder), VlprepError)
    outcomes: Counter[tuple[str, str]] = Counter()
    wrong = []
    with limits():
        for index in range(NUM_MUTATIONS):
            mutated = mutation(index, files)
            for name, data in mutated.items():
                (folder / name).write_bytes(data)
            answers = {}
            for name, read in READERS.items():
                try:
                    answers[name] = answer(read, folder)
                    outcomes[name, "refused" if isinstance(answers[name], VlprepError) else "read"] += 1
                except Exception as error:  # noqa: BLE001 - whatever is not a sentence
                    wrong.append(f"{index}, {name}: {error!r}")
            if answers.get("verify") is True:
                outcomes["verify", "sound"] += 1
                assert_as_in_the_files(answers.get("train"), folder)
    assert wrong == []
    assert outcomes["verify", "sound"] < NUM_MUTATIONS // 10
    assert min(outcomes[name, kind] for name in READERS for kind in ("read", "refused")) > NUM_MUTATIONS // 20


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the set that a test may change."""
    return shutil.copytree(tiny, tmp_path / "set")


def sentences(folder: Path) -> dict[str, str]:
    """What the readers say of a set that none of them can use."""
    with limits():
        answers = {name: answer(read, folder) for name, read in READERS.items() if name != "verify"}
        try:
            findings = [str(finding) for finding in verify(folder, SerialEngine()).findings]
        except VlprepError as error:
            findings = [str(error)]
    assert all(isinstance(said, VlprepError) for said in answers.values()), answers
    return {name: str(said) for name, said in answers.items()} | {"verify": "\n".join(findings)}


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", [SHARD, "bins.parquet", "manifest.json"])
@pytest.mark.parametrize(
    ("replace", "kind"), [(replace_by_pipe, "a named pipe"), (replace_by_device, "a device (through a link)")]
)
def test_special_files_are_refused_unread(folder: Path, name: str, replace: Callable[[Path], None], kind: str) -> None:
    replace(folder / name)
    for said in sentences(folder).values():
        assert f"it is {kind}, not a regular file" in said
        assert name in said


def test_a_link_to_a_regular_file_is_followed(folder: Path, tmp_path: Path) -> None:
    """The cache of the hub consists of such links."""
    (folder / SHARD).rename(tmp_path / "blob")
    (folder / SHARD).symlink_to(tmp_path / "blob")
    assert verified(folder)
    assert trained(folder)


def reseal(folder: Path) -> None:
    """The manifest of a folder has the sizes and digests of its files."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "manifest.json").write_bytes(resealed(files)["manifest.json"])


def write_first_bin(folder: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the members of the first bin; all sizes and checksums follow."""
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    members = members_of(first_bin(files))
    change(members)
    for name, data in resealed({**files, **with_bin(files, tar_bytes("00000000", members))}).items():
        (folder / name).write_bytes(data)


def test_boundaries_whose_differences_wrap_around_are_a_sentence(folder: Path) -> None:
    """2^31 - 1, then -2, then the length: in int32 every difference is positive."""
    rows = pq.read_table(folder / "bins.parquet").to_pylist()
    rows[0]["num_samples"] = 3

    def wrap(members: dict[str, bytes]) -> None:
        members["cu_seqlens.npy"] = npy(np.array([0, 2**31 - 1, -2, rows[0]["num_tokens"]], np.int32))

    write_first_bin(folder, wrap)
    for said in sentences(folder).values():
        assert "do not cut" in said


@pytest.mark.parametrize("name", [SHARD, *TABLES])
def test_a_file_with_a_hole_of_a_terabyte_is_not_read(folder: Path, name: str) -> None:
    os.truncate(folder / name, 1 << 40)
    with limits():
        findings = answer(lambda folder: list(map(str, verify(folder, SerialEngine()).findings)), folder)
        bins = answer(trained, folder)
    assert any(f"{name}: the file has 1,099,511,627,776 bytes, the manifest says" in finding for finding in findings)
    assert "1099511627776 bytes, its manifest says" in str(bins)


def test_a_bin_with_a_hole_of_a_terabyte_is_not_allocated(folder: Path) -> None:
    os.truncate(folder / SHARD, 1 << 40)
    rows = pq.read_table(folder / "bins.parquet").to_pylist()[:1]
    rows[0]["num_bytes"] = 1 << 39
    data = parquet(rows, pq.read_schema(folder / "bins.parquet"))
    (folder / "bins.parquet").write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["shards"][0].update(num_bins=1, num_bytes=1 << 40)
    manifest["tables"][0].update(num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with limits():
        for name in ("show", "report", "train"):
            assert " has 549,755,813,888 bytes; allowed: at most " in str(answer(READERS[name], folder))


def test_a_table_with_more_bins_than_the_shard_has_blocks_is_found(folder: Path) -> None:
    path = folder / "bins.parquet"
    path.write_bytes(parquet(pq.read_table(path).to_pylist() * 50, pq.read_schema(path)))
    reseal(folder)
    assert any("the table has 100 bins, the file only" in said for said in sentences(folder)["verify"].split("\n"))


def test_a_ledger_with_more_samples_of_a_bin_than_it_holds_is_refused_before_they_become_objects(folder: Path) -> None:
    path = folder / "samples.parquet"
    rows = pq.read_table(path).to_pylist()
    path.write_bytes(parquet([*rows, *rows[:1] * 1000], pq.read_schema(path)))
    reseal(folder)
    for name in ("show", "report"):
        assert "rows of samples for " in str(answer(READERS[name], folder))
    assert not verified(folder)


@pytest.mark.parametrize(
    ("is_honest", "expected"), [(True, "bytes, uncompressed, in"), (False, "bytes, the end of the file announces 100")]
)
def test_a_page_that_stands_for_much_more_than_its_size_is_not_decompressed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, is_honest: bool, expected: str
) -> None:
    """As one text of 2 GB in 60 kB, also where the end of the file says that it is small."""
    monkeypatch.setattr("storage.tables._FREE_TEXT_BYTES", 1 << 20)
    path = folder / "samples.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["id"] = "x" * 30_000_000
    pq.write_table(
        pa.Table.from_pylist(rows, schema=table.schema), path, compression="zstd", use_dictionary=False,
        write_statistics=False,
    )  # fmt: skip
    if not is_honest:
        size = pq.read_metadata(path).row_group(0).column(4).total_uncompressed_size
        path.write_bytes(path.read_bytes().replace(varint(size, 4), varint(100, 4)))
        assert pq.read_metadata(path).row_group(0).column(4).total_uncompressed_size == 100
    reseal(folder)
    for name in ("show", "report"):
        assert expected in str(answer(READERS[name], folder))
    assert any(expected in str(finding) for finding in verify(folder, SerialEngine()).findings)


def varint(value: int, num_bytes: int) -> bytes:
    """A positive integer of a Parquet footer, with leading zeros."""
    parts = [2 * value >> 7 * index & 0x7F for index in range(num_bytes)]
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


def test_a_table_of_pages_that_are_none_is_a_sentence(folder: Path) -> None:
    path = folder / "samples.parquet"
    data = bytearray(path.read_bytes())
    data[4:2000] = b"\xff" * 1996
    path.write_bytes(data)
    reseal(folder)
    assert "column dataset cannot be read: " in str(answer(reported, folder))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda text: text.replace('"software": {', '"software": {' + '"a": "", ' * 4_000_000),
            "of counts, statistics",
        ),
        (lambda text: text.replace("\n", "\r\n"), "manifest.json, line 1: it was edited"),
        (lambda text: text + "\n" * 20, "nothing is expected"),
    ],
)
def test_a_manifest_that_is_padded_is_found(folder: Path, change: Callable[[str], str], expected: str) -> None:
    path = folder / "manifest.json"
    path.write_bytes(change(path.read_text()).encode())
    try:
        said = "\n".join(map(str, verify(folder, SerialEngine()).findings))
    except VlprepError as error:
        said = str(error)
    assert expected in said


@pytest.mark.parametrize("name", ["rejects_by_code", "modalities", "unused_fields"])
def test_dictionaries_of_a_manifest_have_bounds(folder: Path, name: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["statistics"][0][name] = {str(index): 1 for index in range(2000)}
    path.write_text(json.dumps(manifest))
    for said in sentences(folder).values():
        assert f"{name} is damaged: expected `object` of length <= " in said


def test_a_name_cannot_pretend_to_be_another_line(folder: Path) -> None:
    (folder / "a\n\x1b[2Jno problems").touch()
    (finding,) = verify(folder, SerialEngine()).findings
    assert str(finding).startswith(r"a\n\x1b[2Jno problems: the manifest does not list it")


def test_of_millions_of_boxes_some_are_drawn() -> None:
    shapes = shapes_by_image((), [7], [SampleBox(image=0, numbers=[1, 2])] * 20_000)
    assert {image: len(drawn) for image, drawn in shapes.items()} == {7: 10_000}


def test_an_error_that_follows_from_little_memory_means_little_memory() -> None:
    """As when a pool of workers is closed that could not start its thread."""
    with pytest.raises(RuntimeError) as caught:
        try:
            raise RuntimeError("can't start new thread")
        finally:
            raise RuntimeError("cannot join thread before it is started")
    assert lacks_memory(caught.value)
    assert not lacks_memory(RuntimeError("cannot join thread before it is started"))


def write_bomb(path: Path, num_rows: int, **values: object) -> None:
    """Repeat the first row of a table: little on disk."""
    table = pq.read_table(path)
    row = {**table.slice(0, 1).to_pylist()[0], **values}
    columns = [pa.repeat(pa.scalar(row[field.name], field.type), num_rows) for field in table.schema]
    repeated = pa.Table.from_arrays(columns, schema=table.schema)
    pq.write_table(repeated, path, compression="zstd")
    assert path.stat().st_size < 150_000
    reseal(path.parent)


@pytest.mark.parametrize(
    ("name", "num_rows", "values", "expected"),
    [
        # As 30 million rows in a few kilobytes, written in less time.
        ("bins.parquet", 300_000, {}, "announces 300,000 rows in"),
        ("samples.parquet", 3_000_000, dict.fromkeys(SAMPLES_COLUMNS), "announces 3,000,000 rows in"),
        ("samples.parquet", 100_000, {"id": "x" * 2000}, "column id holds 200,000,000 bytes of text in a file of"),
        ("samples.parquet", 10_000, {"codes": ["too_long"] * 300}, "values of codes.list.element in 10,000 rows"),
    ],
)
def test_tables_that_stand_for_much_more_than_their_size_are_refused(
    folder: Path, name: str, num_rows: int, values: dict[str, object], expected: str
) -> None:
    write_bomb(folder / name, num_rows, **values)
    with limits():
        findings = "\n".join(map(str, verify(folder, SerialEngine()).findings))
        page = answer(reported, folder)
        bins = answer(trained, folder)
    assert expected in findings
    assert expected in str(page)
    assert expected in str(bins) or name == "samples.parquet"


@pytest.mark.parametrize(
    ("status", "change", "expected"),
    [
        ("rejected", {"message": None}, "message is null"),
        ("packed", {"num_tokens": None}, "num_tokens is null"),
        ("packed", {"bin": 2**63 - 1}, "does not have this bin"),
    ],
)
def test_a_value_that_only_other_rows_may_lack_is_a_sentence(
    folder: Path, status: str, change: dict[str, Any], expected: str
) -> None:
    path = folder / "samples.parquet"
    rows = pq.read_table(path).to_pylist()
    next(row for row in rows if row["status"] == status).update(change)
    path.write_bytes(parquet(rows, pq.read_schema(path)))
    reseal(folder)
    said = [*map(str, verify(folder, SerialEngine()).findings), str(answer(reported, folder))]
    assert any(expected in sentence for sentence in said), said
    assert not verified(folder)


@pytest.mark.parametrize("data", [b"", b"PAR1" * 3, None])
def test_a_table_that_is_empty_cut_short_or_no_parquet_is_a_sentence(folder: Path, data: bytes | None) -> None:
    path = folder / "bins.parquet"
    path.write_bytes(path.read_bytes()[:-200] if data is None else data)
    reseal(folder)
    for said in sentences(folder).values():
        assert "bins.parquet cannot be read as a Parquet table" in said


@pytest.mark.parametrize(
    "main", ["from prep.cli import main; main()", "from train.main import main; sys.exit(main(sys.argv[1:]))"]
)
def test_little_memory_is_a_sentence(folder: Path, main: str) -> None:
    arguments = ["verify", str(folder)] if "prep" in main else ["--shards", str(folder)]
    limited = f"import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (5 * 10**8, 5 * 10**8)); {main}"
    command = [sys.executable, "-c", limited, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "MiB of address space are left: the system gives no more memory" in done.stderr
    assert "Traceback" not in done.stderr
