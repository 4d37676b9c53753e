"""A record of any dialect equals its canonical record, or is rejected with its code; no field is ignored silently."""

from __future__ import annotations

import copy
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.dialects import read_record
from prep.annotations.records import index_file, read_chunk
from prep.annotations.validation import TAG, Checked, check_record, parse_record
from prep.media.item import ItemSettings
from prep.media.paths import resolve_media
from prep.samples.text import Template, build_templates
from prep.samples.tokenizer import TextTokenizer
from schemas.errors import MediaError
from schemas.qwen import DEFAULT_SYSTEM
from schemas.settings import MediaSettings
from tests.prep.dialect_corpus import (
    CASES,
    DEFAULT,
    OPENAI_CALL,
    PNG,
    TOOL,
    Case,
    as_text,
    openai_agent,
    write_media,
)
from tests.prep.packed import Packed, assert_same, packed_samples
from tests.prep.qwen_vl_utils_module import qwen_vl_utils, resized_frames, sampled_video
from tests.prep.test_formats import SETTINGS, build_datasets, table, write_jsonl
from tests.prep.test_golden import original_positions

NUM_FUZZED = 2000

ACCEPTED = [case for case in CASES if case.canonical is not None]
REJECTED = [case for case in CASES if case.canonical is None]
# The canonical spelling cannot express settings, frames and boxes. The tests of media compare the pixels of these.
PLAIN = [case for case in ACCEPTED if not case.settings and not case.frames and not case.packed]

