"""The tokenizer rebuilt from a tiktoken vocabulary is the tokenizer of Qwen2.5-VL."""

from __future__ import annotations

import base64
import json
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from demo import qwen_tokenizer
from demo.qwen_tokenizer import SPLIT_PATTERN, find_tiktoken_file, last_merge, read_ranks
from schemas.errors import ConfigError
from schemas.qwen import tokenizer_fingerprint

ADDED_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
]


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module")
def auto_tokenizer(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(tiny_checkpoint)
    assert isinstance(loaded, PreTrainedTokenizerBase)
    return loaded


@pytest.fixture(scope="module")
def encode_by_ranks() -> Callable[[str], list[int]]:
    """An independent encoder by tiktoken's rule, which joins the neighbours of lowest rank and needs no merges."""
    ranks = read_ranks(find_tiktoken_file())

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for piece in regex.findall(SPLIT_PATTERN, unicodedata.normalize("NFC", text)):
            data = piece.encode()
            parts = [data[i : i + 1] for i in range(len(data))]
            while len(parts) > 1:
                options = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
                if not options:
                    break
                _, i = min(options)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            ids.extend(ranks[part] for part in parts)
        return ids

    return encode


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("assistant", [77091]),
        ("user", [872]),
        ("system", [8948]),
        ("\n", [198]),
        ("You are a helpful assistant.", [2610, 525, 264, 10950, 17847, 13]),
    ],
)
def test_known_texts_have_the_official_ids(tokenizer: Tokenizer, text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).ids == ids


def test_control_tokens_have_the_official_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(text) for text in ADDED_TOKENS] == list(range(151643, 151665))
    assert tokenizer.get_vocab_size() == 151665
    special = [token.content for _, token in sorted(tokenizer.get_added_tokens_decoder().items()) if token.special]
    assert special == ADDED_TOKENS[:14]


def test_there_is_one_merge_for_every_token_of_two_or_more_bytes(tiny_checkpoint: Path) -> None:
    model = json.loads((tiny_checkpoint / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert len(model["merges"]) == 151387 == len(model["vocab"]) - 256
    assert model["merges"][:3] == [["Ġ", "Ġ"], ["ĠĠ", "ĠĠ"], ["i", "n"]]


TEXTS = [
    "The cat's whiskers weren't 123 cm; they'd GROWN!",
    "你好，世界！图片里有几个红色的圆形？",
    "👍🏽 emoji 👩‍👩‍👧 and flags 🇨🇳",
    "  leading\t\ttabs \r\n\r\n  and trailing   ",
    "naïve café ångström Ω",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_encoding(tokenizer: Tokenizer, auto_tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert auto_tokenizer(text)["input_ids"] == ids
    assert auto_tokenizer.decode(ids) == text


def test_text_is_composed_before_it_is_encoded(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("cafe\u0301").ids == tokenizer.encode("café").ids


@given(st.text(st.sampled_from("abcdefgXYZ's'tll 0123456789.,!?-\n\t 的是了在人图片圆é👍🏽ßñж"), max_size=60))
@settings(max_examples=200, deadline=None)
def test_ids_equal_those_of_an_encoder_without_merges(
    tokenizer: Tokenizer, encode_by_ranks: Callable[[str], list[int]], text: str
) -> None:
    assert tokenizer.encode(text).ids == encode_by_ranks(text)


def test_the_longest_tokens_encode_to_themselves(tokenizer: Tokenizer) -> None:
    """Tokens of many bytes need many merges in the right order."""
    ranks = read_ranks(find_tiktoken_file())
    checked = 0
    for token, rank in sorted(ranks.items(), key=lambda item: -len(item[0]))[:2000]:
        try:
            text = token.decode()
        except UnicodeDecodeError:
            continue
        if unicodedata.is_normalized("NFC", text) and len(regex.findall(SPLIT_PATTERN, text)) == 1:
            assert tokenizer.encode(text).ids == [rank]
            checked += 1
    assert checked > 1000


def test_chat_template_writes_chatml(auto_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a.png"},
                {"type": "text", "text": "Compare\nwith "},
                {"type": "video", "video": "b.mp4"},
                {"type": "text", "text": "."},
            ],
        },
        {"role": "assistant", "content": "They differ."},
        {"role": "user", "content": " How? "},
    ]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Compare\nwith "
        "<|vision_start|><|video_pad|><|vision_end|>.<|im_end|>\n"
        "<|im_start|>assistant\nThey differ.<|im_end|>\n"
        "<|im_start|>user\n How? <|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_system_message_replaces_the_default(auto_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    ids = auto_tokenizer.apply_chat_template(messages, return_dict=False)
    brief = auto_tokenizer("Be brief.")["input_ids"]
    hi = auto_tokenizer("Hi")["input_ids"]
    assert ids == [151644, 8948, 198, *brief, 151645, 198, 151644, 872, 198, *hi, 151645, 198]


def test_images_are_numbered_on_request(auto_tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "video"}]}]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_vision_id=True)
    assert isinstance(text, str)
    assert text.split("user\n")[1] == (
        "Picture 1: <|vision_start|><|image_pad|><|vision_end|>Picture 2: <|vision_start|><|image_pad|><|vision_end|>"
        "Video 1: <|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
    )


