"""``vlprep verify``: an intact set passes, and every change is found and named, even if all checksums match."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import zstandard
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from prep.cli import main
from prep.engines import LocalEngine, SerialEngine
from prep.inspect.verify import verify
from prep.inspect.verify.positions import is_sampled_evenly, position_problem
from prep.inspect.verify.statistics import distribution
from prep.samples.mrope import position_ids
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.manifest import WORK_FOLDER, Distribution
from schemas.qwen import IM_START, IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Grid
from schemas.settings import BuildSettings
from tests.prep import finished as sets
from tests.prep.corpus import turn
from tests.prep.finished import Members

BIN = 1
"""A bin of the shared set that is not the first of its shard and holds images and videos."""

MEMBERS = [
    "input_ids.npy",
    "labels.npy",
    "position_ids.npy",
    "cu_seqlens.npy",
    "grid_thw.npy",
    "media_type.npy",
    "pixels.zst",
    "samples.json",
]


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of the shared set that a test may change."""
    copy = tmp_path / "set"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns(WORK_FOLDER))
    return copy


def run(folder: Path) -> Result:
    return CliRunner().invoke(main, ["verify", str(folder), "--workers", "1"])


def findings(folder: Path) -> list[str]:
    """Findings of the command, which must exit with 1 if and only if there are any."""
    result = run(folder)
    lines = result.stdout.splitlines()
    assert result.exit_code == (1 if lines[:-1] else 0), result.output
    return lines[:-1]


def where_of(folder: Path, index: int = BIN) -> str:
    row = sets.place_of(folder, index)
    return f"bins-{row['shard']:05d}.tar, bin {index} at offset {row['offset']}"


# Intact sets


def test_the_bin_that_tests_change_has_samples_images_and_videos(finished: Path) -> None:
    row = sets.place_of(finished, BIN)
    assert row["offset"] > 0
    assert row["num_samples"] > 1
    assert row["num_images"] > 0
    assert row["num_videos"] > 0


def test_a_finished_set_passes(finished: Path) -> None:
    result = run(finished)
    assert result.exit_code == 0
    counts = json.loads((finished / "manifest.json").read_text())["counts"]
    summary = f"{counts['num_bins']} bins, {counts['num_annotations']} annotations"
    assert summary in result.stdout
    assert result.stdout.rstrip().endswith("no problems")


def test_raw_pixels_with_a_patch_budget_and_sampling_rates_pass(
    corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "datasets.toml").write_text(
        f'[half]\nannotation_path = "{corpus_file}"\nmedia_root = "{corpus_file.parent}"\n'
        f'[more]\nannotation_path = "{corpus_file}"\nmedia_root = "{corpus_file.parent}"\n'
    )
    command = ["build", "half%50,more%250", "--registry", tmp_path / "datasets.toml", "--out", tmp_path / "out"]
    command += ["--model", tiny_checkpoint, "--pixels", "raw", "--max-patches", 3000, "--workers", 1]
    assert CliRunner().invoke(main, [str(word) for word in command]).exit_code == 0
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["num_not_sampled"] == 15
    assert findings(tmp_path / "out") == []


@pytest.mark.slow
def test_findings_do_not_depend_on_worker_processes(folder: Path) -> None:
    sets.change_array(folder, BIN, "labels", lambda labels: np.full_like(labels, -100))
    (folder / "bins-00001.tar").unlink()
    alone = verify(folder, SerialEngine())
    assert len(alone.findings) > 3
    with LocalEngine(2) as engine:
        assert verify(folder, engine) == alone


