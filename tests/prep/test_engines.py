"""Properties of every engine: order of results, unchanged errors, few tasks in flight, a prompt end on request."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from prep.engines import Engine, LocalEngine, SerialEngine, default_workers, open_engine
from prep.engines.processes import ONE_THREAD
from prep.engines.requirements import WorkerRequirements, unmet
from prep.media.sandbox import sandbox
from schemas.annotation import ReasonCode
from schemas.errors import ConfigError, MediaError, ShardError, VlprepError
from tests.prep.alive import alive

pytestmark = pytest.mark.slow


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("prep.engines.local.can_fork", lambda: True)
    with LocalEngine(2) as engine:
        yield engine


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("prep.engines.local.can_fork", lambda: False)
    with LocalEngine(2) as engine:
        yield engine


@pytest.fixture(params=["forked", "spawned"])
def local_engine(request: pytest.FixtureRequest) -> Engine:
    instance: Engine = request.getfixturevalue(request.param)
    return instance


@pytest.fixture(params=["serial", "forked", "spawned"])
def engine(request: pytest.FixtureRequest) -> Engine:
    """Every engine. ``test_ray_engine`` runs the tests that use it, and those of ``parallel``, on a cluster."""
    if request.param == "serial":
        return SerialEngine()
    instance: Engine = request.getfixturevalue(request.param)
    return instance


@pytest.fixture(params=["forked", "spawned"])
def parallel(request: pytest.FixtureRequest) -> Engine:
    instance: Engine = request.getfixturevalue(request.param)
    return instance


def square(value: int) -> int:
    return value * value


def later_is_quicker(index: int) -> int:
    time.sleep(0.3 if index % 4 == 0 else 0)
    return index


def fail(kind: str) -> None:
    raise {
        "wrong use": ConfigError("a wrong setting"),
        "medium": MediaError(ReasonCode.MEDIA_EMPTY, "a.png is empty"),
        "shard": ShardError("a damaged shard"),
        "system": FileNotFoundError(2, "No such file or directory", "a.png"),
        "bug": ZeroDivisionError("division by zero"),
    }[kind]


def fail_at(bad: int, folder: Path, index: int) -> int:
    (folder / str(index)).touch()
    if index == bad:
        raise ShardError(f"shard {index} is damaged")
    return index


def environment(name: str) -> str | None:
    return os.environ.get(name)


def stay(folder: Path, index: int) -> int:
    """Task 0 returns once another task runs; the others keep running."""
    if index == 0:
        while not any(folder.iterdir()):
            time.sleep(0.01)
        return 0
    (folder / f"{os.getpid()}").touch()
    time.sleep(600)
    return index


def die_once(folder: Path, index: int) -> int:
    mark = folder / str(index)
    if index == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return index


def die(index: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def process_of(index: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def await_end(processes: Iterable[int]) -> None:
    """Assert that the processes end within a minute."""
    deadline = time.monotonic() + 60
    while any(map(alive, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pending_forever(index: int) -> set[signal.Signals]:
    """Signals that this process blocks."""
    return {kind for kind in signal.pthread_sigmask(signal.SIG_BLOCK, ()) if isinstance(kind, signal.Signals)}


def with_decoder(index: int) -> tuple[int, int]:
    """Process ids of this worker and its decoder."""
    time.sleep(0.1)
    return os.getpid(), (sandbox()._child or sandbox()._start()).pid


def name_of(path: Path) -> bool:
    return path.exists()


def test_results_come_in_the_order_of_the_tasks(engine: Engine) -> None:
    assert list(engine.map(later_is_quicker, range(20))) == list(range(20))
    assert list(engine.map(square, iter([3, 1, 2]))) == [9, 1, 4]
    assert list(engine.map(square, [])) == []


def test_tasks_are_taken_as_they_are_needed(engine: Engine) -> None:
    """At most three per worker are in flight: the tasks and results of a large build do not fit into memory."""
    num_consumed = 0

    def tasks() -> Iterator[int]:
        nonlocal num_consumed
        for index in range(200):
            num_consumed += 1
            yield index

    results = engine.map(square, tasks())
    for index in range(5):
        assert next(results) == index * index
        assert num_consumed <= index + 1 + 3 * engine.num_workers
    results.close()


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("wrong use", ConfigError),
        ("medium", MediaError),
        ("shard", ShardError),
        ("system", FileNotFoundError),
        ("bug", ZeroDivisionError),
    ],
)
def test_exceptions_of_a_task_are_raised_unchanged(engine: Engine, kind: str, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        list(engine.map(fail, [kind]))
    assert type(raised.value) is error
    if isinstance(raised.value, MediaError):
        assert (raised.value.code, raised.value.message) == (ReasonCode.MEDIA_EMPTY, "a.png is empty")
    if isinstance(raised.value, FileNotFoundError):
        assert (raised.value.filename, raised.value.strerror) == ("a.png", "No such file or directory")


def test_the_first_error_in_the_order_of_the_tasks_ends_the_work(engine: Engine, tmp_path: Path) -> None:
    results = engine.map(partial(fail_at, 3, tmp_path), range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ShardError, match="shard 3 is damaged"):
        next(results)
    assert len(list(tmp_path.iterdir())) <= 4 + 3 * engine.num_workers


def test_relative_paths_mean_the_same_everywhere(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").touch()
    assert list(engine.map(name_of, [Path("here"), Path("there")])) == [True, False]


def test_libraries_of_workers_start_no_threads(parallel: Engine) -> None:
    assert dict(zip(ONE_THREAD, parallel.map(environment, ONE_THREAD))) == ONE_THREAD


def test_closing_ends_running_tasks(parallel: Engine, tmp_path: Path) -> None:
    results = parallel.map(partial(stay, tmp_path), range(20))
    assert next(results) == 0
    results.close()
    processes = [int(path.name) for path in tmp_path.iterdir()]
    assert processes
    assert not any(Path(f"/proc/{process}").exists() for process in processes)
    assert list(parallel.map(square, [2])) == [4]


def test_workers_of_this_machine_stay_from_step_to_step_and_end_with_the_block() -> None:
    with LocalEngine(2) as engine:
        first = set(engine.map(process_of, range(20)))
        assert set(engine.map(process_of, range(20))) <= first
        assert len(first) == 2
    assert os.getpid() not in first
    assert not any(Path(f"/proc/{process}").exists() for process in first)


def test_workers_stay_if_the_results_are_not_read_to_the_end(local_engine: Engine) -> None:
    """``zip(tasks, results)`` does not request the end of the results."""
    with closing(local_engine.map(process_of, range(8))) as results:
        first = {result for _, result in zip(range(8), results)}
    assert set(local_engine.map(process_of, range(8))) <= first


KNOWN: list[int] = []


def known(_: int) -> list[int]:
    return KNOWN


def test_forks_have_what_this_process_has_and_renewed_ones_what_it_has_by_then(
    forked: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    KNOWN.append(1)
    assert list(forked.map(known, [0])) == [[1]]
    KNOWN.append(2)
    assert list(forked.map(known, [0])) == [[1]]
    assert forked.renew_workers()
    assert list(forked.map(known, [0])) == [[1, 2]]
    monkeypatch.setattr("prep.engines.local.can_fork", lambda: False)
    assert not forked.renew_workers()


@pytest.mark.parametrize("forks", [True, False])
def test_workers_end_their_decoders_before_themselves(monkeypatch: pytest.MonkeyPatch, forks: bool) -> None:
    monkeypatch.setattr("prep.engines.local.can_fork", lambda: forks)
    with LocalEngine(2) as engine:
        processes = {pid for pair in engine.map(with_decoder, range(4)) for pid in pair}
    assert len(processes) >= 2
    assert not any(map(alive, processes))


def test_forks_do_not_hold_the_lock_of_a_build(forked: Engine, tmp_path: Path) -> None:
    """Otherwise the next build would find it locked while the kernel is still ending the workers of a killed one."""
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert list(forked.map(square, range(4))) == [0, 1, 4, 9]
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_that_is_killed_between_two_steps_is_replaced(local_engine: Engine) -> None:
    processes = set(local_engine.map(process_of, range(8)))
    for process in processes:
        os.kill(process, signal.SIGKILL)
    await_end(processes)
    assert list(local_engine.map(square, [1, 2, 3])) == [1, 4, 9]


def sigterm_handler(_: int) -> str:
    return str(signal.getsignal(signal.SIGTERM))


def test_the_kernel_ends_workers_whatever_they_are_doing(local_engine: Engine) -> None:
    """A Python signal handler would run too late in a worker that starts to wait for a lock of an ended one."""
    assert set(local_engine.map(sigterm_handler, range(20))) == {str(signal.SIG_DFL)}


def test_only_workers_are_ended(local_engine: Engine) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
    other.start()
    try:
        with pytest.raises(ZeroDivisionError):
            list(local_engine.map(fail, ["bug"]))
        assert list(local_engine.map(square, [2])) == [4]
        assert other.is_alive()
    finally:
        other.kill()
        other.join()


def test_interrupts_do_not_reach_workers_even_while_they_start(local_engine: Engine) -> None:
    """Ctrl-C goes to all processes of a terminal; a worker that is importing would end with a traceback."""
    (blocked,) = local_engine.map(pending_forever, [0])
    assert signal.SIGINT in blocked
    assert signal.SIGINT not in pending_forever(0)


IDLE = """
import sys, time
from prep.engines import LocalEngine
from tests.prep.test_engines import with_decoder
if __name__ == "__main__":
    with LocalEngine(2) as engine:
        print(*{pid for pair in engine.map(with_decoder, range(6)) for pid in pair}, flush=True)
        time.sleep(600)
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_workers_without_work_and_their_decoders_end_with_their_parent(tmp_path: Path, kind: signal.Signals) -> None:
    (tmp_path / "idle.py").write_text(IDLE)
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "idle.py")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert parent.stdout is not None
    processes = [int(process) for process in parent.stdout.readline().split()]
    assert len(processes) == 4
    assert all(map(alive, processes))
    parent.send_signal(kind)
    try:
        parent.wait(timeout=60)
    finally:
        parent.kill()
        parent.stdout.close()
    await_end(processes)


