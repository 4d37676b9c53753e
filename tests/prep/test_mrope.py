"""mRoPE positions against the model's own function, and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from demo.tiny_model import tiny_config
from prep.samples.mrope import position_ids
from schemas.qwen import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START, Grid


def sequence(*parts: int | tuple[int, Grid]) -> NDArray[np.int32]:
    """Token ids: an int stands for that many text tokens, (pad, grid) for a medium with its start and end."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += [100] * part
        else:
            pad, grid = part
            ids += [VISION_START, *[pad] * grid.num_tokens, VISION_END]
    return np.asarray(ids, dtype=np.int32)


def test_text_alone_counts_up_on_all_axes() -> None:
    assert position_ids(sequence(3), [], []).tolist() == [[0, 1, 2]] * 3


def test_positions_of_an_image_by_hand() -> None:
    """Two text tokens and the start token are 0 1 2; an image of 2x3 tokens starts at 3; its end token is at 3 + 3."""
    positions = position_ids(sequence(2, (IMAGE_PAD, Grid(1, 4, 6)), 1), [Grid(1, 4, 6)], [0.0])
    assert positions.tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
    ]


def test_positions_of_a_long_video_by_hand() -> None:
    """A step of 2.6 s is 5.2 positions: floor gives 0, 5, 10, 15; text continues after the largest, 1 + 15 + 1 = 17.

    Continuing at max(rows, columns), as current transformers do, would give 1 + 2 = 3.
    """
    grid = Grid(4, 4, 2)
    positions = position_ids(sequence((VIDEO_PAD, grid), 2), [grid], [2.6])
    assert positions.tolist() == [
        [0, 1, 1, 6, 6, 11, 11, 16, 16, 17, 18, 19],
        [0, 1, 2, 1, 2, 1, 2, 1, 2, 17, 18, 19],
        [0, 1, 1, 1, 1, 1, 1, 1, 1, 17, 18, 19],
    ]


def test_video_that_is_wider_than_long_continues_behind_its_columns() -> None:
    grid = Grid(2, 2, 10)
    positions = position_ids(sequence((VIDEO_PAD, grid)), [grid], [1.0])
    assert positions[0].tolist() == [0, *[1] * 5, *[3] * 5, 6]


def test_a_missing_or_wrong_run_of_pads_is_an_error() -> None:
    with pytest.raises(ValueError, match="no run"):
        position_ids(sequence(3), [Grid(1, 2, 2)], [0.0])
    with pytest.raises(ValueError, match="without a medium"):
        position_ids(sequence((IMAGE_PAD, Grid(1, 4, 4))), [Grid(1, 2, 2)], [0.0])


grids = st.builds(Grid, st.just(1), st.integers(1, 6).map(lambda n: 2 * n), st.integers(1, 6).map(lambda n: 2 * n))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), grids), max_size=4), st.integers(1, 5))
def test_images_and_text_equal_the_models_own_positions(media: list[tuple[int, Grid]], tail: int) -> None:
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    parts: list[int | tuple[int, Grid]] = []
    for text, grid in media:
        parts += [text, (IMAGE_PAD, grid)]
    ids = sequence(*parts, tail)
    config = tiny_config()
    with torch.device("meta"):
        model = Qwen2_5_VLModel(config)
    tensor = torch.from_numpy(ids.astype(np.int64))[None]
    expected, _ = model.get_rope_index(
        input_ids=tensor,
        mm_token_type_ids=(tensor == IMAGE_PAD).int(),
        image_grid_thw=torch.tensor([grid for _, grid in media]) if media else None,
        attention_mask=torch.ones_like(tensor),
    )
    positions = position_ids(ids, [grid for _, grid in media], [0.0] * len(media))
    assert positions.tolist() == expected[:, 0].tolist()
