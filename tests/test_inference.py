"""A trained model answers: through ``python -m train.generate``, and through the code of ``docs/inference.md``."""

from __future__ import annotations

import html
import itertools
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from schemas.errors import ConfigError
from schemas.qwen import IGNORE_INDEX
from schemas.settings import BuildSettings, MediaSettings
from tests.guides import blocks, guide
from tests.prep.corpus import turn
from tests.prep.finished import build_set
from tests.prep.packed import Packed, packed_samples
from tests.prep.test_videos import write_video
from train.batches.batch import build_micro_batch
from train.generate.answers import Answerer
from train.generate.cli import generate, main
from train.model import pretrained
from train.model.attention import SDPA
from train.model.packed import PackedQwen
from train.model.processors import shard_media
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import read_checked_bin

pytestmark = pytest.mark.slow

MEDIA = MediaSettings(
    min_pixels=784 * 4,
    max_pixels=784 * 9,
    video_min_frame_pixels=784 * 2,
    video_max_frame_pixels=784 * 6,
    base_interval=1.5,
    video_max_frames=5,
)
"""None is a default, so a model that is asked with defaults does not see what training saw."""

WANTED = {
    "red": ["Red <b>indeed</b>."],
    "noise": ["The first."],
    "video": ["It gets brighter."],
    "chat": ["One, two.", "Two, one."],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Media and annotations: images, a video and a chat of two answers."""
    folder = tmp_path_factory.mktemp("inference")
    Image.new("RGB", (84, 56), (200, 30, 30)).save(folder / "red.png")
    noise = np.random.default_rng(0).integers(0, 256, (150, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "noise.png")
    write_video(folder / "video.mp4", 14, 2)
    records = [
        {"image": "red.png", "conversations": turn("<image>Which colour?", WANTED["red"][0])},
        {"images": ["noise.png", "red.png"], "conversations": turn("<image><image>\nWhich one?", WANTED["noise"][0])},
        {"video": "video.mp4", "conversations": turn("<video>What happens?", WANTED["video"][0])},
        {"conversations": [*turn("Count.", WANTED["chat"][0]), *turn("And back?", WANTED["chat"][1])]},
    ]
    lines = [json.dumps({"id": name, **record}) for name, record in zip(WANTED, records)]
    (folder / "annotations.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path, tiny_checkpoint: Path) -> Path:
    """All samples in one bin."""
    settings = BuildSettings(max_length=512, media=MEDIA)
    return build_set(folder / "annotations.jsonl", folder / "shards", tiny_checkpoint, settings)


@pytest.fixture(scope="module")
def index(shards: Path) -> ShardIndex:
    return open_shards(shards)


@pytest.fixture(scope="module")
def final(folder: Path, index: ShardIndex, tiny_checkpoint: Path) -> Path:
    """The model of a run that has learnt the shards by heart."""
    hf = pretrained.load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation=SDPA)
    model = PackedQwen(hf, attn_implementation=SDPA)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
    micro = build_micro_batch([read_checked_bin(index, 0)])
    for _ in range(60):
        loss = model(micro) / micro.targets.numel()
        if loss.item() < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: parameter.detach() for name, parameter in hf.named_parameters()}
    media = shard_media(index.manifests)
    pretrained.write_checkpoint(folder / "run" / "final", hf, weights, source=tiny_checkpoint, media=media)
    (folder / "run" / "adapter").mkdir()
    return folder / "run" / "final"


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_a_model_that_knows_the_answers_gives_them_exactly_and_shows_them_beside_the_images(
    final: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the page, but in this process."""
    monkeypatch.chdir(tmp_path)
    for name, target in (("runs/first/final", final), ("shards/demo", shards)):
        Path(name).parent.mkdir(parents=True)
        Path(name).symlink_to(target)
    with guide("inference.md", "Judge a run by its answers") as page:
        (command,) = page.take()
    assert command.words[:3] == ["python", "-m", "train.generate"]
    monkeypatch.setattr(sys, "argv", command.words[2:])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("train.generate", run_name="__main__")
    output, errors = capsys.readouterr()
    assert not ended.value.code, errors
    assert "Traceback" not in errors
    assert "exact match: 5 of 5 answers (100.0%)" in output
    named = r"\d\. annotations, annotations\.jsonl:1 \(record 0, id red\): exact\n"
    assert re.search(rf"{named} +<image>Which colour\?\n +wanted +\| generated\n", output)
    assert re.search(r"Red <b>indeed</b>\. +\| Red <b>indeed</b>\.\n", output)
    text = Path("answers.html").read_text()
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text, "a phone fits the page"
    # one image, two images and at most four frames of the video
    assert text.count('<img src="data:image/jpeg;base64,') == 1 + 2 + 4
    assert text.count('class="exact"') == 5
    for answer in itertools.chain(*WANTED.values()):
        assert text.count(html.escape(answer)) == 2, "wanted and generated"
    assert "<b>" not in text


def test_a_limit_may_be_larger_than_a_machine_word(final: Path, shards: Path) -> None:
    assert next(generate(str(final), str(shards), limit=10**30)).is_exact


def test_an_untrained_model_has_no_exact_match_and_its_answers_are_cut_off(tiny_checkpoint: Path, shards: Path) -> None:
    done = run("--model", tiny_checkpoint, "--shards", shards, "--limit", 2, "--max-new-tokens", 3)
    assert done.exit_code == 0, done.output
    assert done.output.count(": different, cut off\n") == 2
    assert "exact match: 0 of 2 answers (0.0%)" in done.output


def test_each_trained_answer_of_a_chat_is_a_question_after_all_that_precedes_it(final: Path, index: ShardIndex) -> None:
    answers = list(Answerer(final).answer_shards(index))
    answers_of: dict[str | None, list[str]] = {}
    for answer in answers:
        answers_of.setdefault(answer.question.sample.id, []).append(answer.question.expected)
    assert answers_of == WANTED
    texts = {answer.question.text for answer in answers if answer.question.sample.id == "chat"}
    assert texts == {"Count.", "And back?"}


def test_an_answer_is_the_one_of_the_generation_of_transformers(
    tiny_checkpoint: Path, shards: Path, index: ShardIndex
) -> None:
    """Of an untrained model, whose choices are close to each other, about an image."""
    answerer = Answerer(tiny_checkpoint, max_new_tokens=12)
    (ours,) = [answer for answer in answerer.answer_shards(index) if answer.question.sample.id == "red"]
    (sample,) = packed_samples(shards)["red"]
    ids = prompt_of(sample)
    hf = pretrained.load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    output = hf.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == hf.config.image_token_id).int(),
        pixel_values=torch.from_numpy(sample.pixel_values()),
        image_grid_thw=torch.tensor([grid for _, grid, _ in sample.media]),
        max_new_tokens=12,
        do_sample=False,
    )
    theirs = answerer._tokenizer.decode(output[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
    assert ours.generated == theirs.strip()


def prompt_of(sample: Packed) -> torch.Tensor:
    """Tokens before the first answer, (1, P) int64."""
    first_target = int(np.argmax(sample.labels != IGNORE_INDEX))
    return torch.from_numpy(sample.input_ids[:first_target].astype(np.int64))[None]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--shards": "nothing"}, "nothing"),
        ({"--model": "run"}, r"--model \S+run holds no model \(config.json is missing\)\. Give \S+run/final\."),
        (
            {"--model": "run/adapter"},
            r"--model \S+run/adapter holds no model \(config.json is missing\)\. Give \S+run/final\.",
        ),
        ({"--model": "shards"}, r"--model \S+shards holds no model \(config.json is missing\)\. Give the final/"),
        ({"--model": "missing"}, r"--model \S+missing is not a folder"),
        ({"--limit": "0"}, "'--limit': 0 is not in the range x>=1"),
        ({"--html": "missing/page.html"}, r"--html \S+: the folder \S+missing does not exist"),
        ({"--html": f"{'x' * 300}.html"}, r"--html \S+ cannot be written: File name too long\. Give another file"),
    ],
)
def test_a_wrong_input_is_wrong_use_and_named_in_a_sentence(
    final: Path, shards: Path, changes: dict[str, str], message: str
) -> None:
    options = {"--model": str(final), "--shards": str(shards)}
    for name, value in changes.items():
        options[name] = value if name == "--limit" else str(shards.parent / value)
    done = run(*(word for option in options.items() for word in option))
    assert done.exit_code == 2, done.output
    assert re.search(message, done.output)
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_a_model_with_another_vocabulary_is_refused(final: Path, shards: Path, tmp_path: Path) -> None:
    for path in final.iterdir():
        if path.name != "tokenizer.json":
            (tmp_path / path.name).symlink_to(path)
    tokenizer: dict[str, Any] = json.loads((final / "tokenizer.json").read_bytes())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ConfigError, match=f"the tokenizer of {tmp_path} differs from the one that {shards} was built"):
        next(generate(str(tmp_path), str(shards), limit=1))


