"""The demo dataset: its answers are what a person sees in the media, and nothing else reveals them."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import ExifTags, Image

from demo import DemoSummary, write_demo
from demo.dataset import (
    EMPTY_IMAGE,
    KINDS,
    MISSING_IMAGE,
    TRUNCATED_IMAGE,
    TRUNCATED_VIDEO,
)
from demo.kinds import generator
from demo.pages import sample_document
from demo.videos import STEPS, encode_video, sample_video
from prep.cli import main
from schemas.errors import ConfigError
from tests.demo.seeing import Seen, see, see_image

Record = dict[str, Any]

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Demo:
    root: Path
    summary: DemoSummary
    lines: list[str]
    train: list[Record]
    held_out: list[Record]

    @property
    def good(self) -> list[Record]:
        return self.train + self.held_out


def is_broken(line: str) -> bool:
    return not line.startswith('{"id": "demo-') or line.startswith('{"id": "demo-broken')


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    root = tmp_path_factory.mktemp("demo")
    summary = write_demo(root)
    lines, held_out = (
        (root / name).read_text(encoding="utf-8").splitlines() for name in ("annotations.jsonl", "heldout.jsonl")
    )
    train = [json.loads(line) for line in lines if not is_broken(line)]
    return Demo(root, summary, lines, train, [json.loads(line) for line in held_out])


def media_of(record: Record, *media_types: str) -> list[str]:
    """The paths of some types (by default all), in whichever field and form."""
    paths: list[str] = []
    for field in (name for media_type in media_types or ("image", "video") for name in (media_type, f"{media_type}s")):
        value = record.get(field, [])
        paths += [value] if isinstance(value, str) else value
    return paths


def turns_of(record: Record, role: str) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == role]


# ---------------------------------------------------------------------------------------------------------------------
# Answers agree with pixels


def read_scene(shapes: list[Seen], question: str) -> str:
    """The answer to a question, from the shapes in the image."""
    if re.search("colour (is|does) the shape", question):
        return shapes[0].colour
    if re.search("What shape is in the picture|Which shape do you see", question):
        return shapes[0].shape
    if "How many shapes" in question:
        return str(len(shapes))
    x = {f"{shape.colour} {shape.shape}": shape.x for shape in shapes}
    match = re.search(r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?", question)
    assert match is not None
    first, second = match.groups()
    return "left" if x[first] < x[second] else "right"


def test_answers_about_a_scene_follow_from_its_pixels(demo: Demo) -> None:
    """Every short English answer about scenes follows from the pixels of the stored files and the question."""
    checked: Counter[str] = Counter()
    for record in demo.good:
        (question, *_), answers = turns_of(record, "human"), turns_of(record, "gpt")
        if record["kind"].startswith("scene/") and question.isascii() and "full sentence" not in question:
            (path,) = media_of(record, "image")
            assert [read_scene(see(demo.root / path), question)] == answers, record
            checked[record["kind"]] += 1
    assert set(checked) == {kind.name for kind in KINDS if kind.name.startswith("scene/")}
    assert checked.total() > 130


def test_everything_on_a_page_is_clear_of_its_foot_and_its_right_edge() -> None:
    """Text that ran into the page number or out of the page would hide an answer."""
    rng = generator(1, "test")
    for page in (page for _ in range(40) for page in sample_document(rng)):
        full, empty = (np.asarray(p.draw()) for p in (page, replace(page, sentences=())))
        assert (full != empty).any()
        assert (full[-28:] == empty[-28:]).all()
        assert (full[:, -4:] == 255).all()


def decode(content: bytes) -> list[Image.Image]:
    with av.open(BytesIO(content), mode="r") as container:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_shapes_move_as_the_answers_say() -> None:
    """The direction is seen in the decoded first and last frames, after the codec."""
    assert STEPS == {"moves left": (-1, 0), "moves right": (1, 0), "moves up": (0, -1), "moves down": (0, 1)}
    rng = generator(2, "test")
    for event, step in (*STEPS.items(), *STEPS.items()):
        video = sample_video(rng, events=(event,))
        frames = decode(encode_video(video))
        ((first,), (last,)) = see_image(frames[0]), see_image(frames[-1])
        moved = np.array([last.x - first.x, last.y - first.y])
        assert moved @ step > 60
        assert abs(moved @ step[::-1]) < 5
        assert first.colour == last.colour == video.start.colour
        assert first.shape == last.shape == video.start.shape


@pytest.mark.parametrize("event", ["changes colour", "grows", "shrinks"])
def test_a_change_is_seen_in_4_frames_of_a_video(event: str) -> None:
    video = sample_video(generator(3, event), events=(event,))
    frames = decode(encode_video(video))
    shapes = [see_image(frames[i])[0] for i in np.linspace(0, len(frames) - 1, 4, dtype=int)]
    before, after = video.start.colour, video.end.colour
    assert [shape.colour for shape in shapes] == [before, before, after, after]
    assert (before != after) == (event == "changes colour")
    sizes = [shape.num_pixels for shape in shapes][:: -1 if event == "shrinks" else 1]
    if event != "changes colour":
        assert sizes == sorted(sizes)
        assert sizes[-1] > 3 * sizes[0]


def test_videos_have_the_frames_and_the_duration_they_claim(demo: Demo) -> None:
    paths = {path for record in demo.good for path in media_of(record, "video")}
    durations = []
    for path in sorted(paths):
        reader = decord.VideoReader(str(demo.root / path))
        duration_s = len(reader) / reader.get_avg_fps()
        durations.append(duration_s)
        assert duration_s == pytest.approx(round(duration_s), abs=1e-3)
        assert 2 <= duration_s <= 20
        assert len(reader) <= 80
        assert len(decode((demo.root / path).read_bytes())) == len(reader)
    assert min(durations) < 5 < 10 < max(durations)
    assert 15 <= len(paths) <= 35


def test_videos_are_encoded_without_x264_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    video = sample_video(generator(4, "test"))
    frames = decode(encode_video(video))
    assert len(frames) == video.num_frames
    assert frames[0].size == (video.width, video.height)


# ---------------------------------------------------------------------------------------------------------------------
# The two parts and their records


def test_the_held_out_part_asks_the_same_kinds_of_questions_about_other_media(demo: Demo) -> None:
    parts = (demo.train, demo.held_out)
    train_kinds, held_out_kinds = ({record["kind"] for record in part} for part in parts)
    assert held_out_kinds == train_kinds == {kind.name for kind in KINDS}
    media = [{(demo.root / path).read_bytes() for record in part for path in media_of(record)} for part in parts]
    assert media[0].isdisjoint(media[1])
    chats = [{tuple(turns_of(r, "human")) for r in part if r["kind"].startswith("chat/")} for part in parts]
    assert chats[0].isdisjoint(chats[1])


def test_counts_are_those_of_the_files(demo: Demo) -> None:
    assert len(demo.lines) == 400
    assert len(demo.held_out) == 80
    assert Counter(record["kind"] for record in demo.train) == demo.summary.train
    assert Counter(record["kind"] for record in demo.held_out) == demo.summary.held_out
    assert sum(map(is_broken, demo.lines)) == demo.summary.broken.total() == 10
    assert "390 for training: " in str(demo.summary)
    assert sum(path.stat().st_size for path in demo.root.rglob("*") if path.is_file()) < 30e6


def test_good_records_have_a_tag_for_every_medium_and_a_file_for_every_path(demo: Demo) -> None:
    for record in demo.good:
        human, answers = turns_of(record, "human"), turns_of(record, "gpt")
        for media_type in ("image", "video"):
            paths = media_of(record, media_type)
            assert sum(text.count(f"<{media_type}>") for text in human) == len(paths), record
            assert all((demo.root / path).stat().st_size > 0 for path in paths)
        roles = [turn["from"] for turn in record["conversations"]]
        assert roles[roles[0] == "system" :] == ["human", "gpt"] * len(answers), record
        assert all(turn["value"].strip() and "<|" not in turn["value"] for turn in record["conversations"])
        assert not any("<image>" in text or "<video>" in text for text in answers)


def test_identifiers_are_unique(demo: Demo) -> None:
    identifiers = [record["id"] for record in demo.good]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"demo-(heldout-)?(scene|page|video|chat)-\d{5}", name) for name in identifiers)


def test_records_vary_as_those_of_real_datasets_do(demo: Demo) -> None:
    fields = {(field, type(record[field])) for record in demo.train for field in record}
    assert fields >= {("image", str), ("image", list), ("images", list), ("video", str), ("videos", list)}
    firsts = [turns_of(record, "human")[0] for record in demo.train if media_of(record, "image")]
    starts, ends = (
        sum(map(is_at, firsts)) for is_at in (lambda t: t.startswith("<image>"), lambda t: t.endswith("<image>"))
    )
    assert min(starts, ends, len(firsts) - starts - ends) > 20, "tags at the start, at the end and in the middle"
    num_english = sum(all(turn["value"].isascii() for turn in record["conversations"]) for record in demo.train)
    num_emoji = sum("🍎" in str(record) for record in demo.train)
    assert 0.1 < 1 - (num_english + num_emoji) / len(demo.train) < 0.35
    turns = Counter(len(turns_of(record, "human")) for record in demo.train)
    assert turns[1] > 250
    assert sum(turns[count] for count in (2, 3)) > 30
    assert any(record["conversations"][0]["from"] == "system" for record in demo.train)
    assert any(media_of(record, "image") and media_of(record, "video") for record in demo.train)
    assert any(len(media_of(record, "image")) == 4 for record in demo.train)
    assert any("\nassistant: " in text for record in demo.train for text in turns_of(record, "human"))
    assert num_emoji > 0


def test_images_come_in_all_formats_and_modes_and_stay_small(demo: Demo) -> None:
    stored: set[tuple[str | None, str]] = set()
    for path in {path for record in demo.train for path in media_of(record, "image")}:
        with Image.open(demo.root / path) as image:
            stored.add((image.format, image.mode))
            assert 112 <= min(image.size) <= max(image.size) <= 448
    assert stored == {
        ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"),
    }  # fmt: skip


def test_a_reader_that_ignores_the_exif_orientation_takes_up_for_left(demo: Demo) -> None:
    """One image of each part is stored on its side."""
    turned = Counter[bool]()
    for record in demo.good:
        for path in media_of(record, "image"):
            with Image.open(demo.root / path) as image:
                if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
                    continue
                as_stored = sorted((shape.x, shape.y) for shape in see_image(image))
                upright = sorted((shape.y, image.height - 1 - shape.x) for shape in see(demo.root / path))
                np.testing.assert_allclose(as_stored, upright, atol=1)
                assert record["kind"] == "scene/left_or_right"
                turned["heldout" in path] += 1
    assert turned == {False: 1, True: 1}


# ---------------------------------------------------------------------------------------------------------------------
# Broken on purpose


def damage(file: Path, root: Path) -> str | None:
    """What is wrong with a medium, as opening it shows."""
    if not file.resolve().is_relative_to(root.resolve()):
        return "media_outside_root"
    if not file.exists():
        return "media_missing"
    if file.stat().st_size == 0:
        return "media_empty"
    try:
        decode(file.read_bytes()) if file.suffix == ".mp4" else Image.open(file).load()
    except (OSError, av.error.FFmpegError):
        return "media_unreadable"
    return None


def faults(root: Path, line: str) -> list[str]:
    """The reason codes of a line, worked out without the validator."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return ["bad_json"]
    if not isinstance(record, dict):
        return ["not_an_object"]
    text, paths = "".join(turns_of(record, "human")), media_of(record)
    codes = [code for path in dict.fromkeys(paths) if (code := damage(root / path, root))]
    if [turn["from"] for turn in record["conversations"]] != ["human", "gpt"]:
        codes.append("bad_turn_order")
    if "<|im_start|>" in text:
        codes.append("reserved_token")
    if text.count("<image>") + text.count("<video>") != len(paths):
        codes.append("tag_mismatch")
    assert [record["kind"]] == [f"broken/{code}" for code in codes]
    return codes