def test_a_process_whose_parent_is_dead_already_ends_at_once() -> None:
    program = (
        "import os, sys; from prep.engines.processes import die_with_parent; "
        "die_with_parent(os.getppid() + 1); print(1)"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (1, b"")


def test_a_task_that_kills_every_worker_stops_the_build_and_says_how_to_resume(parallel: Engine) -> None:
    with pytest.raises(VlprepError, match=r"(?s)killed|lost with its worker 4 times.*same command again"):
        list(parallel.map(die, [0]))


@pytest.mark.parametrize(
    ("quota", "expected"), [("200000 100000\n", 2), ("max 100000\n", 16), ("50000 100000\n", 1), ("3200000 100000", 16)]
)
def test_a_container_gets_as_many_workers_as_it_has_cores(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    (tmp_path / "cpu.max").write_text(quota)
    assert default_workers(tmp_path / "cpu.max") == expected
    assert default_workers(tmp_path / "none") == 16


def test_a_local_engine_takes_the_cores_of_this_process() -> None:
    with open_engine() as engine:
        assert engine.num_workers == default_workers()
    with open_engine(workers=1) as engine:
        assert isinstance(engine, SerialEngine)


@pytest.mark.parametrize("command", ["build", "validate", "verify"])
def test_an_address_without_the_ray_engine_is_wrong_use(command: str, corpus_file: Path, tmp_path: Path) -> None:
    inputs = [str(tmp_path)] if command == "verify" else [str(corpus_file)]
    out = ["--out", str(tmp_path / "out")] if command == "build" else []
    result = CliRunner().invoke(main, [command, *inputs, *out, "--ray-address", "auto"])
    assert result.exit_code == 2
    assert "--ray-address auto goes with --engine ray" in result.output


def test_a_missing_ray_is_reported_in_one_sentence(corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    result = CliRunner().invoke(main, ["validate", str(corpus_file), "--engine", "ray"])
    assert result.exit_code == 2
    assert "pip install 'ray[client]'" in result.output


@pytest.fixture
def shared(tmp_path: Path) -> Iterator[tuple[WorkerRequirements, Path]]:
    """A folder that is read, a file in it, and a folder that is written, which other machines must see too."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(b"picture")
    (tmp_path / "out").mkdir()
    requirements = WorkerRequirements()
    requirements.share([tmp_path / "media", tmp_path / "media" / "a.png"], [tmp_path / "out"])
    yield requirements, tmp_path
    requirements.clear()
    assert not any((tmp_path / "out").glob(".*"))


def test_a_machine_that_sees_the_same_lacks_nothing(shared: tuple[WorkerRequirements, Path]) -> None:
    assert unmet(shared[0]) == []
    assert len(list((shared[1] / "out").iterdir())) == 1  # only the mark: the trial file is removed


def test_paths_that_were_shared_before_are_not_shared_again(shared: tuple[WorkerRequirements, Path]) -> None:
    requirements, folder = shared
    assert not requirements.share([folder / "media"], [folder / "out"])
    (folder / "more").mkdir()
    assert requirements.share([folder / "more"], [])


def test_a_missing_path_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none cannot be used: No such file or directory"):
        WorkerRequirements().share([tmp_path / "none"], [])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("empty mount", "the folder {0}/media is a different one there: it has no a.png"),
        ("no mount", "it does not see the folder {0}/media (No such file or directory)"),
        ("older copy", "the file {0}/media/a.png has 3 bytes there, not 7"),
        ("other output", "it does not see the folder {0}/out, which tasks write into, or sees a different one"),
        ("copied output", "the folder {0}/out, which tasks write into, is a different one there"),
        ("other package", "numpy is {1} there, 0.1 here"),
        ("package here only", "av is not installed there, 1.0 here"),
    ],
)
def test_unmet_requirements_are_named_with_their_path(
    shared: tuple[WorkerRequirements, Path], change: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements, folder = shared
    (mark,) = map(Path, requirements.marks)
    image = folder / "media" / "a.png"
    if change in ("empty mount", "no mount"):
        image.unlink()
    if change == "no mount":
        (folder / "media").rmdir()
    if change == "older copy":
        image.write_bytes(b"old")
    if change == "other output":
        mark.unlink()
    if change == "copied output":
        mark.write_text("a mark of another run")
    software = dict(requirements.software)
    if change == "other package":
        requirements.software = {**software, "numpy": "0.1"}
    if change == "package here only":
        requirements.software = {**software, "av": "1.0"}
        monkeypatch.setattr(
            "prep.engines.requirements.software", lambda: {k: v for k, v in software.items() if k != "av"}
        )
    lacks = unmet(requirements)
    assert lacks[-1].startswith(expected.format(folder, software["numpy"]))
