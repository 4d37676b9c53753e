"""The media that a record names: in its fields, or in the parts of its turns.

A medium is a path or URL, a data URI, ``{"path": …}``, ``{"bytes": …}`` (base64, as JSON has no bytes) or
``{"url": …}``; a video can be a list of the images that are its frames. Bytes are taken out of the record and get a
name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any

from prep.annotations.annotation import ItemSettings, MediaItem
from schemas.annotation import Turn

_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}

_INTEGERS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "nframes", "min_frames", "max_frames")
_VIDEO_ONLY = ("fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end")
_PART_KINDS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}


class FieldError(ValueError):
    """A field of the wrong type or form; the message says what is expected."""


def type_name(value: object) -> str:
    """The name that JSON has for the type of a value."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)


class MediaReader:
    """Collects the media of one record.

    Attributes:
        items: images and videos in the order of their tags, by kind.
        embedded: bytes that came inside the record, by the name that the items give them.
        unreadable: kinds of which some names could not be read.
    """

    FIELDS = ("image", "images", "video", "videos")
    PART_FIELDS = frozenset(
        {"type", "path", "bytes", "url", "sample_fps", "index", *_PART_KINDS, *ItemSettings.__struct_fields__}
    )

    def __init__(self, record: Mapping[str, Any], embedded: Mapping[str, bytes], fail: Callable[[str], None]) -> None:
        self.embedded = dict(embedded)
        self.unreadable: set[str] = set()
        self.items: dict[str, list[MediaItem]] = {"image": [], "video": []}
        self._from_parts: dict[str, list[MediaItem]] = {"image": [], "video": []}
        self._record = record
        self._fail = fail

    @staticmethod
    def kind_of(part: Mapping[str, Any]) -> str | None:
        """``image`` or ``video`` of a part of a turn's content; None for one that is no medium."""
        kind = part.get("type")
        if kind is not None:
            return _PART_KINDS.get(kind) if isinstance(kind, str) else None
        return next((_PART_KINDS[key] for key in _PART_KINDS if part.get(key) is not None), None)

    def add_part(self, kind: str, part: Mapping[str, Any], where: str) -> None:
        """Take the medium of a part of a turn's content, if the part names it."""
        keys = [key for key in (*_PART_KINDS, "path", "bytes", "url") if part.get(key) is not None]
        key = next((key for key in keys if _PART_KINDS.get(key, kind) == kind), None)
        if key is None:
            if any(part.get(name) is not None for name in ItemSettings.__struct_fields__):
                self._fail(f"{where} has settings, and the medium that they are for stands elsewhere; name it here")
            return
        try:
            value = {key: part[key]} if key in ("path", "bytes", "url") else part[key]
            self._from_parts[kind].append(self._item(kind, value, f"{where}.{key}", _settings(kind, part, where)))
        except FieldError as error:
            self._fail(str(error))
            self.unreadable.add(kind)

    def finish(self, turns: list[Turn], inserts_tags: str | None) -> None:
        """Read the record's own fields, and join them with what the parts named.

        Args:
            turns: of the record; tags are inserted before the first human text where the dialect has none.
            inserts_tags: what stands between an inserted tag and the text; None where the dialect inserts none.
        """
        for kind, named in self._from_parts.items():
            field, items = self._field(kind)
            if field is not None and named:
                self._fail(f"the turns name {kind}s and $.{field} does too; name each once")
                self.unreadable.add(kind)
            self.items[kind] = items or named
            first = next((index for index, turn in enumerate(turns) if turn.role == "human"), None)
            if inserts_tags is None or kind != "image" or first is None:
                continue
            if not any("<image>" in turn.value for turn in turns):
                tags = f"<image>{inserts_tags}" * len(self.items[kind])
                turns[first] = Turn("human", tags + turns[first].value)

    def _field(self, kind: str) -> tuple[str | None, list[MediaItem]]:
        names = [name for name in (kind, f"{kind}s") if self._record.get(name) is not None]
        if not names:
            return None, []
        if len(names) == 2:
            self._fail(f"$.{kind} and $.{kind}s are both given; give one of them")
            self.unreadable.add(kind)
            return names[0], []
        (name,) = names
        value = self._record[name]
        try:
            if isinstance(value, list):
                settings = [self._record_settings(kind, index, len(value)) for index in range(len(value))]
                return name, [
                    self._item(kind, item, f"$.{name}[{index}]", settings[index]) for index, item in enumerate(value)
                ]
            if name == kind:
                return name, [self._item(kind, value, f"$.{name}", None)]
            raise FieldError(f"$.{name} is of type {type_name(value)}; expected an array of strings")
        except FieldError as error:
            self._fail(str(error))
            self.unreadable.add(kind)
            return name, []

    def _record_settings(self, kind: str, index: int, count: int) -> ItemSettings | None:
        """``fps`` of the record: the rate of videos that are lists of frames, one for all or one for each."""
        fps = self._record.get("fps")
        if kind != "video" or fps is None:
            return None
        if isinstance(fps, list):
            if len(fps) != count:
                raise FieldError(f"$.fps has {len(fps)} entries for {count} videos; give one number, or one for each")
            fps = fps[index]
        return ItemSettings(fps=_positive(fps, "$.fps"))

    def _item(self, kind: str, value: Any, where: str, settings: ItemSettings | None) -> MediaItem:
        if isinstance(value, list) and kind == "video":
            if not value:
                raise FieldError(f"{where} is an empty list; give the images that are the frames of the video")
            frames = tuple(self._name(frame, f"{where}[{index}]") for index, frame in enumerate(value))
            return MediaItem(f"{frames[0]} … ({len(frames)} frames)", frames, settings)
        return MediaItem(self._name(value, where), (), settings)

    def _name(self, value: Any, where: str) -> str:
        """The name of a medium; its bytes, if it brings them, go to ``embedded``."""
        data = path = None
        if isinstance(value, dict):
            if isinstance(value.get("url"), str):
                value = value["url"]
            else:
                data, path = value.get("bytes"), value.get("path")
                value = path if data is None else data
        if not isinstance(value, str):
            raise FieldError(f"{where} is of type {type_name(value)}; expected a string")
        if data is None and not value.startswith("data:"):
            return value
        text = value if data is not None else value.partition(",")[2]
        if data is None and ";base64" not in value.partition(",")[0]:
            raise FieldError(f"{where} is a data URI without base64; encode it as data:image/png;base64,…")
        name = f"{where.removeprefix('$.')} {path}" if path else where.removeprefix("$.")
        try:
            self.embedded[name] = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FieldError(f"{where} holds bytes that are not base64 ({error})") from error
        return name


