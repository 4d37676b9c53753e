"""The command line: exit codes, one sentence for what a user can mend, and the summaries."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prep.cli import main
from schemas.manifest import read_manifest
from tests.prep.corpus import write_corpus


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))[0]


def test_validate_reports_every_bad_record_and_exits_with_1(corpus: Path, tmp_path: Path) -> None:
    found = run("validate", corpus, "--workers", 1, "--rejects", tmp_path / "rejects.jsonl")
    assert found.exit_code == 1
    assert "29 annotations: 26 valid, 3 rejected" in found.stdout
    assert f"{corpus}:2 (id bad-tag_mismatch)" in found.stdout
    rejects = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    assert [reject["problems"][0]["code"] for reject in rejects] == ["tag_mismatch", "media_missing", "bad_json"]
    assert rejects[0]["annotation"]["id"] == "bad-tag_mismatch"
    assert rejects[2]["annotation"] is None


def test_validate_writes_the_valid_records_back(corpus: Path, tmp_path: Path) -> None:
    run(
        "validate", corpus, "--workers", 1, "--fixed", tmp_path / "fixed.jsonl", "--rejects", tmp_path / "rejects.jsonl"
    )
    originals = corpus.read_text().splitlines()
    rejected = {json.loads(line)["line"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()}
    expected = [json.loads(line) for number, line in enumerate(originals, start=1) if number not in rejected]
    assert [json.loads(line) for line in (tmp_path / "fixed.jsonl").read_text().splitlines()] == expected
    found = run("validate", tmp_path / "fixed.jsonl", "--media-root", corpus.parent, "--workers", 1)
    assert found.exit_code == 0


def test_validate_deep_decodes_what_only_looks_good(corpus: Path) -> None:
    found = run("validate", corpus, "--workers", 1, "--deep")
    assert "media_unreadable: 1" in found.stdout
    assert "29 annotations: 25 valid, 4 rejected" in found.stdout


def test_validate_exits_with_0_when_all_is_well(tmp_path: Path) -> None:
    record = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    (tmp_path / "good.json").write_text(json.dumps([record]))
    found = run("validate", tmp_path / "good.json", "--workers", 1)
    assert found.exit_code == 0
    assert "1 annotations: 1 valid, 0 rejected" in found.stdout


def test_validate_finds_the_real_clip_that_is_missing(qwen_demo: Path) -> None:
    found = run("validate", qwen_demo / "annotations.jsonl", "--workers", 1)
    assert found.exit_code == 1
    assert "media_missing: 1" in found.stdout
    assert "annotations.jsonl:4: 'videos/v_7bUu05RIksU.mp4' does not exist" in found.stdout


def test_build_prints_the_balance_and_the_rejects_by_code(corpus: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    found = run(
        "build", corpus, "--out", tmp_path / "out", "--model", tiny_checkpoint, "--workers", 2, "--max-length", 1200
    )
    assert found.exit_code == 0, found.output
    assert "29 annotations = 24 packed + 5 rejected + 0 not sampled" in found.stdout
    assert "too_long: 1" in found.stdout
    assert read_manifest(tmp_path / "out").settings.max_length == 1200


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["build", "nope", "--out", "{out}", "--registry", "{registry}"], 2, "not registered"),
        (["build", "unset%50", "--out", "{out}", "--registry", "{registry}"], 2, "datasets.toml:2"),
        (["build", "{corpus}", "--out", "{out}", "--model", "./nowhere"], 2, "neither a folder nor a hub id"),
        (["build", "{corpus}", "--out", "{out}", "--model", "{model}", "--max-length", "3"], 2, "max_length is 3"),
        (
            ["build", "{corpus}", "--out", "{out}", "--model", "{model}", "--max-rejected", "5%"],
            1,
            "--max-rejected 5.00%",
        ),
        (["build", "{corpus}", "--out", "{out}", "--max-rejected", "x"], 2, "is not a share"),
        (["build", "{corpus}", "--out", "{out}", "--packer", "x"], 2, "bfd"),
        (["build", "{corpus}"], 2, "--out"),
        (["validate", "{out}/none.jsonl"], 2, "none.jsonl cannot be read"),
        (["validate", "{corpus}", "--media-root", "{out}/none"], 2, "is not a folder"),
        (["datasets", "--registry", "{out}/none.toml"], 2, "does not exist"),
    ],
)
def test_wrong_use_is_one_sentence_and_the_documented_code(
    corpus: Path, tmp_path: Path, tiny_checkpoint: Path, arguments: list[str], code: int, part: str
) -> None:
    (tmp_path / "datasets.toml").write_text('[unset]\nannotation_path = ""\n')
    places = {"out": tmp_path, "registry": tmp_path / "datasets.toml", "corpus": corpus, "model": tiny_checkpoint}
    found = run(
        *[argument.format(**places) for argument in arguments],
        *(["--workers", 1] if arguments[0] != "datasets" else []),
    )
    assert found.exit_code == code
    assert part in found.stderr
    assert "Traceback" not in found.output


def test_datasets_lists_every_entry_with_its_state(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "datasets.toml").write_text(
        '[there]\nannotation_path = "a.json"\nmedia_root = "."\n[unset]\nannotation_path = ""\n'
    )
    found = run("datasets", "--registry", tmp_path / "datasets.toml")
    assert found.exit_code == 0
    lines = found.stdout.splitlines()
    assert lines[0].startswith("there") and "ready" in lines[0]
    assert lines[1].startswith("unset") and "datasets.toml:5" in lines[1]