QWEN_TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided \
with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": \
<args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- set tool_call = tool_call.function %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}"""
"""The chat template of Qwen2.5-7B-Instruct (without its generation prompt), with the system message of Qwen2.5-VL."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dialects")
    write_media(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> TextTokenizer:
    return TextTokenizer((tiny_checkpoint / "tokenizer.json").read_bytes())


def case_id(case: Case) -> str:
    return f"{case.dialect}, {case.name}"


def checked(record: dict[str, Any], root: Path) -> Checked:
    return parse_record(as_text(record, root))


def names(items: list[MediaItem]) -> list[str]:
    return [name for item in items for name in (item.frames or (item.name,))]


def contents(items: list[MediaItem], embedded: Any, root: Path) -> list[bytes]:
    """The encoded bytes of all media, independent of their names."""
    paths = [(name, [root / name, *sorted((root / name).glob("*"))]) for name in names(items)]
    return [
        embedded[name] if name in embedded else b"".join(path.read_bytes() for path in files if path.is_file())
        for name, files in paths
    ]


def template_of(annotation: Annotation | None, tokenizer: TextTokenizer) -> Template:
    assert annotation is not None
    return build_templates([annotation], tokenizer)[0]


def chatml(
    record: dict[str, Any], untrained: tuple[int, ...], num_pads: list[int]
) -> tuple[str, list[tuple[int, int]]]:
    """The text that a canonical record stands for, written out, and the ranges of characters that are trained."""
    pads = iter(num_pads)

    def media(value: str) -> str:
        return TAG.sub(lambda tag: f"<|vision_start|>{f'<|{tag[1]}_pad|>' * next(pads)}<|vision_end|>", value)

    if "text" in record:
        text = media(record["text"]) + "<|endoftext|>"
        return text, [(0, len(text))]
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT))
    text, trained, num_answers = "", [], 0
    for role, value in turns:
        text += f"<|im_start|>{ {'human': 'user', 'gpt': 'assistant'}.get(role, role) }\n"
        start = len(text)
        text += f"{media(value) if role == 'human' else value}<|im_end|>\n"
        if role == "gpt":
            if num_answers not in untrained:
                trained.append((start, len(text)))
            num_answers += 1
    return text, trained


def media_of(case: Case, root: Path) -> list[tuple[int, tuple[int, int, int], float]]:
    """Kind, grid, and seconds of a temporal step of the media in sequence order, by ``qwen_vl_utils``."""
    record = case.canonical or {}
    tags = TAG.findall("".join([record.get("text", ""), *(turn["value"] for turn in record.get("conversations", []))]))
    listed = {kind: record.get(f"{kind}s") or record.get(kind) or [] for kind in ("image", "video")}
    names = {kind: [value] if isinstance(value, str) else value for kind, value in listed.items()}
    own = iter(case.settings or [None] * sum(map(len, names.values())))
    items = {
        "image": iter([image_of(root / name, element_of(next(own))) for name in names["image"]]),
        "video": iter([
            video_of(root, name, case.frames[index] if case.frames else frames_in(root / name), element_of(next(own)))
            for index, name in enumerate(names["video"])
        ]),
    }  # fmt: skip
    return [next(items[tag]) for tag in tags]


def element_of(item: ItemSettings | None) -> dict[str, Any]:
    """Settings of a medium as ``qwen_vl_utils`` gets them."""
    return {name: value for name, value in msgspec.to_builtins(item or {}).items() if value is not None}


def frames_in(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in folder.glob("*.png")))


def image_of(path: Path, element: dict[str, Any]) -> tuple[int, tuple[int, int, int], float]:
    bounds = {"min_pixels": MediaSettings().min_pixels, "max_pixels": SETTINGS.media.max_pixels}
    image = qwen_vl_utils().fetch_image({"image": Image.open(path), **bounds, **element})
    return 0, (1, image.height // 14, image.width // 14), 0.0


def video_of(
    root: Path, name: str, frames: tuple[str, ...], element: dict[str, Any]
) -> tuple[int, tuple[int, int, int], float]:
    """Videos of the corpus are 12 frames of 64x48 pixels, two a second; frames have 112x84 pixels."""
    media = SETTINGS.media
    element = {"min_pixels": media.video_min_frame_pixels, "max_pixels": media.video_max_frame_pixels, **element}
    if frames:
        count, rate = len(frames) + len(frames) % 2, element.get("fps", 2.0)
        height, width = resized_frames(element, count, 84, 112)
    elif "fps" in element or "nframes" in element:
        indices, rate, (height, width) = sampled_video({"video": str(root / name), **element})
        count = len(indices)
    else:
        # An interval of 4 s asks for 2 frames of 6 s. At least 4 are taken.
        count, rate = 4, 4 / 6
        height, width = resized_frames(element, count, 48, 64)
    return 1, (count // 2, height // 14, width // 14), 2 / rate


def test_the_corpus_covers_twenty_dialects_each_with_a_record_to_accept_and_one_to_reject() -> None:
    assert len(CASES) >= 120
    assert len({case_id(case) for case in CASES}) == len(CASES)
    dialects = {case.dialect for case in CASES}
    assert len(dialects) >= 20
    assert {case.dialect for case in ACCEPTED} == {case.dialect for case in REJECTED} == dialects


@pytest.mark.parametrize("case", ACCEPTED, ids=case_id)
def test_a_record_has_the_turns_and_media_of_its_canonical_record(case: Case, root: Path) -> None:
    assert case.canonical is not None
    reading = read_record(as_text(case.record, root))
    assert reading.problems.listed() == []
    expected, actual = read_record(as_text(case.canonical, root)).annotation, reading.annotation
    assert expected is not None and actual is not None
    assert [(turn.role, turn.value) for turn in actual.turns] == [(turn.role, turn.value) for turn in expected.turns]
    answers = [index for index, turn in enumerate(actual.turns) if turn.role == "gpt"]
    assert actual.untrained == {answers[index] for index in case.untrained}
    assert reading.unused == case.unused
    media = actual.images + actual.videos
    assert tuple(item.settings for item in media) == (case.settings or (None,) * len(media))
    if case.frames:
        assert tuple(item.frames for item in actual.videos) == case.frames
    else:
        for kind in ("images", "videos"):
            items = getattr(actual, kind)
            assert contents(items, reading.embedded, root) == contents(getattr(expected, kind), {}, root)


@pytest.mark.parametrize("case", REJECTED, ids=case_id)
def test_a_near_miss_is_rejected_with_its_code_and_no_other(case: Case, root: Path) -> None:
    annotation, problems, _, embedded = checked(case.record, root)[:4]
    codes = {problem.code.value for problem in problems}
    if not codes and annotation is not None:
        for name in names(annotation.images + annotation.videos):
            if name not in embedded:
                with pytest.raises(MediaError) as raised:
                    resolve_media(root, name, max_bytes=1 << 30)
                codes.add(raised.value.code.value)
    assert codes == set(case.code.split())


@pytest.fixture(scope="module")
def packed(root: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Packed]]:
    """The samples of all accepted records by :func:`case_id`, as the shards of one build hold them."""
    folder = tmp_path_factory.mktemp("packed")
    records = [{"id": case_id(case), **case.record} for case in ACCEPTED]
    (folder / "all.jsonl").write_bytes(b"".join(as_text(record, root) + b"\n" for record in records))
    (folder / "datasets.toml").write_text(table("all", [folder / "all.jsonl"], root))
    build_datasets("all", folder / "datasets.toml", tiny_checkpoint, folder / "out")
    return packed_samples(folder / "out")


@pytest.mark.parametrize("case", ACCEPTED, ids=case_id)
def test_ids_labels_positions_and_grids_are_those_of_independent_code(
    case: Case, root: Path, packed: dict[str, list[Packed]], reference: PreTrainedTokenizerBase
) -> None:
    """Written out by hand, tokenized by transformers, measured by ``qwen_vl_utils``, placed token by token."""
    media = media_of(case, root)
    grids = [grid for _, grid, _ in media]
    text, ranges = chatml(case.packed or case.canonical or {}, case.untrained, [t * h * w // 4 for t, h, w in grids])
    encoding = reference(text, add_special_tokens=False, return_offsets_mapping=True)
    (sample,) = packed[case_id(case)]
    assert sample.input_ids.tolist() == encoding["input_ids"]
    vision = reference.convert_tokens_to_ids(["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"])
    labels = [
        token if any(start < last and first < end for first, last in ranges) and token not in vision else -100
        for token, (start, end) in zip(encoding["input_ids"], encoding["offset_mapping"])
    ]
    assert sample.labels.tolist() == [-100, *labels[1:]]
    assert [(kind, grid) for kind, grid, _ in sample.media] == [(kind, grid) for kind, grid, _ in media]
    positions = original_positions(encoding["input_ids"], grids, [seconds for _, _, seconds in media])
    assert np.array_equal(sample.position_ids, positions)


def test_a_tool_call_is_the_token_of_its_own(
    root: Path, tokenizer: TextTokenizer, reference: PreTrainedTokenizerBase
) -> None:
    ids = template_of(checked(openai_agent("rain"), root).annotation, tokenizer).ids.tolist()
    # The instructions in the system message contain the two tags as well.
    assert ids.count(reference.convert_tokens_to_ids("<tool_call>")) == 3
    assert ids.count(reference.convert_tokens_to_ids("</tool_call>")) == 3


@pytest.mark.parametrize("results", [["rain"], ["rain", "sun"]])
@pytest.mark.parametrize("content", ["", "I look."])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_tools_are_laid_out_as_by_the_chat_template_of_qwen(
    results: list[str],
    content: str,
    system: str | None,
    root: Path,
    tokenizer: TextTokenizer,
    reference: PreTrainedTokenizerBase,
) -> None:
    record = openai_agent(*results)
    calls = [OPENAI_CALL, {"function": {"name": "sun", "arguments": {"at": [1, 2.5, None, "é<"]}}}]
    record["messages"][1].update(tool_calls=calls, content=content)
    if system is not None:
        record["messages"].insert(0, {"role": "system", "content": system})
    messages = copy.deepcopy(record["messages"])
    for message in messages:
        for call in message.get("tool_calls", []):
            arguments = call["function"]["arguments"]
            call["function"]["arguments"] = json.loads(arguments) if isinstance(arguments, str) else arguments
    expected = reference.apply_chat_template(
        messages, tools=[TOOL], chat_template=QWEN_TEMPLATE, tokenize=True, return_dict=False
    )
    assert DEFAULT == DEFAULT_SYSTEM
    assert template_of(checked(record, root).annotation, tokenizer).ids.tolist() == expected


def test_a_build_packs_what_the_canonical_records_give(
    root: Path, packed: dict[str, list[Packed]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """Ids, labels, positions, grids and pixels."""
    file = write_jsonl(tmp_path / "a.jsonl", [{"id": case_id(case), **(case.canonical or {})} for case in PLAIN])
    (tmp_path / "datasets.toml").write_text(table("canonical", [file], root))
    build_datasets("canonical", tmp_path / "datasets.toml", tiny_checkpoint, tmp_path / "out")
    canonical = packed_samples(tmp_path / "out")
    for case in PLAIN:
        (ours,), (expected,) = packed[case_id(case)], canonical[case_id(case)]
        if not case.untrained:
            assert_same(ours, expected)
        else:
            assert ours.input_ids.tolist() == expected.input_ids.tolist()
            assert (ours.labels != expected.labels).any()


def test_a_table_may_hold_the_images_of_its_parts_and_lists_of_frames(root: Path, tmp_path: Path) -> None:
    part = [{"type": "image", "image": {"bytes": PNG, "path": None}, "text": None}, {"type": "text", "text": "What?"}]
    turns = [{"role": "user", "content": part}, {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    (chunk,) = index_file(tmp_path / "a.parquet", tmp_path).chunks
    (record,) = read_chunk(tmp_path / "a.parquet", chunk)
    checked_record = check_record(record, "reject")
    assert checked_record.annotation is not None and checked_record.problems == []
    assert contents(checked_record.annotation.images, checked_record.embedded, root) == [PNG]


def mutated(value: Any, rng: random.Random, others: list[Any]) -> Any:
    """A JSON value with one random change somewhere inside it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        change = rng.random()
        if change < 0.15:
            return {name: item for name, item in value.items() if name != key}
        if change < 0.3:
            other = rng.choice(others)
            extra = rng.choice(list(other)) if isinstance(other, dict) and other else "loss"
            return {**value, extra: other[extra] if isinstance(other, dict) and extra in other else 0}
        return {**value, key: mutated(value[key], rng, others)}
    if isinstance(value, list) and value and rng.random() < 0.9:
        index = rng.randrange(len(value))
        change = rng.random()
        if change < 0.15:
            return value[:index] + value[index + 1 :]
        if change < 0.3:
            return [*value[:index], value[index], *value[index:]]
        return [*value[:index], mutated(value[index], rng, others), *value[index + 1 :]]
    if isinstance(value, str) and rng.random() < 0.5:
        cut = rng.randrange(len(value) + 1)
        piece = rng.choice(["<image>", "<video>", "<bbox>", "<|im_end|>", "{", '"', "\n", "", "[" * 5000, "\\ud800"])
        return value[:cut] + piece + value[cut:]
    return rng.choice(
        [
            None,
            True,
            0,
            -1,
            1.5,
            1e300,
            10**30,
            "",
            "x",
            "data:",
            "file://",
            [],
            {},
            [[]],
            [None],
            {"bytes": "!"},
            value,
        ]
    )


