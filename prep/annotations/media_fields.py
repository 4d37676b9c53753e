"""Reads the media of a record: from its own fields, or from the parts of its turns.

A medium is a path or URL, a ``file://`` URL, a data URI, ``{"path": …}``, ``{"bytes": …}`` (base64, since JSON has no
bytes) or ``{"url": …}``. A video may also be a list of the images that are its frames. Bytes move out of the record and
get a name.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

from prep.annotations.annotation import MediaItem
from prep.annotations.fields import says_something
from prep.annotations.reading import FieldReader, type_name
from prep.media.item import ItemSettings
from schemas.annotation import Turn
from schemas.wording import counted

ENCODED_NAMES = ("data:", "file:")
"""How names start that are not the path or URL itself."""

_MAX_SETTING = 1 << 53
_INTEGERS = ("min_pixels", "max_pixels", "resized_height", "resized_width", "nframes", "min_frames", "max_frames")
_VIDEO_ONLY = ("fps", "nframes", "min_frames", "max_frames", "total_pixels", "video_start", "video_end")
_BOUNDS = (("min_pixels", "max_pixels"), ("min_frames", "max_frames"), ("video_start", "video_end"))
_PART_KINDS = {
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "video": "video",
    "video_url": "video",
}
_KINDS = ("image", "video")


class FieldError(ValueError):
    """A field of the wrong type or form. The message says what is expected."""


class MediaReader:
    """The media of one record while it is read.

    Attributes:
        items: images and videos in the order of their tags, by kind.
        embedded: bytes inside the record, by the name that the items give them.
        unreadable: kinds of which some names could not be read.
    """

    FIELDS = frozenset({"image", "images", "video", "videos", "fps"})
    KEYS = frozenset(_PART_KINDS)

    def __init__(self, record: Mapping[str, Any], embedded: Mapping[str, bytes], fields: FieldReader) -> None:
        self.embedded = dict(embedded)
        self.unreadable: set[str] = set()
        self.items: dict[str, list[MediaItem]] = {kind: [] for kind in _KINDS}
        self._from_parts: dict[str, list[MediaItem]] = {kind: [] for kind in _KINDS}
        self._indices: dict[str, list[int | None]] = {kind: [] for kind in _KINDS}
        self._record = record
        self._fields = fields
        self._uses_rate = False

    @property
    def used_fields(self) -> frozenset[str]:
        """Fields of the record that name its media. ``fps`` is one if others of them name videos."""
        return self.FIELDS if self._uses_rate else self.FIELDS - {"fps"}

    @staticmethod
    def kind_of(part: Mapping[str, Any]) -> str | None:
        """``image`` or ``video`` of a part of a turn's content; None for any other part."""
        kind = part.get("type")
        if kind is not None:
            return _PART_KINDS.get(kind) if isinstance(kind, str) else None
        return next((_PART_KINDS[key] for key in _PART_KINDS if says_something(part.get(key))), None)

    @staticmethod
    def names_medium(part: Mapping[str, Any]) -> bool:
        """Whether a part names a medium, whatever its type."""
        return any(says_something(part.get(key)) for key in _PART_KINDS)

    def add_part(self, kind: str, part: Mapping[str, Any], where: str) -> set[str]:
        """Add the medium of a part of a turn's content, if the part names it; returns the fields that it uses."""
        used = {"type", "index"}
        keys = [key for key in (*_PART_KINDS, "path", "bytes", "url") if says_something(part.get(key))]
        index = part.get("index")
        try:
            if not keys:
                if any(part.get(name) is not None for name in ItemSettings.__struct_fields__):
                    raise FieldError(f"{where} has settings for a medium that it does not name; name the medium here")
                if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
                    raise FieldError(f"{where}.index is {str(index)[:40]}; expected the index of an {kind}, from 0")
                self._indices[kind].append(index)
                return used
            (key, *others) = keys
            if others or _PART_KINDS.get(key, kind) != kind:
                raise FieldError(f"{where} is of type {kind} and has {' and '.join(keys)}; give one {kind}")
            value = {key: part[key]} if key in ("path", "bytes", "url") else part[key]
            settings, names = _settings(kind, part, where)
            self._from_parts[kind].append(self._item(kind, value, f"{where}.{key}", settings))
            return used | names | {key}
        except FieldError as error:
            self._fields.fail(str(error))
            self.unreadable.add(kind)
            return used | part.keys()

    def finish(self, turns: list[Turn], inserts_tags: str | None) -> None:
        """Read the record's own fields, and join them with the media of the parts.

        Args:
            turns: of the record. If they have no tag, tags are inserted before the first human text.
            inserts_tags: text between an inserted tag and the next; None if the dialect inserts no tags.
        """
        for kind in _KINDS:
            field, items = self._field(kind)
            from_parts = self._from_parts[kind]
            if field is not None and from_parts:
                self._fields.fail(f"the turns name {kind}s, and so does $.{field}; name each medium once")
                self.unreadable.add(kind)
            self.items[kind] = self._by_index(kind, items) if items else from_parts
            first = next((index for index, turn in enumerate(turns) if turn.role == "human"), None)
            if inserts_tags is not None and first is not None:
                tag = f"<{kind}>"
                if not any(tag in turn.value for turn in turns):
                    tags = f"{tag}{inserts_tags}" * len(self.items[kind])
                    turns[first] = Turn("human", tags + turns[first].value)

    def _by_index(self, kind: str, items: list[MediaItem]) -> list[MediaItem]:
        """The media of a field in the order of the parts, where these say which one they are."""
        indices = self._indices[kind]
        if all(index is None for index in indices):
            return items
        if None in indices or {*indices} != {*range(len(items))}:
            self._fields.fail(
                f"the parts of the turns have the indices {str(indices)[:60]} for {len(items)} {kind}s; each needs a "
                "part, counted from 0"
            )
            self.unreadable.add(kind)
            return items
        return [items[index] for index in indices if index is not None]

    def _field(self, kind: str) -> tuple[str | None, list[MediaItem]]:
        names = [name for name in (kind, f"{kind}s") if self._record.get(name) is not None]
        if not names:
            return None, []
        if len(names) == 2:
            self._fields.fail(f"$.{kind} and $.{kind}s are both given; give one of them")
            self.unreadable.add(kind)
            return names[0], []
        (name,) = names
        value = self._record[name]
        try:
            if name == kind and not isinstance(value, list):
                return name, [self._item(kind, value, f"$.{name}", self._record_settings(kind, 0, 1))]
            if not isinstance(value, list):
                raise FieldError(f"$.{name} is of type {type_name(value)}; expected an array of strings")
            return name if value else None, [
                self._item(kind, item, f"$.{name}[{index}]", self._record_settings(kind, index, len(value)))
                for index, item in enumerate(value)
            ]
        except FieldError as error:
            self._fields.fail(str(error))
            self.unreadable.add(kind)
            return name, []

    def _record_settings(self, kind: str, index: int, count: int) -> ItemSettings | None:
        """``fps`` of the record, for the videos of its fields: one number for all, or one for each."""
        fps = self._record.get("fps")
        if kind != "video" or not says_something(fps):
            return None
        self._uses_rate = True
        if isinstance(fps, list):
            if len(fps) != count:
                raise FieldError(
                    f"$.fps has {counted(len(fps), 'number')} for {counted(count, 'video')}; give one number, or one "
                    "for each"
                )
            fps = fps[index]
        return ItemSettings(fps=_positive(fps, "$.fps"))

    def _item(self, kind: str, value: Any, where: str, settings: ItemSettings | None) -> MediaItem:
        if isinstance(value, list) and kind == "video":
            if not value:
                raise FieldError(f"{where} is an empty list; give the images that are the frames of the video")
            frames = tuple(self._name(frame, f"{where}[{index}]") for index, frame in enumerate(value))
            return MediaItem(f"{frames[0]} … ({counted(len(frames), 'frame')})", frames, settings)
        return MediaItem(self._name(value, where), (), settings)

    def _name(self, value: Any, where: str) -> str:
        """The name of a medium. If the record holds its bytes, they go to ``embedded``."""
        path = data = None
        if isinstance(value, dict):
            keys = [key for key in ("url", "bytes", "path") if says_something(value.get(key))]
            self._fields.account(value, {"url", "bytes", "path"}, _without_indices(where))
            if "url" in keys and len(keys) > 1:
                raise FieldError(f"{where} has {' and '.join(keys)}; give one of them")
            data, path = value.get("bytes"), value.get("path")
            value = value.get(keys[0]) if keys else None
            if data is not None and not isinstance(value, str):
                raise FieldError(f"{where}.bytes is of type {type_name(value)}; expected base64 text")
        if not isinstance(value, str):
            raise FieldError(f"{where} is of type {type_name(value)}; expected a string")
        name = where.removeprefix("$.")
        if data:
            name = f"{name} {path}" if path else name
        elif value.startswith("data:"):
            header, _, value = value.partition(",")
            if not header.endswith(";base64"):
                raise FieldError(f"{where} is a data URI without base64; write it as data:image/png;base64,…")
        else:
            return value.removeprefix("file://")
        try:
            self.embedded[name] = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise FieldError(f"{where} holds bytes that are not base64 ({error})") from error
        return name