def test_a_folder_without_a_manifest_is_an_error(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    result = run(folder)
    assert result.exit_code == 1
    assert "holds no manifest.json: a build into it failed, was interrupted, or still runs" in result.stderr


def test_the_advice_repairs_a_damaged_shard(folder: Path, corpus_file: Path, tiny_checkpoint: Path) -> None:
    """The advice is to remove the manifest and build again."""
    before = sets.shard_of(folder, BIN).read_bytes()
    sets.shard_of(folder, BIN).write_bytes(before[:-600] + b"\1" + before[-599:])
    report = findings(folder)
    assert report
    assert all("emove manifest.json and run the same `vlprep build` again" in line for line in report)
    (folder / "manifest.json").unlink()
    sets.build_set(corpus_file, folder, tiny_checkpoint)
    assert sets.shard_of(folder, BIN).read_bytes() == before
    assert findings(folder) == []


# Damage


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("location", ["header", "first byte", "last byte"])
def test_a_flipped_byte_is_found_in_every_member(folder: Path, member: str, location: str) -> None:
    path, row = sets.shard_of(folder, BIN), sets.place_of(folder, BIN)
    data = bytearray(path.read_bytes())
    start = data.index(f"{BIN:08d}.{member}".encode(), row["offset"])
    size = len(sets.members_of(folder, BIN)[member])
    data[start + {"header": 3, "first byte": 512, "last byte": 511 + size}[location]] ^= 0x10
    path.write_bytes(data)
    report = findings(folder)
    assert any(line.startswith(f"{path.name}: SHA-256 is ") for line in report)
    assert any(line.startswith(f"{where_of(folder)}: XXH3-64 of its") for line in report)
    others = [line for line in report if not line.startswith((f"{path.name}: SHA-256", where_of(folder)))]
    assert others == []


def test_a_truncated_shard_is_found_at_the_truncated_bin(folder: Path) -> None:
    path = sets.shard_of(folder, BIN)
    path.write_bytes(path.read_bytes()[:-5000])
    report = findings(folder)
    assert any(line.startswith(f"{path.name}: the file has ") for line in report)
    assert any(f"bin {BIN} at offset" in line and "3976 bytes before the bin does" in line for line in report)


def test_a_missing_end_of_archive_is_found(folder: Path) -> None:
    path = sets.shard_of(folder, BIN)
    path.write_bytes(path.read_bytes()[:-512])
    sets.reseal(folder)
    assert [
        "the file is truncated: it ends with 512 zero bytes instead of 1024" in line for line in findings(folder)
    ] == [True]


def test_bytes_after_the_end_of_archive_are_found(folder: Path) -> None:
    path = sets.shard_of(folder, BIN)
    path.write_bytes(path.read_bytes() + sets.tar_bytes("extra", {"txt": b"x"}))
    sets.reseal(folder)
    assert ["2,048 bytes follow the last bin" in line for line in findings(folder)] == [True]


def test_a_missing_shard_and_a_missing_table_are_found_together(folder: Path) -> None:
    path = sets.shard_of(folder, BIN)
    path.unlink()
    (folder / "samples.parquet").unlink()
    report = findings(folder)
    assert any(line.startswith(f"{path.name}: the shard cannot be read: No such file") for line in report)
    assert any("samples.parquet is missing" in line for line in report)
    assert len(report) == 2


def test_swapped_shards_have_one_finding_each(folder: Path) -> None:
    first, second = folder / "bins-00000.tar", folder / "bins-00001.tar"
    (folder / "swap").write_bytes(first.read_bytes())
    second.replace(first)
    (folder / "swap").replace(second)
    report = findings(folder)
    assert [line.partition(". ")[0] for line in report] == [
        "bins-00000.tar: the file holds the bytes of bins-00001.tar: files were renamed or swapped",
        "bins-00001.tar: the file holds the bytes of bins-00000.tar: files were renamed or swapped",
    ]


@pytest.mark.parametrize("name", ["bins-00099.tar", ".bins-00000.tar.tmp", "notes.txt"])
def test_a_file_outside_the_set_is_found(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    (folder / "report.html").write_text("a page of `vlprep report` is allowed")
    (folder / "build_metrics.json").write_text("and so are the metrics of the build")
    assert [line.startswith(f"{name}: the manifest does not list it") for line in findings(folder)] == [True]


@pytest.mark.parametrize("name", ["bins.parquet", "samples.parquet"])
def test_a_flipped_byte_in_a_table_is_found(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 0x40
    (folder / name).write_bytes(data)
    assert any(line.startswith(f"{name}: SHA-256 is ") for line in findings(folder))


@pytest.mark.parametrize("name", ["bins.parquet", "samples.parquet"])
def test_a_truncated_table_does_not_stop_the_other_checks(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    data = bytearray(sets.shard_of(folder, 0).read_bytes()) if name == "samples.parquet" else bytearray()
    if data:
        data[700] ^= 1
        (folder / "bins-00000.tar").write_bytes(data)
    report = findings(folder)
    assert any(f"{name} cannot be read as a Parquet table" in line for line in report)
    assert any(line.startswith("bins-00000.tar, bin 0 at offset 0: XXH3") for line in report) is bool(data)


def test_a_column_of_another_type_is_found(folder: Path) -> None:
    table = pq.read_table(folder / "bins.parquet")
    at = table.schema.get_field_index("num_tokens")
    table = table.set_column(at, "num_tokens", table.column(at).cast("int64"))
    pq.write_table(table, folder / "bins.parquet")
    sets.reseal(folder)
    assert ["num_tokens is int64, not int32" in line for line in findings(folder)] == [True]


# The manifest


@pytest.mark.parametrize(
    "name",
    [
        "num_annotations",
        "num_packed",
        "num_rejected",
        "num_not_sampled",
        "num_bins",
        "num_tokens",
        "num_targets",
        "num_patches",
        "num_images",
        "num_videos",
    ],
)
def test_a_wrong_count_in_the_manifest_is_found(folder: Path, name: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["counts"][name] += 1

    sets.change_manifest(folder, change)
    assert any(name in line for line in findings(folder))


def test_a_wrong_number_of_rejects_by_code_is_found(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["counts"]["rejects_by_code"]["too_long"] = 7
        manifest["counts"]["rejects_by_code"]["bad_luck"] = 1

    sets.change_manifest(folder, change)
    report = "\n".join(findings(folder))
    assert "samples.parquet: it has code too_long in 1 row, the manifest says 7" in report
    assert "manifest.json: rejects_by_code has the unknown code 'bad_luck'" in report


def test_shards_with_other_bins_than_the_manifest_says_are_found(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["shards"][1]["first_bin"] += 1

    sets.change_manifest(folder, change)
    assert ["bins-00001.tar" in line and "1 bin from bin 2 on" in line for line in findings(folder)] == [True]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda manifest: manifest["inputs"][0].update(num_drawn=30),
            "draws 30 of 29 annotations, but its rate is 1.0",
        ),
        (lambda manifest: manifest["inputs"][0].update(num_drawn=30), "do not make the 30 annotations drawn"),
        (lambda manifest: manifest["inputs"][0].update(num_drawn=30), "is 29, the inputs have 30"),
        (lambda manifest: manifest["inputs"][0].update(rate=0.5), "draws 29 of 29 annotations, but its rate is 0.5"),
        (lambda manifest: manifest["tables"].reverse(), "tables are ['samples.parquet', 'bins.parquet']"),
        (lambda manifest: manifest["shards"].reverse(), "expected ascending names such as bins-00000.tar"),
        (
            lambda manifest: manifest["fingerprints"].update(image_mean=[0.5] * 3),
            "normalised with mean (0.5, 0.5, 0.5)",
        ),
        (lambda manifest: manifest["shards"].pop(), "counts.num_bins is 4, the shards hold 3"),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_found(
    folder: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    sets.change_manifest(folder, change)
    assert any(line.startswith("manifest.json: ") and expected in line for line in findings(folder))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda dataset: dataset.update(dataset="other"), "statistics are of the datasets ['other']; the inputs are"),
        (lambda dataset: dataset.update(num_packed=1), "num_packed is 1, samples.parquet has 24"),
        (lambda dataset: dataset["rejects_by_code"].pop("too_long"), "rejects_by_code is "),
        (lambda dataset: dataset["modalities"].update(text=1), "modalities are {"),
        (lambda dataset: dataset.update(targets=None), "targets is None, samples.parquet has "),
        (lambda dataset: dataset["tokens"].update(p90=1), "tokens.p90 is 1, samples.parquet has "),
        (lambda dataset: dataset["media"].update(num_images=99), "the statistics of media have 99"),
        (lambda dataset: dataset["patches"].update(mean=1.5), "patches.mean is 1.5, samples.parquet has "),
    ],
)
def test_wrong_statistics_of_a_dataset_are_found(
    folder: Path, change: Callable[[dict[str, Any]], None], expected: str
) -> None:
    sets.change_manifest(folder, lambda manifest: change(manifest["statistics"][0]))
    report = findings(folder)
    assert all(line.startswith("manifest.json") for line in report)
    assert any(expected in line for line in report), report


def test_percentiles_are_values_of_the_data_by_rank() -> None:
    """Of 1 to 10: the 5th, the 9th, the 10th."""
    result = distribution(np.arange(10, 0, -1, dtype=np.int32))
    assert result == Distribution(total=55, mean=5.5, min=1, p50=5, p90=9, p99=10, max=10)
    assert distribution(np.empty(0, dtype=np.int32)) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[BIN].update(num_tokens=None), "bins.parquet, row 1: num_tokens is null"),
        (lambda rows: rows[BIN].update(num_targets=0), "row 1: num_targets is 0; allowed: 1 to 16777216"),
        (lambda rows: rows[BIN].update(shard=9), "bins.parquet, row 1: the manifest has no such shard"),
        (lambda rows: rows[BIN].update(shard=9), "bins.parquet, bins-00000.tar: the table has 1 bin from bin 0 on"),
        (lambda rows: rows.reverse(), "bins.parquet, row 1: bin does not ascend (3 rows in all)"),
        (lambda rows: rows.reverse(), "bins.parquet, row 1: shard does not ascend"),
        (lambda rows: rows.pop(), "bins.parquet: it adds up to num_bins 3, the manifest says num_bins 4"),
        (lambda rows: rows.pop(), "bins.parquet, bins-00002.tar: the table has 0 bins"),
        (lambda rows: rows.pop(), "samples.parquet, bin 3: bins.parquet does not have this bin"),
        (lambda rows: rows[BIN].update(num_bytes=rows[BIN]["num_bytes"] + 9999), "the shard ends"),
        (lambda rows: rows[BIN].update(num_bytes=(1 << 62) - 1), " bytes; allowed: at most "),
        (lambda rows: rows[BIN].update(num_bytes=1 << 62), "num_bytes is 4611686018427387904; allowed: 1 to"),
        (lambda rows: rows[BIN].update(offset=-512), "offset is -512; allowed: 0 to"),
        (lambda rows: rows[BIN].update(num_patches=-4), "num_patches is -4; allowed: 0 to"),
    ],
)
def test_a_table_of_bins_that_breaks_a_rule_is_found(
    folder: Path, change: Callable[[list[dict[str, Any]]], None], expected: str
) -> None:
    sets.change_rows(folder, "bins.parquet", change)
    report = findings(folder)
    assert any(expected in line for line in report), report


def test_an_edited_manifest_is_found(folder: Path) -> None:
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('  "counts"', ' "counts"'))
    assert ["it was edited" in line for line in findings(folder)] == [True]


