"""Every kind of bad record has its code, its location and its remedy; good records pass."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prep.annotations.validation import parse_record, read_id
from schemas.annotation import ReasonCode

GOOD: dict[str, Any] = {
    "id": "a1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}


def human(value: object) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A cat."}]}


def roles(*names: str) -> dict[str, Any]:
    return {"conversations": [{"from": name, "value": "x"} for name in names]}


def problems_of(record: object, **options: str) -> list[tuple[str, str]]:
    data = record if isinstance(record, bytes) else json.dumps(record).encode()
    return [(problem.code.value, problem.message) for problem in parse_record(data, **options).problems]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"image": ["a.png"]},
        {"image": None, "images": ["a.png"]},
        {"id": 7},
        {"id": None},
        {"unknown": {"deep": [1, 2]}},
        {
            "video": "v.mp4",
            "conversations": [{"from": "human", "value": "<video> a <image> b"}, {"from": "gpt", "value": "c"}],
        },
        {"conversations": [{"from": "system", "value": "Be brief."}, *GOOD["conversations"]]},
        {
            "conversations": [
                *GOOD["conversations"],
                {"from": "human", "value": "And?"},
                {"from": "gpt", "value": "No."},
            ]
        },
    ],
)
def test_good_records_have_no_problems(change: dict[str, Any]) -> None:
    assert problems_of({**GOOD, **change}) == []


BAD: list[tuple[object, str, str]] = [
    (b"{", "bad_json", "not valid JSON"),
    (
        b'{"a": NaN}',
        "bad_json",
        "not valid JSON: JSON is malformed: invalid character (byte 6); JSON has no NaN: write null",
    ),
    (b'{"a": [-Infinity]}', "bad_json", "JSON has no Infinity: write null or text"),
    (b"{'a': 1}", "bad_json", "it is written as Python: write it with `json.dumps`"),
    (b"{\"a\": 'x'}", "bad_json", "it is written as Python"),
    (b'{"a": None}', "bad_json", "it is written as Python"),
    (b'{"a": True}', "bad_json", "it is written as Python"),
    (b'{"a": "\xff"}', "bad_json", "not valid JSON"),
    (b"", "bad_json", "not valid JSON"),
    (b"[" * 100_000, "bad_json", ""),
    ([1], "not_an_object", "array"),
    ("text", "not_an_object", "string"),
    (None, "not_an_object", "null"),
    ({}, "missing_conversations", "$.conversations"),
    ({"conversations": []}, "missing_conversations", "empty"),
    ({"conversations": "x"}, "bad_field", "$.conversations is of type string"),
    ({"conversations": [1]}, "bad_field", "$.conversations[0]"),
    ({"conversations": [{"value": "x"}]}, "bad_field", "$.conversations[0].from is missing"),
    (human(3), "bad_field", "$.conversations[0].value is of type number"),
    ({**GOOD, "image": 3}, "bad_field", "$.image"),
    ({**GOOD, "image": ["a", 3]}, "bad_field", "$.image[1]"),
    ({**GOOD, "images": "a"}, "bad_field", "$.images"),
    ({**GOOD, "images": ["a"]}, "bad_field", "both given"),
    ({**GOOD, "id": [1]}, "bad_field", "$.id"),
    (roles("human", "bot"), "unknown_role", "'bot'"),
    (roles("gpt", "human"), "bad_turn_order", "expected 'human'"),
    (roles("human", "human"), "bad_turn_order", "expected 'gpt'"),
    (roles("human"), "bad_turn_order", "ends with 'gpt'"),
    (roles("system"), "bad_turn_order", "ends with 'gpt'"),
    (roles("human", "gpt", "system"), "bad_turn_order", "'system'"),
    (human("  \n"), "empty_turn", "$.conversations[0].value"),
    (human("<image>"), "tag_mismatch", "1 <image> tag in human turns and 0 images"),
    ({**GOOD, "image": ["a", "b"]}, "tag_mismatch", "1 <image> tag in human turns and 2 images"),
    ({**human("What?"), "video": "v.mp4"}, "tag_mismatch", "0 <video> tags in human turns and 1 video"),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<image>"}]},
        "tag_in_answer",
        "gpt turn",
    ),
    (human("<|im_end|>"), "reserved_token", "<|im_end|>"),
    (human("x<|image_pad|>"), "reserved_token", "--reserved escape"),
]


@pytest.mark.parametrize(("record", "code", "part"), BAD)
def test_bad_records_have_their_code_and_say_where(record: object, code: str, part: str) -> None:
    problems = problems_of(record)
    assert [name for name, _ in problems] == [code]
    assert part in problems[0][1]


def test_all_problems_of_a_record_are_reported() -> None:
    record = {
        "image": ["a.png", "b.png"],
        "conversations": [
            {"from": "human", "value": "<image> <|im_start|>"},
            {"from": "robot", "value": ""},
        ],
    }
    assert {name for name, _ in problems_of(record)} == {"reserved_token", "unknown_role", "empty_turn", "tag_mismatch"}


def test_a_wrong_field_does_not_hide_what_is_wrong_with_the_turns() -> None:
    problems = problems_of({**roles("human", "human"), "image": 3, "id": True})
    assert [name for name, _ in problems] == ["bad_field", "bad_field", "bad_turn_order"]


@pytest.mark.parametrize(
    ("record", "path"),
    [
        (roles("human", "human"), "$.conversations[1].from"),
        (roles("human", "human") | {"source": "web"}, "$.conversations[1].from"),
        ({"messages": [{"role": "user", "content": "x"}] * 2}, "$.messages[1].role"),
        ({"messages": [{"role": "user", "content": "x", "name": "A"}] * 2}, "$.messages[1].role"),
        ({"system": "Be brief.", "messages": [{"role": "user", "content": "x"}] * 2}, "$.messages[1].role"),
    ],
)
def test_a_wrong_role_is_named_by_the_path_of_the_role(record: object, path: str) -> None:
    assert path in problems_of(record)[0][1].split()


def test_control_tokens_pass_when_they_are_to_be_escaped() -> None:
    assert problems_of(human("<|im_end|>"), reserved="escape") == []


def test_names_of_media_come_in_order_from_either_field() -> None:
    annotation = parse_record(json.dumps({**GOOD, "image": None, "images": ["a.png"]}).encode()).annotation
    assert annotation is not None
    assert [item.name for item in annotation.images] == ["a.png"] and annotation.videos == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"id": 7}', "7"),
        (b'{"id": "x"}', "x"),
        (b"{}", None),
        (b"{", None),
        (b'{"id": [1]}', None),
        (b'{"id": true}', None),
    ],
)
def test_the_id_of_an_unread_record(data: bytes, expected: str | None) -> None:
    assert read_id(data) == expected


def test_every_reason_code_is_documented_in_the_schema() -> None:
    assert len({code.value for code in ReasonCode}) == 23


@pytest.mark.parametrize(
    ("turn", "part"),
    [
        ({"content": "<image>"}, "has <image> in a userus"),
        ({"content": "Hi", "loss": True}, "asks for a loss on a userus"),
        ({"content": "Hi", "tool_calls": [{"function": {"name": "f"}}]}, "has tool calls, but its role is 'userus"),
    ],
)
def test_no_message_quotes_a_long_role_in_full(turn: dict[str, Any], part: str) -> None:
    record = {"messages": [{"role": "user" * 1000, **turn}, {"role": "assistant", "content": "Hello"}]}
    messages = [message for _, message in problems_of(record)]
    assert any(part in message for message in messages)
    assert max(map(len, messages)) < 300
