"""Tests of what ``docs/annotations.md`` says about records: examples, layouts and tables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prep.annotations.annotation import ItemSettings
from prep.annotations.dialects import read_record
from prep.annotations.fields import UNSUPPORTED_FIELDS, UNSUPPORTED_PART_FIELDS, UNSUPPORTED_TURN_FIELDS
from prep.annotations.unused import describe_unused
from prep.annotations.validation import parse_record
from prep.samples.text import build_templates
from prep.samples.tokenizer import TextTokenizer
from schemas.annotation import ReasonCode
from schemas.json_schema import FOLDER
from schemas.qwen import DEFAULT_SYSTEM
from tests.guides import DOCS, blocks
from tests.prep.dialect_corpus import CASES, llava

PAGE = (DOCS / "annotations.md").read_text(encoding="utf-8")
EXAMPLES: list[dict[str, Any]] = [
    json.loads(text) for text in re.findall(r"^```json\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
]
TOOLS = re.findall(r"^```text\n<\|im_start\|>system\n(.*?)<\|im_end\|>\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SHAREGPT_TOOLS = TOOLS[0][0].removeprefix(DEFAULT_SYSTEM)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
RESULT = "<tool_response>\nrain{}\n</tool_response>"
RAIN = "Does it rain in Rome?"

CANONICAL: list[tuple[dict[str, Any], tuple[int, ...]]] = [
    (
        llava(
            "Is <image> the same car as <image>?",
            "Yes.",
            "Which colour?",
            "Red.",
            system="Answer briefly.",
            images=["a.jpg", "b.jpg"],
            id="car-7",
        ),
        (),
    ),
    (llava("<image>\nWhat is it?", "A car.", image="a.jpg"), ()),
    (llava(RAIN, CALL, RESULT.format(""), "Yes.", system="Answer briefly." + SHAREGPT_TOOLS), ()),
    (llava("<image>What is it?", "A car.", image="a.jpg"), ()),
    (llava(RAIN, CALL, RESULT.format("<image>"), "Yes.", system=DEFAULT_SYSTEM + SHAREGPT_TOOLS, image="a.jpg"), ()),
    (llava("<video><image>Is it in the video?", "Yes.", image="a.jpg", video="v.mp4"), ()),
    (llava("Hi", "Hello", "<image>What is it?", "A car.", image="a.jpg"), ()),
    (llava("<image>Find the car.", "[10, 20, 110, 90]", image="a.jpg"), ()),
    (llava("What is it? <image>\nAnswer in French.", "Une voiture.", image="a.jpg"), ()),
    (llava("<image>\nWhat is it?", "A car.", "Sure?", "Yes.", image="a.jpg"), ()),
    (llava("<image>What is it?", "A car.", image="a.jpg"), ()),
    ({"text": "A car <image> and a house <image>.", "images": ["a.jpg", "b.jpg"]}, ()),
    (llava("<video>What moves?", "The car.", video="a.jpg … (4 frames)"), ()),
    (llava("Hi", "Hello", "What is it?", "A car."), (0,)),
]
"""What each example of the page means, in its order, and which answers have no loss."""


@pytest.mark.parametrize(("example", "meaning"), list(zip(EXAMPLES, CANONICAL, strict=True)))
def test_every_example_is_read_as_the_page_says(
    example: dict[str, Any], meaning: tuple[dict[str, Any], tuple[int, ...]]
) -> None:
    canonical, untrained = meaning
    reading = read_record(json.dumps(example).encode())
    expected = read_record(json.dumps(canonical).encode()).annotation
    actual = reading.annotation
    assert reading.problems.listed() == [] and reading.unused == ()
    assert actual is not None and expected is not None and actual.id == expected.id
    assert [(turn.role, turn.value) for turn in actual.turns] == [(turn.role, turn.value) for turn in expected.turns]
    assert [item.name for item in actual.images] == [item.name for item in expected.images]
    assert [item.name for item in actual.videos] == [item.name for item in expected.videos]
    answers = [index for index, turn in enumerate(actual.turns) if turn.role == "gpt"]
    assert actual.untrained == {answers[index] for index in untrained}


def test_settings_and_frames_of_the_examples_are_those_of_the_page() -> None:
    by_video = [
        (item.frames, item.settings)
        for example in EXAMPLES
        for item in getattr(read_record(json.dumps(example).encode()).annotation, "videos", [])
    ]
    assert by_video == [
        ((), ItemSettings(fps=2.0, max_pixels=151200)),
        (("a.jpg", "b.jpg", "a.jpg", "b.jpg"), ItemSettings(fps=2.0)),
    ]


def test_tools_are_laid_out_as_the_page_shows(tiny_checkpoint: Path) -> None:
    reference: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer = TextTokenizer((tiny_checkpoint / "tokenizer.json").read_bytes())
    (example,) = [example for example in EXAMPLES if isinstance(example.get("tools"), list)]
    annotation = parse_record(json.dumps(example).encode()).annotation
    assert annotation is not None
    (template,) = build_templates([annotation], tokenizer)
    text = f"<|im_start|>system\n{TOOLS[0][0]}<|im_end|>\n{TOOLS[0][1]}".replace("…", "")
    assert template.ids.tolist() == reference(text, add_special_tokens=False)["input_ids"]


def test_a_record_becomes_the_text_that_the_page_shows(tiny_checkpoint: Path) -> None:
    tokenizer = TextTokenizer((tiny_checkpoint / "tokenizer.json").read_bytes())
    reference: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_checkpoint)
    (text,) = blocks("annotations.md", "From record to tokens", "text")
    annotation = parse_record(json.dumps(llava("<image>\nWhat is this?", "A car.", image="a.jpg")).encode()).annotation
    assert annotation is not None
    (template,) = build_templates([annotation], tokenizer)
    assert template.ids.tolist() == reference(text.replace("…", ""), add_special_tokens=False)["input_ids"]
    assert reference.decode(template.ids[template.trained]) == "A car.<|im_end|>\n"


def test_unused_fields_are_listed_as_the_page_shows() -> None:
    (line,) = blocks("annotations.md", "Fields", "text")
    assert line == f"fields not used: {describe_unused({'img': 3, 'width': 1204})}\n"


def rows(heading: str) -> dict[str, str]:
    """The table below a heading of two columns: its first column in backticks."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(.*?)` \| (.*?) \|$", table, re.MULTILINE))


def test_the_tables_of_refused_fields_are_those_of_the_code() -> None:
    for heading, fields in (
        ("field of a record", UNSUPPORTED_FIELDS),
        ("field of a turn", UNSUPPORTED_TURN_FIELDS),
        ("field of a part", UNSUPPORTED_PART_FIELDS),
    ):
        assert rows(f"{heading} | where it has a meaning") == fields


def test_every_reason_code_has_a_row() -> None:
    assert list(rows("code | meaning")) == [code.value for code in ReasonCode]


def test_the_schema_for_editors_accepts_every_accepted_record() -> None:
    schema = json.loads((FOLDER / "annotation.schema.json").read_bytes())
    validator = jsonschema.Draft202012Validator(schema)
    records = [case.record for case in CASES if case.canonical is not None] + EXAMPLES
    assert [record for record in records if not validator.is_valid(record)] == []
