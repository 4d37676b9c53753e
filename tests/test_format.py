"""docs/format.md describes the shards: its tables equal the code, and its programs run and read what was written."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.bins import ARRAY_MEMBERS, SAMPLES_MEMBER
from schemas.codecs import PIXELS_MEMBER
from schemas.manifest import FORMAT_VERSION
from schemas.tables import BINS_COLUMNS, SAMPLES_COLUMNS
from tests.format_reader import read_set
from tests.guides import guide
from tests.train.synthetic import as_stored, make_bins, write_shards
from train.batches.batch import build_micro_batch
from train.model.pixels import pixel_values
from train.order.explain import SourceSample, source_samples
from train.shards.index import open_shards
from train.shards.reader import read_checked_bin

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = (REPOSITORY / "docs" / "format.md").read_text()
BINS = make_bins(num_bins=8)


def section(title: str) -> str:
    """Text under a heading, up to the next one."""
    match = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ )", PAGE + "# ", re.MULTILINE | re.DOTALL)
    assert match is not None, title
    return match[1]


def rows(title: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its header row."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize(
    ("title", "columns"), [("`bins.parquet`", BINS_COLUMNS), ("`samples.parquet`", SAMPLES_COLUMNS)]
)
def test_columns_are_those_of_the_code(title: str, columns: dict[str, str]) -> None:
    assert {name.strip("`"): kind for name, kind, _ in rows(title)} == columns


def test_members_are_those_of_the_code_in_their_order() -> None:
    members = rows("A shard")
    arrays = {name.strip("`"): kind.split(" ")[0] for name, kind, _ in members if name.endswith(".npy`")}
    assert arrays == {name: dtype.name for name, dtype in ARRAY_MEMBERS.items()}
    assert list(arrays) == list(ARRAY_MEMBERS)
    others = [re.findall("`([^`]+)`", name) for name, _, _ in members[len(arrays) :]]
    assert others == [list(PIXELS_MEMBER.values()), [SAMPLES_MEMBER]]
    assert f"(this page: {FORMAT_VERSION})" in PAGE


def expected_lines(codec: str) -> list[str]:
    """Key, tokens, targets, samples, media and sum of all pixels of every bin, from what was written."""
    lines = []
    for index, samples in enumerate(BINS):
        media = [as_stored(medium, codec) for sample in samples for medium in sample.media]
        tokens = sum(len(sample.input_ids) for sample in samples)
        targets = sum(int((sample.labels != -100).sum()) for sample in samples)
        total = sum(int(medium.frames.sum(dtype=np.int64)) for medium in media)
        lines.append(f"{index:08d} {tokens} {targets} {len(samples)} {len(media)} {total}")
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("codec", list(PIXELS_MEMBER))
def test_the_program_of_the_page_with_webdataset_reads_the_shards(
    tmp_path: Path, codec: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_shards(tmp_path / "set", BINS, codec=codec)
    with guide("format.md", "With `webdataset`") as page:
        (program,) = page.take()
    reader = tmp_path / "reader.py"
    reader.write_text(program.text)
    monkeypatch.setattr(sys, "argv", [str(reader), str(folder)])
    runpy.run_path(str(reader), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == expected_lines(codec)


@pytest.mark.slow
def test_the_program_of_the_page_without_packages_reads_the_shards_in_an_isolated_interpreter(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", BINS, codec="raw")
    with guide("format.md", "With the standard library alone") as page:
        (program,) = page.take()
    command = [sys.executable, "-I", "-c", program.text, str(folder)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=tmp_path).stdout
    assert output.splitlines() == expected_lines("raw")


@pytest.mark.parametrize("codec", list(PIXELS_MEMBER))
def test_a_reader_written_from_the_page_alone_gets_what_the_trainer_gets(tmp_path: Path, codec: str) -> None:
    """Arrays, order of samples, and pixel values to the bit; tests/format_reader.py knows the page and no code."""
    folder = write_shards(tmp_path / "set", BINS, codec=codec)
    index = open_shards(folder)
    bins = list(read_set(folder))
    assert [page_bin.bin_index for page_bin in bins] == list(range(index.num_bins))
    for page_bin in bins:
        ours = read_checked_bin(index, page_bin.bin_index)
        for name in ARRAY_MEMBERS:
            assert np.array_equal(getattr(ours, name[:-4]), page_bin.arrays[name[:-4]]), name
        assert [sample["id"] for sample in page_bin.samples] == [
            sample.id for sample in source_of(folder, page_bin.bin_index)
        ]
        vision = build_micro_batch([ours]).vision
        if len(page_bin.pixel_values):
            assert torch.equal(pixel_values(vision), torch.from_numpy(page_bin.pixel_values))
    assert sum(len(page_bin.pixel_values) for page_bin in bins) == index.num_patches.sum()


def source_of(folder: Path, index: int) -> list[SourceSample]:
    return source_samples(open_shards(folder), [index])[index]


@pytest.mark.slow
def test_the_program_of_the_short_page_rebuilds_the_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_shards(tmp_path / "set", BINS, bins_per_shard=len(BINS))
    with guide("shards/README.md") as page:
        (program,) = page.take()
    text = program.text.replace("shards/demo/", f"{folder}/")
    assert str(folder) in text
    (tmp_path / "reader.py").write_text(f"{text.rstrip()}\n        print(bin['__key__'], frames.shape, frames.sum())\n")
    runpy.run_path(str(tmp_path / "reader.py"), run_name="__main__")
    assert capsys.readouterr().out.splitlines() == [
        f"{index:08d} {medium.frames.shape} {medium.frames.sum()}"
        for index, samples in enumerate(BINS)
        for sample in samples
        for medium in sample.media
    ]


def test_the_short_page_is_linked_and_names_the_same_members() -> None:
    short = (REPOSITORY / "shards" / "README.md").read_text()
    assert "(../docs/format.md)" in short
    for name in (*ARRAY_MEMBERS, *PIXELS_MEMBER.values(), SAMPLES_MEMBER, *BINS_COLUMNS, *SAMPLES_COLUMNS):
        assert f"`{name}`" in short, name
