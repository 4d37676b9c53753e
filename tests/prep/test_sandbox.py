"""The decoder process gives the results of this process, and a decoder that hangs or crashes costs one medium."""

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
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

SETTINGS = MediaSettings()


@pytest.fixture(params=[True, False], ids=["forked", "spawned"])
def box(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    monkeypatch.setattr(sandbox_module, "can_fork", lambda: request.param)
    sandbox = Sandbox()
    yield sandbox
    sandbox.close()


@pytest.fixture
def media(tmp_path: Path) -> list[tuple[MediaSource, int]]:
    random_image(300, 200).save(tmp_path / "x.png")
    random_image(900, 700, seed=1).save(tmp_path / "y.jpg")
    write_video(tmp_path / "z.mp4", 12, 2)
    kinds = {"x.png": MEDIA_IMAGE, "z.mp4": MEDIA_VIDEO, "y.jpg": MEDIA_IMAGE}
    return [(MediaSource(name, tmp_path / name), kind) for name, kind in kinds.items()]


def test_probes_and_frames_equal_those_of_the_calling_process(
    box: Sandbox, media: list[tuple[MediaSource, int]]
) -> None:
    for source, kind in media * 2:
        info, frames = decode(source, kind, SETTINGS)
        assert box.probe(source, kind, SETTINGS) == probe(source, kind, SETTINGS) == info
        sandbox_info, sandbox_frames = box.decode(source, kind, SETTINGS)
        assert sandbox_info == info
        assert (sandbox_frames == frames).all()


def test_media_inside_another_file_decode_like_files(
    box: Sandbox, media: list[tuple[MediaSource, int]], tmp_path: Path
) -> None:
    for source, kind in media:
        content = source.open().read()
        (tmp_path / "blob").write_bytes(b"before" + content + b"after")
        inside = MediaSource(source.name, tmp_path / "blob", span=(6, len(content)))
        for embedded in (inside, MediaSource(source.name, data=content)):
            assert (box.decode(embedded, kind, SETTINGS)[1] == decode(source, kind, SETTINGS)[1]).all()


@pytest.mark.slow
def test_frames_are_right_while_the_shared_memory_grows_and_shrinks(
    box: Sandbox, media: list[tuple[MediaSource, int]], tmp_path: Path
) -> None:
    """A medium larger than the kept memory, then smaller ones, with a truncated image after each."""
    large = MediaSettings(min_pixels=23_000_000, max_pixels=24_000_000)
    (small, kind), video, (other, _) = media
    (tmp_path / "cut.jpg").write_bytes(other.open().read()[:-2000])
    cut = MediaSource("cut.jpg", tmp_path / "cut.jpg")
    for settings, (source, media_type) in [
        (SETTINGS, (other, kind)), (large, (small, kind)), (SETTINGS, (small, kind)), (SETTINGS, video)
    ]:  # fmt: skip
        frames = decode(source, media_type, settings)[1]
        assert (frames.nbytes > sandbox_module._MAX_KEPT_BYTES) == (settings is large)
        assert (box.decode(source, media_type, settings)[1] == frames).all()
        with pytest.raises(MediaError, match="cannot be decoded"):
            box.decode(cut, kind, SETTINGS)


def test_frames_of_a_failed_decode_may_outlive_the_next_mapping() -> None:
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


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.ENOSPC])
def test_too_little_memory_is_blamed_on_the_medium_and_a_full_machine_is_not(
    media: list[tuple[MediaSource, int]], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "ftruncate", full)
    for source, kind in media:
        answer = sandbox_module._answer(sandbox_module._SharedFrames(-1), "decode", source, kind, SETTINGS)
        if code == errno.ENOMEM:
            assert isinstance(answer, MediaError)
            assert answer.code is ReasonCode.MEDIA_TOO_LARGE
        else:
            assert isinstance(answer, OSError)
            assert (answer.errno, answer.filename) == (code, "memory shared with the decoder process")


def test_errors_keep_their_reason_code(box: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not an image")
    with pytest.raises(MediaError) as caught:
        box.probe(MediaSource("x.png", tmp_path / "x.png"), MEDIA_IMAGE, SETTINGS)
    assert caught.value.code is ReasonCode.UNSUPPORTED_MEDIA


HANGING = "time.sleep(600)"
CRASHING = "os.kill(os.getpid(), 11)"
PROBING = "import prep.media.sandbox as s, sys, os, time\ns.probe = lambda *a: {}\ns._serve(int(sys.argv[1]))"


def replace_probe(monkeypatch: pytest.MonkeyPatch, expression: str) -> None:
    """Make the next child evaluate an expression in place of probing a medium, as a fork or as a new interpreter."""
    monkeypatch.setattr(sandbox_module, "probe", lambda *_: eval(expression))
    if not sandbox_module.can_fork():
        replace_child(monkeypatch, PROBING.format(expression))


def replace_child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Make the next child run ``program`` in an interpreter of its own, instead of the sandbox module."""
    monkeypatch.setattr(sandbox_module, "can_fork", lambda: False)
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        return real([command[0], "-c", program, command[-1]], **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sandbox_module.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("expression", "code", "part"),
    [(HANGING, ReasonCode.DECODE_TIMEOUT, "within 1 s"), (CRASHING, ReasonCode.MEDIA_UNREADABLE, "SIGSEGV")],
)
def test_a_decoder_that_hangs_or_crashes_costs_one_medium(
    box: Sandbox,
    media: list[tuple[MediaSource, int]],
    monkeypatch: pytest.MonkeyPatch,
    expression: str,
    code: ReasonCode,
    part: str,
) -> None:
    source, kind = media[0]
    with monkeypatch.context() as patch:
        replace_probe(patch, expression)
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
def test_a_signal_to_all_processes_of_a_build_is_not_blamed_on_the_medium(
    box: Sandbox, media: list[tuple[MediaSource, int]], kind: signal.Signals
) -> None:
    (first, media_type), _, _ = media
    child = box._start()
    child.send_signal(kind)
    assert box.probe(first, media_type, SETTINGS) == probe(first, media_type, SETTINGS)
    assert box._child is child
    assert alive(child.pid)


def test_an_interrupt_between_request_and_response_does_not_shift_the_responses(
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
