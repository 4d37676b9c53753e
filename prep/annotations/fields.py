"""Unsupported fields that change the meaning of a record in another tool.

Every field of a record is used, rejected as ``unsupported_field`` if it is listed here, or counted by its name. A field
that is null, or an empty list, text or object, counts as absent.
"""

from __future__ import annotations

from collections.abc import Mapping

UNSUPPORTED_FIELDS = {
    "rejected_response": "ms-swift, for preference training",
    "rejected_messages": "ms-swift, for preference training",
    "rejected_images": "ms-swift, for preference training",
    "positive_messages": "ms-swift, for embedding models",
    "negative_messages": "ms-swift, for embedding models",
    "chosen": "TRL and LLaMA-Factory, for preference training",
    "rejected": "TRL and LLaMA-Factory, for preference training",
    "kto_tag": "LLaMA-Factory, for KTO",
    "label": "TRL and ms-swift, for KTO if it is true or false",
    "margin": "ms-swift, for reward models",
    "loss_scale": "ms-swift, a weight of the loss",
    "teacher_prompt": "ms-swift, for distillation",
    "teacher_images": "ms-swift, for distillation",
    "audio": "ms-swift, LLaMA-Factory and qwen_vl_utils; Qwen2.5-VL has no audio",
    "audios": "ms-swift and LLaMA-Factory; Qwen2.5-VL has no audio",
}
"""Fields of a record, each with the tool that uses it."""

_MEDIA_OF_TURN = "media belong to the whole record, or to a part of the turn's content; move them there"

UNSUPPORTED_TURN_FIELDS = {
    "loss_scale": "ms-swift, a weight of the loss",
    "train_detail": "Axolotl, parts of a turn with a loss",
    "audio": "OpenAI and qwen_vl_utils; Qwen2.5-VL has no audio",
    "audios": "ms-swift; Qwen2.5-VL has no audio",
    "refusal": "OpenAI, an answer of another kind",
    "reasoning_content": "DeepSeek, for reasoning models; write it into the answer",
    "thinking": "TRL, for reasoning models; write it into the answer",
    "tools": "tools belong to the whole record; move them there",
    **dict.fromkeys(("image", "images", "video", "videos"), _MEDIA_OF_TURN),
    "chosen": "TRL and LLaMA-Factory, for preference training",
    "rejected": "TRL and LLaMA-Factory, for preference training",
}
"""Fields of a turn, or of an exchange of question and answer."""

UNSUPPORTED_PART_FIELDS = {
    "audio": "qwen_vl_utils; Qwen2.5-VL has no audio",
    "audio_url": "OpenAI; Qwen2.5-VL has no audio",
    "input_audio": "OpenAI; Qwen2.5-VL has no audio",
}
"""Fields of a part of a turn's content."""


def says_something(value: object) -> bool:
    """Whether a field holds anything but null, or an empty list, text or object."""
    return value is not None and value != [] and value != "" and value != {}


def unsupported(name: str, value: object, table: Mapping[str, str], where: str) -> str | None:
    """A message about an unsupported field that holds something; None for any other field."""
    if name not in table or not says_something(value) or (name == "label" and not isinstance(value, bool)):
        return None
    return f"{where}.{name} is not supported ({table[name]}); remove it, or train on such records with another tool"