@pytest.mark.parametrize("change", [lambda media: media.clear(), lambda media: media.update(fps=3)])
def test_settings_that_are_left_out_or_spelled_otherwise_are_found(
    folder: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    """They would be read as the defaults, which are not those of the build."""
    sets.change_manifest(folder, lambda manifest: change(manifest["settings"]["media"]))
    assert [line.startswith("manifest.json, line ") and "it was edited" in line for line in findings(folder)] == [True]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (b'"max_length"', b'"max_l\xefngth"', ""),
        (b'"max_length": 1200', b'"max_length": 1', "max_length is 1; allowed: 32 to 16777216 tokens"),
        (b'"max_length": 1200', b'"max_length": 4611686018427387904', "allowed: 32 to 16777216 tokens"),
        (b'"max_pixels": ', b'"max_pixels": 9999999', "max_pixels is 9999999"),
        (b'"num_packed": ', b'"num_packed": -', "num_packed is -"),
        (b'"num_packed": ', b'"num_packed": 99999999999999999999', "num_packed"),
        (b"bins-00000.tar", b"../bins-00000.tar", "shards[0].file is '../bins-00000.tar'"),
        (b"bins-00000.tar", b"bins-99999999999999999999.tar", "shards[0].file is 'bins-99999999999999999999.tar'"),
        (b'"inputs": ', b'"inputs": ' + b"[" * 5000, "nested too deeply"),
    ],
)
def test_an_unreadable_manifest_is_an_error(folder: Path, old: bytes, new: bytes, expected: str) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes().replace(old, new, 1))
    result = run(folder)
    assert result.exit_code == 1
    assert "manifest.json is damaged" in result.stderr
    assert expected in result.stderr


