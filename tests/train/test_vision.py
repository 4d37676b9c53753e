"""The inputs of the vision tower equal those that transformers computes from the grids."""

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
videos = st.builds(Grid, st.integers(1, 5), sides, sides)


@settings(deadline=None)
@given(st.lists(st.one_of(images, videos), min_size=1, max_size=6), st.sampled_from([28, 56, 112, 140]))
def test_inputs_equal_those_of_the_model(grids: list[Grid], window_size: int) -> None:
    inputs = vision_inputs(grids, window_size=window_size)
    grid_thw = torch.tensor(grids)
    positions = get_vision_position_ids(grid_thw, 2)
    cu_seqlens = get_vision_cu_seqlens(grid_thw)
    window_index, cu_window_seqlens = get_vision_window_index(
        grid_thw, spatial_merge_size=2, window_size=window_size, patch_size=14
    )
    for ours, theirs in [
        (inputs.position_ids, positions),
        (inputs.cu_seqlens, cu_seqlens),
        (inputs.window_index, window_index),
        (inputs.cu_window_seqlens, cu_window_seqlens),
    ]:
        assert torch.equal(torch.from_numpy(ours), theirs)
        assert torch.from_numpy(ours).dtype == theirs.dtype
    assert inputs.max_seqlen == int(cu_seqlens.diff().max())
    assert inputs.max_window_seqlen == int(cu_window_seqlens.diff().max())


def test_an_image_of_five_by_two_tokens_worked_out_by_hand() -> None:
    """Windows are four by four tokens: rows 0-3 form a window of eight tokens, row 4 one of two."""
    inputs = vision_inputs([Grid(1, 10, 4)])
    assert inputs.window_index.tolist() == list(range(10))
    assert inputs.cu_window_seqlens.tolist() == [0, 32, 40]
    assert inputs.cu_seqlens.tolist() == [0, 40]
    assert inputs.position_ids[:6].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2], [0, 3]]


def test_windows_of_a_wide_image_span_all_rows() -> None:
    """Two by five tokens: the first window holds columns 0-3 of both rows, the second column 4."""
    assert vision_inputs([Grid(1, 4, 10)]).window_index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 4, 9]


def test_every_temporal_step_attends_to_itself_only() -> None:
    inputs = vision_inputs([Grid(3, 2, 4), Grid(1, 2, 2)])
    assert inputs.cu_seqlens.tolist() == [0, 8, 16, 24, 28]
    assert inputs.window_index.tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_modifying_a_result_does_not_affect_later_results() -> None:
    """Results do not share memory with the cached layouts."""
    first = vision_inputs([Grid(1, 4, 4)])
    first.position_ids[:] = -1
    first.window_index[:] = -1
    again = vision_inputs([Grid(1, 4, 4)])
    assert np.array_equal(again.window_index, np.arange(4))
    assert again.position_ids.min() == 0


@pytest.mark.parametrize("window_size", [0, 14, 100, -28])
def test_a_window_size_that_is_not_a_multiple_of_28_is_rejected(window_size: int) -> None:
    with pytest.raises(ConfigError, match="multiples of 28"):
        vision_inputs([Grid(1, 2, 2)], window_size=window_size)
