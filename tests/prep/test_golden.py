"""From annotation file to the bytes of a bin, against an implementation that shares no code with the program.

Token ids come from the checkpoint's chat template and its tokenizer, run live. Labels come from the positions of the
answers in the rendered text. Positions of images and text come from the model's own ``get_rope_index``, those of videos
from a few lines that follow its original definition. Pixels come from the Pillow image processor, for videos over
frames that PyAV decodes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ExifTags import Base as ExifTag
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from demo.tiny_model import tiny_config
from schemas.qwen import IM_END, IMAGE_PAD, VIDEO_PAD
from schemas.settings import BuildSettings, MediaSettings
from tests.prep.finished import build_set
from tests.prep.packed import Packed, packed_samples
from tests.prep.test_images import MODES, random_image, reference_pixel_values
from tests.prep.test_videos import rotate_video, write_video

pytestmark = pytest.mark.slow

# Images have the default bounds, which `reference_pixel_values` uses. Videos have small ones, for speed.
MEDIA = MediaSettings(video_min_frame_pixels=4 * 784, video_max_frame_pixels=30 * 784)
SETTINGS = BuildSettings(media=MEDIA, max_length=4096, shard_bytes=4_000_000)

SIZES = [(28, 28), (1, 1), (640, 480), (57, 2000), (1100, 900), (199, 1)]

VIDEOS = {  # frames, frames a second, interval 4 s: how many are sampled
    "one": (1, 5),  # 1 frame, repeated
    "three": (3, 1),  # fewer than the least, odd
    "four": (75, 5),  # 15 s: 4
    "five": (60, 3),  # 20 s: 5, odd
    "seven": (56, 2),  # 28 s: 7, odd
    "eight": (76, 1),  # 76 s: at most 8, steps of 19 s
}

LANGUAGES = {
    "english": ("<image>\nWhat is in the picture?", "It's a cat; isn't it? They'll say 1,234.5 dollars."),
    "chinese": ("请描述这张图片。<image>", "图片里有一只猫,正在睡觉。\n\n它很可爱!"),
    "japanese": ("<image>この写真に写っているものは何ですか?", "カタカナとひらがな、漢字が混ざった文です。"),
    "korean": ("이 사진을 설명해 주세요 <image>", "고양이가 자고 있습니다."),
    "arabic": ("ما الذي يظهر في الصورة؟ <image>", "قطة نائمة على السرير."),
    "hebrew": ("<image>מה רואים בתמונה?", "חתול ישן."),
    "hindi": ("<image>\nइस चित्र में क्या है?", "एक बिल्ली सो रही है।"),
    "thai": ("ภาพนี้คืออะไร<image>", "แมวกำลังนอนหลับ"),
    "russian": ("Что на картинке?\n<image>\n", "Кот спит."),
    "vietnamese": ("<image> Bức ảnh này là gì?", "Một con mèo đang ngủ. e\u0301 o\u0302\u0323"),
    "emoji": ("👩🏽‍💻🇪🇺 <image> 👨‍👩‍👧‍👦", "🐈‍⬛💤\ufe0f"),
    "code": ("<image>\n```python\nif x < 3:\n\treturn '<b>'\r\n```", "\n\n\tdef f():\n        return None\n\n\n"),
    "mathematics": ("$\\frac{a}{b} \\le ∑_{i=0}^{n} x_i²$ <image>", "≈ 3.14159 × 10⁻⁷"),
    "spaces": ("   <image>   ", "   leading and trailing\u00a0\u3000  "),
    "markers": ("user\nassistant\n<|nothing|> <image><tool_call>", "assistant\nassistant</tool_call>"),
}


@dataclass(frozen=True)
class Case:
    """An annotation: its turns, and its images and videos in order."""

    turns: list[tuple[str, str]]
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()

    def record(self, identity: str) -> dict[str, Any]:
        conversations = [{"from": role, "value": value} for role, value in self.turns]
        return {"id": identity, "images": self.images, "videos": self.videos, "conversations": conversations}


def one_image(name: str, question: str = "<image>\nWhat is this?", answer: str = "A picture.") -> Case:
    return Case([("human", question), ("gpt", answer)], images=(name,))


def write_media(folder: Path) -> dict[str, Case]:
    """Write the media of all cases; return the cases by id."""
    cases: dict[str, Case] = {}
    for mode in MODES:
        for width, height in SIZES:
            name = f"{mode}-{width}x{height}.{'tif' if mode == 'CMYK' else 'png'}"
            random_image(width, height, mode, seed=len(cases)).save(folder / name)
            cases[f"image {name}"] = one_image(name)
    for orientation in range(1, 9):
        for kind in ("jpg", "png", "webp", "tif"):
            name = f"turned-{orientation}.{kind}"
            exif = Image.Exif()
            exif[ExifTag.Orientation] = orientation
            random_image(300, 120, seed=orientation).save(folder / name, exif=exif)
            cases[f"image {name}"] = one_image(name)
    random_image(120, 90, seed=9).convert("P", palette=Image.Palette.ADAPTIVE, colors=9).save(
        folder / "hole.png", transparency=2
    )
    cases["image hole.png"] = one_image("hole.png")
    for kind in ("jpg", "webp", "gif", "bmp", "jp2"):
        random_image(250, 130, seed=3).save(folder / f"kind.{kind}")
        cases[f"image kind.{kind}"] = one_image(f"kind.{kind}")
    a, b, c = "RGB-28x28.png", "turned-6.jpg", "RGBA-1x1.png"
    for language, (question, answer) in LANGUAGES.items():
        cases[f"language {language}"] = one_image(a, question, answer)
    cases["text"] = Case([("human", "Hi"), ("gpt", "Hello!")])
    cases["text with system"] = Case([("system", " Be brief.\n"), ("human", "Hi"), ("gpt", "\nHello!")])
    cases["several"] = Case([("human", "First <image>, then <image><image>: same?"), ("gpt", "No.")], images=(a, b, c))
    cases["turns"] = Case(
        [
            ("system", "You see <nothing>."),
            ("human", "<image>\nWhat?"),
            ("gpt", "A cat."),
            ("human", "And in <image>?"),
            ("gpt", "猫"),
            ("human", "Sure?"),
            ("gpt", "Yes.\n"),
            ("human", "<image>"),
            ("gpt", "No."),
        ],
        images=(b, a, c),
    )
    for name, (num_frames, fps) in VIDEOS.items():
        write_video(folder / f"{name}.mp4", num_frames, fps, width=64 + 10 * len(name), height=48)
        cases[f"video {name}"] = Case(
            [("human", "<video>\nWhat happens?"), ("gpt", "It gets brighter.")], videos=(f"{name}.mp4",)
        )
    write_video(folder / "turned.mp4", 20, 1, width=96, height=64)
    rotate_video(folder / "turned.mp4", 90)
    cases["video turned"] = Case([("human", "Look: <video>"), ("gpt", "Up.")], videos=("turned.mp4",))
    cases["videos and images"] = Case(
        [
            ("human", "<video>, <image> and <video>: which is longer?"),
            ("gpt", "第二个。"),
            ("human", "And <image><video>?"),
            ("gpt", "Neither."),
        ],
        images=(a, b),
        videos=("eight.mp4", "five.mp4", "one.mp4"),
    )
    return cases


@dataclass(frozen=True)
class Expected:
    """A sample of the independent implementation; ``kinds`` and ``grids`` of the media in sequence order."""

    input_ids: list[int]
    labels: list[int]
    position_ids: NDArray[np.int64]
    kinds: list[int]
    grids: list[tuple[int, int, int]]
    pixel_values: NDArray[np.float32]


class Reference:
    """The independent implementation."""

    def __init__(self, checkpoint: Path, folder: Path) -> None:
        self.folder = folder
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(checkpoint)
        with torch.device("meta"):
            self.model = Qwen2_5_VLModel(tiny_config())
        self.frames = Qwen2VLImageProcessorPil(
            size={"shortest_edge": MEDIA.video_min_frame_pixels, "longest_edge": MEDIA.video_max_frame_pixels}
        )

    def sample(self, case: Case) -> Expected:
        images, videos = iter(case.images), iter(case.videos)
        tags = [tag for role, value in case.turns if role == "human" for tag in re.findall("<(image|video)>", value)]
        kinds = [int(tag == "video") for tag in tags]
        media = [self.video(next(videos)) if kind else self.image(next(images)) for kind in kinds]
        assert next(images, None) is None and next(videos, None) is None
        grids = [grid for _, grid, _ in media]
        ids, labels = self.text(case.turns, [t * h * w // 4 for t, h, w in grids])
        return Expected(
            input_ids=ids,
            labels=labels,
            position_ids=self.positions(ids, kinds, grids, [seconds for _, _, seconds in media]),
            kinds=kinds,
            grids=grids,
            pixel_values=np.concatenate([values for values, _, _ in media] or [np.empty((0, 1176), dtype=np.float32)]),
        )

    def image(self, name: str) -> tuple[NDArray[np.float32], tuple[int, int, int], float]:
        with Image.open(self.folder / name) as image:
            values, (t, h, w) = reference_pixel_values(image)
        return values, (t, h, w), 0.0

    def video(self, name: str) -> tuple[NDArray[np.float32], tuple[int, int, int], float]:
        with av.open(str(self.folder / name)) as container:
            stream = container.streams.video[0]
            frames = [
                np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90) for frame in container.decode(stream)
            ]
            duration_s = len(frames) / float(stream.average_rate)
        num_frames = min(max(round(duration_s / 4), 4), 8)
        sampled = sorted({int(index) for index in np.linspace(0, len(frames) - 1, num_frames)})
        shown = [Image.fromarray(np.ascontiguousarray(frames[index])) for index in sampled]
        shown += shown[-1:] * (len(shown) % 2)
        processed = self.frames(images=shown, return_tensors="np")
        _, h, w = processed["image_grid_thw"][0].tolist()
        # A row of an image has its frame twice. A temporal step of a video has two frames.
        halves = processed["pixel_values"].reshape(len(shown) // 2, 2, h * w, 3, 2, 196)
        values = np.stack([halves[:, 0, :, :, 0], halves[:, 1, :, :, 1]], axis=3).reshape(-1, 1176)
        return values, (len(shown) // 2, h, w), 2 * duration_s / len(sampled)

    def text(self, turns: list[tuple[str, str]], num_pads: list[int]) -> tuple[list[int], list[int]]:
        """Ids of the rendered conversation, and labels from the positions of the answers in it."""
        roles = {"human": "user", "gpt": "assistant", "system": "system"}
        messages = [{"role": roles[role], "content": list(parts(role, value))} for role, value in turns]

        def rendered(count: int, ask: bool = False) -> str:
            text = self.tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=ask)
            pads = iter(num_pads)
            return re.sub(r"<\|(?:image|video)_pad\|>", lambda match: match.group() * next(pads), text)

        text = rendered(len(messages))
        spans = [
            (len(rendered(index, ask=True)), len(rendered(index + 1)))
            for index, (role, _) in enumerate(turns)
            if role == "gpt"
        ]
        for start, stop in spans:
            assert text[:start].endswith("<|im_start|>assistant\n")
            assert text[start:stop].endswith("<|im_end|>\n")
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        # A token that joins the header's newline with newlines of the answer counts as the answer's.
        trained = [any(start < end <= stop for start, stop in spans) for _, end in encoded["offset_mapping"]]
        return ids, [token if target else -100 for token, target in zip(ids, trained)]

    def positions(
        self, ids: list[int], kinds: list[int], grids: list[tuple[int, int, int]], seconds: list[float]
    ) -> NDArray[np.int64]:
        if any(kinds):
            return original_positions(ids, grids, seconds)
        tensor = torch.tensor(ids)[None]
        rope, _ = self.model.get_rope_index(
            input_ids=tensor,
            mm_token_type_ids=(tensor == IMAGE_PAD).int(),
            image_grid_thw=torch.tensor(grids) if grids else None,
            attention_mask=torch.ones_like(tensor),
        )
        positions: NDArray[np.int64] = rope[:, 0].numpy()
        assert np.array_equal(positions, original_positions(ids, grids, seconds))
        return positions


def parts(role: str, value: str) -> Iterator[dict[str, str]]:
    """A turn as content parts."""
    pieces = re.split("<(image|video)>", value) if role == "human" else [value]
    for index, piece in enumerate(pieces):
        if index % 2:
            yield {"type": piece, piece: "x"}
        elif piece:
            yield {"type": "text", "text": piece}


def original_positions(ids: list[int], grids: list[tuple[int, int, int]], seconds: list[float]) -> NDArray[np.int64]:
    """Token by token, as transformers 4.49 defines it: the text after a medium continues after its largest index."""
    positions: list[tuple[int, int, int]] = []
    media = iter(zip(grids, seconds))
    at, following = 0, 0
    while len(positions) < len(ids):
        if ids[at] not in (IMAGE_PAD, VIDEO_PAD):
            positions.append((following,) * 3)
        else:
            (t, h, w), step_s = next(media)
            for step in range(t):
                for row in range(h // 2):
                    for column in range(w // 2):
                        # 2 positions per second
                        offsets = (int(step * step_s * 2), row, column)
                        positions.append(tuple(following + offset for offset in offsets))  # type: ignore[arg-type]
        following = 1 + max(max(position) for position in positions[at:])
        at = len(positions)
    return np.asarray(positions).T


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Case]]:
    folder = tmp_path_factory.mktemp("golden")
    cases = write_media(folder)
    lines = [json.dumps(case.record(name), ensure_ascii=False) for name, case in cases.items()]
    (folder / "annotations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "annotations.jsonl", cases


@pytest.fixture(scope="module")
def expected(corpus: tuple[Path, dict[str, Case]], tiny_checkpoint: Path) -> dict[str, Expected]:
    reference = Reference(tiny_checkpoint, corpus[0].parent)
    return {name: reference.sample(case) for name, case in corpus[1].items()}


@pytest.fixture(scope="module", params=["zstd", "raw"])
def packed(
    request: pytest.FixtureRequest,
    corpus: tuple[Path, dict[str, Case]],
    tmp_path_factory: pytest.TempPathFactory,
    tiny_checkpoint: Path,
) -> dict[str, list[Packed]]:
    settings = BuildSettings(
        media=MEDIA, max_length=SETTINGS.max_length, shard_bytes=SETTINGS.shard_bytes, pixels=request.param
    )
    return packed_samples(build_set(corpus[0], tmp_path_factory.mktemp("golden-set"), tiny_checkpoint, settings))


def test_bins_hold_what_the_reference_implementation_gives(
    packed: dict[str, list[Packed]], expected: dict[str, Expected]
) -> None:
    """Ids, labels, positions and grids are equal; pixel values are exactly equal."""
    for name, reference in expected.items():
        (sample,) = packed[name]
        assert sample.input_ids.tolist() == reference.input_ids, name
        assert sample.labels.tolist() == reference.labels, name
        assert np.array_equal(sample.position_ids, reference.position_ids), name
        assert [(kind, grid) for kind, grid, _ in sample.media] == list(zip(reference.kinds, reference.grids)), name
        if sample.media:
            values = sample.pixel_values()
            assert values.dtype == reference.pixel_values.dtype == np.float32, name
            assert values.shape == reference.pixel_values.shape, name
            assert np.abs(values - reference.pixel_values).max() == 0.0, name


def test_the_cases_are_as_different_as_they_say(
    corpus: tuple[Path, dict[str, Case]], expected: dict[str, Expected]
) -> None:
    """Checks the cases themselves: turned images are upright, videos have odd, even and few frames."""
    for kind in ("jpg", "png", "webp", "tif"):
        upright = [expected[f"image turned-{orientation}.{kind}"].grids[0] for orientation in range(1, 9)]
        assert [h > w for _, h, w in upright] == [False] * 4 + [True] * 4
    steps = {name: expected[f"video {name}"].grids[0][0] for name in VIDEOS}
    assert steps == {"one": 1, "three": 2, "four": 2, "five": 3, "seven": 4, "eight": 4}
    assert expected["video turned"].grids[0][1] > expected["video turned"].grids[0][2]
    assert expected["videos and images"].kinds == [1, 0, 1, 0, 1]
    with Image.open(corpus[0].parent / "turned-6.jpg") as image:
        assert ImageOps.exif_transpose(image).size == image.size[::-1]
    # The temporal index of a video of 76 s in 4 steps of 19 s: 0, 38, 76, 114.
    eight = expected["video eight"]
    is_pad = np.asarray(eight.input_ids) == VIDEO_PAD
    first = int(eight.position_ids[0, is_pad][0])
    assert sorted(set((eight.position_ids[0, is_pad] - first).tolist())) == [0, 38, 76, 114]


def test_only_answers_with_their_end_and_newline_are_trained(packed: dict[str, list[Packed]]) -> None:
    (turns,) = packed["turns"]
    (briefly,) = packed["text with system"]
    assert int((turns.labels == IM_END).sum()) == 4
    assert int((briefly.labels == IM_END).sum()) == 1
    assert (turns.labels[turns.labels != -100] == turns.input_ids[turns.labels != -100]).all()
