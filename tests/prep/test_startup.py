"""What starts once: the tokenizer is read once or in part, decoders start with the first medium, forks inherit."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from prep.build.pipeline import build
from prep.engines import SerialEngine
from prep.engines.processes import Fork, can_fork, open_descriptors
from prep.media import sandbox as sandbox_module
from prep.media.sandbox import Sandbox
from prep.samples import known_tokenizers
from prep.samples.known_tokenizers import remembered_fingerprint
from prep.samples.tokenizer import TextTokenizer, load_tokenizer
from schemas.errors import ConfigError
from schemas.qwen import parse_tokenizer, tokenizer_fingerprint
from schemas.settings import BuildSettings
from tests.prep.corpus import turn
from tests.prep.test_build import request_for

REPOSITORY = Path(__file__).resolve().parents[2]
ODD_PIECES = (
    "", " <tool_call>x</tool_call> ", "<|im_start|>", "\U0001f600e\u0301", "   \n\n\t", "\0\x7f", "ﬁ①", '\\"\\\\u"/'
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer_json(tiny_checkpoint: Path) -> bytes:
    return (tiny_checkpoint / "tokenizer.json").read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vlprep" / "tokenizers"


def excerpts(num_batches: int) -> list[list[str]]:
    """Batches of a few pieces of text in several languages, with odd characters."""
    rng = random.Random(0)
    texts = [(REPOSITORY / name).read_text() for name in ("README.md", "README.zh.md", "prep/cli.py")]
    batches = []
    for _ in range(num_batches):
        starts = [(text, rng.randrange(len(text))) for text in rng.choices(texts, k=rng.randint(1, 6))]
        batches.append([text[at : at + rng.randint(0, 400)] + rng.choice(ODD_PIECES) for text, at in starts])
    return batches


@pytest.fixture(scope="module")
def layouts(tokenizer_json: bytes) -> dict[str, bytes]:
    """The same tokenizer as a file may write it."""
    content = json.loads(tokenizer_json)
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    indented = json.dumps(content, ensure_ascii=False, indent=2).encode()
    return {"pairs": tokenizer_json, "texts, indented": indented, "escaped": json.dumps(content).encode()}


def test_short_texts_get_the_tokens_that_all_merges_give(layouts: dict[str, bytes]) -> None:
    complete = TextTokenizer(layouts["pairs"])
    complete.complete()
    for index, batch in enumerate(excerpts(12)):
        layout = ("pairs", "texts, indented")[index % 2]
        parse_tokenizer.cache_clear()
        encoded, expected = TextTokenizer(layouts[layout]).encode_batch(batch), complete.encode_batch(batch)
        assert parse_tokenizer.cache_info().misses == 0
        assert [encoding.ids for encoding in encoded] == [encoding.ids for encoding in expected]
        assert [encoding.offsets for encoding in encoded] == [encoding.offsets for encoding in expected]


@pytest.mark.parametrize("batches", [[["a"]] * 4, [["a b " * 10_000]], [["a" * 3000]]])
def test_more_texts_than_a_few_take_all_merges_once(tokenizer_json: bytes, batches: list[list[str]]) -> None:
    parse_tokenizer.cache_clear()
    tokenizer = TextTokenizer(tokenizer_json)
    for batch in batches:
        assert parse_tokenizer.cache_info().misses == 0
        encoded = tokenizer.encode_batch(batch)
    for batch in batches:
        assert [encoding.ids for encoding in tokenizer.encode_batch(batch)] == [encoding.ids for encoding in encoded]
    assert parse_tokenizer.cache_info().misses == 1


def test_a_file_with_more_escapes_than_it_needs_is_read_completely(layouts: dict[str, bytes]) -> None:
    parse_tokenizer.cache_clear()
    (encoded,) = TextTokenizer(layouts["escaped"]).encode_batch(["What is this?"])
    (expected,) = TextTokenizer(layouts["pairs"]).encode_batch(["What is this?"])
    assert encoded.ids == expected.ids
    assert parse_tokenizer.cache_info().misses == 1


def test_a_fingerprint_is_computed_once_for_the_same_bytes(
    tokenizer_json: bytes, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokenizer_fingerprint(tokenizer_json, where="t")
    assert remembered_fingerprint(tokenizer_json, where="t") == expected
    (entry,) = cache.iterdir()
    for damaged in ("", expected[:-1], "\N{SNOWMAN}" * 32):
        entry.write_text(damaged)
        assert remembered_fingerprint(tokenizer_json, where="t") == expected
        assert entry.read_text() == expected
    with pytest.raises(ConfigError, match="not the tokenizer of Qwen2"):
        remembered_fingerprint(tokenizer_json.replace(b"<|im_end|>", b"<|the_end|>"), where="t")
    monkeypatch.setattr(known_tokenizers, "tokenizer_fingerprint", None)
    assert remembered_fingerprint(tokenizer_json, where="t") == expected
    assert list(cache.iterdir()) == [entry]


def test_without_a_cache_folder_the_fingerprint_is_computed(tokenizer_json: bytes, cache: Path) -> None:
    cache.parent.parent.write_text("a file")
    assert remembered_fingerprint(tokenizer_json, where="t") == tokenizer_fingerprint(tokenizer_json, where="t")


class Starts:
    """Decoders that were started."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        real = Sandbox._start
        sandbox_module._sandbox_of.cache_clear()

        def start(box: Sandbox) -> object:
            self.count += 1
            return real(box)

        monkeypatch.setattr(Sandbox, "_start", start)


