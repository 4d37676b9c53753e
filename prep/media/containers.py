"""Recognises the container of a video by its first bytes.

Input: a source. Output: a :class:`Container`. Video libraries also open playlists and concatenation scripts, which only
name other files, perhaps outside the media root or on the network. So a video is opened only if its first bytes are
those of a container that holds the frames itself, and PyAV is told to use the demuxer of that container alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError

_HEAD_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Container:
    """A container format.

    Attributes:
        demuxer: name of its FFmpeg demuxer.
        has_index: whether backends can seek to an exact frame. In MPEG streams, backends that seek (decord 3.4.0,
            torchcodec 0.13) silently return the wrong frames. In other streams without an index, they fail.
    """

    demuxer: str
    has_index: bool


_CONTAINERS = {
    Container(demuxer, has_index): re.compile(head, re.DOTALL)
    for demuxer, has_index, head in (
        ("mov", True, rb".{4}(?:ftyp|styp|moov|moof|mdat|free|skip|wide|pnot)"),
        ("matroska", True, rb"\x1a\x45\xdf\xa3"),
        ("avi", True, rb"RIFF.{4}AVI"),
        ("flv", True, rb"FLV"),
        ("asf", True, rb"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),
        ("gif", True, rb"GIF8[79]a"),
        ("mpegts", False, rb"(?:G.{187}){2}G|.{4}(?:G.{191}){2}G"),
        ("mpeg", False, rb"\x00\x00\x01\xba"),
        ("mpegvideo", False, rb"\x00\x00\x01\xb3"),
        ("m4v", False, rb"\x00\x00\x01[\x00\xb0\xb5]"),
        ("h264", False, rb"\x00?\x00\x00\x01[\x06\x09\x27\x47\x67]"),
        ("hevc", False, rb"\x00?\x00\x00\x01[\x40\x42\x46]"),
        ("ogg", False, rb"OggS"),
        ("ivf", False, rb"DKIF"),
        ("yuv4mpegpipe", False, rb"YUV4MPEG2 "),
    )
}


def container_of(source: MediaSource) -> Container:
    """Recognise the container of a video.

    Raises:
        MediaError: ``unsupported_media`` if the file does not begin like any known container.
    """
    with source.open() as file:
        head = file.read(_HEAD_BYTES)
    for container, pattern in _CONTAINERS.items():
        if pattern.match(head):
            return container
    raise MediaError(
        ReasonCode.UNSUPPORTED_MEDIA,
        "is not a video in a supported container: MP4 (MOV, 3GP), Matroska (WebM), AVI, FLV, ASF (WMV), GIF, Ogg, "
        "MPEG streams, plain H.264 or HEVC (playlists are not followed)",
    )