def _without_indices(where: str) -> str:
    """``content[].image_url`` of ``$.messages[0].content[1].image_url``; a field of the record keeps its name."""
    field = where.rpartition("content[")[2].partition("].")[2]
    return f"content[].{field}" if field else where.removeprefix("$.").partition("[")[0]


def _settings(kind: str, part: Mapping[str, Any], where: str) -> tuple[ItemSettings | None, set[str]]:
    """The settings that a part has for its medium, and the fields that hold them."""
    values: dict[str, Any] = {}
    names: set[str] = set()
    for name in ItemSettings.__struct_fields__:
        if part.get(name) is None or (kind == "image" and name in _VIDEO_ONLY):
            continue
        value = part[name]
        if name in ("video_start", "video_end"):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < _MAX_SETTING:
                raise FieldError(f"{where}.{name} is {str(value)[:40]}; expected seconds, 0 or more")
            values[name] = float(value)
        else:
            values[name] = _positive(value, f"{where}.{name}", is_integer=name in _INTEGERS)
        names.add(name)
    if isinstance(part.get("video"), list) and part.get("sample_fps") is not None:
        values["fps"] = _positive(part["sample_fps"], f"{where}.sample_fps")
        names = names - {"fps"} | {"sample_fps"}
    if "fps" in values and "nframes" in values:
        raise FieldError(f"{where} has fps and nframes; give one of them")
    if ("resized_height" in values) != ("resized_width" in values):
        raise FieldError(f"{where} has only one of resized_height and resized_width; give both")
    for low, high in _BOUNDS:
        if low in values and high in values and values[low] > values[high]:
            raise FieldError(f"{where} has {low} above {high}")
    if "total_pixels" in values:
        values["total_pixels"] = int(values["total_pixels"])
    return (ItemSettings(**values) if values else None), names


def _positive(value: Any, where: str, *, is_integer: bool = False) -> Any:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < _MAX_SETTING or (is_integer and value != int(value)):
        expected = "a whole number" if is_integer else "a number"
        raise FieldError(f"{where} is {value!r:.40}; expected {expected} above 0 and below {_MAX_SETTING:,}")
    return int(value) if is_integer else float(value)