@pytest.fixture(scope="module")
def program(final: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """What the code of the guide defines, for this model and these media."""
    with guide("inference.md", "Without torchvision") as page:
        (block,) = page.take()
    code = block.text
    for name, path in (
        ("runs/first/final", final),
        ("photo.jpg", folder / "red.png"),
        ("video.mp4", folder / "video.mp4"),
    ):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    names: dict[str, Any] = {}
    exec(compile(code, "docs/inference.md", "exec"), names)
    yield names


@pytest.mark.parametrize(
    ("name", "text", "kind", "file"),
    [("red", "Which colour?", "image", "red.png"), ("video", "What happens?", "video", "video.mp4")],
)
def test_the_code_of_the_guide_gives_the_model_what_training_saw_and_gets_the_answer(
    program: dict[str, Any], shards: Path, folder: Path, name: str, text: str, kind: str, file: str
) -> None:
    (sample,) = packed_samples(shards)[name]
    prepared = program["prepare"](text, **{kind: str(folder / file)})
    assert torch.equal(prepared["input_ids"], prompt_of(sample))
    pixels = prepared["pixel_values" if kind == "image" else "pixel_values_videos"]
    assert torch.equal(pixels, torch.from_numpy(sample.pixel_values()))
    assert program["ask"](text, **{kind: str(folder / file)}).strip() == WANTED[name][0]


def test_the_code_of_the_guide_for_the_processor_of_transformers_gets_the_answer(final: Path, folder: Path) -> None:
    pytest.importorskip("torchvision")
    pytest.importorskip("torchcodec")
    code, _ = blocks("inference.md", "transformers", "python")
    names: dict[str, Any] = {}
    exec(code.partition("\n\nprint(")[0].replace("runs/first/final", str(final)), names)
    image = {"type": "image", "path": str(folder / "red.png")}
    assert names["ask"](image, {"type": "text", "text": "Which colour?"}).strip() == WANTED["red"][0]
