"""The canonical form of an annotation. Every dialect maps to it, and the rest of the program sees nothing else.

Turns are ready for ChatML: tools are in the system text, tool calls in the model's turns, and tool results in the
user's turns, as in the Qwen2.5 chat template. Media are in the order of their tags.
"""

from __future__ import annotations

import msgspec

from prep.annotations.boxes import Shape
from prep.media.item import ItemSettings
from schemas.annotation import Turn


class MediaItem(msgspec.Struct, frozen=True, gc=False):
    """One image or video of an annotation.

    Attributes:
        name: path below the media root, URL, or the name of bytes inside the record.
        frames: names of the images that are the frames of a video; empty for a video file.
        settings: settings that replace those of the build, or None.
    """

    name: str
    frames: tuple[str, ...] = ()
    settings: ItemSettings | None = None


class Annotation(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One annotation in canonical form.

    Attributes:
        turns: roles ``system`` (only first), ``human`` and ``gpt``; for continued pretraining one turn ``text``.
        images: in the order of the ``<image>`` tags.
        videos: in the order of the ``<video>`` tags.
        id: the record's own id, if any.
        untrained: indices of ``gpt`` turns without loss.
        shapes: boxes, points and polygons by the index of their turn.
        coordinates: what their coordinates are, as the record itself or the setting of its dataset says; None where
            nothing says so.
        grounding: whether the tokens of boxes and names of objects in its turns are control tokens.
    """

    turns: list[Turn]
    images: list[MediaItem] = []
    videos: list[MediaItem] = []
    id: str | int | None = None
    untrained: frozenset[int] = frozenset()
    shapes: dict[int, tuple[Shape, ...]] = {}
    coordinates: str | None = None
    grounding: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is text for continued pretraining: no chat template, all of it trained."""
        return len(self.turns) == 1 and self.turns[0].role == "text"

    @property
    def num_shapes(self) -> int:
        """Boxes, points and polygons."""
        return sum(map(len, self.shapes.values()))
