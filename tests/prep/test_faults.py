"""Faults during a build: full disks, media that change or vanish, too little memory, workers that die.

Each time, one sentence says what happened, the ledger balances, and the same command then gives the same bytes.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import prep.build.pipeline
from prep.annotations.validation import MAX_MEDIA, parse_record
from prep.build.pipeline import build
from prep.build.write import write_shard
from prep.engines import SerialEngine
from prep.media import sandbox as sandbox_module
from prep.media.decode import probe
from prep.media.sandbox import Sandbox
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE
from schemas.errors import ConfigError, MediaError
from schemas.manifest import Manifest
from schemas.settings import BuildSettings, MediaSettings
from tests.prep.commands import Command
from tests.prep.corpus import turn, write_corpus
from tests.prep.full_disk import MODES, STAGES
from tests.prep.test_build import (
    SETTINGS,
    build_arguments,
    contents,
    ledger,
    leftovers,
    replace_settings,
    request_for,
    started,
)
from tests.prep.test_images import random_image
from tests.prep.test_sandbox import replace_child

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(request_for(corpus, out, tiny_checkpoint), SerialEngine())
    return out


# Disks


@pytest.fixture(scope="module")
def namespace() -> list[str]:
    """Arguments that run a command in its own mount namespace."""
    prefix = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*prefix, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"file systems cannot be mounted here, not even in a namespace of one's own ({error})")
    return prefix


@dataclass(frozen=True)
class Outcome:
    """What builds onto a disk with a fault did, and the shards of the last build, after the fault."""

    runs: list[dict[str, Any]]
    disk: Path
    shards: Path


@pytest.fixture(scope="module")
def outcomes(
    namespace: list[str], corpus: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("disks")
    program = [sys.executable, "-m", "tests.prep.full_disk", str(corpus), str(tiny_checkpoint), str(folder)]
    done = subprocess.run([*namespace, *program], check=True, stdout=subprocess.PIPE, cwd=REPOSITORY)
    runs_of: dict[str, list[dict[str, Any]]] = json.loads(done.stdout)
    assert set(runs_of) == set(MODES)
    return {mode: Outcome(runs, folder / mode / "disk", folder / mode / "shards") for mode, runs in runs_of.items()}


def faulty_runs(outcome: Outcome) -> list[dict[str, Any]]:
    """The runs on the disk with its fault. All are clear and leave nothing behind, and the last one succeeds."""
    for run in outcome.runs:
        assert "Traceback" not in run["says"]
        assert run["left"] == []
    *faulty, last = outcome.runs
    assert (last["code"], last["sealed"]) == (0, True)
    return faulty


def test_a_disk_that_runs_full_at_any_step_stops_the_build_which_resumes_once_there_is_room(
    outcomes: dict[str, Outcome], built: Path
) -> None:
    runs = faulty_runs(outcomes["stages"])
    assert [run["run"] for run in runs] == list(STAGES)
    files = {
        "scan": "/.build/scan/",
        "write": "/bins-00000.tar: ",
        "ledger": "/samples.parquet: ",
        "bins": "/bins.parquet: ",
        "manifest": "/manifest.json: ",
    }
    for run in runs:
        (sentence,) = [line for line in run["says"].splitlines() if line.startswith("vlprep: ")]
        assert files[run["run"]] in sentence
        assert "No space left on device" in sentence
        assert sentence.endswith("Fix that and rerun the same command.")
        assert (run["code"], run["sealed"]) == (1, False)
    assert contents(outcomes["stages"].shards) == contents(built)


def test_a_disk_that_runs_full_under_worker_processes_is_one_sentence_too(
    outcomes: dict[str, Outcome], built: Path
) -> None:
    (run,) = faulty_runs(outcomes["workers"])
    (sentence,) = [line for line in run["says"].splitlines() if line.startswith("vlprep: ")]
    assert "/bins-0000" in sentence
    assert "No space left on device" in sentence
    assert (run["code"], run["sealed"]) == (1, False)
    assert contents(outcomes["workers"].shards) == contents(built)


def test_an_output_that_can_only_be_read_is_named(outcomes: dict[str, Outcome], built: Path) -> None:
    outcome = outcomes["read-only"]
    (run,) = faulty_runs(outcome)
    assert run["code"] == 2
    assert f"--out {outcome.disk} cannot be written: Read-only file system." in run["says"]
    assert contents(outcome.shards) == contents(built)


@pytest.mark.parametrize(("limit", "location"), [(1 << 10, "/.build/"), (1 << 19, "/bins-00000.tar: ")])
def test_a_limit_on_the_size_of_files_stops_the_build_which_resumes_without_it(
    tiny_checkpoint: Path, tmp_path: Path, limit: int, location: str
) -> None:
    """The same with a limit on the file size, which needs no mount."""
    random_image(120, 120).save(tmp_path / "a.png")
    record = json.dumps({"image": "a.png", "conversations": turn("<image>")})
    (tmp_path / "a.jsonl").write_text(f"{record}\n" * 30)
    out = tmp_path / "out"
    arguments = [*build_arguments(tmp_path / "a.jsonl", out, tiny_checkpoint, 1), "--pixels", "raw"]
    stopped = Command(*arguments, folder=tmp_path, max_file_bytes=limit)
    assert stopped.wait() == 1
    (sentence,) = [line for line in stopped.errors.splitlines() if line.startswith("vlprep: ")]
    assert f"{out}{location}" in sentence
    assert sentence.endswith("File too large. Fix that and rerun the same command.")
    assert not (out / "manifest.json").exists()
    assert leftovers(out) == []
    assert Command(*arguments, folder=tmp_path).wait() == 0
    unlimited = request_for(
        tmp_path / "a.jsonl", tmp_path / "unlimited", tiny_checkpoint, replace_settings(pixels="raw")
    )
    build(unlimited, SerialEngine())
    assert contents(out) == contents(tmp_path / "unlimited")


# Media that change after the scan


def changed_after_the_scan(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, out: Path, model: Path, change: Any
) -> Manifest:
    """Build; ``change`` runs when the scan is over."""

    def late(task: Any) -> Any:
        change()
        return write_shard(task)

    with monkeypatch.context() as patch:
        patch.setattr(prep.build.pipeline, "write_shard", late)
        return build(request_for(corpus, out, model), SerialEngine())


@pytest.fixture
def own_corpus(corpus: Path, tmp_path: Path) -> Path:
    shutil.copytree(corpus.parent, tmp_path / "in")
    return tmp_path / "in" / corpus.name


def using(corpus: Path, name: str) -> set[str]:
    records = [json.loads(line) for line in corpus.read_text().splitlines() if line.startswith('{"')]
    return {record["id"] for record in records if name in (record.get("image"), *record.get("images", ()))}


def test_a_medium_replaced_by_one_of_another_size_is_rejected_until_it_is_scanned_again(
    own_corpus: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def replaced() -> None:
        random_image(500, 300).save(own_corpus.parent / "2.png")

    manifest = changed_after_the_scan(monkeypatch, own_corpus, out, tiny_checkpoint, replaced)
    hit = using(own_corpus, "2.png")
    assert len(hit) > 1
    rejected = {row["id"]: row for row in ledger(out) if row["codes"] == ["media_unreadable"]}
    assert set(rejected) == hit | {"bad-media_unreadable"}
    for identity in hit:
        assert "'2.png' decodes to a grid of (1, 22, 36)" in rejected[identity]["message"]
        assert "the file changed after it was scanned (--retry-media scans it again)" in rejected[identity]["message"]
    assert manifest.counts.balances()
    request = replace(request_for(own_corpus, out, tiny_checkpoint), retry_media=True)
    assert build(request, SerialEngine()).counts.num_packed == 24
    build(request_for(own_corpus, tmp_path / "fresh", tiny_checkpoint), SerialEngine())
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_medium_replaced_by_one_of_the_same_size_is_built_as_it_is_when_it_is_decoded(
    own_corpus: Path, built: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are those of a build that sees the new image only."""
    path = own_corpus.parent / "2.png"
    with Image.open(path) as old:
        other = random_image(old.width, old.height, seed=7)
    manifest = changed_after_the_scan(
        monkeypatch, own_corpus, tmp_path / "out", tiny_checkpoint, lambda: other.save(path)
    )
    assert manifest.counts.num_packed == 24
    build(request_for(own_corpus, tmp_path / "fresh", tiny_checkpoint), SerialEngine())
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert contents(tmp_path / "out") != contents(built)