def test_broken_lines_have_the_one_fault_that_they_announce(demo: Demo) -> None:
    codes = [faults(demo.root, line) for line in demo.lines if is_broken(line)]
    assert all(len(of_line) == 1 for of_line in codes)
    assert Counter(code for (code,) in codes) == demo.summary.broken
    assert len(demo.summary.broken) >= 8
    assert np.ptp([i for i, line in enumerate(demo.lines) if is_broken(line)]) > 200, "spread over the file"


def test_validation_rejects_exactly_the_lines_that_are_broken_on_purpose(demo: Demo, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    arguments = [
        "validate",
        "--workers",
        "1",
        "--deep",
        str(demo.root / "annotations.jsonl"),
        "--rejects",
        str(rejects),
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    rejected = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    broken = [i for i, line in enumerate(demo.lines, start=1) if is_broken(line)]
    assert [reject["line"] for reject in rejected] == broken
    assert Counter(problem["code"] for reject in rejected for problem in reject["problems"]) == demo.summary.broken
    assert (
        CliRunner().invoke(main, ["validate", "--workers", "1", "--deep", str(demo.root / "heldout.jsonl")]).exit_code
        == 0
    )


def test_the_truncated_image_fails_only_when_it_is_decoded(demo: Demo) -> None:
    """Its header is intact, so probing the header accepts it, and decoding finds the loss later."""
    assert not (demo.root / MISSING_IMAGE).exists()
    assert (demo.root / EMPTY_IMAGE).read_bytes() == b""
    with Image.open(demo.root / TRUNCATED_IMAGE) as image:
        assert min(image.size) >= 112
        with pytest.raises(OSError, match="truncated"):
            image.load()
    with pytest.raises(av.error.FFmpegError):
        decode((demo.root / TRUNCATED_VIDEO).read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# Deterministic


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    """Writing again replaces the files of the dataset and leaves others alone."""
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_demo(tmp_path / name, seed=seed, num_annotations=40)
    first, second, third = (tree(tmp_path / name) for name in ("one", "two", "three"))
    assert first == second
    assert first["annotations.jsonl"] != third["annotations.jsonl"]
    (tmp_path / "two" / "annotations.jsonl").write_text("old")
    (tmp_path / "two" / "mine.txt").write_text("mine")
    write_demo(tmp_path / "two", seed=5, num_annotations=40)
    assert tree(tmp_path / "two") == first | {"mine.txt": b"mine"}


@pytest.mark.parametrize("size", [(224, 224), (240, 240), (320, 240)])
def test_the_same_video_is_encoded_to_the_same_bytes_every_time(size: tuple[int, int]) -> None:
    """Encoders have been seen to differ at widths that are no multiple of a processor's vectors."""
    video = replace(sample_video(generator(5, "test")), width=size[0], height=size[1], num_frames=24, fps=12)
    assert len({encode_video(video) for _ in range(12)}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Wrong use


def test_too_few_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 40 annotations, not 39"):
        write_demo(tmp_path, num_annotations=39)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path}: cannot create this folder"):
        write_demo(path)


def test_a_missing_pyav_is_named_with_its_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        write_demo(tmp_path)
    assert not list(tmp_path.iterdir())
