"""``vlprep show``: the text of a bin, what is trained, and its frames."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console
from tokenizers import Tokenizer

from prep.annotations.boxes import number_shape
from prep.cli import main
from prep.inspect.show import render, show
from prep.inspect.terminal import blocks, open_console, print_bin, wants_colour
from prep.inspect.transcript import Span, SpanKind, Transcriber, cached_transcriber, open_transcriber
from schemas.qwen import IM_END, IM_START, IMAGE_PAD, VIDEO_PAD
from schemas.settings import BuildSettings, MediaSettings
from schemas.wording import printable
from storage.pixels import decode_frames
from storage.shard_set import open_set
from tests.prep import finished as sets


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["show", *map(str, arguments)])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """One bin with one image of 56x84 pixels and two turns."""
    folder = tmp_path_factory.mktemp("small")
    pixels = np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    record = {
        "id": "page\x1b[31m-1",
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "What is in <image>?"},
            {"from": "gpt", "value": "Noise.\nNothing else."},
            {"from": "human", "value": "Sure? 你好\x07"},
            {"from": "gpt", "value": "是的"},
        ],
    }
    (folder / "talk.jsonl").write_text("\n" + json.dumps(record) + "\n")
    settings = BuildSettings(media=MediaSettings(min_pixels=784))
    return sets.build_set(folder / "talk.jsonl", folder / "out", tiny_checkpoint, settings)


def test_a_bin_is_shown_as_text_with_brackets_around_what_is_trained(small: Path, tiny_checkpoint: Path) -> None:
    row = sets.place_of(small, 0)
    result = run(small, "--bin", 0, "--model", tiny_checkpoint)
    assert result.exit_code == 0
    assert result.stdout == (
        f"{small}/bins-00000.tar, bin 0 at offset 0, {row['num_bytes']:,} bytes\n"
        f"{row['num_tokens']} of 4,096 tokens, {row['num_targets']} of them [[trained]]; 1 sample, 1 image, 0 videos, "
        "24 patches\n"
        "\n"
        f"── sample 0 ── talk, talk.jsonl:2 (record 0, id page\\x1b[31m-1): {row['num_tokens']} tokens, "
        f"{row['num_targets']} trained\n"
        "   image 0: 84×56 pixels, grid 1×4×6, 6 tokens\n"
        "<|im_start|>system\n"
        "You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n"
        "What is in <|vision_start|><|image_pad|>×6<|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
        "[[Noise.↵\n"
        "Nothing else.<|im_end|>↵]]\n"
        "<|im_start|>user\n"
        "Sure? 你好\\x07<|im_end|>\n"
        "<|im_start|>assistant\n"
        "[[是的<|im_end|>↵]]\n"
    )


def test_frames_are_saved_exactly_as_they_are_stored(finished: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    result = run(finished, "--bin", 1, "--model", tiny_checkpoint, "--save", tmp_path / "frames")
    assert result.exit_code == 0
    shards = open_set(finished)
    bin_ = shards.read(1)
    media = decode_frames(bin_, where="here")
    expected = {}
    for medium_index, ((_, kind), frames) in enumerate(zip(bin_.grids(), media, strict=True)):
        for index, frame in enumerate(frames):
            name = f"video-{medium_index:03d}-frame-{index:03d}" if kind else f"image-{medium_index:03d}"
            expected[name] = frame.transpose(1, 2, 0)
    saved = {path.stem.split("-", 4)[4]: np.asarray(Image.open(path)) for path in (tmp_path / "frames").iterdir()}
    assert saved.keys() == expected.keys()
    assert all(np.array_equal(saved[name], expected[name]) for name in expected)
    assert f"{len(expected)} PNG files written to {tmp_path / 'frames'}" in result.stdout


def test_media_are_listed_with_their_samples(finished: Path, tiny_checkpoint: Path) -> None:
    """Every sample lists as many media as its text has runs of pads."""
    text = run(finished, "--bin", 1, "--model", tiny_checkpoint).stdout
    samples = text.split("── sample ")[1:]
    assert len(samples) == sets.place_of(finished, 1)["num_samples"]
    indices = []
    for sample in samples:
        listed = [line.split()[:2] for line in sample.splitlines() if line.startswith("   ")]
        pads = sample.count("_pad|>×")
        assert len(listed) == pads
        assert [kind for kind, _ in listed] == [
            "image" if part.endswith("<|image_pad|>") else "video"
            for part in sample.split("×")[:-1]
            if "_pad|>" in part[-14:]
        ]
        indices += [int(index.rstrip(":")) for _, index in listed]
    assert indices == list(range(len(indices)))


def test_tokens_are_listed_with_their_ids_labels_and_positions(small: Path, tiny_checkpoint: Path) -> None:
    """Every token that is no pad has a line, and so have the first and the last pad of the image."""
    result = run(small, "--bin", 0, "--model", tiny_checkpoint, "--token-level")
    assert result.exit_code == 0
    head, *lines = result.stdout.splitlines()[5:]
    assert head.split() == ["index", "id", "label", "t", "h", "w", "token"]
    bin_ = open_set(small).read(0)
    pads = np.flatnonzero(bin_.input_ids == IMAGE_PAD)
    kept = [index for index in range(bin_.input_ids.size) if index not in pads[1:-1]]
    assert lines.pop(kept.index(pads[-1])).split() == ["…", "4", "more", "pads"]
    for index, line in zip(kept, lines, strict=True):
        label = bin_.labels[index]
        numbers = [index, bin_.input_ids[index], "·" if label == -100 else label, *bin_.position_ids[:, index]]
        assert line.split()[:6] == [str(value) for value in numbers]
    texts = [line[44:] for line in lines]
    assert texts[:3] == ["<|im_start|>", "system", r"\n"]
    assert r"\x07" in texts
    # The grid is 4x6 patches, so the pads of the image lie in 2x3 positions.
    first, last = (bin_.position_ids[:, index] for index in pads[[0, -1]])
    assert (last - first).tolist() == [0, 1, 2]


def test_without_a_model_a_bin_is_shown_without_texts_and_one_sentence_says_so(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As ``report`` does. Ids, labels and positions do not need a tokenizer."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    result = run(small, "--bin", 0)
    assert result.exit_code == 0
    assert "What is in" not in result.stdout and re.search(r"\[\[⟨\d+ tokens⟩<\|im_end\|>", result.stdout)
    (said,) = caplog.messages
    assert said.startswith(
        "the texts are missing: the shards do not name their model, and the default one, Qwen/Qwen2.5"
    )
    assert said.endswith("Pass the --model of the build.")
    tokens = run(small, "--bin", 0, "--token-level").stdout.splitlines()
    assert len(tokens) > 30 and tokens[6].split() == ["0", str(IM_START), "·", "0", "0", "0", "<|im_start|>"]


def test_either_a_bin_or_a_step_is_shown(small: Path, tmp_path: Path) -> None:
    both, neither = run(small, "--bin", 0, "--step", 0), run(small)
    assert both.exit_code == neither.exit_code == 2
    assert "give either --bin N, of the shards in DIR, or --step N, of the run in DIR" in both.stderr


def test_what_train_order_says_about_a_run_is_passed_on(tmp_path: Path) -> None:
    result = run(tmp_path, "--step", 0)
    assert result.exit_code == 2
    assert "settings.toml does not exist: give the folder of a run that has started" in result.stderr
    assert len(result.stderr.splitlines()) == 1


# A terminal with rich


def test_a_terminal_shows_the_same_text_and_the_images_as_blocks(small: Path, tiny_checkpoint: Path) -> None:
    shards = open_set(small)
    transcriber = open_transcriber(str(tiny_checkpoint), shards.manifest)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="truecolor", width=120)
    print_bin(console, shards, 0, transcriber, token_level=False)
    shown = screen.getvalue()
    plain = re.sub("\x1b\\[[0-9;]*m", "", shown)
    assert "\x1b[31m-1" not in shown and "id page\\x1b[31m-1" in plain
    for line in show(shards, 0, transcriber).replace("[[", "").replace("]]", "").splitlines():
        assert line.strip("─ ").removeprefix("sample 0 ── ") in plain
    assert "\x1b[1;32mNoise.↵" in shown
    # 84x56 pixels are scaled to 56 columns: two rows of pixels in each line.
    blocks = [line for line in plain.splitlines() if line.startswith("▀")]
    assert {len(line) for line in blocks} == {56}
    assert len(blocks) == round(56 / 84 * 56 / 2)
    colours = re.findall(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;", shown)
    assert len(set(colours)) > 100


def test_a_terminal_lists_tokens_and_has_no_blocks_without_enough_colours(small: Path, tiny_checkpoint: Path) -> None:
    shards = open_set(small)
    transcriber = open_transcriber(str(tiny_checkpoint), shards.manifest)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system="standard", width=120)
    print_bin(console, shards, 0, transcriber, token_level=True)
    assert "▀" not in screen.getvalue()
    trained = [line for line in screen.getvalue().splitlines() if line.startswith("\x1b[1;32m")]
    assert len(trained) == sets.place_of(small, 0)["num_targets"]


def test_boxes_are_drawn_on_blocks() -> None:
    frames = np.zeros((1, 3, 280, 280), dtype=np.uint8)
    box = number_shape([70, 70, 210, 210], image=None)[1]
    black, drawn = (blocks(frames, shapes, 120) for shapes in ((), (box,)))
    assert len({span.style for span in black.spans}) == 1
    assert len({span.style for span in drawn.spans}) > 1


@pytest.mark.parametrize("variable", [("NO_COLOR", "1"), ("TERM", "dumb"), None])
def test_colours_are_for_terminals_that_want_them(
    monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str] | None
) -> None:
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert open_console() is None
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    if variable is not None:
        monkeypatch.setenv(*variable)
    assert (open_console() is None) == (variable is not None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert open_console() is None
    assert wants_colour() == (variable is None)


def test_a_different_tokenizer_is_wrong_use(small: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(tiny_checkpoint / "preprocessor_config.json", other)
    tokenizer = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    result = run(small, "--bin", 0, "--model", other)
    assert result.exit_code == 2
    assert f"--model {other} has a different tokenizer" in result.stderr


def test_a_missing_bin_is_wrong_use(small: Path, tiny_checkpoint: Path) -> None:
    result = run(small, "--bin", 1, "--model", tiny_checkpoint)
    assert (result.exit_code, result.stderr) == (2, f"vlprep: {small} has no bin 1; it holds bin 0.\n")


def test_an_unwritable_folder_is_wrong_use(small: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    result = run(small, "--bin", 0, "--model", tiny_checkpoint, "--save", tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "cannot be written: Not a directory" in result.stderr


def test_a_damaged_shard_exits_with_1(small: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(small, tmp_path / "set")
    (tmp_path / "set" / "bins-00000.tar").write_bytes(b"")
    result = run(tmp_path / "set", "--bin", 0, "--model", tiny_checkpoint)
    assert result.exit_code == 1
    assert "bins-00000.tar, bin 0 at offset 0: the shard ends" in result.stderr


def test_a_checkpoint_outside_the_hub_cache_has_no_transcriber(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cached_transcriber("nobody/nothing", open_set(small).manifest) is None


def test_a_checkpoint_in_the_hub_cache_is_used_if_its_files_are_valid(
    small: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--team--model"
    shutil.copytree(tiny_checkpoint, repository / "snapshots" / "1")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1")
    manifest = open_set(small).manifest
    assert cached_transcriber("team/model", manifest) is not None
    (repository / "snapshots" / "1" / "processor_config.json").write_text("{")
    assert cached_transcriber("team/model", manifest) is None


# Spans


SPANS = [
    Span(SpanKind.CONTROL, "<|im_start|>", False),
    Span(SpanKind.TEXT, "assistant\n", False),
    Span(SpanKind.TEXT, "yes\nno", True),
    Span(SpanKind.CONTROL, "<|im_end|>", True),
    Span(SpanKind.TEXT, "\n", True),
    Span(SpanKind.PADS, "<|image_pad|>×4", False),
]


def test_brackets_enclose_a_run_of_trained_spans() -> None:
    assert render(SPANS, colour=False) == "<|im_start|>assistant\n[[yes↵\nno<|im_end|>↵]]\n<|image_pad|>×4"


def test_colours_mark_every_trained_line_and_dim_control_tokens() -> None:
    on, dim, off = "\x1b[32m\x1b[7m", "\x1b[2m", "\x1b[0m"
    assert render(SPANS, colour=True) == (
        f"{dim}<|im_start|>{off}assistant\n{on}yes↵{off}\n{on}no{off}{on}<|im_end|>{off}{on}↵{off}\n"
        f"{dim}<|image_pad|>×4{off}"
    )


def test_text_cannot_control_a_terminal() -> None:
    assert printable("a\x1b]0;b\x9b\r\x00\n\tc\x7fé…") == "a\\x1b]0;b\\x9b\\x0d\\x00\n\tc\\x7fé…"


def spans_of(tokenizer: Tokenizer | None, ids: list[int], trained: list[int]) -> list[tuple[str, str, bool]]:
    array = np.asarray(ids, dtype=np.int32)
    labels = np.where(np.isin(np.arange(len(ids)), trained), array, -100)
    return [(span.kind.name, span.text, span.trained) for span in Transcriber(tokenizer).spans(array, labels)]


def test_every_control_token_and_every_run_of_pads_is_a_span() -> None:
    ids = [IM_START, IM_START, 10, 11, IMAGE_PAD, IMAGE_PAD, VIDEO_PAD, 12, IM_END, 13]
    assert spans_of(None, ids, [8, 9]) == [
        ("CONTROL", "<|im_start|>", False),
        ("CONTROL", "<|im_start|>", False),
        ("TEXT", "⟨2 tokens⟩", False),
        ("PADS", "<|image_pad|>×2", False),
        ("PADS", "<|video_pad|>×1", False),
        ("TEXT", "⟨1 token⟩", False),
        ("CONTROL", "<|im_end|>", True),
        ("TEXT", "⟨1 token⟩", True),
    ]


def test_text_is_split_where_training_begins(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(tiny_checkpoint / "tokenizer.json"))
    ids = tokenizer.encode("one two three").ids
    assert spans_of(tokenizer, ids, [2]) == [("TEXT", "one two", False), ("TEXT", " three", True)]