def _settings(kind: str, part: Mapping[str, Any], where: str) -> ItemSettings | None:
    """The settings that a part has for its medium."""
    values: dict[str, Any] = {}
    for name in ItemSettings.__struct_fields__:
        if part.get(name) is None or (kind == "image" and name in _VIDEO_ONLY):
            continue
        value = part[name]
        if name in ("video_start", "video_end"):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise FieldError(f"{where}.{name} is {str(value)[:40]}; expected seconds, 0 or more")
            values[name] = float(value)
        else:
            values[name] = _positive(value, f"{where}.{name}", is_integer=name in _INTEGERS)
    if isinstance(part.get("video"), list) and part.get("sample_fps") is not None:
        values["fps"] = _positive(part["sample_fps"], f"{where}.sample_fps")
    if "fps" in values and "nframes" in values:
        raise FieldError(f"{where} has fps and nframes; give one of them")
    if ("resized_height" in values) != ("resized_width" in values):
        raise FieldError(f"{where} has only one of resized_height and resized_width; give both")
    if values.get("min_pixels", 0) > values.get("max_pixels", float("inf")):
        raise FieldError(f"{where} has min_pixels above max_pixels")
    if "total_pixels" in values:
        values["total_pixels"] = int(values["total_pixels"])
    return ItemSettings(**values) if values else None


def _positive(value: Any, where: str, *, is_integer: bool = False) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 1 << 53 or (is_integer and value != int(value)):
        expected = "a positive whole number" if is_integer else "a positive number"
        raise FieldError(f"{where} is {str(value)[:40]}; expected {expected}")
    return int(value) if is_integer else float(value)
