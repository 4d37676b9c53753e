"""Every reader reads the sets of shards that earlier versions wrote, with the contents that are noted beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from prep.cli import main
from schemas.bins import ARRAY_MEMBERS
from schemas.codecs import CODECS
from schemas.manifest import FORMAT_VERSION
from storage.shard_set import read_manifest
from tests.write_stored_set import CODEC_OF_SUFFIX, DATA, contents, sha256, squares
from train.batches.batch import build_micro_batch
from train.model.pixels import pixel_values
from train.order.explain import source_samples
from train.shards.index import open_shards
from train.shards.reader import read_checked_bin

SETS = sorted(path.parent for path in DATA.glob("shards_v*/manifest.json"))
each_set = pytest.mark.parametrize("folder", SETS, ids=[folder.name for folder in SETS])


def noted(folder: Path) -> list[dict[str, Any]]:
    bins: list[dict[str, Any]] = json.loads(folder.with_suffix(".json").read_text(encoding="utf-8"))
    return bins


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result.stdout


def test_there_is_a_set_of_every_version_up_to_this_one_and_of_every_codec() -> None:
    assert {folder.name: read_manifest(folder).settings.pixels for folder in SETS} == {
        f"shards_v{version}{suffix}": codec
        for version in range(1, FORMAT_VERSION + 1)
        for suffix, codec in CODEC_OF_SUFFIX.items()
    }
    assert sorted(CODEC_OF_SUFFIX.values()) == sorted(CODECS)
    assert sum(path.stat().st_size for folder in SETS for path in folder.iterdir()) < 50_000 * len(SETS)


@each_set
def test_the_reader_of_the_page_about_the_format_finds_what_is_noted(folder: Path) -> None:
    assert contents(folder) == folder.with_suffix(".json").read_text(encoding="utf-8")


@each_set
def test_the_reader_of_the_trainer_finds_what_is_noted(folder: Path) -> None:
    index = open_shards(folder)
    assert index.num_bins == len(noted(folder))
    for stored in noted(folder):
        read = read_checked_bin(index, stored["bin"])
        for member in ARRAY_MEMBERS:
            name = member.removesuffix(".npy")
            assert np.array_equal(getattr(read, name), stored["arrays"][name]), name
        rows = pixel_values(build_micro_batch([read]).vision).numpy()
        assert rows.shape == (stored["num_patches"], 1176)
        assert sha256(rows) == stored["pixel_values"]
        ids = [sample.id for sample in source_samples(index, [stored["bin"]])[stored["bin"]]]
        assert ids == [sample["id"] for sample in stored["samples"]]


@each_set
def test_verify_accepts_the_set_and_its_ledger_has_the_reject(folder: Path) -> None:
    run("verify", folder, "--workers", 1)
    rejects = [row for row in pq.read_table(folder / "samples.parquet").to_pylist() if row["status"] == "rejected"]
    assert [(row["id"], row["codes"]) for row in rejects] == [("missing", ["media_missing"])]


@each_set
def test_show_prints_the_texts_and_saves_the_pixels(folder: Path, demo_checkpoint: Path, tmp_path: Path) -> None:
    text = run("show", folder, "--bin", 0, "--model", demo_checkpoint, "--save", tmp_path)
    for words in ("What is it?", "Six colours.", "What happens?", "It gets brighter.", "你好", "Hello."):
        assert words in text
    images = [np.asarray(Image.open(path)) for path in sorted(tmp_path.glob("*.png"))]
    assert len(images) == 1 + 4
    drift = np.abs(images[0].astype(int) - np.asarray(squares(), int)).max()
    assert drift <= (8 if folder.name.endswith("_jpeg") else 0)