def test_no_mutated_record_of_any_dialect_breaks_the_reader(root: Path) -> None:
    """Every record is read without an exception, and a valid record has as many tags as media."""
    rng = random.Random(17)
    bases = [json.loads(as_text(case.record, root)) for case in CASES]
    outcomes: Counter[str] = Counter()
    for index in range(NUM_FUZZED):
        record = bases[index % len(bases)]
        for _ in range(rng.choice([1, 1, 2, 4])):
            record = mutated(record, rng, bases)
        annotation, problems, unused = checked(record, root)[:3] if isinstance(record, dict) else (None, [0], ())
        outcomes["rejected" if problems else "valid"] += 1
        assert all(isinstance(name, str) for name in unused)
        if not problems:
            assert annotation is not None
            tags = Counter(TAG.findall("".join(turn.value for turn in annotation.turns if turn.role != "gpt")))
            assert (tags["image"], tags["video"]) == (len(annotation.images), len(annotation.videos)), record
            assert all(isinstance(item.name, str) for item in annotation.images + annotation.videos)
    assert min(outcomes.values()) >= NUM_FUZZED // 10, outcomes


@pytest.mark.parametrize("extra", [{}, {"width": 640}], ids=["as it is", "with a field without effect"])
def test_the_fast_ways_of_reading_agree_with_the_slow_one(root: Path, extra: dict[str, Any]) -> None:
    """An empty system message has no meaning, but such a record is read field by field."""
    for case in CASES:
        record = {**case.record, **extra}
        fast, slow = checked(record, root), checked({"system": "", **record}, root)
        assert fast.problems == slow.problems, case_id(case)
        assert fast.unused == slow.unused
        assert fast.embedded == slow.embedded
        ours, theirs = fast.annotation, slow.annotation
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert [(t.role, t.value) for t in ours.turns] == [(t.role, t.value) for t in theirs.turns]
            assert (ours.images, ours.videos, ours.untrained) == (theirs.images, theirs.videos, theirs.untrained)


def test_placeholders_are_filled_in_time_that_grows_with_the_text() -> None:
    """Half a million names take about a second; copying the rest of the text for each would take minutes."""
    count = 500_000
    record = {"text": "<ref-object>" * count, "objects": {"ref": ["a"] * count}}
    start = time.monotonic()
    annotation = parse_record(json.dumps(record).encode()).annotation
    assert annotation is not None and annotation.turns[0].value == "a" * count
    assert time.monotonic() - start < 30
