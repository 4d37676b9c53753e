"""The demo dataset: what a person sees in the media is what the answers say, and nothing else gives them away."""

from __future__ import annotations

import colorsys
import json
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner
from PIL import Image, ImageOps

from demo import DemoSummary, write_demo
from demo.broken import EMPTY_PICTURE, MISSING_PICTURE, TRUNCATED_CLIP, TRUNCATED_PICTURE
from demo.chart_questions import CHART_KINDS
from demo.charts import COLUMN_WIDTH, sample_chart
from demo.clip_questions import CLIP_KINDS
from demo.clips import encode_clip, sample_clip
from demo.dataset import Plan, plan_demo
from demo.kinds import allocate, balanced, generator
from demo.page_questions import PAGE_KINDS
from demo.pages import Table, sample_document
from demo.scene_questions import SCENE_KINDS
from demo.vocabulary import COLOUR_RGB, RGB
from prep.cli import main
from schemas.annotation import ReasonCode
from schemas.errors import ConfigError
from schemas.qwen import PATCH_SIZE

ANSWERS = {
    f"{family}/{kind.name}": kind.answers
    for family, kinds in (("scene", SCENE_KINDS), ("chart", CHART_KINDS), ("page", PAGE_KINDS), ("clip", CLIP_KINDS))
    for kind in kinds
}
Record = dict[str, Any]
Indices = npt.NDArray[np.signedinteger[Any]]


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
def plans() -> list[tuple[Plan, Plan]]:
    return [plan_demo(seed, num_train=390, num_held_out=80) for seed in range(5)]


def media_of(record: Record, media_type: str) -> list[str]:
    """The paths of one type, whichever field and form they have."""
    paths: list[str] = []
    for field in (media_type, f"{media_type}s"):
        value = record.get(field, [])
        paths += [value] if isinstance(value, str) else value
    return paths


def said(record: Record, role: str) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == role]


# ---------------------------------------------------------------------------------------------------------------------
# A reader that knows nothing of the generator: it looks at pixels.


@dataclass(frozen=True)
class Seen:
    colour: str
    shape: str
    x: float
    y: float


def name_colour(rgb: npt.NDArray[np.float64]) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.2:
        return "grey"
    degrees = hue * 360
    for end, name in ((20, "red"), (35, "orange"), (65, "yellow"), (170, "green"), (250, "blue"), (310, "purple")):
        if degrees < end:
            return name
    return "red"


def name_shape(ys: Indices, xs: Indices) -> str:
    """The outline as distance from the centre by angle: its strongest harmonic is the number of corners."""
    dy, dx = ys - ys.mean(), xs - xs.mean()
    bins = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 60).astype(int) % 60
    outline = np.zeros(60)
    np.maximum.at(outline, bins, np.hypot(dx, dy))
    harmonics = np.abs(np.fft.rfft(outline))[3:6] / outline.sum()
    corners = 3 + int(harmonics.argmax())
    return "circle" if harmonics.max() < 0.025 else {3: "triangle", 4: "square", 5: "star"}[corners]