def test_a_medium_that_vanishes_costs_its_samples_and_the_command_succeeds(
    own_corpus: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """With the command itself: the video is deleted as soon as the scan has written its parts."""
    out = tmp_path / "out"
    command = Command(*build_arguments(own_corpus, out, tiny_checkpoint, 1), folder=tmp_path)
    while command.poll() is None and not list((out / ".build").glob("write-*")):
        time.sleep(0.001)
    (own_corpus.parent / "clip.mp4").unlink()
    assert command.wait() == 0
    printed = command.output
    rows = ledger(out)
    lost = [row for row in rows if row["codes"] == ["media_missing"] and row["id"] != "bad-media_missing"]
    statuses = Counter(row["status"] for row in rows)
    assert statuses == {"packed": 24 - len(lost), "rejected": 5 + len(lost)}
    assert f"29 annotations = {24 - len(lost)} packed + {5 + len(lost)} rejected" in printed
    assert {row["message"] for row in lost} <= {"'clip.mp4' does not exist below the media root"}


# Memory


@pytest.fixture
def box() -> Iterator[Sandbox]:
    instance = Sandbox()
    yield instance
    instance.close()


def test_a_decoder_that_runs_out_of_memory_says_so_and_decodes_the_next_medium(box: Sandbox, tmp_path: Path) -> None:
    Image.new("RGB", (9000, 9000)).save(tmp_path / "large.png")
    random_image(300, 200).save(tmp_path / "small.png")
    large, small = (MediaSource(name, tmp_path / name) for name in ("large.png", "small.png"))
    settings = MediaSettings()
    child = box._start()
    in_use = int(Path(f"/proc/{child.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(child.pid, resource.RLIMIT_AS, (in_use + (200 << 20), resource.RLIM_INFINITY))
    with pytest.raises(MediaError) as caught:
        box.decode(large, MEDIA_IMAGE, settings)
    assert caught.value.code is ReasonCode.MEDIA_TOO_LARGE
    assert caught.value.message == "'large.png' needs more memory than is available"
    assert box.decode(small, MEDIA_IMAGE, settings)[0] == probe(small, MEDIA_IMAGE, settings)


KILLED = (
    "import prep.media.sandbox as s, sys, os\n"
    "from pathlib import Path\n"
    "real, mark = s.probe, Path({mark!r})\n"
    "def probe(*a):\n"
    "    if {always} or not mark.exists():\n"
    "        mark.touch()\n"
    "        os.kill(os.getpid(), 9)\n"
    "    return real(*a)\n"
    "s.probe = probe\n"
    "s._serve(int(sys.argv[1]))"
)


@pytest.mark.parametrize("always", [False, True])
def test_a_decoder_killed_from_outside_is_retried_before_the_medium_is_blamed(
    box: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    random_image(300, 200).save(tmp_path / "x.png")
    source, settings = MediaSource("x.png", tmp_path / "x.png"), MediaSettings()
    replace_child(monkeypatch, KILLED.format(mark=str(tmp_path / "mark"), always=always))
    if not always:
        assert box.probe(source, MEDIA_IMAGE, settings) == probe(source, MEDIA_IMAGE, settings)
        return
    with pytest.raises(MediaError) as caught:
        box.probe(source, MEDIA_IMAGE, settings)
    assert caught.value.code is ReasonCode.MEDIA_TOO_LARGE
    assert "the decoder of 'x.png' was killed 2 times (SIGKILL)" in caught.value.message


def test_the_decoder_is_what_the_kernel_kills_first_when_memory_runs_out(box: Sandbox) -> None:
    child = box._start()
    assert int(Path(f"/proc/{child.pid}/oom_score_adj").read_text()) == int(sandbox_module._OOM_SCORE_ADJUSTMENT)


def test_a_killed_worker_is_reported_and_the_build_resumes(
    corpus: Path, built: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = build_arguments(corpus, out, tiny_checkpoint, 2)
    command = started(arguments, out, tmp_path)
    killed = [pid for pid in children_of(command.pid) if not is_resource_tracker(pid)]
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    if command.wait():
        assert command.returncode == 1
        assert (
            "vlprep: a worker process was killed (out of memory, or by a signal). Run the same command"
            in command.errors
        )
        assert "Traceback" not in command.errors
    assert killed or not command.returncode
    assert Command(*arguments, folder=tmp_path).wait() == 0
    assert contents(out) == contents(built)
    assert leftovers(out) == []


def is_resource_tracker(pid: int) -> bool:
    """Whether a process is that of multiprocessing beside spawned workers. It prints a traceback when it is killed."""
    return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Sizes out of range


def test_sizes_of_shards_beyond_all_bounds_are_refused_and_the_largest_gives_one_shard(
    corpus: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for size in (0, 2**62, 2**63, 2**64, 10**30):
        with pytest.raises(ConfigError, match=r"setting shard_bytes is .*; allowed: 1 to 4611686018427387903 bytes"):
            BuildSettings(shard_bytes=size)
    request = request_for(corpus, tmp_path / "out", tiny_checkpoint, replace_settings(shard_bytes=2**62 - 1))
    assert len(build(request, SerialEngine()).shards) == 1
    assert SETTINGS.shard_bytes < 2**62 - 1


@pytest.mark.parametrize("spelling", ["canonical", "reordered"])
def test_a_record_that_names_millions_of_media_is_one_problem_and_none_is_opened(spelling: str) -> None:
    names = np.arange(MAX_MEDIA + 1).astype(str).tolist()
    record = {"id": "many", "images": names, "conversations": turn("<image>" * len(names))}
    if spelling == "reordered":
        record = {"conversations": record["conversations"], "images": names, "extra": "é"}
    annotation, problems, *_ = parse_record(json.dumps(record).encode())
    assert annotation is None
    assert [(problem.code, problem.message) for problem in problems] == [
        (
            ReasonCode.BAD_FIELD,
            "$.images names 16,385 media; at most 16,384 are allowed. Cut the record into several",
        )
    ]
    record["images"] = names[1:]
    record["conversations"] = turn("<image>" * MAX_MEDIA)
    annotation, problems, *_ = parse_record(json.dumps(record).encode())
    assert annotation is not None
    assert problems == []