# Rules of the format, broken with matching checksums


def put(index: Any, value: int) -> Callable[[np.ndarray], None]:
    def change(array: np.ndarray) -> None:
        array[index] = value

    return change


def test_rewriting_a_bin_unchanged_changes_nothing(folder: Path, finished: Path) -> None:
    """The tools of these tests write shards exactly as the builder does."""
    sets.change_members(folder, BIN, lambda members: members)
    assert sets.shard_of(folder, BIN).read_bytes() == sets.shard_of(finished, BIN).read_bytes()
    assert findings(folder) == []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("input_ids", put(0, 872), "sample 0 starts with id 872 instead of <|im_start|>"),
        ("input_ids", put(4, -3), "input_ids is -3 at token 4 (sample 0)"),
        ("input_ids", put(4, 151643), "input_ids has <|endoftext|> at token 4 (sample 0)"),
        ("input_ids", put(4, 151648), "the token of boxes or objects at token 4 (sample 0) is not one of a pair"),
        ("input_ids", put([4, 5], 151648), "the token of boxes or objects at token 4 (sample 0) is not one of a pair"),
        ("labels", put(0, IM_START), "the first label of sample 0 is 151644; it must be -100"),
        ("labels", put(5, 999), "1 label neither -100 nor the id of the token, the first at token 5 (sample 0)"),
        ("labels", lambda labels: np.full_like(labels, -100), "sample 0 has no target"),
        ("labels", lambda labels: np.full_like(labels, -100), "bins.parquet says num_targets"),
        (
            "position_ids",
            put((0, 3), 2),
            "position_ids of sample 0: wrong positions of 1 token, the first at token 3",
        ),
        ("position_ids", put((2, -1), 5), "position_ids of sample 2"),
        ("position_ids", lambda array: np.arange(array.size // 3, dtype="i4") + 0 * array, "position_ids of sample 1"),
        ("cu_seqlens", put(1, 40), "sample 1 starts with id"),
        ("cu_seqlens", put(1, 40), "samples.parquet says of sample 0: num_tokens"),
        (
            "cu_seqlens",
            lambda boundaries: boundaries[[0, 2, 3]],
            "samples.json names 3 samples, cu_seqlens divides the bin into 2",
        ),
        ("cu_seqlens", put(-1, 7), "do not cut"),
        ("grid_thw", put((0, 1), 5), "h and w even and at least 2"),
        ("grid_thw", put((0, 0), 0), "t must be at least 1"),
        ("grid_thw", lambda grids: grids[:-1], "grid_thw has shape"),
        ("media_type", put(0, 9), "media_type of medium 0 is 9"),
        ("media_type", lambda kinds: 1 - kinds, "an image has t = 1"),
        ("input_ids", lambda ids: ids.astype("<i8"), "expected int32 in C order"),
        ("position_ids", lambda array: np.asfortranarray(array), "Fortran order True"),
        ("position_ids", lambda array: array[:2], "position_ids has shape"),
    ],
)
def test_arrays_that_break_a_rule_are_found(
    folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None], expected: str
) -> None:
    sets.change_array(folder, BIN, name, change)
    report = findings(folder)
    assert any(line.startswith(where_of(folder)) and expected in line for line in report), report


