"""The decoder process: same results as without it, and what hangs or crashes costs one medium."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from prep.media import sandbox as sandbox_module
from prep.media.decode import decode, probe
from prep.media.sandbox import Sandbox
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import MediaError
from schemas.settings import MediaSettings
from tests.prep.alive import alive
from tests.prep.test_images import picture
from tests.prep.test_videos import write_clip

SETTINGS = MediaSettings()


@pytest.fixture
def box() -> Iterator[Sandbox]:
    found = Sandbox()
    yield found
    found.close()


@pytest.fixture
def media(tmp_path: Path) -> list[tuple[MediaSource, int]]:
    picture(300, 200).save(tmp_path / "x.png")
    picture(900, 700, seed=1).save(tmp_path / "y.jpg")
    write_clip(tmp_path / "z.mp4", 12, 2)
    kinds = {"x.png": MEDIA_IMAGE, "z.mp4": MEDIA_VIDEO, "y.jpg": MEDIA_IMAGE}
    return [(MediaSource(name, tmp_path / name), kind) for name, kind in kinds.items()]


def test_probes_and_frames_equal_those_of_this_process(box: Sandbox, media: list[tuple[MediaSource, int]]) -> None:
    for source, kind in media * 2:
        facts, frames = decode(source, kind, SETTINGS)
        assert box.probe(source, kind, SETTINGS) == probe(source, kind, SETTINGS) == facts
        found, pixels = box.decode(source, kind, SETTINGS)
        assert found == facts
        assert (pixels == frames).all()


def test_media_inside_another_file_decode_as_files_do(
    box: Sandbox, media: list[tuple[MediaSource, int]], tmp_path: Path
) -> None:
    for source, kind in media:
        content = source.open().read()
        (tmp_path / "blob").write_bytes(b"before" + content + b"after")
        inside = MediaSource(source.name, tmp_path / "blob", span=(6, len(content)))
        for found in (inside, MediaSource(source.name, data=content)):
            assert (box.decode(found, kind, SETTINGS)[1] == decode(source, kind, SETTINGS)[1]).all()


def test_pixels_are_those_of_the_last_medium_while_the_shared_memory_grows_and_shrinks(
    box: Sandbox, media: list[tuple[MediaSource, int]], tmp_path: Path
) -> None:
    """More than is kept, then less; what is decoded but for a part lies in between, and errors too."""
    large = MediaSettings(min_pixels=23_000_000, max_pixels=24_000_000)
    (picture_of_few, kind), clip, (other, _) = media
    (tmp_path / "cut.jpg").write_bytes(other.open().read()[:-2000])
    cut = MediaSource("cut.jpg", tmp_path / "cut.jpg")
    for settings, (source, media_type) in [
        (SETTINGS, (other, kind)), (large, (picture_of_few, kind)), (SETTINGS, (picture_of_few, kind)), (SETTINGS, clip)
    ]:  # fmt: skip
        frames = decode(source, media_type, settings)[1]
        assert (frames.nbytes > sandbox_module._MAX_KEPT_BYTES) == (settings is large)
        assert (box.decode(source, media_type, settings)[1] == frames).all()
        with pytest.raises(MediaError, match="cannot be decoded"):
            box.decode(cut, kind, SETTINGS)


def test_frames_of_a_decoder_that_failed_may_outlive_the_memory_of_the_next() -> None:
    memory = os.memfd_create("frames")
    shared = sandbox_module._SharedFrames(memory)
    held = shared.allocate((1, 3, 28, 28))
    larger = shared.allocate((2, 3, 56, 56))
    held[:], larger[:] = 1, 2
    assert larger.min() == 2
    assert os.fstat(memory).st_size == larger.size
    again = shared.allocate((2, 3, 56, 56))
    again[:] = 3
    assert os.pread(memory, larger.size, 0) == b"\3" * larger.size
    os.close(memory)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.ENOSPC])
def test_too_little_memory_is_put_down_to_the_medium_and_a_full_machine_is_not(
    media: list[tuple[MediaSource, int]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "ftruncate", full)
    for source, kind in media:
        answer = sandbox_module._answer(sandbox_module._SharedFrames(-1), "decode", source, kind, SETTINGS)
        if number == errno.ENOMEM:
            assert isinstance(answer, MediaError)
            assert answer.code is ReasonCode.MEDIA_TOO_LARGE
        else:
            assert isinstance(answer, OSError)
            assert (answer.errno, answer.filename) == (number, "memory shared with the decoder process")


def test_errors_come_back_with_their_code(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(MediaError) as caught:
        box.probe(MediaSource("x.png", tmp_path / "x.png"), MEDIA_IMAGE, SETTINGS)
    assert caught.value.code is ReasonCode.UNSUPPORTED_MEDIA


HANGING = "import prep.media.sandbox as s, sys, time\ns.probe = lambda *a: time.sleep(600)\ns._serve(int(sys.argv[1]))"
CRASHING = (
    "import prep.media.sandbox as s, sys, os\ns.probe = lambda *a: os.kill(os.getpid(), 11)\ns._serve(int(sys.argv[1]))"
)


def replace_child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Let the next child run ``program`` instead of the module."""
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", program, command[-1]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sandbox_module.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("program", "code", "part"),
    [(HANGING, ReasonCode.DECODE_TIMEOUT, "within 1 s"), (CRASHING, ReasonCode.MEDIA_UNREADABLE, "SIGSEGV")],
)
def test_a_decoder_that_hangs_or_crashes_costs_one_medium(
    box: Sandbox,
    media: list[tuple[MediaSource, int]],
    monkeypatch: pytest.MonkeyPatch,
    program: str,
    code: ReasonCode,
    part: str,
) -> None:
    source, kind = media[0]
    with monkeypatch.context() as patch:
        replace_child(patch, program)
        with pytest.raises(MediaError) as caught:
            box.probe(source, kind, MediaSettings(decode_timeout=1.0))
    assert caught.value.code is code
    assert part in caught.value.message
    assert source.name in caught.value.message
    assert box.probe(source, kind, SETTINGS) == probe(source, kind, SETTINGS)


def test_a_child_dies_with_its_worker(tmp_path: Path) -> None:
    program = (
        "import time\nfrom pathlib import Path\nfrom prep.media.sandbox import sandbox\n"
        "box = sandbox()\nprint(box._start().pid, flush=True)\ntime.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert worker.stdout is not None
    child = int(worker.stdout.readline())
    worker.kill()
    worker.wait()
    worker.stdout.close()
    for _ in range(200):
        if not alive(child):
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child outlived its worker")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_stops_all_processes_of_a_build_does_not_look_like_a_medium_that_crashes_its_decoder(
    box: Sandbox, media: list[tuple[MediaSource, int]], kind: signal.Signals
) -> None:
    (first, media_type), _, _ = media
    child = box._start()
    child.send_signal(kind)
    assert box.probe(first, media_type, SETTINGS) == probe(first, media_type, SETTINGS)
    assert box._child is child
    assert alive(child.pid)


def test_an_interrupt_between_question_and_answer_does_not_shift_the_answers(
    box: Sandbox, media: list[tuple[MediaSource, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, kind), _, (other, _) = media

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    box.probe(first, kind, SETTINGS)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sandbox_module, "_receive", interrupted)
        box.probe(first, kind, SETTINGS)
    assert box.probe(other, kind, SETTINGS) == probe(other, kind, SETTINGS)
