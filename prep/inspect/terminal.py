"""``vlprep show`` on a terminal with ``rich``: the same as the plain text, laid out, with images as coloured blocks.

Input: as :mod:`prep.inspect.show`. Output: printed on a console. ``rich`` is optional (the extra ``terminal``): without
it, in a pipe, and where colours are not wanted, ``show`` prints plain text. Cost: decoding the bin.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.annotations.boxes import Shape
from prep.inspect.drawing import draw_shapes
from prep.inspect.show import (
    ShownSample,
    as_image,
    describe_medium,
    head_lines,
    origin,
    sample_shapes,
    samples_of,
    token_lines,
)
from prep.inspect.transcript import ESCAPED_NOTE, SpanKind, Transcriber, spells_token, visible
from schemas.bins import Bin
from storage.pixels import decode_frames
from storage.shard_set import ShardSet

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_MAX_COLUMNS = 56
_MAX_ROWS = 22
_MAX_FRAMES = 4
_TRAINED, _CONTROL = "bold green", "dim"
_BLOCK_COLOURS = ("truecolor", "256")


def wants_colour() -> bool:
    """Whether standard output is a terminal on which colours are wanted (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def open_console() -> Console | None:
    """The terminal; None without ``rich``, or if colours are not wanted."""
    if not wants_colour():
        return None
    try:
        from rich.console import Console
    except ModuleNotFoundError:
        return None
    return Console(highlight=False, emoji=False, markup=False)


def print_bin(console: Console, shards: ShardSet, bin_id: int, transcriber: Transcriber, *, token_level: bool) -> None:
    """Print a bin.

    Args:
        console: the terminal.
        shards: the set.
        bin_id: number of the bin.
        transcriber: reads the token ids.
        token_level: list the tokens instead of the text.

    Raises:
        ConfigError: the set has no such bin.
        ShardError: the shard is damaged.
    """
    from rich.panel import Panel
    from rich.text import Text

    bin_ = shards.read(bin_id)
    where, contents = head_lines(shards, bin_id, mark="trained")
    console.print(Panel(Text(f"{where}\n{contents}"), title=f"bin {bin_id}", title_align="left"))
    frames = decode_frames(bin_, where=shards.row(bin_id).where)
    for slot, sample in enumerate(samples_of(shards, bin_)):
        console.rule(Text(f"sample {slot}", "bold"), align="left")
        console.print(Text(origin(sample.row), "dim"))
        shapes = sample_shapes(shards, sample, bin_, transcriber)
        for index, grid, kind in sample.media:
            console.print(Text(describe_medium(index, grid, kind), "cyan"))
            if console.color_system in _BLOCK_COLOURS:
                console.print(blocks(frames[index], shapes.get(index, ()), console.width), no_wrap=True)
        console.print(_tokens(bin_, sample, transcriber) if token_level else _text(bin_, sample, transcriber))


def _text(bin_: Bin, sample: ShownSample, transcriber: Transcriber) -> Text:
    from rich.text import Text

    tokens = slice(sample.first, sample.last)
    spans = list(transcriber.spans(bin_.input_ids[tokens], bin_.labels[tokens]))
    text = Text(f"{ESCAPED_NOTE}\n" if any(map(spells_token, spans)) else "", overflow="fold")
    for span in spans:
        text.append(visible(span), _TRAINED if span.trained else _CONTROL if span.kind is not SpanKind.TEXT else None)
    text.rstrip()
    return text


def _tokens(bin_: Bin, sample: ShownSample, transcriber: Transcriber) -> Text:
    from rich.text import Text

    head, *lines = token_lines(bin_, sample, transcriber)
    text = Text(head, "bold", overflow="fold")
    for line in lines:
        # The third column is the label.
        is_trained = line.split()[2].isdecimal()
        text.append(f"\n{line}", _TRAINED if is_trained else None)
    return text


def blocks(frames: NDArray[np.uint8], shapes: Sequence[Shape], width: int) -> Text:
    """An image, or a few frames of a video side by side, as half blocks: two pixels a character.

    Args:
        frames: (F, 3, H, W) uint8.
        shapes: boxes and points of an image.
        width: characters of a line.
    """
    from rich.text import Text

    shown = np.linspace(0, len(frames) - 1, min(len(frames), _MAX_FRAMES)).astype(int).tolist()
    columns = max(4, min(_MAX_COLUMNS, (width - len(shown) + 1) // len(shown)))
    pixels = [_small(as_image(frames[index]), shapes, columns) for index in shown]
    lines = [Text(" ").join(_line(image, row) for image in pixels) for row in range(len(pixels[0]) // 2)]
    return Text("\n").join(lines)


def _small(image: Image.Image, shapes: Sequence[Shape], columns: int) -> NDArray[np.uint8]:
    """(2·rows, columns, 3) uint8. A character is about twice as high as wide, so two pixels of it are square."""
    scale = min(columns / image.width, 2 * _MAX_ROWS / image.height)
    size = max(1, round(image.width * scale)), 2 * max(1, round(image.height * scale / 2))
    # Lines of one pixel of the small image.
    image = draw_shapes(image, shapes, width=max(1, round(1 / scale)))
    return np.asarray(image.resize(size, Image.Resampling.BOX))


def _line(pixels: NDArray[np.uint8], row: int) -> Text:
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    line = Text()
    for upper, lower in zip(pixels[2 * row].tolist(), pixels[2 * row + 1].tolist()):
        line.append("▀", Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return line