def test_a_medium_that_the_ids_have_and_the_grids_lack_is_found(folder: Path) -> None:
    num_media = len(sets.array_of(folder, BIN, "grid_thw"))
    sets.change_array(folder, BIN, "grid_thw", lambda grids: grids[:-1])
    sets.change_array(folder, BIN, "media_type", lambda kinds: kinds[:-1])
    expected = f"input_ids has {num_media} runs of pad tokens, grid_thw {num_media - 1} media"
    assert any(line.startswith(f"{where_of(folder)}: {expected}") for line in findings(folder))


def replace_member(name: str, content: bytes) -> Callable[[Members], Members]:
    return lambda members: {**members, name: content}


def appended(name: str) -> Callable[[Members], Members]:
    return lambda members: {**members, name: members[name] + b"\0"}


def with_frame_of(change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        content = zstandard.ZstdDecompressor().decompress(members["pixels.zst"])
        return {**members, "pixels.zst": zstandard.ZstdCompressor().compress(change(content))}

    return changed


def as_raw(members: Members) -> Members:
    content = zstandard.ZstdDecompressor().decompress(members["pixels.zst"])
    renamed = {("pixels.raw" if name == "pixels.zst" else name): value for name, value in members.items()}
    return {**renamed, "pixels.raw": content}


def in_reverse(members: Members) -> Members:
    return dict(reversed(members.items()))


def samples_changed(**fields: object) -> Callable[[Members], Members]:
    def changed(members: Members) -> Members:
        samples = json.loads(members["samples.json"])
        samples[1].update(fields)
        return {**members, "samples.json": json.dumps(samples, separators=(",", ":")).encode()}

    return changed


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (with_frame_of(lambda pixels: pixels[:-1]), "the grids ask for"),
        (with_frame_of(lambda pixels: pixels + b"\0"), "the grids ask for"),
        (appended("pixels.zst"), "the pixels cannot be decompressed"),
        (replace_member("pixels.zst", b""), "the pixels cannot be decompressed"),
        (as_raw, "the pixels are stored as raw, the manifest says zstd"),
        (appended("labels.npy"), "1 byte after the end of the array"),
        (replace_member("notes.txt", b""), "its members are"),
        (in_reverse, "its members are"),
        (
            lambda members: {name: value for name, value in members.items() if name != "labels.npy"},
            "labels.npy is missing",
        ),
        (samples_changed(record=99), "samples.parquet says of sample 1: record"),
        (samples_changed(id="other"), "the bin has other"),
        (samples_changed(dataset="other"), "samples.parquet says of sample 1: dataset annotations, the bin has other"),
        (samples_changed(note=1), "samples.json is not formatted as vlprep writes it"),
        (replace_member("samples.json", b"[\xef"), "samples.json cannot be read"),
        (replace_member("samples.json", b"[]"), "samples.json names 0 samples"),
    ],
)
def test_members_that_break_a_rule_are_found(folder: Path, change: Callable[[Members], Members], expected: str) -> None:
    sets.change_members(folder, BIN, change)
    report = findings(folder)
    assert any(line.startswith(where_of(folder)) and expected in line for line in report), report