def blobs(mask: npt.NDArray[np.bool_]) -> list[tuple[Indices, Indices]]:
    """The connected parts of a mask, as coordinates, without specks: labels spread to neighbours until none changes."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        spread = labels
        for y in (0, 1, 2):
            for x in (0, 1, 2):
                spread = np.maximum(spread, padded[y : y + mask.shape[0], x : x + mask.shape[1]])
        spread = np.where(mask, spread, 0)
        if (spread == labels).all():
            break
        labels = spread
    names, sizes = np.unique(labels[mask], return_counts=True)
    parts = [np.nonzero(labels == name) for name in names[sizes > 60]]
    return [(ys, xs) for ys, xs in parts]


def see_image(image: Image.Image) -> list[Seen]:
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    mask = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 25
    found = []
    for ys, xs in blobs(mask):
        middle = (slice(int(ys.mean()) - 3, int(ys.mean()) + 4), slice(int(xs.mean()) - 3, int(xs.mean()) + 4))
        colour = name_colour(np.median(pixels[middle].reshape(-1, 3), axis=0))
        found.append(Seen(colour, name_shape(ys, xs), float(xs.mean()), float(ys.mean())))
    return found


def see(path: Path) -> list[Seen]:
    """The shapes in a picture file, as a viewer shows it."""
    return see_image(ImageOps.exif_transpose(Image.open(path)))


def find(seen: list[Seen], name: str) -> Seen:
    (found,) = [thing for thing in seen if name in (thing.colour, thing.shape, f"{thing.colour} {thing.shape}")]
    return found


def count(seen: list[Seen], name: str) -> str:
    return str(sum(name in (thing.colour, thing.shape, f"{thing.shape}s", "shapes") for thing in seen))


def outermost(seen: list[Seen], side: str) -> str:
    key = {
        "leftmost": lambda thing: thing.x,
        "rightmost": lambda thing: -thing.x,
        "topmost": lambda thing: thing.y,
        "lowest": lambda thing: -thing.y,
    }[side]
    return min(seen, key=key).colour


Reading = Callable[[list[list[Seen]], "re.Match[str]"], str]
SCENE_READINGS: tuple[tuple[str, Reading], ...] = (
    (r"colour (?:is|does) the shape", lambda seen, _: seen[0][0].colour),
    (r"What shape is in the picture|Which shape do you see", lambda seen, _: seen[0][0].shape),
    (r"colour is the (leftmost|rightmost|topmost|lowest)", lambda seen, m: outermost(seen[0], m[1])),
    (r"colour is the (\w+)\?", lambda seen, m: find(seen[0], m[1]).colour),
    (r"[Ss]hape is (?:the )?(\w+)", lambda seen, m: find(seen[0], m[1]).shape),
    (r"How many (shapes|circles|squares|triangles|stars) ", lambda seen, m: count(seen[0], m[1])),
    (r"How many (\w+) shapes", lambda seen, m: count(seen[0], m[1])),
    (
        r"Is the (\w+ \w+) left or right of the (\w+ \w+)\?",
        lambda seen, m: "left" if find(seen[0], m[1]).x < find(seen[0], m[2]).x else "right",
    ),
    (
        r"Is the (\w+ \w+) above or below the (\w+ \w+)\?",
        lambda seen, m: "above" if find(seen[0], m[1]).y < find(seen[0], m[2]).y else "below",
    ),
    (
        r"Is there a (\w+ \w+)\?",
        lambda seen, m: "yes" if m[1] in [f"{thing.colour} {thing.shape}" for thing in seen[0]] else "no",
    ),
    (r"first or the second", lambda seen, _: "first" if len(seen[0]) > len(seen[1]) else "second"),
    (
        r"from left to right",
        lambda seen, _: ", ".join(f"a {t.colour} {t.shape}" for t in sorted(seen[0], key=lambda thing: thing.x)),
    ),
)


def read_scene(seen: list[list[Seen]], question: str) -> str:
    for pattern, answer in SCENE_READINGS:
        if match := re.search(pattern, question):
            value = answer(seen, match)
            options = dict(
                reversed(option) for option in re.findall(r"^([A-D])\. (\w+)$", question, flags=re.MULTILINE)
            )
            return options[value] if options else value
    raise AssertionError(f"no way to read {question!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Answers agree with pixels


def test_who_looks_at_a_scene_gives_the_answer(demo: Demo) -> None:
    """Every short English answer about scenes follows from the pixels of the stored files and the question."""
    checked: Counter[str] = Counter()
    for record in demo.good:
        questions, answers = said(record, "human"), said(record, "gpt")
        text = "".join(questions)
        if not record["kind"].startswith("scene/") or not text.isascii() or "full sentence" in text:
            continue
        if len(questions) == 1:
            seen = [see(demo.root / path) for path in media_of(record, "image")]
            assert read_scene(seen, questions[0]) == answers[0], record
            checked[record["kind"]] += 1
    assert set(checked) == {kind for kind in ANSWERS if kind.startswith("scene/")} - {
        "scene/conversation",
        "scene/two_in_turn",
    }
    assert sum(checked.values()) > 100


def test_conversations_about_a_scene_agree_with_the_pixels_in_every_turn(demo: Demo) -> None:
    checked = 0
    for record in demo.good:
        answers = said(record, "gpt")
        if record["kind"] not in ("scene/conversation", "scene/two_in_turn") or not answers[1].isascii():
            continue
        seen = [see(demo.root / path) for path in media_of(record, "image")]
        if record["kind"] == "scene/two_in_turn":
            assert answers == [seen[0][0].colour, seen[1][0].colour]
        else:
            left = min(seen[0], key=lambda thing: thing.x)
            assert re.search(r"\d", answers[0])[0] == str(len(seen[0]))  # type: ignore[index]
            assert answers[1:] == [left.colour, left.shape]
        checked += 1
    assert checked > 10


def colour_mask(image: Image.Image, rgb: RGB) -> npt.NDArray[np.bool_]:
    distance: npt.NDArray[np.int64] = np.abs(np.asarray(image).astype(int) - rgb).max(axis=-1)
    return distance < 12


def test_bars_are_as_high_as_their_values() -> None:
    rng = generator(0, "test")
    for _ in range(20):
        chart = sample_chart(rng, ("bar",))
        image = chart.draw()
        heights = [colour_mask(image, COLOUR_RGB[colour]).any(axis=1).sum() for colour in chart.colours]
        lefts = [np.nonzero(colour_mask(image, COLOUR_RGB[c]).any(axis=0))[0].min() for c in chart.colours]
        per_unit = np.array(heights) / np.array(chart.values)
        assert lefts == sorted(lefts)
        assert np.ptp(per_unit) * max(chart.values) < 0.15 * max(heights)
        assert np.argsort(heights).tolist() == np.argsort(chart.values).tolist()


@pytest.mark.parametrize("chart_type", ["bar", "line"])
def test_names_and_values_stand_above_what_they_belong_to(chart_type: str) -> None:
    """The value in the row of patches above a point, the name above that: another name changes pixels there alone."""
    rng = generator(2, "test")
    for _ in range(20):
        chart = sample_chart(rng, (chart_type,))
        column = int(rng.integers(len(chart.values)))
        x, y = chart.point(column)
        renamed = replace(chart, categories=(*chart.categories[:column], "ox", *chart.categories[column + 1 :]))
        changed = (np.asarray(chart.draw()) != np.asarray(renamed.draw())).any(axis=-1)
        rows, columns = np.nonzero(changed)
        assert (x % PATCH_SIZE, y % PATCH_SIZE) == (0, 0)
        assert x - COLUMN_WIDTH / 2 <= columns.min() and columns.max() < x + COLUMN_WIDTH / 2
        assert y - 2.5 * PATCH_SIZE <= rows.min() and rows.max() < y - PATCH_SIZE
        of_value = np.asarray(chart.draw())[y - PATCH_SIZE : y - 5, x - PATCH_SIZE : x + PATCH_SIZE]
        assert (of_value.max(axis=-1) < 128).sum() >= 10


def test_slices_are_as_large_as_their_values() -> None:
    rng = generator(0, "test")
    for _ in range(20):
        chart = sample_chart(rng, ("pie",))
        image = chart.draw().crop((0, 0, chart.height, chart.height))
        areas = np.array([colour_mask(image, COLOUR_RGB[colour]).sum() for colour in chart.colours])
        assert sum(chart.values) == 100
        np.testing.assert_allclose(areas / areas.sum() * 100, chart.values, atol=1.5)


def english_exchanges(plan: Plan, kind: str) -> list[tuple[Any, str, str]]:
    return [
        (annotation.draft.facts, exchange.question, exchange.answer)
        for annotation in plan.annotations
        if annotation.kind == kind and annotation.draft.wording.language == "en"
        for exchange in annotation.draft.dialogue.exchanges[:1]
    ]


def test_answers_about_charts_follow_from_their_values(plans: list[tuple[Plan, Plan]]) -> None:
    for plan in (part for parts in plans for part in parts):
        for (chart,), question, answer in english_exchanges(plan, "chart/value"):
            category = re.search(r"(?:for|does) (\w+)", question)[1]  # type: ignore[index]
            assert str(dict(zip(chart.categories, chart.values, strict=True))[category]) in answer
        for (chart,), question, answer in english_exchanges(plan, "chart/value_by_colour"):
            (colour,) = set(chart.colours) & set(re.findall(r"\w+", question))
            assert str(dict(zip(chart.colours, chart.values, strict=True))[colour]) in answer
        for (chart,), question, answer in english_exchanges(plan, "chart/category_by_colour"):
            (colour,) = set(chart.colours) & set(re.findall(r"\w+", question))
            assert dict(zip(chart.colours, chart.categories, strict=True))[colour] in answer
        for (chart,), question, answer in english_exchanges(plan, "chart/extreme"):
            best = (max if "highest" in question else min)(zip(chart.values, chart.categories, strict=True))
            assert answer.startswith(best[1])
        for (chart,), question, answer in english_exchanges(plan, "chart/higher"):
            one, other = re.search(r"for (\w+) higher than for (\w+)", question).groups()  # type: ignore[union-attr]
            values = dict(zip(chart.categories, chart.values, strict=True))
            assert answer.lower().startswith("yes" if values[one] > values[other] else "no")


def test_answers_about_documents_follow_from_their_pages(plans: list[tuple[Plan, Plan]]) -> None:
    for plan in (part for parts in plans for part in parts):
        for pages, question, answer in english_exchanges(plan, "page/title"):
            number = int(re.search(r"page (\d)", question)[1])  # type: ignore[index]
            assert pages[number - 1].title in answer
        for pages, question, answer in english_exchanges(plan, "page/page_of_title"):
            (page,) = [page for page in pages if f'"{page.title}"' in question]
            assert f"page {page.number}" in answer.lower()
        for pages, _, answer in english_exchanges(plan, "page/total"):
            (table,) = [page.figure for page in pages if isinstance(page.figure, Table)]
            assert str(sum(value for _, value in table.rows)) in answer


def test_what_stands_on_a_page_stays_clear_of_its_foot() -> None:
    """A chart or table that ran into the page number would hide an answer."""
    rng = generator(1, "test")
    for page in (page for _ in range(40) for page in sample_document(rng)):
        with_figure, without = (np.asarray(p.draw()) for p in (page, replace(page, figure=None)))
        assert (with_figure[-28:] == without[-28:]).all()
        assert (with_figure[:, -4:] == 255).all()


def decode(content: bytes) -> list[Image.Image]:
    with av.open(BytesIO(content), mode="r") as container:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


def test_moving_shapes_move_as_the_answers_say() -> None:
    """The direction is seen in the decoded first and last frames, after the codec."""
    rng = generator(2, "test")
    for _ in range(8):
        clip = sample_clip(rng, events=("moves",), max_shapes=1)
        frames = decode(encode_clip(clip))
        ((first,), (last,)) = see_image(frames[0]), see_image(frames[-1])
        step = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}[clip.actors[0].direction]
        moved = np.array([last.x - first.x, last.y - first.y])
        assert moved @ step > 60
        assert abs(moved @ step[::-1]) < 5
        assert first.colour == last.colour == clip.actors[0].figure.colour
        assert first.shape == clip.actors[0].figure.shape


@pytest.mark.parametrize("event", ["changes colour", "grows", "shrinks", "appears", "disappears"])
def test_what_changes_in_a_clip_is_seen_in_four_of_its_frames(event: str) -> None:
    clip = sample_clip(generator(3, event), events=(event,), max_shapes=1)
    frames = decode(encode_clip(clip))
    shown = [frames[i] for i in np.linspace(0, len(frames) - 1, 4, dtype=int)]
    colours = [[thing.colour for thing in see_image(frame)] for frame in shown]
    sizes = [(np.abs(np.asarray(frame).astype(int) - clip.background).max(axis=-1) > 40).sum() for frame in shown]
    before, after = clip.actors[0].figure.colour, clip.actors[0].end_colour
    expected = {
        "changes colour": [[before], [before], [after], [after]],
        "appears": [[], [], [before], [before]],
        "disappears": [[before], [before], [], []],
    }.get(event, [[before]] * 4)
    assert colours == expected
    assert (before != after) == (event == "changes colour")
    if event == "grows":
        assert sizes == sorted(sizes)
        assert sizes[-1] > 3 * sizes[0]
    if event == "shrinks":
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > 3 * sizes[-1]


def test_clips_have_the_frames_and_the_duration_they_claim(demo: Demo) -> None:
    paths = {path for record in demo.good for path in media_of(record, "video")}
    durations = []
    for path in sorted(paths):
        reader = decord.VideoReader(str(demo.root / path))
        duration_s = len(reader) / reader.get_avg_fps()
        durations.append(duration_s)
        assert duration_s == pytest.approx(round(duration_s), abs=1e-3)
        assert 2 <= duration_s <= 20
        assert len(reader) <= 80
        with av.open(str(demo.root / path)) as container:
            assert sum(1 for _ in container.decode(video=0)) == len(reader)
    assert min(durations) < 5 < 10 < max(durations)
    assert 15 <= len(paths) <= 30


def test_clips_are_encoded_without_x264_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    clip = sample_clip(generator(4, "test"))
    frames = decode(encode_clip(clip))
    assert len(frames) == clip.num_frames
    assert frames[0].size == (clip.width, clip.height)


# ---------------------------------------------------------------------------------------------------------------------
# Answers cannot be guessed


def test_every_answer_of_a_kind_is_given_equally_often(plans: list[tuple[Plan, Plan]]) -> None:
    assert all(len(answers) != 1 for answers in ANSWERS.values())
    for plan in (part for parts in plans for part in parts):
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for annotation in plan.annotations:
            values[annotation.kind][annotation.draft.dialogue.value] += 1
        for kind, answers in ANSWERS.items():
            if answers and kind in values:
                counts = [values[kind][answer] for answer in answers]
                assert max(counts) - min(counts) <= 1, kind
                assert set(values[kind]) <= set(answers), kind


def test_who_only_reads_the_questions_is_near_chance(plans: list[tuple[Plan, Plan]]) -> None:
    """The most usual training answer to the same words is right no more often than a guess."""
    hits, chances = [], []
    for train, held_out in plans:
        by_words: dict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
        for annotation in train.annotations:
            draft, value = annotation.draft, annotation.draft.dialogue.value
            words = (annotation.kind, draft.dialogue.exchanges[0].question, len(draft.facts))
            for key in (words, (annotation.kind, "", 0)):
                by_words[key][value] += 1
        for annotation in held_out.annotations:
            draft = annotation.draft
            if not ANSWERS.get(annotation.kind):
                continue
            key = (annotation.kind, draft.dialogue.exchanges[0].question, len(draft.facts))
            guesses = by_words.get(key, by_words[annotation.kind, "", 0])
            hits.append(guesses.most_common(1)[0][0] == draft.dialogue.value)
            chances.append(1 / len(ANSWERS[annotation.kind]))
    deviation = np.sqrt(np.sum([chance * (1 - chance) for chance in chances])) / len(chances)
    assert len(hits) > 200
    assert np.mean(hits) < np.mean(chances) + 3 * deviation
    assert np.mean(chances) < 0.35


def test_different_answers_have_different_words_in_both_languages(plans: list[tuple[Plan, Plan]]) -> None:
    words: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for annotation in (annotation for train, _ in plans for annotation in train.annotations):
        wording = annotation.draft.wording
        if ANSWERS.get(annotation.kind) and not wording.sentence and not annotation.kind.startswith("page/page_of"):
            exchange = annotation.draft.dialogue.exchanges[0]
            words[annotation.kind, wording.language][exchange.value].add(exchange.answer)
    for (kind, language), answers in words.items():
        texts = [text for found in answers.values() for text in found]
        assert all(len(found) == 1 for found in answers.values()), (kind, language, answers)
        assert len(set(texts)) == len(texts), (kind, language, answers)
        has_words = not any(text.isascii() for text in texts)
        if language == "zh" and kind in ("scene/colour", "scene/shape", "clip/direction", "chart/chart_type"):
            assert has_words, (kind, texts)


# ---------------------------------------------------------------------------------------------------------------------
# The two parts


def test_the_held_out_part_asks_the_same_kinds_of_questions_about_other_media(demo: Demo) -> None:
    train_kinds, held_out_kinds = ({record["kind"] for record in part} for part in (demo.train, demo.held_out))
    assert held_out_kinds <= train_kinds
    assert {kind for kind in train_kinds if not kind.startswith("clip/")} <= held_out_kinds

    def contents(part: list[Record]) -> set[bytes]:
        return {
            (demo.root / path).read_bytes() for r in part for kind in ("image", "video") for path in media_of(r, kind)
        }

    assert not contents(demo.train) & contents(demo.held_out)
    chats = [
        {tuple(said(r, "human")) for r in part if r["kind"].startswith("chat/")} for part in (demo.train, demo.held_out)
    ]
    assert not chats[0] & chats[1]


def test_counts_are_those_of_the_files(demo: Demo) -> None:
    assert len(demo.lines) == demo.summary.num_annotations == 400
    assert len(demo.held_out) == demo.summary.num_held_out == 80
    assert Counter(record["kind"] for record in demo.train) == demo.summary.train
    assert Counter(record["kind"] for record in demo.held_out) == demo.summary.held_out
    assert sum(map(is_broken, demo.lines)) == sum(demo.summary.broken.values()) == 10
    assert len(list((demo.root / "images").iterdir())) == demo.summary.num_images
    assert len(list((demo.root / "videos").iterdir())) == demo.summary.num_videos
    size = sum(path.stat().st_size for folder in ("images", "videos") for path in (demo.root / folder).iterdir())
    assert size == demo.summary.media_bytes < 30e6
    assert "400 annotations for training: 55 chart, 70 chat, " in str(demo.summary)
    scenes = sum(count for kind, count in demo.summary.train.items() if kind.startswith("scene/"))
    assert 0.45 < scenes / 400 < 0.55


@pytest.mark.parametrize(("num", "seed"), [(40, 0), (57, 1), (203, 2)])
def test_any_number_of_annotations_is_planned_exactly(num: int, seed: int) -> None:
    train, held_out = plan_demo(seed, num_train=num, num_held_out=num // 5)
    assert (len(train.annotations), len(held_out.annotations)) == (num, num // 5)
    assert sum(train.counts().values()) == num


# ---------------------------------------------------------------------------------------------------------------------
# Records and files


def test_good_records_have_a_tag_for_every_medium_and_a_file_for_every_path(demo: Demo) -> None:
    for record in demo.good:
        human, answers = said(record, "human"), said(record, "gpt")
        for media_type in ("image", "video"):
            paths = media_of(record, media_type)
            assert sum(text.count(f"<{media_type}>") for text in human) == len(paths), record
            assert all((demo.root / path).stat().st_size > 0 for path in paths)
        roles = [turn["from"] for turn in record["conversations"]]
        start = 1 if roles[0] == "system" else 0
        assert roles[start:] == ["human", "gpt"] * len(answers), record
        assert all(turn["value"].strip() and "<|" not in turn["value"] for turn in record["conversations"])
        assert not any("<image>" in text or "<video>" in text for text in answers)


def test_identifiers_are_unique(demo: Demo) -> None:
    identifiers = [record["id"] for record in demo.good]
    assert len(set(identifiers)) == len(identifiers)
    assert all(re.fullmatch(r"demo-(heldout-)?(scene|chart|page|clip|chat)-\d{5}", name) for name in identifiers)


def test_records_vary_as_those_of_real_datasets_do(demo: Demo) -> None:
    fields = {
        (field, type(record[field])) for record in demo.train for field in record if field[:5] in ("image", "video")
    }
    assert fields >= {("image", str), ("image", list), ("images", list), ("video", str), ("videos", list)}
    firsts = [said(record, "human")[0] for record in demo.train if media_of(record, "image")]
    places = {
        "start": sum(text.startswith("<image>") for text in firsts),
        "end": sum(text.endswith("<image>") for text in firsts),
        "middle": sum(not text.startswith("<image>") and not text.endswith("<image>") for text in firsts),
    }
    assert min(places.values()) > 20
    languages = Counter(all(turn["value"].isascii() for turn in record["conversations"]) for record in demo.train)
    assert 0.1 < languages[False] / len(demo.train) < 0.35
    turns = Counter(len(said(record, "human")) for record in demo.train)
    assert turns[1] > 250
    assert sum(turns[num] for num in (2, 3)) > 30
    assert any(record["conversations"][0]["from"] == "system" for record in demo.train)
    assert any(media_of(record, "image") and media_of(record, "video") for record in demo.train)
    assert any(len(media_of(record, "image")) == 4 for record in demo.train)
    assert any("\nassistant: " in text for record in demo.train for text in said(record, "human"))


def test_pictures_come_in_all_formats_and_modes_and_stay_small(demo: Demo) -> None:
    stored, turned = Counter[tuple[str | None, str]](), 0
    for path in {path for record in demo.train for path in media_of(record, "image")}:
        with Image.open(demo.root / path) as image:
            stored[image.format, image.mode] += 1
            turned += image.getexif().get(0x0112, 1) != 1
            assert 112 <= min(image.size) <= max(image.size) <= 448
    assert set(stored) == {
        ("PNG", "RGB"), ("PNG", "L"), ("PNG", "P"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("JPEG", "L"), ("WEBP", "RGB"),
    }  # fmt: skip
    assert turned == 1


def test_who_ignores_the_exif_orientation_takes_up_for_left(demo: Demo) -> None:
    turned = 0
    for record in demo.good:
        for path in media_of(record, "image"):
            with Image.open(demo.root / path) as image:
                if image.getexif().get(0x0112, 1) == 1:
                    continue
                as_stored = sorted((thing.x, thing.y) for thing in see_image(image))
                upright = sorted((thing.y, image.height - 1 - thing.x) for thing in see(demo.root / path))
                np.testing.assert_allclose(as_stored, upright, atol=1)
                assert record["kind"] == "scene/left_or_right"
                turned += 1
    assert turned == 2


def test_media_are_stored_once_however_many_annotations_use_them(demo: Demo) -> None:
    uses = Counter(path for record in demo.train for kind in ("image", "video") for path in media_of(record, kind))
    assert any(path.startswith("images/page") for path, num in uses.items() if num > 1)
    assert any(path.startswith("videos/") for path, num in uses.items() if num > 1)
    contents = [(demo.root / path).read_bytes() for path in uses if not path.startswith("images/broken")]
    assert len(set(contents)) == len(contents)


# ---------------------------------------------------------------------------------------------------------------------
# Broken on purpose


def test_broken_lines_are_broken_in_the_way_they_are_announced(demo: Demo) -> None:
    broken = [line for line in demo.lines if is_broken(line)]
    assert set(demo.summary.broken) <= {code.value for code in ReasonCode}
    found: Counter[str] = Counter()
    for line in broken:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            found["bad_json"] += 1
            continue
        if not isinstance(record, dict):
            found["not_an_object"] += 1
            continue
        roles = [turn["from"] for turn in record["conversations"]]
        text = "".join(said(record, "human"))
        paths = media_of(record, "image") + media_of(record, "video")
        problems = []
        if roles != ["human", "gpt"]:
            problems.append("bad_turn_order")
        if "<|im_start|>" in text:
            problems.append("reserved_token")
        if text.count("<image>") + text.count("<video>") != len(paths):
            problems.append("tag_mismatch")
        for path in dict.fromkeys(paths):
            problems += damage(demo.root, path)
        assert len(problems) == 1, (record, problems)
        assert record["kind"] == f"broken/{problems[0]}"
        found.update(problems)
    assert found == demo.summary.broken


def test_validation_rejects_exactly_the_lines_that_are_broken_on_purpose(demo: Demo, tmp_path: Path) -> None:
    rejects = tmp_path / "rejects.jsonl"
    arguments = ["validate", "--deep", str(demo.root / "annotations.jsonl"), "--rejects", str(rejects)]
    assert CliRunner().invoke(main, arguments).exit_code == 1
    found = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
    assert [reject["line"] for reject in found] == [i for i, line in enumerate(demo.lines, start=1) if is_broken(line)]
    assert Counter(problem["code"] for reject in found for problem in reject["problems"]) == demo.summary.broken
    assert CliRunner().invoke(main, ["validate", "--deep", str(demo.root / "heldout.jsonl")]).exit_code == 0


def damage(root: Path, path: str) -> list[str]:
    """What is wrong with a medium, found by opening it."""
    file = root / path
    if not file.resolve().is_relative_to(root.resolve()):
        return ["media_outside_root"]
    if not file.exists():
        return ["media_missing"]
    if file.stat().st_size == 0:
        return ["media_empty"]
    try:
        if path.endswith(".mp4"):
            decode(file.read_bytes())
        else:
            Image.open(file).load()
    except (OSError, av.error.FFmpegError):
        return ["media_unreadable"]
    return []


def test_the_truncated_picture_shows_only_when_it_is_decoded(demo: Demo) -> None:
    """Its header is whole, so that measuring by headers lets it pass and the loss is found later."""
    assert not (demo.root / MISSING_PICTURE).exists()
    assert (demo.root / EMPTY_PICTURE).read_bytes() == b""
    with Image.open(demo.root / TRUNCATED_PICTURE) as image:
        assert min(image.size) >= 112
        with pytest.raises(OSError, match="truncated"):
            image.load()
    with pytest.raises(av.error.FFmpegError):
        decode((demo.root / TRUNCATED_CLIP).read_bytes())


def test_broken_lines_do_not_stand_together(demo: Demo) -> None:
    places = [i for i, line in enumerate(demo.lines) if is_broken(line)]
    assert np.ptp(places) > 200


# ---------------------------------------------------------------------------------------------------------------------
# Deterministic


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_demo(tmp_path / name, seed=seed, num_annotations=60)
    one, two, three = (tree(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert one["annotations.jsonl"] != three["annotations.jsonl"]


def test_writing_again_replaces_the_files_and_leaves_others_alone(tmp_path: Path) -> None:
    write_demo(tmp_path, num_annotations=40)
    before = tree(tmp_path)
    (tmp_path / "annotations.jsonl").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    write_demo(tmp_path, num_annotations=40)
    assert tree(tmp_path) == before | {"mine.txt": b"mine"}


@pytest.mark.parametrize("size", [(224, 224), (240, 240), (320, 240)])
def test_the_same_clip_is_encoded_to_the_same_bytes_every_time(size: tuple[int, int]) -> None:
    """Widths that are no multiple of a processor's vectors are those where encoders have been seen to differ."""
    clip = sample_clip(generator(5, "test"))
    clip = replace(clip, width=size[0], height=size[1], duration_s=2, fps=12)
    assert len({encode_clip(clip) for _ in range(12)}) == 1


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib; from demo.dataset import plan_demo; plan = plan_demo(0, num_train=60, num_held_out=12);"
        "print(hashlib.sha256(repr(plan).encode()).hexdigest())"
    )
    root = Path(__file__).parents[2]
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1


def test_balanced_gives_every_answer_as_often_as_the_others() -> None:
    answers = balanced(generator(0, "test"), ("a", "b", "c"), 11)
    assert sorted(Counter(answers).values()) == [3, 4, 4]


@pytest.mark.parametrize("num", [0, 2, 3, 7, 100])
def test_allocate_gives_away_exactly_what_there_is(num: int) -> None:
    counts = allocate(num, [5, 1, 3])
    assert sum(counts) == num
    assert min(counts) >= (1 if num >= 3 else 0)


def test_allocate_follows_the_weights() -> None:
    """12 = one each + 9 in the ratio 5:1:3."""
    assert allocate(12, [5, 1, 3]) == [6, 2, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong use


def test_too_few_annotations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 40 annotations, not 39"):
        write_demo(tmp_path, num_annotations=39)
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    with pytest.raises(ConfigError, match=f"{path}: cannot be made a folder"):
        write_demo(path)


def test_without_pyav_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        write_demo(tmp_path)
    assert not list(tmp_path.iterdir())
