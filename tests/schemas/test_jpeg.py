"""The member ``pixels.jpeg``: only a table that fills it, and only baseline JPEGs of the right shape, pass."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.bins import Bin
from schemas.errors import ShardError
from schemas.jpeg import join_streams, split_streams
from tests.train.synthetic import Medium, as_bin, as_stored, jpeg_member, jpeg_of, make_medium, make_sample

RNG = np.random.default_rng(0)
VIDEO, IMAGE = make_medium(RNG, 2, 4, steps=1), make_medium(RNG, 4, 2)
LOSSY_BIN = as_bin([make_sample(RNG, [VIDEO, IMAGE])], codec="jpeg")
FRAMES = [*VIDEO.frames, *IMAGE.frames]
STREAMS = [jpeg_of(frame) for frame in FRAMES]


def with_member(member: bytes) -> Bin:
    return replace(LOSSY_BIN, pixels=np.frombuffer(member, dtype=np.uint8))


def test_streams_come_back_with_the_shapes_of_their_frames() -> None:
    assert b"".join(join_streams(STREAMS)) == LOSSY_BIN.pixels.tobytes()
    assert split_streams(LOSSY_BIN, where="here") == [(frame.shape, data) for frame, data in zip(FRAMES, STREAMS)]


def test_the_layout_by_hand() -> None:
    assert b"".join(join_streams([b"abc", b"", b"x" * 258])) == b"\3\0\0\0\0\0\0\0\2\1\0\0abc" + b"x" * 258
    assert join_streams([]) == [b""]
    text = as_bin([make_sample(RNG)], codec="jpeg")
    assert text.pixels.size == 0
    assert split_streams(text, where="here") == []


def sizes(*byte_counts: int) -> bytes:
    return np.array(byte_counts, dtype="<u4").tobytes()


def first(stream: bytes) -> bytes:
    """The member with another stream as its first frame, and the table of sizes that fits it."""
    return jpeg_member([stream, *STREAMS[1:]])


def changed(old: bytes, new: bytes) -> bytes:
    assert STREAMS[0].count(old) == 1
    return first(STREAMS[0].replace(old, new))


A, B, C = map(len, STREAMS)
WHOLE = b"".join(STREAMS)


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (b"", "pixels.jpeg has 0 bytes; the sizes of its 3 frames alone take 12"),
        (jpeg_member(STREAMS)[:-1], "its table of 3 sizes asks for"),
        (jpeg_member(STREAMS) + b"\0", "its table of 3 sizes asks for"),
        (jpeg_member(STREAMS[:2]), "its table of 3 sizes asks for"),
        (sizes(B, A, C) + WHOLE, r"frame [01] of pixels.jpeg (has no end|is not a JPEG)"),
        (sizes(A + B, 0, C) + WHOLE, "frame 1 of pixels.jpeg is not a JPEG"),
        (sizes(A - 1, B + 1, C) + WHOLE, "frame 0 of pixels.jpeg has no end"),
        (sizes(2**32 - 1, B, C) + WHOLE, "its table of 3 sizes asks for"),
        (jpeg_member([STREAMS[0], STREAMS[2], STREAMS[1]]), "frame 1 of pixels.jpeg is 28x56 pixels in 3 components"),
        (first(jpeg_of(IMAGE.frames[0])), "frame 0 of pixels.jpeg is 28x56 pixels in 3 components, its grid asks"),
        (first(STREAMS[0] + b"\0"), "frame 0 of pixels.jpeg has no end"),
        (first(STREAMS[0][:-2]), "frame 0 of pixels.jpeg has no end"),
        (first(STREAMS[0][:100]), "frame 0 of pixels.jpeg has the segment"),
        (first(b"\x89PNG\r\n"), "frame 0 of pixels.jpeg is not a JPEG"),
        (first(b"\xff\xd8\xff\xd9"), "has the segment 'ffd9' at byte 2"),
        (first(jpeg_of(FRAMES[0], subsampling=2)), "is not YCbCr of 8 bits without subsampling"),
        (first(jpeg_of(FRAMES[0], progressive=True)), "has the segment 'ffc2'"),
        (first(jpeg_of(FRAMES[0], comment=b"hidden")), "has the segment 'fffe'"),
        (first(jpeg_of(FRAMES[0], exif=b"Exif\0\0" + b"x" * 9)), "has the segment 'ffe1'"),
        (first(jpeg_of(FRAMES[0], keep_rgb=True)), "has the segment 'ffee'|is not YCbCr"),
        (changed(b"\xff\xc0\x00\x11", b"\xff\xc0\x00\x12"), "has a frame header of 18 bytes"),
        (changed(b"\xff\xda\x00\x0c\x03", b"\xff\xda\x00\x08\x01"), "begins with a scan of some components"),
        (changed(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "is not YCbCr of 8 bits"),
        (changed(b"\x00\x1c\x00\x38\x03", b"\x00\x1c\xff\xdc\x03"), "is 65500x28 pixels"),
        (changed(b"\xff\xc0\x00\x11", b"\xff\xdb\x00\x11"), "has 0 frame headers"),
    ],
)
def test_a_member_that_is_not_an_image_of_the_right_shape_is_refused_before_it_is_decoded(
    member: bytes, message: str
) -> None:
    with pytest.raises(ShardError, match=rf"^bin 5: .*({message}).*Copy the set of shards again"):
        split_streams(with_member(member), where="bin 5")


def test_a_grid_that_asks_for_endless_frames_makes_no_list_of_them() -> None:
    """Two thousand million frames in a few bytes: refused by the size of the table."""
    endless = replace(LOSSY_BIN, grid_thw=np.array([[2**30, 2, 4], [1, 4, 2]], dtype=np.int32))
    with pytest.raises(ShardError, match="the sizes of its 2147483649 frames alone take 8589934596"):
        split_streams(endless, where="here")


@given(st.data())
def test_any_changed_bytes_are_refused_or_leave_the_shapes_alone(data: st.DataObject) -> None:
    member = bytearray(LOSSY_BIN.pixels.tobytes())
    for at in data.draw(st.lists(st.integers(0, len(member) - 1), min_size=1, max_size=4)):
        member[at] = data.draw(st.integers(0, 255))
    try:
        streams = split_streams(with_member(bytes(member)), where="here")
    except ShardError as error:
        assert str(error).startswith("here: ")
    else:
        assert [shape for shape, _ in streams] == [frame.shape for frame in FRAMES]


@pytest.mark.parametrize("medium", [VIDEO, IMAGE])
def test_the_lossy_medium_of_these_tests_differs_from_the_original(medium: Medium) -> None:
    """Guards the comparisons of other modules: JPEG changes these frames, and not by much."""
    difference = np.abs(as_stored(medium, "jpeg").frames.astype(int) - medium.frames)
    assert 0 < difference.mean() < 10