def test_pad_tokens_that_do_not_fit_the_media_are_found(folder: Path) -> None:
    def swap_kinds(ids: np.ndarray) -> np.ndarray:
        return np.where(ids == IMAGE_PAD, VIDEO_PAD, np.where(ids == VIDEO_PAD, IMAGE_PAD, ids)).astype(ids.dtype)

    sets.change_array(folder, BIN, "input_ids", swap_kinds)
    assert any(line.startswith(where_of(folder)) and "medium 0 (type" in line for line in findings(folder))


def test_a_trained_pad_is_found(folder: Path) -> None:
    ids = sets.array_of(folder, BIN, "input_ids")
    at = int(np.argmax(ids == VISION_START))
    sets.change_array(folder, BIN, "labels", put(at, int(ids[at])))
    assert any("1 trained token of media" in line for line in findings(folder))


def test_media_without_vision_start_and_end_are_found(folder: Path) -> None:
    ids = sets.array_of(folder, BIN, "input_ids")
    sets.change_array(folder, BIN, "input_ids", put(int(np.argmax(ids == VISION_END)), 872))
    report = "\n".join(findings(folder))
    assert "the pad tokens of medium 0 are not between" in report
    assert "<|vision_end|> for" in report


@pytest.mark.parametrize(("field", "value"), [("mtime", 1), ("mode", 0o600), ("uname", "someone"), ("uid", 1000)])
def test_a_header_with_a_time_or_an_owner_is_found(folder: Path, field: str, value: object) -> None:
    members = sets.members_of(folder, BIN)
    sets.replace_bin(folder, BIN, sets.tar_bytes(f"{BIN:08d}", members, **{field: value}))
    report = findings(folder)
    assert len(report) == len(members)
    assert all("its tar header has a time, owner, mode or link" in line for line in report)


def test_padding_that_is_not_zero_is_found(folder: Path) -> None:
    data = bytearray(sets.tar_bytes(f"{BIN:08d}", sets.members_of(folder, BIN)))
    data[-1] = 1
    sets.replace_bin(folder, BIN, bytes(data))
    assert ["member 00000001.samples.json" in line and "not zero" in line for line in findings(folder)] == [True]


def test_a_bin_with_another_number_is_found(folder: Path) -> None:
    sets.replace_bin(folder, BIN, sets.tar_bytes("00000077", sets.members_of(folder, BIN)))
    assert ["found a member of bin 00000077, expected 00000001" in line for line in findings(folder)] == [True]


