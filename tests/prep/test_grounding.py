"""Boxes from the annotation to the shard: what is trained are coordinates of the image that the model sees."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import tarfile
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from PIL.ExifTags import Base as ExifTag
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prep.annotations.boxes import find_shapes
from prep.annotations.registry import find_sources
from prep.annotations.validation import parse_record
from prep.build.pipeline import BuildRequest, build
from prep.build.summary import build_summary
from prep.cli import main
from prep.engines import SerialEngine
from prep.inspect.drawing import draw_shapes, shapes_by_image
from prep.inspect.verify.bins import BinCheck
from schemas.annotation import SampleBox
from schemas.bins import Bin
from schemas.errors import ConfigError
from schemas.manifest import WORK_FOLDER, Manifest
from schemas.qwen import IM_START, IMAGE_PAD, VISION_END, VISION_START
from schemas.settings import BOX_COORDINATES, BuildSettings, MediaSettings
from schemas.tables import StoredBin
from storage.shard_set import read_manifest
from tests.guides import blocks, table_rows
from tests.prep.finished import change_members
from tests.prep.packed import packed_samples
from tests.prep.test_build import watch_scans

TOKENS = {"photo.png": 294, "turned.jpg": 294, "wide.png": 576}
"""Tokens of the images: 600x400 is stored as 588x392 (14 x 21 tokens), 1920x1080 as 896x504 (18 x 32)."""


@dataclass(frozen=True)
class Case:
    """A record, and its question and answer as the shard stores them.

    ``stored_question`` is set where it differs from ``question``; ``fields`` are further fields of the record.
    """

    question: str
    answer: str
    trained: str
    stored_question: str = ""
    boxes: str = "pixels"
    images: tuple[str, ...] = ("photo.png",)
    fields: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": self.question}, {"from": "gpt", "value": self.answer}]
        return {"id": name, "images": list(self.images), "conversations": turns, **self.fields}

    def chatml(self) -> str:
        """The text of the shard, written out by hand."""
        names = iter(self.images)
        question = re.sub(
            "<image>",
            lambda _: f"<|vision_start|>{'<|image_pad|>' * TOKENS[next(names)]}<|vision_end|>",
            self.stored_question or self.question,
        )
        return (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{self.trained}<|im_end|>\n"
        )


BOX = '{"bbox_2d": [100, 200, 300, 400]}'
PHOTO_BOX = '{"bbox_2d": [98, 196, 294, 392]}'

CASES = {
    # 588 / 600 = 392 / 400 = 0.98
    "photo": Case("<image>Where?", BOX, PHOTO_BOX),
    # Stored on its side, displayed 600 wide and 400 high.
    "turned": Case("<image>Where?", BOX, PHOTO_BOX, images=("turned.jpg",)),
    # 896 / 1920 = 504 / 1080 = 7 / 15
    "wide": Case(
        "<image>Where?",
        '```json\n[\n\t{"bbox_2d": [150, 300, 960, 1080], "label": "é"}\n]\n```',
        '```json\n[\n\t{"bbox_2d": [70, 140, 448, 504], "label": "é"}\n]\n```',
        images=("wide.png",),
    ),
    "question": Case(
        '<image>What is at {"point_2d": [50, 100]}? Answer as {"bbox_2d": [x1, y1, x2, y2]}.',
        "A cat.",
        "A cat.",
        stored_question='<image>What is at {"point_2d": [49, 98]}? Answer as {"bbox_2d": [x1, y1, x2, y2]}.',
    ),
    "several images": Case(
        "<image> and <image>: where?",
        '[{"bbox_2d": [150, 300, 960, 1080], "image_id": 1}, {"image_index": 0, "bbox_2d": [0, 0, 600, 400]}]',
        '[{"bbox_2d": [70, 140, 448, 504], "image_id": 1}, {"image_index": 0, "bbox_2d": [0, 0, 588, 392]}]',
        images=("photo.png", "wide.png"),
    ),
    "shares": Case(
        "<image>Where?", '{"bbox_2d": [0.25, 0.5, 1, 1.0]}', '{"bbox_2d": [147, 196, 588, 392]}', boxes="norm1"
    ),
    "thousandths": Case(
        "<image>Where?", '{"bbox_2d": [250, 500, 1000, 1000]}', '{"bbox_2d": [147, 196, 588, 392]}', boxes="norm1000"
    ),
    "right already": Case("<image>Where?", BOX.replace("400", "391.5"), BOX.replace("400", "391.5"), boxes="resized"),
    "only text": Case("<image>Where?", BOX.replace("400", "4000"), BOX.replace("400", "4000"), boxes="off"),
    "page": Case(
        "<image>",
        '<body><p data-bbox="100 200 300 400">x</p><i data-polygon="0 0 600 0 600 400"/></body>',
        '<body><p data-bbox="98 196 294 392">x</p><i data-polygon="0 0 588 0 588 392"/></body>',
    ),
    "tokens": Case(
        "<image>Where is <|object_ref_start|>the cat<|object_ref_end|>?",
        "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(100,200),(300,400)<|box_end|>.",
        "<|object_ref_start|>the cat<|object_ref_end|><|box_start|>(98,196),(294,392)<|box_end|>.",
    ),
    "objects": Case(
        "<image>Where is <ref-object>?",
        "<ref-object> is at <bbox>, and the dog at <bbox>.",
        "the cat is at [98, 196, 294, 392], and the dog at [0, 49].",
        stored_question="<image>Where is the cat?",
        fields={"objects": {"ref": ["the cat", "the cat"], "bbox": [[100, 200, 300, 400], [0, 50]]}},
    ),
    # The record takes precedence: it has relative coordinates in a dataset with pixel coordinates.
    "objects in shares": Case(
        "<image> and <image>?",
        '{"bbox_2d": <bbox>}',
        '{"bbox_2d": [224, 0, 896, 504]}',
        images=("photo.png", "wide.png"),
        fields={"objects": {"bbox": [[0.25, 0, 1, 1]], "bbox_type": "norm1", "image_id": [1]}},
    ),
    # Nothing in the text says that these lists are boxes, or of which image. [1, 2] is not one.
    "objects of several images": Case(
        "<image> and <image>: where, as [x, y] like [1, 2]?",
        "<bbox> and <bbox>",
        "[70, 140, 448, 504] and [49, 98]",
        images=("photo.png", "wide.png"),
        fields={"objects": {"bbox": [[150, 300, 960, 1080], [50, 100]], "image_id": [1, 0]}},
    ),
    "objects by default": Case(
        "<image>?",
        "<bbox>",
        "[147, 196, 588, 392]",
        boxes="norm1000",
        fields={"objects": {"bbox": [[250, 500, 1000, 1000]]}},
    ),
}


def write_images(folder: Path) -> None:
    Image.new("RGB", (600, 400), "white").save(folder / "photo.png")
    Image.new("RGB", (1920, 1080), "white").save(folder / "wide.png")
    exif = Image.Exif()
    exif[ExifTag.Orientation] = 6
    Image.new("RGB", (400, 600), "white").save(folder / "turned.jpg", exif=exif)


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def answered(answer: str, image: str = "photo.png", question: str = "<image>Where?") -> dict[str, Any]:
    return Case(question, answer, "", images=(image,)).record(answer)


def build_registered(folder: Path, expression: str, model: Path, out: str = "out", **settings: Any) -> Manifest:
    build_settings = BuildSettings(**settings)
    sources = find_sources(expression, registry=folder / "datasets.toml", media_root=None, media=build_settings.media)
    request = BuildRequest(
        sources=tuple(sources), out=folder / out, settings=build_settings, model=str(model), max_rejected=Fraction(1)
    )
    return build(request, SerialEngine())


def vlprep(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_checkpoint)
    return loaded


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A set of all cases; each kind of coordinates is a dataset, declared in its table of the registry."""
    folder = tmp_path_factory.mktemp("grounding")
    write_images(folder)
    tables = []
    for boxes in ("pixels", "norm1", "norm1000", "resized", "off"):
        write_records(
            folder / f"{boxes}.jsonl", [case.record(name) for name, case in CASES.items() if case.boxes == boxes]
        )
        tables.append(f'[{boxes}]\nannotation_path = "{boxes}.jsonl"\nmedia_root = "."\nboxes = "{boxes}"\n')
    (folder / "datasets.toml").write_text("\n".join(tables))
    build_registered(folder, "pixels,norm1,norm1000,resized,off", tiny_checkpoint)
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ids_are_those_of_the_text_with_coordinates_of_the_resized_image(
    built: Path, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    expected = CASES[name].chatml()
    (sample,) = packed_samples(built / "out")[name]
    assert tokenizer.decode(sample.input_ids) == expected
    assert sample.input_ids.tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    answer = tokenizer(CASES[name].trained + "<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert sample.labels[sample.labels != -100].tolist() == answer


def test_the_manifest_records_the_coordinates_and_counts_the_boxes(built: Path) -> None:
    manifest = read_manifest(built / "out")
    assert {dataset.dataset: dataset.media.boxes for dataset in manifest.inputs} == {
        name: name for name in ("pixels", "norm1", "norm1000", "resized", "off")
    }
    # photo, turned, wide and tokens have one, question and objects in shares one, the others two.
    counts = {"pixels": 4 + 2 + 4 * 2, "norm1": 1, "norm1000": 2, "resized": 1, "off": 0}
    assert {dataset.dataset: dataset.num_boxes for dataset in manifest.statistics} == counts
    assert b"num_boxes" not in msgspec.json.encode(manifest.statistics[-1])
    summary = build_summary(manifest, built / "out", model="m", verbose=True)
    assert (
        "10 with images; 14 boxes and points; tokens" in summary and "1 with images; 1 box or point; tokens" in summary
    )


def stored_references(folder: Path) -> dict[str, str]:
    """The entries of ``samples.json`` by id, as they are written."""
    entries: dict[str, str] = {}
    for shard in sorted(folder.glob("bins-*.tar")):
        with tarfile.open(shard) as tar:
            for name in tar.getnames():
                if name.endswith(".samples.json"):
                    text = tar.extractfile(name).read().decode()  # type: ignore[union-attr]
                    pieces = text[1:-1].replace('},{"dataset"', '}\n{"dataset"').split("\n")
                    entries |= {json.loads(piece)["id"]: piece for piece in pieces}
    return entries


def test_samples_json_has_the_boxes_that_the_text_does_not_show_and_no_others(built: Path) -> None:
    """Every other entry has the bytes that it had before there were such boxes."""
    beside = {
        "objects": '[{"image":0,"numbers":[98,196,294,392]},{"image":0,"numbers":[0,49]}]',
        "objects in shares": '[{"image":1,"numbers":[224,0,896,504]}]',
        "objects of several images": '[{"image":1,"numbers":[70,140,448,504]},{"image":0,"numbers":[49,98]}]',
        "objects by default": '[{"image":0,"numbers":[147,196,588,392]}]',
    }
    records = {
        name: (boxes, index)
        for boxes in BOX_COORDINATES
        for index, name in enumerate(name for name, case in CASES.items() if case.boxes == boxes)
    }
    assert stored_references(built / "out") == {
        name: f'{{"dataset":"{dataset}","record":{record},"id":"{name}"'
        + (f',"boxes":{beside[name]}}}' if name in beside else "}")
        for name, (dataset, record) in records.items()
    }


@pytest.mark.parametrize(
    "box",
    [
        {"image": 2, "numbers": [1, 2]},
        {"image": 0, "numbers": [1, 2, 3]},
        {"image": 0, "numbers": [590, 2]},
        {"image": 1, "numbers": [5, 5, 4, 6]},
    ],
)
def test_verify_finds_a_box_beside_the_text_that_cannot_be_right(box: dict[str, Any]) -> None:
    ids = np.asarray([IM_START, *[VISION_START, IMAGE_PAD, VISION_END] * 2], dtype=np.int32)
    good = [{"image": 1, "numbers": [0, 0, 28, 29]}, {"image": 0, "numbers": [588.5, 27.5]}]
    found = []
    for boxes in (good, [*good, box]):
        sample = {"dataset": "d", "record": 0, "id": None, "boxes": boxes}
        bin_ = Bin(
            index=0,
            input_ids=ids,
            labels=ids,
            position_ids=np.zeros((3, ids.size), dtype=np.int32),
            cu_seqlens=np.asarray([0, ids.size], dtype=np.int32),
            grid_thw=np.asarray([[1, 2, 42], [1, 2, 2]], dtype=np.int32),
            media_type=np.zeros(2, dtype=np.uint8),
            pixels=np.zeros(0, dtype=np.uint8),
            codec="raw",
            samples_json=json.dumps([sample], separators=(",", ":")).encode(),
        )
        row = msgspec.convert(dict.fromkeys(StoredBin.__struct_fields__, 1), StoredBin)
        check = BinCheck(bin_, row, None, BuildSettings())
        found.append([finding.text for finding in check.findings() if "samples.json" in finding.text])
    assert found[0] == [] and len(found[1]) == 1
    assert f"in image {box['image']} of sample 0, which has 2 images" in found[1][0]


def test_verify_accepts_tokens_of_boxes_and_text_without_a_template(built: Path, tiny_checkpoint: Path) -> None:
    write_records(built / "text.jsonl", [{"image": "photo.png", "text": "<image>At <|box_start|>(1,2)<|box_end|>."}])
    registry = (built / "datasets.toml").read_text()
    (built / "datasets.toml").write_text(registry + '\n[text]\nannotation_path = "text.jsonl"\nboxes = "pixels"\n')
    build_registered(built, "pixels,text", tiny_checkpoint, "with-text")
    result = vlprep("verify", built / "with-text", "--workers", 1)
    assert result.exit_code == 0, result.output


def test_show_draws_boxes_and_points_onto_copies_of_the_stored_images(
    built: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    write_images(tmp_path)
    names = ["several images", "question", "page", "objects by default", "objects of several images", "only text"]
    cases = {name: CASES[name] for name in names}
    # The record says what its boxes are, whatever the dataset says.
    own = {"objects": {"bbox": [[0.25, 0.5, 1, 1]], "bbox_type": "norm1"}}
    cases["objects where boxes are off"] = Case("<image>?", '{"bbox_2d": <bbox>}', "", boxes="off", fields=own)
    for name, case in cases.items():
        boxes = case.boxes
        write_records(tmp_path / "a.jsonl", [case.record(name)])
        (tmp_path / "datasets.toml").write_text(
            f'[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\nboxes = "{boxes}"\n'
        )
        build_registered(tmp_path, "a", tiny_checkpoint, name)
        shown = vlprep(
            "show", tmp_path / name, "--bin", 0, "--model", tiny_checkpoint, "--save", tmp_path / name / "png"
        )
        assert shown.exit_code == 0, shown.output

    def lines(name: str, image: int) -> set[tuple[int, int]]:
        """The points of a white image that are drawn on."""
        stem = f"bin-00000000-sample-000-image-{image:03d}"
        assert (np.asarray(Image.open(tmp_path / name / "png" / f"{stem}.png")) == 255).all()
        drawn = np.asarray(Image.open(tmp_path / name / "png" / f"{stem}-boxes.png"))
        return {(x, y) for y, x in np.argwhere((drawn != 255).any(axis=2)).tolist()}

    # The box of the second image is the wide one's: 70, 140 to 448, 504. The first image is framed.
    first, second = lines("several images", 0), lines("several images", 1)
    assert (300, 0) in first and (0, 200) in first and (300, 200) not in first
    assert {(70, 140), (70, 300), (300, 140), (448, 300)} <= second and (200, 300) not in second
    # A disc around 49, 98.
    assert (49, 98) in lines("question", 0) and all(abs(x - 49) + abs(y - 98) < 12 for x, y in lines("question", 0))
    assert {(98, 196), (98, 300), (200, 196), (294, 300), (588 // 2, 0)} <= lines("page", 0)
    for name in ("objects by default", "objects where boxes are off"):
        assert {(147, 196), (147, 300), (300, 196), (300, 391)} <= lines(name, 0)
    first, second = lines("objects of several images", 0), lines("objects of several images", 1)
    assert (49, 98) in first and all(abs(x - 49) + abs(y - 98) < 12 for x, y in first)
    assert {(70, 140), (70, 300), (300, 140), (448, 300)} <= second and (1, 2) not in second and (49, 98) not in second
    assert not list((tmp_path / "only text" / "png").glob("*-boxes.png"))


def thumbnails(page: str) -> list[tuple[tuple[int, int], bool]]:
    """Size of each image of a report, and whether it has lines in colour."""
    images = [
        Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        for data in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)
    ]
    return [(image.size, bool((np.ptp(np.asarray(image).astype(int), axis=2) > 60).any())) for image in images]


@pytest.mark.parametrize(
    "change",
    [{"image": -1}, {"numbers": [1]}, {"numbers": [1, 2, 3, 4, 5]}, {"numbers": [-2, 0]}, {"numbers": [1e300, 0]}],
)
def test_boxes_that_no_build_writes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"image": 0, "numbers": [1, 2], **change}, SampleBox)


def test_shapes_that_no_build_writes_are_cut_at_the_image_or_left_out() -> None:
    image = Image.new("RGB", (56, 28), "white")
    far = find_shapes('{"bbox_2d": [900000000000, 20, 10, -700000000000]} {"point_2d": [-1e11, 1e11]}').shapes
    drawn = np.asarray(draw_shapes(image, far))
    assert drawn.shape == (28, 56, 3) and (drawn[15, 10] != 255).any() and (drawn[24, 30] == 255).all()
    assert shapes_by_image((), [0], [SampleBox(0, [1, 2, 3]), SampleBox(1, [1, 2])]) == {}


def test_show_of_a_bin_without_readable_references_is_an_error(
    built: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(built / "out", tmp_path / "out", ignore=shutil.ignore_patterns(WORK_FOLDER))
    change_members(tmp_path / "out", 0, lambda members: {**members, "samples.json": b'[{"dataset": 1}]'})
    shown = vlprep("show", tmp_path / "out", "--bin", 0, "--model", tiny_checkpoint)
    assert shown.exit_code == 1 and "samples.json cannot be read" in shown.stderr


def test_the_report_draws_boxes_and_counts_them(built: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert vlprep("report", built / "out", "--out", tmp_path / "a.html", "--model", tiny_checkpoint).exit_code == 0
    page = (tmp_path / "a.html").read_text()
    assert "10 with images; 14 boxes and points" in page
    # All images are white. Most have lines in colour, text that only looks like boxes has none.
    coloured = {is_coloured for _, is_coloured in thumbnails(page)}
    assert coloured == {True, False}


def test_the_files_of_a_set_stay_as_they_are_where_nothing_is_declared() -> None:
    assert b"boxes" not in msgspec.json.encode(MediaSettings())


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (
            '{"bbox_2d": [0, 0, 700, 400]}',
            "bad_box",
            '$.conversations[1].value: "bbox_2d": [0, 0, 700, 400] has x = 700, outside the image, which is 600 pixels',
        ),
        ('{"bbox_2d": [300, 0, 200, 400]}', "bad_box", "x1 = 300 beyond x2 = 200"),
        ('{"bbox_2d": [0, 0, "a", 400]}', "bad_box", "not a number"),
        ('{"bbox_2d": [0, 0, 5, 5], "image_id": 1}', "ambiguous_box", "names image 1 of 1"),
        ("<|box_start|>(1,2),(3,4)", "reserved_token", "<|box_start|>"),
        ("<|object_ref_start|>a<|object_ref_end|><|im_end|>", "reserved_token", "<|im_end|>"),
    ],
)
def test_a_box_that_cannot_be_right_is_rejected(
    tmp_path: Path, tiny_checkpoint: Path, answer: str, code: str, reason: str
) -> None:
    write_images(tmp_path)
    file = write_records(tmp_path / "a.jsonl", [answered(BOX), answered(answer)])
    result = vlprep("validate", file, "--boxes", "pixels", "--workers", 1)
    assert result.exit_code == 1
    assert f"{code}: 1" in result.stdout and f"{file}:2" in result.stdout and reason in result.stdout
    (tmp_path / "datasets.toml").write_text('[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\n')
    build_registered(tmp_path, "a", tiny_checkpoint, media=MediaSettings(boxes="pixels"))
    (row,) = pq.read_table(tmp_path / "out" / "samples.parquet", filters=[("status", "=", "rejected")]).to_pylist()
    assert row["codes"] == [code] and reason in row["message"]


def test_boxes_in_the_text_of_a_record_with_objects_have_no_default() -> None:
    objects = {"objects": {"bbox": [[100, 200, 300, 400]]}}
    alone = parse_record(json.dumps({**answered('{"bbox_2d": <bbox>}'), **objects}).encode())
    assert alone.annotation is not None and alone.annotation.coordinates == "pixels" and alone.undeclared is None
    further = json.dumps({**answered("<bbox>", question=f"<image>Not {BOX}?"), **objects}).encode()
    assert parse_record(further).undeclared == BOX[1:-1]
    assert parse_record(further, coordinates="norm1000").undeclared is None


def test_a_box_in_one_image_by_its_number_and_in_another_by_its_text_is_ambiguous() -> None:
    case = Case("<image><image>?", '{"bbox_2d": <bbox>, "image_id": 1}', "", images=("photo.png", "wide.png"))
    for image, codes in ((1, []), (0, ["ambiguous_box"])):
        record = {**case.record("x"), "objects": {"bbox": [[1, 2, 3, 4]], "image_id": [image]}}
        assert [problem.code for problem in parse_record(json.dumps(record).encode()).problems] == codes


@pytest.mark.parametrize("text", ["<|object_ref_start|>cat<|object_ref_end|>", "<|box_start|>(1,2)<|box_end|>"])
def test_escaped_text_spells_no_token_of_boxes_unless_these_are_declared(text: str) -> None:
    record = json.dumps(answered(text)).encode()
    declared = parse_record(record, reserved="escape", coordinates="pixels")
    assert declared.annotation is not None and declared.annotation.grounding and not declared.problems
    off = parse_record(record, reserved="escape", coordinates="off")
    assert off.annotation is not None and not off.annotation.grounding and not off.problems
    assert parse_record(record, reserved="escape").undeclared == text
    broken = parse_record(json.dumps(answered("<|box_start|>cat")).encode(), reserved="escape", coordinates="pixels")
    assert broken.annotation is not None and not broken.annotation.grounding


def test_a_box_of_several_images_that_names_none_is_ambiguous(tmp_path: Path) -> None:
    write_images(tmp_path)
    record = Case("<image><image>", BOX, "", images=("photo.png", "wide.png")).record("two")
    text = Case("Hi", BOX, "", images=()).record("none")
    file = write_records(tmp_path / "a.jsonl", [record, text])
    result = vlprep("validate", file, "--boxes", "pixels", "--workers", 1)
    assert "belongs to none of 2 images; name its image in the same object" in result.stdout
    assert "the record has no image" in result.stdout
    assert vlprep("validate", file, "--boxes", "off", "--workers", 1).exit_code == 0


def test_undeclared_boxes_stop_the_build_with_the_choices(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_images(tmp_path)
    plain = answered("A cat.")
    write_records(tmp_path / "a.jsonl", [plain, answered(BOX), answered(BOX, "wide.png")])
    write_records(tmp_path / "b.jsonl", [plain, answered("<|object_ref_start|>cat<|object_ref_end|>")])
    write_records(tmp_path / "c.jsonl", [plain])
    tables = [f'[{name}]\nannotation_path = "{name}.jsonl"\nmedia_root = "."\n' for name in "abc"]
    (tmp_path / "datasets.toml").write_text("\n".join(tables))
    with pytest.raises(ConfigError) as error:
        build_registered(tmp_path, "a,b,c", tiny_checkpoint)
    assert error.value.exit_code == 2
    assert str(error.value) == (
        "2 records have boxes or points in dataset a, and nothing says what their coordinates are; the first is "
        'a.jsonl:2: "bbox_2d": [100, 200, 300, 400]\n'
        "1 record has boxes or points in dataset b, and nothing says what their coordinates are; the first is "
        "b.jsonl:2: <|object_ref_start|>cat<|object_ref_end|>\n"
        'Declare them with --boxes, or as boxes = "…" in the table of the dataset in datasets.toml:\n'
        "  pixels    pixels of the original image, as displayed\n"
        "  norm1     shares of the image, 0 to 1\n"
        "  norm1000  shares of the image, 0 to 1000\n"
        "  resized   pixels of the resized image, as the model was trained: left alone\n"
        "  off       no coordinates: text that only looks like boxes"
    )
    assert not (tmp_path / "out" / "manifest.json").exists() and not list((tmp_path / "out").glob("*.tar"))
    assert build_registered(tmp_path, "c", tiny_checkpoint, "plain").counts.num_packed == 1


def test_validate_reports_undeclared_boxes_with_exit_code_2(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = write_records(tmp_path / "a.jsonl", [answered("A cat."), answered(BOX), answered(BOX, "none.png")])
    result = vlprep("validate", file, "--workers", 1)
    assert result.exit_code == 2
    assert "3 annotations: 2 valid, 1 rejected" in result.stdout
    assert f"2 records have boxes or points in {file}" in result.stdout
    assert f'the first is {file}:2: "bbox_2d": [100, 200, 300, 400]' in result.stdout
    assert "norm1000" in result.stdout


def test_shrunk_media_have_boxes_of_their_final_size(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """600x400 in a bin of 128 tokens: the text has the size that is stored, and its length is that of the bin."""
    write_images(tmp_path)
    answer = json.dumps([{"point_2d": [600, 400]}, {"bbox_2d": [150, 100, 300, 200]}])
    objects = {**answered("<bbox>" + " a" * 20), "id": "objects", "objects": {"bbox": [[150, 100, 300, 200]]}}
    write_records(tmp_path / "a.jsonl", [answered(answer), answered("A cat. " * 20), objects])
    (tmp_path / "datasets.toml").write_text('[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\nboxes = "pixels"\n')
    manifest = build_registered(tmp_path, "a", tiny_checkpoint, max_length=128, overlong="shrink")
    assert manifest.counts.num_packed == 3
    (plain,) = packed_samples(tmp_path / "out")["objects"]
    assert plain.media[0][2].shape[2] < 392
    ((_, numbers),) = [box.values() for box in json.loads(stored_references(tmp_path / "out")["objects"])["boxes"]]
    assert tokenizer.decode(plain.input_ids[plain.labels != -100]).startswith(f"{numbers} a")
    (sample,) = packed_samples(tmp_path / "out")[answer]
    ((_, (_, h, w), frames),) = sample.media
    height, width = frames.shape[2:]
    assert (height, width) == (14 * h, 14 * w) and height < 392
    point, box = json.loads(tokenizer.decode(sample.input_ids[sample.labels != -100]).removesuffix("<|im_end|>\n"))
    assert point["point_2d"] == [width, height]
    assert box["bbox_2d"] == [round(width / 4), round(height / 4), round(width / 2), round(height / 2)]
    row = next(r for r in pq.read_table(tmp_path / "out" / "samples.parquet").to_pylist() if r["id"] == answer)
    assert row["num_tokens"] == len(sample.input_ids) <= 128


def test_media_that_shrink_leave_text_without_boxes_as_it_is(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_images(tmp_path)
    write_records(tmp_path / "a.jsonl", [answered("At [600, 400].")])
    (tmp_path / "datasets.toml").write_text('[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\nboxes = "pixels"\n')
    build_registered(tmp_path, "a", tiny_checkpoint, max_length=128, overlong="shrink")
    (sample,) = packed_samples(tmp_path / "out")["At [600, 400]."]
    text = tokenizer.decode(sample.input_ids[sample.labels != -100])
    assert text == "At [600, 400].<|im_end|>\n"


def test_an_image_with_a_size_of_its_own_has_boxes_of_that_size(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_images(tmp_path)
    image = {"type": "image", "image": "photo.png", "resized_width": 308, "resized_height": 196}
    messages = [
        {"role": "user", "content": [image, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": BOX},
    ]
    write_records(tmp_path / "a.jsonl", [{"id": "own", "messages": messages}])
    (tmp_path / "datasets.toml").write_text('[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\nboxes = "pixels"\n')
    build_registered(tmp_path, "a", tiny_checkpoint)
    (sample,) = packed_samples(tmp_path / "out")["own"]
    assert sample.media[0][2].shape == (1, 3, 196, 308)
    # 100 and 300 times 308 / 600 = 51.33 and 154; 200 and 400 times 196 / 400.
    expected = '{"bbox_2d": [51, 98, 154, 196]}<|im_end|>\n'
    assert tokenizer.decode(sample.input_ids[sample.labels != -100]) == expected


def test_other_coordinates_scan_only_the_files_with_boxes(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path)
    write_records(tmp_path / "boxes.jsonl", [answered(BOX)])
    write_records(tmp_path / "text.jsonl", [Case("Hi", BOX, "", images=()).record("text"), answered("A cat.")])
    write_records(tmp_path / "none.jsonl", [answered("A cat.")])
    (tmp_path / "datasets.toml").write_text('[all]\nannotation_path = "*.jsonl"\nmedia_root = "."\n')
    scanned = watch_scans(monkeypatch)

    def scanned_by(boxes: str, **settings: Any) -> list[str]:
        scanned.clear()
        build_registered(tmp_path, "all", tiny_checkpoint, media=MediaSettings(boxes=boxes), **settings)
        return sorted(file.stem for file in scanned)

    assert scanned_by("pixels") == ["boxes", "none", "text"]
    assert scanned_by("norm1000") == ["boxes", "text"]
    assert scanned_by("pixels") == []
    assert scanned_by("off") == ["boxes", "text"]
    (sample,) = packed_samples(tmp_path / "out")["text"]
    assert BOX in tokenizer.decode(sample.input_ids)


def test_a_box_of_a_record_is_a_box_in_every_copy(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_images(tmp_path)
    write_records(tmp_path / "a.jsonl", [answered(BOX)])
    (tmp_path / "datasets.toml").write_text('[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\nboxes = "pixels"\n')
    build_registered(tmp_path, "a%300", tiny_checkpoint)
    first, *others = packed_samples(tmp_path / "out")[BOX]
    assert len(others) == 2 and all(np.array_equal(first.input_ids, other.input_ids) for other in others)


def test_coordinates_are_declared_in_the_table_the_media_table_or_the_command(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", [])
    registry = tmp_path / "datasets.toml"

    def declared(table: str, boxes: Any = msgspec.UNSET) -> Any:
        registry.write_text(f'[a]\nannotation_path = "a.jsonl"\nmedia_root = "."\n{table}\n')
        (source,) = find_sources("a", registry=registry, media_root=None, media=MediaSettings(boxes=boxes))
        return source.media.boxes

    assert declared("") is msgspec.UNSET
    assert declared("", "norm1") == "norm1"
    assert declared('boxes = "pixels"', "norm1") == "pixels"
    assert declared('[a.media]\nboxes = "off"', "norm1") == "off"
    allowed = re.escape("boxes is cm; allowed: pixels, norm1, norm1000, resized, off")
    with pytest.raises(ConfigError, match=f"datasets.toml:4: .*{allowed}"):
        declared('boxes = "cm"')
    with pytest.raises(ConfigError, match=f"datasets.toml:5: .*{allowed}"):
        declared('[a.media]\nboxes = "cm"')
    with pytest.raises(ConfigError, match=r"datasets.toml:4: .*give it once"):
        declared('boxes = "off"\nmedia.boxes = "off"')


PAIRS = [block.splitlines() for block in blocks("grounding.md", "Before and after", "text")]
(SEVERAL,) = blocks("grounding.md", "Several images", "text")
ERRORS = [(row[0].strip("`"), row[1].strip("`")) for row in table_rows("grounding.md", "Errors")]


def test_the_guide_lists_the_coordinates() -> None:
    rows = table_rows("grounding.md", "Declare the coordinates")
    assert tuple(row[0].strip("`") for row in rows) == BOX_COORDINATES


def test_every_example_of_the_guide_is_trained_as_it_says(
    tmp_path: Path, tiny_checkpoint: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    write_images(tmp_path)
    (registry,) = blocks("grounding.md", "Declare the coordinates", "toml")
    (swift,) = blocks("grounding.md", "Records of ms-swift", "json")
    (swift_answer,) = blocks("grounding.md", "Records of ms-swift", "text")
    records = [answered(before) for before, _ in PAIRS]
    before, after = SEVERAL.splitlines()
    records.append(Case("<image><image>", before, "", images=("wide.png", "photo.png")).record(before))
    records.append({"id": "swift", **json.loads(swift)})
    write_records(tmp_path / "cells.jsonl", records)
    (tmp_path / "datasets.toml").write_text(registry)
    manifest = build_registered(tmp_path, "cells", tiny_checkpoint)
    assert manifest.counts.num_packed == len(records) and manifest.inputs[0].media.boxes == "pixels"
    samples = packed_samples(tmp_path / "out")
    for name, trained in [*PAIRS, (before, after), ("swift", swift_answer.rstrip("\n"))]:
        (sample,) = samples[name]
        assert tokenizer.decode(sample.input_ids[sample.labels != -100]) == trained + "<|im_end|>\n"


def test_every_error_of_the_guide_is_one(tmp_path: Path) -> None:
    write_images(tmp_path)
    file = write_records(tmp_path / "a.jsonl", [answered(answer) for answer, _ in ERRORS])
    rejects = tmp_path / "rejects.jsonl"
    assert vlprep("validate", file, "--boxes", "pixels", "--workers", 1, "--rejects", rejects).exit_code == 1
    lines = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [[problem["code"] for problem in line["problems"]] for line in lines] == [[code] for _, code in ERRORS]
