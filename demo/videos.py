"""Short videos of one shape that moves or changes, and questions about them.

``sample_video`` -> ``Video`` (facts) -> ``Video.frame`` (RGB images) -> ``encode_video`` (an MP4 file). A move or a
change of size takes the whole video, and a change of colour happens half way, so 4 frames from first to last show it.
Cost: about 1.5 ms per frame for drawing and encoding.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np
from PIL import Image

from demo.drawing import COLOURS, SHAPES, Figure, draw_figures
from demo.kinds import Exchange, Facts, Kind, Wording, pick, sample_names
from demo.scenes import Scene, sample_scene

STEPS = {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
"""Moves as the viewer sees them: (x, y) with y pointing down."""
EVENTS = (*STEPS, "changes colour", "grows", "shrinks")

_SIZES = ((224, 224), (240, 240), (256, 192), (320, 240))
_LENGTHS = ((2, 24), (3, 15), (4, 12), (5, 12), (6, 10), (8, 8), (10, 6), (12, 5), (16, 4), (20, 4))
"""Pairs of seconds and frames per second. Longer videos have fewer, so that none has more than 80 frames."""
_EDGE_GAP = 6
_SCALES = {"grows": (0.45, 1.0), "shrinks": (1.0, 0.45)}
"""Events that change the size -> radius in the first and in the last frame, relative to the largest."""
_X264_OPTIONS = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "cpu-independent=1"}
"""One thread, and only algorithms that are the same on every processor. With those that x264 picks for the processor at
hand, the same frames occasionally gave different bytes, even on one machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Video:
    """A video in which the figure ``start`` becomes ``end``."""

    width: int
    height: int
    num_frames: int
    fps: int
    event: str
    start: Figure
    end: Figure

    def frame(self, index: int) -> Image.Image:
        """Return frame ``index`` as an RGB image, as drawn (the codec changes it slightly)."""
        progress = index / (self.num_frames - 1)
        figure = replace(
            self.start if progress < 0.5 else self.end,
            x=self.start.x + (self.end.x - self.start.x) * progress,
            y=self.start.y + (self.end.y - self.start.y) * progress,
            radius=self.start.radius + (self.end.radius - self.start.radius) * progress,
        )
        return draw_figures(self.width, self.height, (255, 255, 255), [figure])


def sample_video(rng: np.random.Generator, *, events: tuple[str, ...] = EVENTS) -> Video:
    """Draw the facts of a video: a shape to which one of ``events`` happens."""
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    duration_s, fps = _LENGTHS[int(rng.integers(len(_LENGTHS)))]
    event = pick(rng, events)
    colour, other_colour = sample_names(rng, COLOURS, 2)
    radius = round(min(width, height) * (0.14 + 0.07 * rng.random()), 1)
    middle = Figure(shape=pick(rng, SHAPES), colour=colour, x=width / 2, y=height / 2, radius=radius)
    dx, dy = (step * (side / 2 - radius - _EDGE_GAP) for step, side in zip(STEPS.get(event, (0, 0)), (width, height)))
    start_scale, end_scale = _SCALES.get(event, (1.0, 1.0))
    end_colour = other_colour if event == "changes colour" else colour
    return Video(
        width=width,
        height=height,
        num_frames=duration_s * fps,
        fps=fps,
        event=event,
        start=replace(middle, x=middle.x - dx, y=middle.y - dy, radius=radius * start_scale),
        end=replace(middle, x=middle.x + dx, y=middle.y + dy, radius=radius * end_scale, colour=end_colour),
    )


def encode_video(video: Video) -> bytes:
    """Return the video as an MP4 file: H.264 if PyAV has an encoder for it, else MPEG-4 part 2.

    The bytes depend only on the facts and the versions of the libraries.
    """
    import av

    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        if "libx264" in av.codecs_available:
            stream = container.add_stream("libx264", rate=video.fps, options=_X264_OPTIONS)
        else:
            stream = container.add_stream("mpeg4", rate=video.fps, options={"qscale": "3", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = video.width, video.height, "yuv420p"
        stream.time_base = Fraction(1, video.fps)
        for index in range(video.num_frames):
            frame = av.VideoFrame.from_ndarray(np.asarray(video.frame(index)), format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, video.fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _ask_event(videos: tuple[Video], rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    return (wording.ask(wording.say("What does the shape do?", "视频中的图形发生了什么？"), videos[0].event),)


def _ask_same_colour(media: tuple[Video, Scene], rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    video, scene = media
    question = wording.say("Do the two shapes have the same colour?", "两个图形的颜色相同吗？请回答是或否。")
    return (wording.ask(question, "yes" if scene.figures[0].colour == video.start.colour else "no"),)


def _video_and_scene(rng: np.random.Generator) -> Facts:
    return sample_video(rng, events=tuple(STEPS)), sample_scene(rng, max_shapes=1)


VIDEO_KINDS = (
    Kind(name="video/event", weight=4, sample=lambda rng: (sample_video(rng),), ask=_ask_event, answers=EVENTS),
    Kind(name="video/same_colour", weight=2, sample=_video_and_scene, ask=_ask_same_colour, answers=("yes", "no")),
)