def test_a_gap_and_an_overlap_between_bins_are_found(folder: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        rows[BIN]["offset"] += 512

    sets.change_rows(folder, "bins.parquet", change)
    report = findings(folder)
    assert any(f"bin {BIN} at offset" in line and "belong to no bin" in line for line in report)
    sets.change_rows(folder, "bins.parquet", lambda rows: rows[BIN].update(offset=rows[BIN]["offset"] - 1024))
    assert any(f"bin {BIN} at offset" in line and "begins inside another bin" in line for line in findings(folder))


def test_a_bin_above_the_budgets_of_the_manifest_is_found(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["settings"].update(max_length=1000, max_patches=100)

    sets.change_manifest(folder, change)
    report = "\n".join(findings(folder))
    assert (
        f"bin {BIN} at offset {sets.place_of(folder, BIN)['offset']}: the bin has 1193 tokens, max_length is 1000"
        in report
    )
    assert "max_patches is 100" in report


@pytest.mark.parametrize(
    "name",
    ["num_tokens", "num_targets", "num_samples", "num_patches", "num_images", "num_videos", "sum_squared_lengths"],
)
def test_a_wrong_count_in_the_table_of_bins_is_found_at_its_bin(folder: Path, name: str) -> None:
    sets.change_rows(folder, "bins.parquet", lambda rows: rows[BIN].update({name: rows[BIN][name] + 1}))
    stated = sets.place_of(folder, BIN)[name]
    expected = f"{where_of(folder)}: bins.parquet says {name} {stated}, the bin has {stated - 1}"
    assert any(line.startswith(expected) for line in findings(folder))


def first_packed(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["bin"] == BIN)


def first_rejected(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["status"] == "rejected")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: first_packed(rows).update(slot=7), f"samples.parquet, bin {BIN}: its slots do not run from 0"),
        (
            lambda rows: first_packed(rows).update(bin=0),
            f"samples.parquet, bin {BIN}: its samples add up to num_samples",
        ),
        (
            lambda rows: first_packed(rows).update(bin=50),
            "samples.parquet, bin 50: bins.parquet does not have this bin",
        ),
        (lambda rows: first_packed(rows).update(num_tokens=1), "its samples add up to num_tokens"),
        (lambda rows: first_packed(rows).update(num_patches=1), "its samples add up to num_patches"),
        (lambda rows: first_rejected(rows).update(num_tokens=-1), "num_tokens is -1; allowed: 0 to"),
        (lambda rows: first_packed(rows).update(bin=None), "bin must be set for status packed, and only then"),
        (lambda rows: first_packed(rows).update(num_tokens=None), "num_tokens is null, for a packed sample"),
        (lambda rows: first_packed(rows).update(message="m"), "message must be set for status rejected, and only then"),
        (lambda rows: first_packed(rows).update(id="x"), "samples.parquet says of sample"),
        (
            lambda rows: first_packed(rows).update(status="lost"),
            "status is 'lost'; allowed: not_sampled, packed, rejected",
        ),
        (lambda rows: first_packed(rows).update(dataset="other"), "the manifest has no such dataset"),
        (
            lambda rows: first_packed(rows).update(file="other.jsonl"),
            "the manifest says that this record is in another file",
        ),
        (lambda rows: first_packed(rows).update(line=0), "line is 0; allowed: 1 to"),
        (lambda rows: rows[-1].update(line=2), "row 28: line decreases within a file"),
        (lambda rows: first_packed(rows).update(record=1000), "record is outside 0 to 28"),
        (lambda rows: first_packed(rows).update(dataset=None), "dataset is null"),
        (lambda rows: first_rejected(rows).update(codes=[]), "codes must be set for status rejected, and only then"),
        (lambda rows: first_rejected(rows).update(codes=["bad_luck"]), "the code 'bad_luck' is unknown"),
        (
            lambda rows: first_rejected(rows).update(message=None),
            "message must be set for status rejected, and only then",
        ),
        (lambda rows: rows.reverse(), "record does not ascend"),
        (lambda rows: rows.pop(), "28 rows for 29 annotations"),
        (lambda rows: rows.append(dict(rows[-1])), "30, the manifest says 29"),
        (lambda rows: rows.append(dict(rows[-1])), "are drawn, the manifest says 29; record 28 has 2 rows"),
    ],
)
def test_a_ledger_that_breaks_a_rule_is_found(
    folder: Path, change: Callable[[list[dict[str, Any]]], None], expected: str
) -> None:
    sets.change_rows(folder, "samples.parquet", change)
    report = findings(folder)
    assert any(line.startswith(("samples.parquet", "bins-")) for line in report)
    assert any(expected in line for line in report), report


