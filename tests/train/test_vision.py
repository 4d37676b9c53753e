"""Inputs of the vision tower equal those that transformers computes from the grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from schemas.errors import ConfigError
from schemas.qwen import Grid
from train.batches.vision_inputs import vision_inputs

sides = st.integers(1, 14).map(lambda merged: 2 * merged)
images = st.builds(Grid, st.just(1), sides, sides)
clips = st.builds(Grid, st.integers(1, 5), sides, sides)


@settings(deadline=None)
@given(st.lists(st.one_of(images, clips), min_size=1, max_size=6), st.sampled_from([28, 56, 112, 140]))
def test_inputs_equal_those_of_the_model(grids: list[Grid], window_size: int) -> None:
    found = vision_inputs(grids, window_size=window_size)
    grid_thw = torch.tensor(grids)
    positions = get_vision_position_ids(grid_thw, 2)
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_thw, spatial_merge_size=2, window_size=window_size, patch_size=14
    )
    for ours, theirs in [
        (found.position_ids, positions),
        (found.cu_seqlens, cu_seqlens),
        (found.window_index, window_index),
        (found.cu_window_seqlens, cu_window_seqlens),
    ]:
        assert torch.equal(torch.from_numpy(ours), theirs)
        assert torch.from_numpy(ours).dtype == theirs.dtype
    assert found.max_seqlen == int(cu_seqlens.diff().max())
    assert found.max_window_seqlen == int(cu_window_seqlens.diff().max())


def test_a_picture_of_five_by_two_tokens_worked_out_by_hand() -> None:
    """Windows of four by four tokens: rows 0-3 make a window of eight tokens, row 4 one of two."""
    found = vision_inputs([Grid(1, 10, 4)])
    assert found.window_index.tolist() == list(range(10))
    assert found.cu_window_seqlens.tolist() == [0, 32, 40]
    assert found.cu_seqlens.tolist() == [0, 40]
    assert found.position_ids[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]


def test_windows_of_a_wide_picture_take_tokens_from_every_row() -> None:
    """Two by five tokens: the first window holds columns 0-3 of both rows, the second column 4."""
    assert vision_inputs([Grid(1, 4, 10)]).window_index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]


def test_every_temporal_step_attends_to_itself_only() -> None:
    found = vision_inputs([Grid(3, 2, 4), Grid(1, 2, 2)])
    assert found.cu_seqlens.tolist() == [0, 8, 16, 24, 28]
    assert found.window_index.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_a_result_is_the_callers_own() -> None:
    """The cache of layouts must not be reachable through a result."""
    first = vision_inputs([Grid(1, 4, 4)])
    first.position_ids[:] = -1
    first.window_index[:] = -1
    again = vision_inputs([Grid(1, 4, 4)])
    assert np.array_equal(again.window_index, np.arange(4))
    assert again.position_ids.min() == 0


@pytest.mark.parametrize("window_size", [0, 14, 100, -28])
def test_a_window_that_is_no_multiple_of_a_token_is_wrong_use(window_size: int) -> None:
    with pytest.raises(ConfigError, match="multiples of 28"):
        vision_inputs([Grid(1, 2, 2)], window_size=window_size)
