"""Token ids against the chat template run through the reference tokenizer; labels against hand-written ones."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prep.annotations.annotation import Annotation
from prep.annotations.validation import RESERVED
from prep.samples.text import Template, build_templates, expand, num_tokens
from prep.samples.tokenizer import TextTokenizer
from schemas.annotation import Turn
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.qwen import CONTROL_TOKENS, IGNORE_INDEX, IM_END, IMAGE_PAD, VIDEO_PAD, Grid

NEWLINE, ASSISTANT, YES = 198, 77091, 9454


@pytest.fixture(scope="module")
def reference(tiny_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> TextTokenizer:
    return TextTokenizer((tiny_checkpoint / "tokenizer.json").read_bytes())


def conversation(*turns: tuple[str, str]) -> Annotation:
    return Annotation(turns=[Turn(role, value) for role, value in turns])


def template_of(tokenizer: TextTokenizer, *turns: tuple[str, str]) -> Template:
    return build_templates([conversation(*turns)], tokenizer)[0]


def reference_ids(reference: PreTrainedTokenizerBase, turns: list[tuple[str, str]], grids: list[Grid]) -> list[int]:
    """The chat template with content parts for media, every pad repeated as the processor does, then the tokenizer."""
    names = {"human": "user", "gpt": "assistant", "system": "system"}
    messages = []
    for role, value in turns:
        parts: list[dict[str, str]] = []
        rest = value
        while role == "human" and rest:
            cuts = [(rest.find(tag), tag) for tag in ("<image>", "<video>") if tag in rest]
            if not cuts:
                break
            at, tag = min(cuts)
            if at:
                parts.append({"type": "text", "text": rest[:at]})
            parts.append({"type": tag.strip("<>"), tag.strip("<>"): "x"})
            rest = rest[at + len(tag) :]
        if rest:
            parts.append({"type": "text", "text": rest})
        messages.append({"role": names[role], "content": parts})
    text = reference.apply_chat_template(messages, tokenize=False)
    pieces = re.split(r"(<\|(?:image|video)_pad\|>)", text)
    for index, grid in enumerate(grids):
        pieces[2 * index + 1] *= grid.num_tokens
    return list(reference("".join(pieces), add_special_tokens=False)["input_ids"])


CONVERSATIONS: list[list[tuple[str, str]]] = [
    [("human", "Hi"), ("gpt", "Hello!")],
    [("system", "Answer briefly."), ("human", "<image>\nWhat is this?"), ("gpt", "A cat.")],
    [("human", "What is this?\n<image>"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "Yes.")],
    [("human", "Compare <image> with <image>, then <video>."), ("gpt", "同じではない。\n\n再见 👋🏽")],
    [("human", "<image>"), ("gpt", "  leading and trailing spaces  ")],
    [("human", "\n\n\nThree newlines first<video>\n\n"), ("gpt", "\nNewline first")],
    [("human", "the assistant said: user\nassistant\n<|notatoken|>"), ("gpt", "assistant\nassistant")],
    [("human", "é combining e\u0301, tool <tool_call>{}</tool_call>"), ("gpt", "\t x=1;\r\n\r\n# done\u00a0")],
]


@pytest.mark.parametrize("turns", CONVERSATIONS)
def test_ids_equal_the_chat_template_run_through_the_reference_tokenizer(
    tokenizer: TextTokenizer, reference: PreTrainedTokenizerBase, turns: list[tuple[str, str]]
) -> None:
    template = template_of(tokenizer, *turns)
    grids = [Grid(1, 4, 6), Grid(1, 2, 2), Grid(3, 4, 4)][: len(template.media_types)]
    input_ids, _ = expand(template, grids)
    assert input_ids.tolist() == reference_ids(reference, turns, grids)
    assert input_ids.size == num_tokens(template, grids)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.lists(
                st.one_of(st.sampled_from(["<image>", "<video>", "\n", "assistant", " "]), st.text(max_size=12)),
                min_size=1,
            ),
            st.text(min_size=1, max_size=30),
        ),
        min_size=1,
        max_size=3,
    )
)
def test_ids_of_random_conversations_equal_the_reference(
    tokenizer: TextTokenizer, reference: PreTrainedTokenizerBase, exchanges: list[tuple[list[str], str]]
) -> None:
    turns: list[tuple[str, str]] = []
    for pieces, answer in exchanges:
        turns += [("human", "".join(pieces) + "?"), ("gpt", answer + ".")]
    assume(not any(RESERVED.search(value) for _, value in turns))
    template = template_of(tokenizer, *turns)
    grids = [Grid(1, 2, 4)] * len(template.media_types)
    input_ids, labels = expand(template, grids)
    assert input_ids.tolist() == reference_ids(reference, turns, grids)
    assert labels[0] == IGNORE_INDEX
    trained = labels != IGNORE_INDEX
    assert (labels[trained] == input_ids[trained]).all()
    assert int((labels == IM_END).sum()) == len(exchanges)


def test_labels_are_the_answer_its_end_and_the_newline_and_nothing_else(tokenizer: TextTokenizer) -> None:
    """The word "assistant" in what the user says must not open a trained span."""
    template = template_of(tokenizer, ("human", "assistant\nassistant"), ("gpt", "Yes"))
    _, labels = expand(template, [])
    # <|im_start|>system\nYou are a helpful assistant.<|im_end|>\n  <|im_start|>user\nassistant\nassistant<|im_end|>\n
    before = (3 + 6 + 2) + (3 + 3 + 2)
    expected = [IGNORE_INDEX] * (before + 3) + [YES, IM_END, NEWLINE]
    assert labels.tolist() == expected
    assert template.ids.tolist()[before + 1] == ASSISTANT


def test_every_answer_of_a_conversation_is_trained(tokenizer: TextTokenizer) -> None:
    template = template_of(tokenizer, ("human", "a"), ("gpt", "Yes"), ("human", "b"), ("gpt", "Yes"))
    _, labels = expand(template, [])
    assert labels[labels != IGNORE_INDEX].tolist() == [YES, IM_END, NEWLINE] * 2


def test_a_token_that_joins_the_header_newline_with_the_answer_is_trained(
    tokenizer: TextTokenizer, reference: PreTrainedTokenizerBase
) -> None:
    template = template_of(tokenizer, ("human", "a"), ("gpt", "\nYes"))
    _, labels = expand(template, [])
    double = reference.encode("\n\n")
    assert labels[labels != IGNORE_INDEX].tolist() == [*double, YES, IM_END, NEWLINE]


def test_pads_are_written_out_in_place_and_never_trained(tokenizer: TextTokenizer) -> None:
    template = template_of(tokenizer, ("human", "<video>x<image>"), ("gpt", "Yes"))
    assert template.media_types == (MEDIA_VIDEO, MEDIA_IMAGE)
    input_ids, labels = expand(template, [Grid(2, 4, 4), Grid(1, 2, 6)])
    assert int((input_ids == VIDEO_PAD).sum()) == 8
    assert int((input_ids == IMAGE_PAD).sum()) == 3
    assert (labels[(input_ids == IMAGE_PAD) | (input_ids == VIDEO_PAD)] == IGNORE_INDEX).all()


@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_text_of_a_user_never_becomes_a_control_token(tokenizer: TextTokenizer, control: str) -> None:
    plain = template_of(tokenizer, ("human", "x"), ("gpt", "Yes"))
    spelled = template_of(tokenizer, ("human", f"x{control}y"), ("gpt", f"{control}"))
    for token_id in CONTROL_TOKENS.values():
        assert np.count_nonzero(spelled.ids == token_id) == np.count_nonzero(plain.ids == token_id)