def test_a_video_without_its_decoder_is_found(folder: Path) -> None:
    def change(rows: list[dict[str, Any]]) -> None:
        next(row for row in rows if row["bin"] == BIN and row["video_backend"])["video_backend"] = None

    sets.change_rows(folder, "samples.parquet", change)
    assert ["has a video, but its video_backend in samples.parquet is None" in line for line in findings(folder)] == [
        True
    ]


# Positions


def sample_ids(media: list[tuple[int, Grid, int]], length: int) -> np.ndarray:
    ids = np.full(length, 872, dtype=np.int32)
    for start, grid, kind in media:
        ids[start : start + grid.num_tokens] = VIDEO_PAD if kind == MEDIA_VIDEO else IMAGE_PAD
    return ids


def test_positions_worked_out_by_hand_pass() -> None:
    """Two words, a video of 2 steps of 2x1 tokens at 3 per step, one word: text continues at the maximum 5 plus 1."""
    positions = np.array([[0, 1, 2, 2, 5, 5, 6], [0, 1, 2, 3, 2, 3, 6], [0, 1, 2, 2, 2, 2, 6]], dtype=np.int32)
    media = [(2, Grid(2, 4, 2), MEDIA_VIDEO)]
    assert position_problem(positions, media) is None
    wrong = positions.copy()
    wrong[:, 6] = 4  # maximum of height and width, plus 1
    assert position_problem(wrong, media) == (
        "wrong positions of 1 token, the first at token 6 of the sample: [4, 4, 4], expected [6, 6, 6] "
        "(time, height, width)"
    )


@given(st.data())
def test_written_positions_pass_and_any_other_value_is_found(data: st.DataObject) -> None:
    media: list[tuple[int, Grid, int]] = []
    at = data.draw(st.integers(1, 3))
    for _ in range(data.draw(st.integers(0, 3))):
        kind = data.draw(st.sampled_from((MEDIA_IMAGE, MEDIA_VIDEO)))
        t = data.draw(st.integers(1, 4)) if kind == MEDIA_VIDEO else 1
        grid = Grid(t, 2 * data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(1, 3)))
        media.append((at, grid, kind))
        at += grid.num_tokens + data.draw(st.integers(1, 3))
    ids = sample_ids(media, at)
    seconds = [data.draw(st.floats(0.05, 20)) for _ in media]
    positions = position_ids(ids, [grid for _, grid, _ in media], seconds)
    assert position_problem(positions, media) is None
    axis, token = data.draw(st.integers(0, 2)), data.draw(st.integers(0, at - 1))
    is_time_of_video = axis == 0 and ids[token] == VIDEO_PAD
    if not is_time_of_video:
        positions[axis, token] += data.draw(st.sampled_from((-2, -1, 1, 3)))
        assert position_problem(positions, media) is not None


@given(st.floats(0.001, 100), st.integers(1, 400))
def test_steps_at_one_rate_are_even(rate: float, num: int) -> None:
    assert is_sampled_evenly(np.floor(np.arange(num) * rate).astype(np.int64))


@pytest.mark.parametrize("steps", [[1, 2], [0, 2, 3], [0, 1, 1, 3], [0, -1], [0, 3, 5]])
def test_steps_that_no_rate_gives_are_not_even(steps: list[int]) -> None:
    assert not is_sampled_evenly(np.asarray(steps))


# Bins without media


def test_text_alone_passes_and_bytes_in_its_empty_pixels_are_found(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "text.jsonl").write_text(json.dumps({"conversations": turn("Hello")}) + "\n")
    out = sets.build_set(tmp_path / "text.jsonl", tmp_path / "out", tiny_checkpoint, BuildSettings())
    assert findings(out) == []
    sets.change_members(out, 0, appended("pixels.zst"))
    assert ["not one empty frame" in line for line in findings(out)] == [True]
