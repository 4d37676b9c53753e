"""Records of ms-swift's and LLaMA-Factory's dialects get the token ids, labels and grids that those tools give them.

What the tools themselves encode lies in ``tests/data``, written by the scripts in ``tests/peers``. Every difference is
listed here by its record, and has its row in ``docs/annotations.md``.
"""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.engines import SerialEngine
from schemas.settings import BuildSettings, MediaSettings
from tests.guides import DOCS, table_rows
from tests.peers.files import (
    MAX_PIXELS,
    MAX_VIDEO_PIXELS,
    MIN_PIXELS,
    MIN_VIDEO_PIXELS,
    Encoding,
    read_corpus,
    read_encodings,
    read_versions,
    write_images,
)
from tests.prep.packed import packed_samples


class Rejected(NamedTuple):
    """A record that the peer encodes and vlprep rejects.

    Attributes:
        row: first cell of the row of the documentation that says why.
        code: of the rejection.
    """

    row: str
    code: str


class Differs(NamedTuple):
    """A record that both encode, differently.

    Attributes:
        row: first cell of the row of the documentation that says why.
        theirs: what the peer has in its :func:`transcript`.
        ours: what vlprep has in its place. The rest of the record is the same.
    """

    row: str
    theirs: str
    ours: str


DEFAULT_SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
NEWLINE = Differs("answer that starts with a newline", "assistant\n⟦\nHello", "assistant⟦\n\nHello")
ROTATED = Differs("image with an EXIF orientation", "[1, 28, 42]", "[1, 42, 28]")

DIFFERENCES: dict[str, dict[str, Rejected | Differs]] = {
    "ms_swift": {
        "empty system turn": Rejected("empty system turn", "empty_turn"),
        "empty system field": Differs("empty `system` field", "", DEFAULT_SYSTEM),
        "one image as a string": Rejected("`images` as a string", "bad_field"),
        "image without a tag": Rejected("image without a tag", "tag_mismatch"),
        "image rotated by EXIF": ROTATED,
        "image part with a bound": Differs("bounds in a content part", "[1, 28, 42]", "[1, 12, 18]"),
        "loss of the last turn off": Differs(
            '`"loss": false` on the last turn', "Red.⟦<|im_end|>\n⟧", "Red.<|im_end|>\n"
        ),
        "answer starts with a newline": NEWLINE,
        "call after words": Differs("words before a tool call", "look.<tool_call>", "look.\n<tool_call>"),
        "boxes as tokens": Differs(
            "boxes with `QWENVL_BBOX_FORMAT=legacy`",
            "<|box_start|>(325,39),(569,357)<|box_end|>",
            "[325, 39, 569, 357]",
        ),
        "boxes of two images without image_id": Rejected("boxes of several images", "ambiguous_box"),
        "video as frames": Differs("video as a list of frames", "[2, 28, 40]", "[2, 28, 38]"),
        "box with corners exchanged": Rejected("corners of a box exchanged", "bad_box"),
    },
    "llama_factory": {
        "empty system turn": Rejected("empty system turn", "empty_turn"),
        "image rotated by EXIF": ROTATED,
        "tiny image": Differs("image smaller than 28 pixels", "[1, 6, 10]", "[1, 8, 10]"),
        "large image near a half": Differs("large image", "[1, 40, 58]", "[1, 38, 58]"),
        "call after a thought": Rejected("thought before a tool call", "bad_field"),
        "openai tool_calls": Differs(
            '`"formatting": "openai"`', "<|im_start|>system\ndetailed thinking off<|im_end|>\n", DEFAULT_SYSTEM
        ),
        "answer starts with a newline": NEWLINE,
    },
}


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))


