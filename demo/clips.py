"""Short clips of moving shapes: the facts, every frame, and the MP4 file.

``sample_clip`` -> ``Clip`` (facts) -> ``Clip.frame`` (RGB pictures) -> ``encode_clip`` (bytes of an MP4). What moves,
moves over the whole clip, and what changes, changes half way, so that four frames from first to last show it.
Cost: about 1.5 ms a frame for drawing and encoding.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from fractions import Fraction
from types import ModuleType

import numpy as np
from PIL import Image

from demo.kinds import pick
from demo.shapes import Figure, draw_figures
from demo.vocabulary import COLOURS, RGB, SHAPES
from schemas.errors import ConfigError

DIRECTIONS = ("left", "right", "up", "down")
EVENTS = ("moves", "changes colour", "grows", "shrinks", "appears", "disappears")

_SIZES = ((224, 224), (240, 240), (256, 192), (320, 240))
_LENGTHS = ((2, 24), (3, 15), (4, 12), (5, 12), (6, 10), (8, 8), (10, 6), (12, 5), (16, 4), (20, 4))
"""Pairs of seconds and frames per second: the longer, the fewer, so that no clip has many more than 80 frames."""
_BACKGROUNDS: tuple[RGB, ...] = ((255, 255, 255), (236, 236, 236), (228, 238, 246))
_X264_OPTIONS = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "cpu-independent=1"}
"""One thread, and the algorithms that are the same on every processor: with those that x264 picks for the processor at
hand, the same frames gave other bytes once in a while, on one machine."""
_EDGE_GAP = 6
_SMALL = 0.45
_PATH = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Actor:
    """A shape and what happens to it over the clip.

    ``dx`` and ``dy`` are what it moves in all (pixels); ``end_radius`` and ``end_colour`` what it has in the end (the
    radius goes over gradually, the colour half way); it is visible from ``first_shown`` to ``last_shown`` (0 to 1).
    """

    figure: Figure
    event: str
    direction: str = ""
    dx: float = 0.0
    dy: float = 0.0
    end_radius: float
    end_colour: str
    first_shown: float = 0.0
    last_shown: float = 1.0

    def at(self, progress: float) -> Figure | None:
        """Returns the figure at ``progress`` (0 to 1) of the clip, or None while it is not there."""
        if not self.first_shown <= progress <= self.last_shown:
            return None
        return replace(
            self.figure,
            x=self.figure.x + self.dx * progress,
            y=self.figure.y + self.dy * progress,
            radius=self.figure.radius + (self.end_radius - self.figure.radius) * progress,
            colour=self.figure.colour if progress < 0.5 else self.end_colour,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """A clip of ``duration_s * fps`` frames. The first actor does something; the others, if any, stand still."""

    width: int
    height: int
    duration_s: int
    fps: int
    background: RGB
    actors: tuple[Actor, ...]

    @property
    def num_frames(self) -> int:
        """How many frames the file has."""
        return self.duration_s * self.fps

    def frame(self, index: int) -> Image.Image:
        """Returns frame ``index`` as an RGB picture, as drawn (the video codec changes it slightly)."""
        progress = index / (self.num_frames - 1)
        figures = [figure for actor in self.actors if (figure := actor.at(progress)) is not None]
        return draw_figures(self.width, self.height, self.background, figures)


def sample_clip(
    rng: np.random.Generator, *, events: tuple[str, ...] = EVENTS, min_shapes: int = 1, max_shapes: int = 3
) -> Clip:
    """Draws the facts of a clip: one shape to which one of ``events`` happens, the others still; no two alike.

    The actor keeps to one half of the picture and the still shapes to the other, so none ever hides another.
    """
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    duration_s, fps = _LENGTHS[int(rng.integers(len(_LENGTHS)))]
    num = int(rng.integers(min_shapes, max_shapes + 1))
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))]
    shapes = [SHAPES[i] for i in rng.permutation(len(SHAPES))]
    event = pick(rng, events)
    direction = pick(rng, DIRECTIONS) if event == "moves" else ""
    sideways = direction in ("left", "right") or (direction == "" and bool(rng.random() < 0.5))
    lanes = _Lanes(width=width, height=height, sideways=sideways, actor_first=bool(rng.random() < 0.5))
    radius = round(lanes.across / 4 * (0.6 + 0.25 * rng.random()), 1)
    lead = _lead(lanes, event, direction, radius, shapes[0], colours[0], other_colour=colours[-1])
    still = [_still(lanes, i / num, shapes[i], colours[i]) for i in range(1, num)]
    background = _BACKGROUNDS[int(rng.integers(len(_BACKGROUNDS)))]
    return Clip(
        width=width, height=height, duration_s=duration_s, fps=fps, background=background, actors=(lead, *still)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Lanes:
    """The two halves of a picture, one above the other (``sideways``) or side by side: the actor's and the others'."""

    width: int
    height: int
    sideways: bool
    actor_first: bool

    @property
    def along(self) -> int:
        return self.width if self.sideways else self.height

    @property
    def across(self) -> int:
        return self.height if self.sideways else self.width

    def point(self, position: float, *, actor: bool) -> tuple[float, float]:
        """Returns x and y of the point ``position`` pixels along the middle of the actor's lane or of the other."""
        middle = self.across / 4 if actor == self.actor_first else self.across * 3 / 4
        return (position, middle) if self.sideways else (middle, position)


def _lead(
    lanes: _Lanes, event: str, direction: str, radius: float, shape: str, colour: str, *, other_colour: str
) -> Actor:
    margin = radius + _EDGE_GAP
    start = lanes.along / 2
    if event == "moves":
        start = lanes.along - margin if direction in ("left", "up") else margin
    x, y = lanes.point(start, actor=True)
    step_x, step_y = _PATH.get(direction, (0, 0))
    small = round(radius * _SMALL, 1)
    return Actor(
        figure=Figure(shape=shape, colour=colour, x=x, y=y, radius=small if event == "grows" else radius),
        event=event,
        direction=direction,
        dx=step_x * (lanes.along - 2 * margin),
        dy=step_y * (lanes.along - 2 * margin),
        end_radius=small if event == "shrinks" else radius,
        end_colour=other_colour if event == "changes colour" else colour,
        first_shown=0.5 if event == "appears" else 0.0,
        last_shown=0.5 if event == "disappears" else 1.0,
    )


def _still(lanes: _Lanes, place: float, shape: str, colour: str) -> Actor:
    x, y = lanes.point(round(lanes.along * place, 1), actor=False)
    figure = Figure(shape=shape, colour=colour, x=x, y=y, radius=round(lanes.along / 10, 1))
    return Actor(figure=figure, event="", end_radius=figure.radius, end_colour=colour)


def require_av() -> ModuleType:
    """Returns PyAV, which encodes the clips.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("the demo dataset needs PyAV to encode its clips; install it with: pip install av") from error
    return av


def encode_clip(clip: Clip) -> bytes:
    """Returns the clip as an MP4 file: H.264 where PyAV has an encoder for it, else MPEG-4 part 2.

    The bytes depend on nothing but the facts and the versions of the libraries.

    Raises:
        ConfigError: If PyAV is not installed.
    """
    av = require_av()
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=clip.fps, options=_X264_OPTIONS)
        else:
            stream = container.add_stream("mpeg4", rate=clip.fps, options={"qscale": "3", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.time_base = Fraction(1, clip.fps)
        for index in range(clip.num_frames):
            frame = av.VideoFrame.from_image(clip.frame(index))
            frame.pts, frame.time_base = index, Fraction(1, clip.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()