def test_padding_and_end_of_text_are_the_official_tokens(auto_tokenizer: PreTrainedTokenizerBase) -> None:
    assert auto_tokenizer.eos_token_id == 151645
    assert auto_tokenizer.pad_token_id == 151643
    assert auto_tokenizer.bos_token is None
    assert auto_tokenizer.model_max_length == 131072


def test_the_contract_accepts_the_tokenizer(tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    assert len(tokenizer_fingerprint(path.read_bytes(), where=str(path))) == 32


def test_last_merge_is_what_lower_ranks_leave() -> None:
    """Worked by hand: "aab" is "a" + "ab", because "ab" has a lower rank than "aa" and is joined first."""
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"ab", b"aa", b"aab"])}
    assert last_merge(b"ab", ranks) == (b"a", b"b")
    assert last_merge(b"aab", ranks) == (b"a", b"ab")


def test_last_merge_names_a_token_that_lower_ranks_cannot_form() -> None:
    ranks = {token: rank for rank, token in enumerate([b"a", b"b", b"abb", b"ab"])}
    with pytest.raises(ValueError, match="b'abb'"):
        last_merge(b"abb", ranks)


def test_a_missing_package_is_named_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qwen_tokenizer, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install --no-deps dashscope"):
        find_tiktoken_file()


def test_the_vocabulary_is_a_file_or_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "qwen.tiktoken"
    with pytest.raises(ConfigError, match=r"no tokenizer vocabulary at .*qwen\.tiktoken"):
        find_tiktoken_file(path)
    path.touch()
    assert find_tiktoken_file(path) == find_tiktoken_file(tmp_path) == path


def _lines(*tokens: bytes) -> list[bytes]:
    return [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (_lines(b"a", b"b"), "2 tokens, the vocabulary of Qwen2.5 has 151643"),
        (_lines(b"a", b"a"), ":2: expected a new token of rank 1"),
        ([b"YQ== 0", b"Yg== 2"], ":2: expected a new token of rank 1, found rank 2"),
        ([b"YQ== 0", b"Yg=="], ":2: not a line of a tiktoken vocabulary"),
        ([b"?? 0"], ":1: not a line of a tiktoken vocabulary"),
        ([b"YQ== x"], ":1: not a line of a tiktoken vocabulary"),
    ],
)
def test_a_damaged_vocabulary_is_refused_with_its_line(tmp_path: Path, lines: list[bytes], message: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ConfigError, match=regex.escape(message)):
        read_ranks(path)
