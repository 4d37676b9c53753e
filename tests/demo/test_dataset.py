"""The demo dataset: its answers are what a person sees in the media, and nothing else reveals them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
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
    Planned,
    plan_demo,
)
from demo.kinds import Draft, allocate, balanced, generator
from demo.pages import sample_document
from demo.videos import STEPS, encode_video, sample_video
from prep.cli import main
from schemas.errors import ConfigError
from tests.demo.seeing import Seen, see, see_image

Record = dict[str, Any]
Parts = tuple[list[Planned], list[Planned]]


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


@pytest.fixture(scope="module")
def plans() -> list[Parts]:
    return [(plan_demo(seed, 390, held_out=False), plan_demo(seed, 80, held_out=True)) for seed in range(5)]


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
    one, other = re.search(r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?", question).groups()  # type: ignore[union-attr]
    return "left" if x[one] < x[other] else "right"


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


def drafts_of(plans: list[Parts], kind: str) -> list[Draft]:
    """The English drafts of a kind, of all seeds and parts."""
    drafts = [draft for parts in plans for part in parts for draft, _ in part]
    return [draft for draft in drafts if draft.kind.name == kind and draft.wording.language == "en"]


def test_answers_about_documents_follow_from_their_pages(plans: list[Parts]) -> None:
    drafts = drafts_of(plans, "page/title")
    assert len(drafts) > 150
    for draft in drafts:
        for exchange in draft.exchanges:
            number = int(re.search(r"page (\d)", exchange.question)[1])  # type: ignore[index]
            assert draft.facts[number - 1].title == exchange.answer
            assert draft.facts[number - 1].number == number


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


def test_answers_about_videos_follow_from_their_facts(plans: list[Parts]) -> None:
    for draft in drafts_of(plans, "video/event"):
        assert draft.exchanges[0].answer == draft.facts[0].event
    drafts = drafts_of(plans, "video/same_colour")
    assert len(drafts) > 10
    for draft in drafts:
        video, scene = draft.facts
        assert draft.exchanges[0].answer == ("yes" if video.start.colour == scene.figures[0].colour else "no")
        assert video.start.colour == video.end.colour


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
# Answers cannot be guessed


def test_all_answers_of_a_kind_are_equally_frequent(plans: list[Parts]) -> None:
    assert all(len(kind.answers) != 1 for kind in KINDS)
    for part in (part for parts in plans for part in parts):
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for draft, _ in part:
            values[draft.kind.name][draft.exchanges[0].value] += 1
        for kind in (kind for kind in KINDS if kind.answers):
            counts = [values[kind.name][answer] for answer in kind.answers]
            assert max(counts) - min(counts) <= 1, kind.name
            assert set(values[kind.name]) <= set(kind.answers), kind.name


def test_the_text_of_a_question_does_not_reveal_its_answer(plans: list[Parts]) -> None:
    """The most frequent training answer to the same words is right no more often than a guess.

    A kind without balanced answers has so many that a guess is right 1 of 20 times at most.
    """
    hits, chances = [], []
    for train, held_out in plans:
        by_words: dict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
        for draft, _ in train:
            kind, first = draft.kind.name, draft.exchanges[0]
            for key in ((kind, first.question, len(draft.facts)), (kind, "", 0)):
                by_words[key][first.value] += 1
        for draft in (draft for draft, _ in held_out if draft.facts):
            kind, first = draft.kind.name, draft.exchanges[0]
            guesses = by_words.get((kind, first.question, len(draft.facts)), by_words[kind, "", 0])
            hits.append(guesses.most_common(1)[0][0] == first.value)
            chances.append(1 / (len(draft.kind.answers) or 20))
    deviation = np.sqrt(np.sum([chance * (1 - chance) for chance in chances])) / len(chances)
    assert len(hits) > 200
    assert np.mean(hits) < np.mean(chances) + 3 * deviation
    assert np.mean(chances) < 0.35


def test_different_answers_have_different_words_in_both_languages(plans: list[Parts]) -> None:
    words: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for draft in (draft for train, _ in plans for draft, _ in train):
        if draft.kind.answers and not draft.wording.sentence:
            exchange = draft.exchanges[0]
            words[draft.kind.name, draft.wording.language][exchange.value].add(exchange.answer)
    for (name, language), answers in words.items():
        texts = [text for phrasings in answers.values() for text in phrasings]
        assert len(set(texts)) == len(texts) == len(answers), (name, language, answers)
        if language == "zh" and name != "scene/count":
            assert not any(text.isascii() for text in texts), (name, texts)
    assert {language for _, language in words} == {"en", "zh"}


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


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (57, 1), (203, 2)])
def test_any_number_of_annotations_is_planned_exactly(count: int, seed: int) -> None:
    assert len(plan_demo(seed, count, held_out=False)) == count
    assert len(plan_demo(seed, count // 5, held_out=True)) == count // 5


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
    arguments = ["validate", "--deep", str(demo.root / "annotations.jsonl"), "--rejects", str(rejects)]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    rejected = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    broken = [i for i, line in enumerate(demo.lines, start=1) if is_broken(line)]
    assert [reject["line"] for reject in rejected] == broken
    assert Counter(problem["code"] for reject in rejected for problem in reject["problems"]) == demo.summary.broken
    assert CliRunner().invoke(main, ["validate", "--deep", str(demo.root / "heldout.jsonl")]).exit_code == 0


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
    one, two, three = (tree(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["annotations.jsonl"] != three["annotations.jsonl"]
    (tmp_path / "two" / "annotations.jsonl").write_text("old")
    (tmp_path / "two" / "mine.txt").write_text("mine")
    write_demo(tmp_path / "two", seed=5, num_annotations=40)
    assert tree(tmp_path / "two") == one | {"mine.txt": b"mine"}


@pytest.mark.parametrize("size", [(224, 224), (240, 240), (320, 240)])
def test_the_same_video_is_encoded_to_the_same_bytes_every_time(size: tuple[int, int]) -> None:
    """Encoders have been seen to differ at widths that are no multiple of a processor's vectors."""
    video = replace(sample_video(generator(5, "test")), width=size[0], height=size[1], num_frames=24, fps=12)
    assert len({encode_video(video) for _ in range(12)}) == 1


@pytest.mark.slow
def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib; from demo.dataset import plan_demo; plan = plan_demo(0, 60, held_out=False);"
        "facts = [(draft.facts, draft.exchanges, encoding) for draft, encoding in plan];"
        "print(hashlib.sha256(repr(facts).encode()).hexdigest())"
    )
    environments = [{"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])} for seed in ("1", "2")]
    one, two = (subprocess.check_output([sys.executable, "-c", code], env=env, text=True) for env in environments)
    assert one == two


def test_balanced_answers_are_equally_frequent() -> None:
    answers = balanced(generator(0, "test"), ("a", "b", "c"), 11)
    assert sorted(Counter(answers).values()) == [3, 4, 4]


@pytest.mark.parametrize("count", [0, 2, 3, 7, 100])
def test_allocate_distributes_exactly_the_count(count: int) -> None:
    counts = allocate(count, [5, 1, 3])
    assert sum(counts) == count
    assert min(counts) >= (1 if count >= 3 else 0)


def test_allocate_follows_the_weights() -> None:
    """12 = one each + 9 in the ratio 5:1:3."""
    assert allocate(12, [5, 1, 3]) == [6, 2, 4]


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
