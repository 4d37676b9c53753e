"""Records as the JSON Schema for editors describes them: what all dialects share, and the two spellings of turns.

The structs say which fields there are and of which types. They are lenient: further fields are allowed, as dialects
have them, and what depends on several fields is checked by ``vlprep validate``. Nothing is decoded into them.
"""

from __future__ import annotations

from typing import Any

import msgspec


class MediaObject(msgspec.Struct, kw_only=True):
    """A medium as an object: a path, a URL, or the file itself in base64."""

    path: str | None = None
    url: str | None = None
    bytes: str | None = None


Medium = str | MediaObject
"""A path below the media root, a URL, a data URI, or an object."""

Video = Medium | list[Medium]
"""A video, or the images that are its frames."""


class ContentPart(msgspec.Struct, kw_only=True):
    """One piece of a message: text, or a medium with its settings. Their meaning is that of ``qwen_vl_utils``."""

    type: str | None = None
    text: str | None = None
    image: Medium | None = None
    image_url: Medium | None = None
    video: Video | None = None
    video_url: Medium | None = None
    path: str | None = None
    url: str | None = None
    bytes: str | None = None
    index: int | None = None
    min_pixels: int | float | None = None
    max_pixels: int | float | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: int | float | None = None
    sample_fps: int | float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | float | None = None
    video_start: int | float | None = None
    video_end: int | float | None = None


Content = str | list[str | ContentPart] | None


class LossFlags(msgspec.Struct, kw_only=True):
    """Flags that leave a turn of the model untrained, if they are false or 0."""

    loss: bool | int | float | None = None
    train: bool | int | float | None = None
    weight: bool | int | float | None = None


class ConversationTurn(LossFlags, kw_only=True, rename={"role": "from"}):
    """A turn: who speaks (``from``) and what is said (``value``)."""

    role: str
    value: Content


class Message(LossFlags, kw_only=True):
    """A turn in the other spelling: ``role`` and ``content``, with the tools that the model calls."""

    role: str
    content: Content = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class Objects(msgspec.Struct, kw_only=True):
    """ms-swift's boxes and names of objects, which replace ``<bbox>`` and ``<ref-object>`` in the turns."""

    ref: list[str] = []
    bbox: list[list[int | float]] = []
    bbox_type: str | None = None
    image_id: list[int] = []


class SharedFields(msgspec.Struct, kw_only=True):
    """Fields of a record of any dialect."""

    id: str | int | None = None
    image: Medium | list[Medium] | None = None
    images: list[Medium] | None = None
    video: Medium | list[Video] | None = None
    videos: list[Video] | None = None
    fps: int | float | list[int | float] | None = None
    system: str | None = None
    tools: str | dict[str, Any] | list[Any] | None = None
    functions: str | dict[str, Any] | list[Any] | None = None
    objects: Objects | None = None


class Record(SharedFields, kw_only=True):
    """A record: turns, and the media of their ``<image>`` and ``<video>`` tags in order.

    The turns are ``conversations`` (LLaVA, ShareGPT) or ``messages`` (OpenAI, qwen-vl-utils, ms-swift). Other dialects
    have other fields for them, which docs/annotations.md lists and ``vlprep validate`` checks.
    """

    conversations: list[ConversationTurn] | None = None
    messages: list[Message] | None = None
