"""The commands of pages in ``docs`` about data and shards, run as they stand there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from storage.shard_set import read_manifest
from tests.guides import guide
from tests.prep.dialect_corpus import HELLO, llava
from tests.prep.launch_scripts import LLAMA_FACTORY_FILES, UPSTREAM_SCRIPTS
from tests.prep.test_formats import write_jsonl
from tests.prep.test_grounding import BOX, thumbnails, write_images
from tests.prep.test_item_settings import AS_AT_INFERENCE
from tests.prep.test_migrate import REGISTRY
from tests.typed import prepare_folder, run

GOOD = llava("<image>Where?", "A cat.", image="photo.png")


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images and the tiny checkpoint under the name of the default model."""
    monkeypatch.chdir(tmp_path)
    prepare_folder(tiny_checkpoint)
    write_images(tmp_path)
    return tmp_path


def register(**records: list[dict[str, object]]) -> None:
    """Datasets of these names in ``datasets.toml``."""
    for name, lines in records.items():
        write_jsonl(Path(f"{name}.jsonl"), lines)
    tables = [f'[{name}]\nannotation_path = "{name}.jsonl"\n' for name in records]
    Path("datasets.toml").write_text("".join(tables))


def test_the_commands_of_the_page_about_annotations(folder: Path) -> None:
    write_jsonl(folder / "annotations.jsonl", [GOOD, {**GOOD, "image": "none.png"}, HELLO])
    register(mp_doc=[GOOD])
    write_jsonl(folder / "a.jsonl", [GOOD])
    write_jsonl(folder / "b.jsonl", [HELLO] * 4)
    with guide("annotations.md") as page:
        (build,) = page.take("Files")
        for command in page.take("Checking"):
            is_good = "mp_doc" in command.words
            output = run(command.words, exit_code=0 if is_good else 1)
            assert ("1 annotation: 1 valid" if is_good else "3 annotations: 2 valid, 1 rejected") in output
        bad, good = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("bad", "good"))
        assert [problem["code"] for line in bad for problem in json.loads(line)["problems"]] == ["media_missing"]
        assert [json.loads(line) for line in good] == [GOOD, HELLO]
        run(build.words)
    manifest = read_manifest(folder / "shards" / "mix")
    assert [source.dataset for source in manifest.inputs] == ["a", "b"]
    assert (manifest.counts.num_packed, manifest.counts.num_not_sampled) == (3, 2)


def test_the_commands_of_the_page_about_boxes(folder: Path) -> None:
    objects = {"objects": {"bbox": [[960, 540, 1920, 1080]], "image_id": [1]}}
    two = llava("<image><image>Where?", "<bbox>", images=["photo.png", "wide.png"])
    write_jsonl(folder / "annotations.jsonl", [llava("<image>Where?", BOX, image="photo.png"), {**two, **objects}])
    with guide("grounding.md") as page:
        for command in page.take():
            run(command.words)
    assert read_manifest(folder / "shards" / "mine").statistics[0].num_boxes == 2
    drawn = sorted(path.name for path in (folder / "pngs").glob("*-boxes.png"))
    assert len(drawn) == 2 and len(list((folder / "pngs").glob("*.png"))) == 3 + 2
    page_text = (folder / "report.html").read_text()
    assert "2 boxes and points" in page_text
    # The box of the second record is in its second image, the wide one.
    is_drawn = {(width > 1.6 * height, drawn) for (width, height), drawn in thumbnails(page_text)}
    assert is_drawn == {(False, True), (False, False), (True, True)}


def test_the_commands_of_the_page_about_the_report(folder: Path) -> None:
    write_jsonl(folder / "annotations.jsonl", [GOOD, HELLO])
    with guide("report.md") as page:
        for command in page.take():
            run(command.words)
    names = ["shards/mine/report.html", "pages/mine.html", "pages/bin.html", "pages/sample.html"]
    pages = [(folder / name).read_text() for name in names]
    assert pages[0] == pages[1]
    assert [page.count("<article") for page in pages] == [2, 2, 2, 2]


def test_the_commands_of_the_start_page_about_registered_datasets(folder: Path) -> None:
    register(cambrian_737k=[GOOD] * 5, mp_doc=[HELLO, GOOD])
    with guide("index.md", "Registered datasets") as page:
        for command in page.take():
            run(command.words)
    counts = [read_manifest(folder / "shards" / name).counts for name in ("mp_doc-50", "mix")]
    assert [(count.num_packed, count.num_not_sampled) for count in counts] == [(1, 1), (4 + 1, 1 + 1)]


def test_the_command_of_the_page_about_codecs(folder: Path) -> None:
    register(mp_doc=[GOOD])
    with guide("storage.md") as page:
        (build,) = page.take()
        run(build.words)
    assert read_manifest(folder / "shards" / "mp_doc").settings.pixels == "zstd"


def test_the_command_of_the_page_about_media_samples_videos_by_the_defaults_of_qwen_vl_utils(folder: Path) -> None:
    write_jsonl(folder / "annotations.jsonl", [GOOD])
    with guide("media.md") as page:
        (build,) = page.take()
        run(build.words)
    used = read_manifest(folder / "shards" / "mine").settings.media
    names = [name for name in used.__struct_fields__ if name.startswith(("video_", "fps"))]
    assert [(name, getattr(used, name)) for name in names] == [(name, getattr(AS_AT_INFERENCE, name)) for name in names]


def test_the_commands_of_the_page_about_moving_over(folder: Path) -> None:
    info = {name: {"file_name": "mllm.jsonl", "formatting": "sharegpt"} for name in ("mllm_demo", "my_set")}
    files = {
        "scripts/sft.sh": UPSTREAM_SCRIPTS["sft.sh"],
        "examples/qwen2_5vl_lora.yaml": LLAMA_FACTORY_FILES["lora.yaml"],
        "data/dataset_info.json": json.dumps(info),
        "qwenvl/data/__init__.py": REGISTRY,
    }
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    register(mp_doc=[GOOD])
    with guide("moving_over.md") as page:
        *launches, registry, validate = page.take()
        for launch in launches:
            output = run(launch.words)
            assert "vlprep build " in output and "train/main.py " in output
        assert "[mp_doc]" in run(registry.words)
        assert "1 annotation: 1 valid" in run(validate.words)
