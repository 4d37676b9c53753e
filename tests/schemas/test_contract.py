"""The contract: schema files follow the structs, residuals are reversible, damaged bins and manifests are refused."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from schemas.bins import Bin
from schemas.errors import ConfigError, ShardError
from schemas.json_schema import FOLDER, json_schemas
from schemas.manifest import decode_manifest
from schemas.pixels import decode_residuals, encode_residuals
from schemas.qwen import CONTROL_TOKENS, tokenizer_fingerprint
from schemas.settings import BuildSettings, MediaSettings
from storage.bins import parse_bin
from storage.shard_set import read_manifest


def test_schema_files_follow_the_structs() -> None:
    """Run `python -m schemas.json_schema` when this fails."""
    assert {path.name: path.read_bytes() for path in FOLDER.glob("*.json")} == json_schemas()


def test_the_annotation_schema_accepts_good_records_and_refuses_bad_ones() -> None:
    schema = json.loads(json_schemas()["annotation.schema.json"])
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    jsonschema.validate({"image": "a.png", "conversations": turns, "other": 1}, schema)
    for bad in (
        {},
        {"conversations": "x"},
        {"conversations": turns, "image": 3},
        {"conversations": [{"from": "human"}]},
    ):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


@given(hnp.arrays(np.uint8, st.tuples(st.just(3), st.integers(1, 9), st.integers(1, 9))))
def test_residuals_are_reversible(frame: np.ndarray) -> None:
    assert (decode_residuals(encode_residuals(frame)) == frame).all()


def test_residuals_by_hand() -> None:
    """R - G = 5, 7 / 250, 0; rows: 5, 7 / 245, 249; columns: 5, 2 / 245, 4."""
    frame = np.asarray([[[15, 17], [4, 10]], [[10, 10], [10, 10]], [[10, 10], [10, 10]]], dtype=np.uint8)
    assert encode_residuals(frame)[0].tolist() == [[5, 2], [245, 4]]


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
        end = file.offset
    return buffer.getvalue()[:end]


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def members(**changes: Any) -> list[tuple[str, bytes]]:
    arrays = {
        "input_ids": np.arange(5, dtype=np.int32),
        "labels": np.full(5, -100, dtype=np.int32),
        "position_ids": np.zeros((3, 5), dtype=np.int32),
        "cu_seqlens": np.asarray([0, 2, 5], dtype=np.int32),
        "grid_thw": np.zeros((0, 3), dtype=np.int32),
        "media_type": np.zeros(0, dtype=np.uint8),
    }
    named = [(f"00000007.{name}.npy", npy(changes.get(name, array))) for name, array in arrays.items()]
    return [
        *named,
        ("00000007.pixels.raw", b""),
        ("00000007.samples.json", b'[{"dataset":"d","record":0,"id":null}]'),
    ]


def test_a_bin_written_with_standard_tools_is_read() -> None:
    parsed: Bin = parse_bin(tar(members()), 7, where="here")
    assert parsed.cu_seqlens.tolist() == [0, 2, 5]
    assert parsed.codec == "raw"
    assert parsed.samples()[0].dataset == "d"
    assert not parsed.input_ids.flags.writeable


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tar(members())[:-512], "cut short"),
        (b"\1" * 2048, "no tar header"),
        (tar(members())[512:], "no tar header"),
        (tar(members()[:-1]), "samples.json is missing"),
        (tar(members()[:-2]), "is missing"),
        (tar(members(labels=np.zeros(4, dtype=np.int32))), "labels has shape"),
        (tar(members(labels=np.zeros(5, dtype=np.int64))), "dtype int64"),
        (tar(members(position_ids=np.zeros((5, 3), dtype=np.int32))), "position_ids has shape"),
        (tar(members(cu_seqlens=np.asarray([0, 5, 4], dtype=np.int32))), "cu_seqlens"),
        (tar(members(cu_seqlens=np.asarray([0], dtype=np.int32))), "cu_seqlens"),
        (tar([(name.replace("07", "08"), data) for name, data in members()]), "found a member of bin 00000008"),
    ],
)
def test_bytes_that_are_not_the_bin_are_refused_with_their_location(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message) as caught:
        parse_bin(data, 7, where="bins-00000.tar, bin 7 at byte 0")
    assert "bins-00000.tar, bin 7 at byte 0" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"{}", "is not the manifest of a set of shards. Give the folder"),
        (b"x", "is not the manifest of a set of shards"),
        (b'{"name": "web app", "icons": []}', "is not the manifest of a set of shards"),
        (b'{"version": 1, "x": "\xae", "settings": []}', "damaged"),
        (b'{"version": 99}', "format version 99"),
        (b'{"version": 1}', "damaged"),
    ],
)
def test_a_manifest_that_cannot_be_used_says_why(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=message):
        decode_manifest(data, where="m.json")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (MediaSettings, {"min_pixels": 3}, "min_pixels is 3"),
        (MediaSettings, {"max_pixels": 784}, "max_pixels is 784; allowed: at least min_pixels"),
        (MediaSettings, {"video_min_frames": 0}, "video_min_frames"),
        (MediaSettings, {"video_max_frames": 1}, "video_max_frames"),
        (MediaSettings, {"base_interval": float("nan")}, "base_interval"),
        (BuildSettings, {"max_length": 5}, "max_length is 5"),
        (BuildSettings, {"packer": "x"}, "packer is x; allowed: bfd, binpacking"),
        (BuildSettings, {"pixels": "png"}, "pixels is png; allowed: zstd, raw, jpeg"),
        (BuildSettings, {"seed": -1}, "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**change)


def tokenizer_json(merges: list[Any], **change: Any) -> bytes:
    added = [{"id": token_id, "content": text, "special": True} for text, token_id in CONTROL_TOKENS.items()]
    content = {"model": {"vocab": {"a": 0, "b": 1, "ab": 2}, "merges": merges, "type": "BPE"}, "added_tokens": added}
    return json.dumps({**content, **change}, indent=1).encode()


def test_the_fingerprint_of_a_tokenizer_ignores_layout_and_sees_content() -> None:
    fingerprint = tokenizer_fingerprint(tokenizer_json(["a b"]), where="t")
    assert fingerprint == tokenizer_fingerprint(tokenizer_json([["a", "b"]], version="1.0"), where="t")
    assert fingerprint != tokenizer_fingerprint(tokenizer_json([["b", "a"]]), where="t")
    offsets = [
        {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "trim_offsets": trim}]} for trim in (True, False)
    ]
    assert len({tokenizer_fingerprint(tokenizer_json(["a b"], pre_tokenizer=kind), where="t") for kind in offsets}) == 1
    assert fingerprint != tokenizer_fingerprint(tokenizer_json(["a b"], normalizer={"type": "NFC"}), where="t")


def test_a_file_that_is_not_the_tokenizer_of_the_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a byte-level BPE"):
        tokenizer_fingerprint(b"[]", where="t.json")
    with pytest.raises(ConfigError, match="not the tokenizer of Qwen2"):
        tokenizer_fingerprint(tokenizer_json([], added_tokens=[]), where="t.json")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            ["settings.toml", "metrics.jsonl"],
            "of a training run, not a set of shards. Show a step",
        ),
        (
            ["config.json", "model.safetensors"],
            "a model checkpoint, not a set of shards. Give the",
        ),
        (["adapter_config.json"], "it is an adapter of peft,"),
        (["dataset_info.json", "state.json"], "it is a dataset that save_to_disk of Hugging Face datasets wrote,"),
        ([".nv-meta", "a.tar"], "it is a dataset of Megatron-Energon,"),
        (["index.json", "shard.00000.mds"], "it is a set of shards of MosaicML Streaming,"),
        (["a.tar", "b.tar", "x"], "it is a folder with 2 tar files and 1 other file,"),
        (["a.jpg", "b.PNG", "c.mp4"], "it is a folder with 2 images and 1 video,"),
        (["b.jsonl", "a.jpg", "a.json.gz"], "Build shards from a file in it: `vlprep build {folder}/a.json.gz --out"),
    ],
)
def test_a_folder_that_is_no_set_of_shards_is_named_for_what_it_is(tmp_path: Path, names: list[str], said: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=re.escape(said.format(folder=tmp_path))) as raised:
        read_manifest(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path} holds no manifest.json: it is ")


def test_a_folder_without_a_manifest_is_distinguished_from_one_that_is_missing_or_holds_several(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone does not exist\. Give the folder"):
        read_manifest(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"holds no manifest\.json: it is an empty folder, not a set of shards"):
        read_manifest(tmp_path)
    for name in "dcba":
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").touch()
    with pytest.raises(ConfigError, match=r"holds no manifest\.json itself, but folders that do \(a, b, c, …\)"):
        read_manifest(tmp_path)