@pytest.fixture(scope="module", params=list(DIFFERENCES))
def peer(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def ours(peer: str, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Encoding | str]:
    """What a build makes of the peer's corpus: an encoding, or the codes of the rejection."""
    folder = tmp_path_factory.mktemp(peer)
    corpus = read_corpus(peer)
    write_images(corpus, folder)
    records = [{**record, "id": name} for name, record in corpus.items()]
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    settings = BuildSettings(
        media=MediaSettings(
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
            video_min_frame_pixels=MIN_VIDEO_PIXELS,
            video_max_frame_pixels=MAX_VIDEO_PIXELS,
        )
    )
    sources = find_sources(str(folder / "a.jsonl"), registry=None, media_root=None, media=settings.media)
    request = BuildRequest(
        sources=tuple(sources),
        out=folder / "out",
        settings=settings,
        model=str(tiny_checkpoint),
        max_rejected=Fraction(1),
    )
    build(request, SerialEngine())
    ledger = pq.read_table(folder / "out" / "samples.parquet").to_pylist()
    rejected: dict[str, Encoding | str] = {
        row["id"]: " ".join(row["codes"]) for row in ledger if row["status"] == "rejected"
    }
    packed = {name: samples[0] for name, samples in packed_samples(folder / "out").items() if name in corpus}
    return rejected | {
        name: Encoding(
            sample.input_ids,
            sample.labels,
            np.array([grid for _, grid, _ in sample.media], dtype=np.int32).reshape(-1, 3),
        )
        for name, sample in packed.items()
    }


@pytest.fixture(scope="module")
def theirs(peer: str) -> dict[str, Encoding]:
    return read_encodings(peer)


def test_records_without_a_listed_difference_are_equal(
    peer: str, ours: dict[str, Any], theirs: dict[str, Encoding]
) -> None:
    names = theirs.keys() - DIFFERENCES[peer].keys()
    assert len(names) > 20
    rejected = {name: ours[name] for name in names if isinstance(ours[name], str)}
    assert not rejected
    unequal = [
        (name, field)
        for name in names
        for field, mine, its in zip(Encoding._fields, ours[name], theirs[name])
        if mine.tolist() != its.tolist()
    ]
    assert not unequal


def test_listed_differences_are_as_listed_and_no_more(
    peer: str, ours: dict[str, Any], theirs: dict[str, Encoding], tokenizer: Tokenizer
) -> None:
    for name, difference in DIFFERENCES[peer].items():
        if isinstance(difference, Rejected):
            assert ours[name] == difference.code, name
        else:
            shown = transcript(theirs[name], tokenizer)
            assert shown.count(difference.theirs) == 1 or not difference.theirs, name
            assert transcript(ours[name], tokenizer) == shown.replace(difference.theirs, difference.ours, 1), name


def test_every_record_is_accounted_for(peer: str, ours: dict[str, Any], theirs: dict[str, Encoding]) -> None:
    assert read_corpus(peer).keys() == ours.keys() == theirs.keys()


def test_every_difference_has_its_row_in_the_documentation() -> None:
    rows = {row[0] for row in table_rows("annotations.md", "Differences from other tools")}
    assert rows == {difference.row for listed in DIFFERENCES.values() for difference in listed.values()}


def test_the_documentation_names_the_versions_that_encoded() -> None:
    page = (DOCS / "annotations.md").read_text(encoding="utf-8")
    assert f"ms-swift {read_versions('ms_swift')['ms-swift']} " in page
    assert f"LLaMA-Factory {read_versions('llama_factory')['llamafactory']}," in page


def transcript(encoding: Encoding, tokenizer: Tokenizer) -> str:
    """The decoded ids, with trained text between ⟦ and ⟧, and one pad a medium with its grid behind it."""
    is_trained = encoding.labels != -100
    assert (encoding.labels[is_trained] == encoding.input_ids[is_trained]).all()
    starts = np.flatnonzero(np.diff(is_trained, prepend=not is_trained[0]))
    text = ""
    for start, run in zip(starts, np.split(encoding.input_ids, starts[1:])):
        decoded = tokenizer.decode(run.tolist(), skip_special_tokens=False)
        text += f"⟦{decoded}⟧" if is_trained[start] else decoded
    grids = iter(encoding.grid_thw.tolist())
    return re.sub(r"(<\|(?:image|video)_pad\|>)+", lambda pads: f"{pads[1]}{next(grids)}", text)