@pytest.mark.parametrize("num_images", [0, 1])
def test_a_small_build_reads_no_complete_tokenizer_and_starts_a_decoder_only_for_media(
    tmp_path: Path, tiny_checkpoint: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, num_images: int
) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    record = {"conversations": turn("<image>" * num_images + "What is this?"), "images": ["a.png"] * num_images}
    (tmp_path / "a.json").write_text(json.dumps([record]))
    starts = Starts(monkeypatch)
    for out, num_parsed in (("first", 1), ("second", 0)):
        for cached in (parse_tokenizer, tokenizer_fingerprint, load_tokenizer):
            cached.cache_clear()
        request = request_for(tmp_path / "a.json", tmp_path / out, tiny_checkpoint, BuildSettings())
        assert build(request, SerialEngine()).counts.num_packed == 1
        assert parse_tokenizer.cache_info().misses == num_parsed, "only a fingerprint that is new needs all tokens"
    assert starts.count == num_images


class InheritingEngine(SerialEngine):
    """An engine whose workers have what this process has."""

    renewals = 0

    def renew_workers(self) -> bool:
        self.renewals += 1
        return True


def test_workers_inherit_a_complete_tokenizer_unless_everything_is_scanned(
    tmp_path: Path, tiny_checkpoint: Path, cache: Path
) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        path.write_text(json.dumps([{"conversations": turn("What is this?")}] * 100))
    requests = [request_for(path, tmp_path / "out", tiny_checkpoint, BuildSettings()) for path in paths]
    request = replace(requests[0], sources=requests[0].sources + requests[1].sources)
    engine = InheritingEngine()
    for cached in (parse_tokenizer, tokenizer_fingerprint, load_tokenizer):
        cached.cache_clear()
    build(request, engine)
    assert engine.renewals == parse_tokenizer.cache_info().misses == 1
    build(replace(request, settings=BuildSettings(max_length=500)), engine)
    assert engine.renewals == parse_tokenizer.cache_info().misses == 1


def test_the_command_line_loads_no_library_of_a_build() -> None:
    program = "import sys, prep.cli; print(*{'numpy', 'pyarrow', 'PIL', 'tokenizers', 'tqdm'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=True)
    assert done.stdout == "\n"


def test_a_process_with_threads_is_not_forked() -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        assert not can_fork()
    finally:
        end.set()
        thread.join()


def test_threads_that_have_ended_do_not_keep_a_process_from_being_forked() -> None:
    """The kernel may still be taking them down after they have been joined."""
    program = (
        "import threading; from prep.engines.processes import can_fork\n"
        "for _ in range(100):\n"
        "    threads = [threading.Thread(target=int) for _ in range(3)]\n"
        "    for thread in threads: thread.start()\n"
        "    for thread in threads: thread.join()\n"
        "    assert can_fork()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)


def list_open_files(kept: int) -> None:
    os.write(1, json.dumps([*open_descriptors()]).encode())
    os.write(kept, b"kept")


def test_a_fork_holds_no_file_of_its_parent_but_those_it_is_given(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("wb") as lock, (tmp_path / "kept").open("wb") as kept:
        fork = Fork(partial(list_open_files, kept.fileno()), keep=[kept.fileno()])
        assert json.loads(fork.stdout.read()) == [kept.fileno()]
        assert lock.fileno() != kept.fileno()
    assert fork.wait() == 0
    assert (tmp_path / "kept").read_bytes() == b"kept"
    fork.stdin.close()
    fork.stdout.close()
