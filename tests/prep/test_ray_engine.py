"""``--engine ray``: the same bytes from a cluster, though nodes die, see other files or have other software."""

from __future__ import annotations

import http.server
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from prep.annotations.registry import find_sources
from prep.build.pipeline import BuildRequest, build
from prep.cli import main
from prep.engines import Engine, SerialEngine, open_engine, ray_nodes
from prep.engines import ray_cluster as ray_engine_cluster
from schemas.errors import ConfigError
from schemas.manifest import METRICS_FILE
from schemas.settings import BuildSettings
from tests.guides import blocks, guide
from tests.prep import test_engines as laws
from tests.prep.commands import Command
from tests.prep.corpus import write_corpus
from tests.prep.ray_cluster import ENVIRONMENT, NodeProcesses, kill_while_it_runs
from tests.typed import prepare_folder, run

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
SETTINGS = BuildSettings(max_length=1200, shard_bytes=400_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("ray-corpus"), num_good=48)[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tiny_checkpoint: Path) -> Path:
    """The set that one process alone makes."""
    out = tmp_path_factory.mktemp("ray-built") / "out"
    sources = find_sources(str(corpus), registry=None, media_root=None, media=SETTINGS.media)
    request = BuildRequest(
        sources=tuple(sources), out=out, settings=SETTINGS, model=str(tiny_checkpoint), max_rejected=Fraction(1)
    )
    build(request, SerialEngine())
    return out


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != METRICS_FILE)
    return {path.name: path.read_bytes() for path in files}


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.fixture(scope="class")
def engine(ray_cluster: NodeProcesses) -> Iterator[Engine]:
    with open_engine("ray", ray_address=ray_cluster.address) as engine:
        yield engine


@pytest.fixture
def parallel(engine: Engine) -> Engine:
    return engine


class TestLawsOfEveryEngine:
    """The tests of ``test_engines`` on a cluster, which all of this file share."""

    def test_a_task_whose_worker_dies_is_run_again(self, engine: Engine, tmp_path: Path) -> None:
        assert list(engine.map(partial(laws.die_once, tmp_path), range(4))) == [0, 1, 2, 3]

    test_order = staticmethod(laws.test_results_come_in_the_order_of_the_tasks)
    test_need = staticmethod(laws.test_tasks_are_taken_as_they_are_needed)
    test_exceptions = staticmethod(laws.test_exceptions_of_a_task_are_raised_unchanged)
    test_first_error = staticmethod(laws.test_the_first_error_in_the_order_of_the_tasks_ends_the_work)
    test_paths = staticmethod(laws.test_relative_paths_mean_the_same_everywhere)
    test_threads = staticmethod(laws.test_libraries_of_workers_start_no_threads)
    test_closing = staticmethod(laws.test_closing_ends_running_tasks)
    test_kills = staticmethod(laws.test_a_task_that_kills_every_worker_stops_the_build_and_says_how_to_resume)


def build_arguments(corpus: Path, out: Path, model: Path, *options: str) -> list[object]:
    sizes = ["--max-length", SETTINGS.max_length, "--shard-bytes", SETTINGS.shard_bytes]
    return ["build", corpus, "--out", out, "--model", model, *sizes, "--engine", "ray", *options]


def node_of(task: int) -> str:
    import ray

    time.sleep(0.2)
    node: str = ray.get_runtime_context().get_node_id()
    return node


def test_a_build_that_is_stopped_twice_and_then_loses_a_node_ends_with_the_same_bytes(
    ray_cluster: NodeProcesses, corpus: Path, built: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    arguments = build_arguments(corpus, out, tiny_checkpoint, "--ray-address", ray_cluster.address)
    # Early enough that a busy machine cannot finish the build before the signal comes.
    for kind, begun in ((signal.SIGINT, ".build/lock"), (signal.SIGTERM, ".build/scan/*")):
        command = Command(*arguments, "--workers", 1, folder=tmp_path, environment=ENVIRONMENT)
        while command.poll() is None and not any(out.glob(begun)):
            time.sleep(0.01)
        command.send(kind)
        assert command.wait() == 130, command.errors
        assert "rerun the same command to continue" in command.errors
        assert "Traceback" not in command.errors
        assert leftovers(out) == []
        assert not (out / "manifest.json").exists()
    with ray_cluster.node() as node:
        command = Command(*arguments, folder=tmp_path, environment=ENVIRONMENT)
        was_killed = kill_while_it_runs(node, "write_shard", lambda: command.poll() is not None)
        command.wait()
    assert was_killed, command.errors
    assert command.returncode == 0, command.errors
    assert "ray: 2 nodes with room for 3 tasks" in command.errors
    assert "ray: a task was lost with its worker" in command.errors
    assert contents(out) == contents(built)
    assert leftovers(out) == []


def test_without_a_cluster_one_is_started_quietly_and_ended(
    corpus: Path, built: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    pytest.importorskip("ray")
    out = tmp_path / "out"
    arguments = build_arguments(corpus, out, tiny_checkpoint, "--workers", "2", "--ray-address", "local")
    command = Command(*arguments, folder=tmp_path)
    assert command.wait() == 0, command.errors
    # A build without its compiled kernel says so.
    others = r"(index|scan|write):|Pillow resizes the images"
    said = [line for line in re.split(r"[\r\n]+", command.errors) if line and not re.match(others, line)]
    assert all(line.startswith("ray: 1 node with room for 2 tasks at this machine") for line in said), command.errors
    assert command.output.startswith(str(out))
    assert contents(out) == contents(built)


def test_validate_and_verify_find_the_same_as_one_process(
    ray_cluster: NodeProcesses, corpus: Path, built: Path
) -> None:
    for command in (["validate", str(corpus), "--deep"], ["verify", str(built)]):
        expected = CliRunner().invoke(main, [*command, "--workers", "1"])
        result = CliRunner().invoke(main, [*command, "--engine", "ray", "--ray-address", ray_cluster.address])
        assert result.exit_code == expected.exit_code
        assert result.stdout == expected.stdout


def test_nodes_that_see_other_files_or_have_other_software_get_no_work(
    ray_cluster: NodeProcesses, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An empty folder is mounted over the media of one node; another has a tokenizer that would give other ids."""
    listed = next(path for path in distribution("tokenizers").files or [] if path.name == "METADATA").locate()
    other = tmp_path / "METADATA"
    other.write_text(re.sub(r"(?m)^Version: .*", "Version: 0.0.1", Path(str(listed)).read_text()))
    with (
        ray_cluster.apart(f"-t tmpfs none '{corpus.parent}'"),
        ray_cluster.apart(f"--bind '{other}' '{listed}'"),
        open_engine("ray", ray_address=ray_cluster.address) as engine,
    ):
        engine.share([corpus, corpus.parent])
        used = set(engine.map(node_of, range(12)))
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    refused = [re.fullmatch(r"ray: no work for node \S+ \((\w{8})\): (.*)", warning) for warning in warnings]
    reasons = {match[2]: match[1] for match in refused if match is not None}
    assert len(reasons) == len(warnings) == 2
    assert any(f"it does not see the file {corpus} (" in reason for reason in reasons)
    assert any(f"the folder {corpus.parent} is a different one there" in reason for reason in reasons)
    assert any(re.fullmatch(r"tokenizers is 0\.0\.1 there, [0-9.]+ here", reason) for reason in reasons)
    assert len(used) == 1
    assert used.pop()[:8] not in reasons.values()


def test_a_node_that_joins_later_gets_work(ray_cluster: NodeProcesses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_nodes, "_CHECK_INTERVAL_S", 0.5)
    seen: set[str] = set()
    with ExitStack() as joined:

        def tasks() -> Iterator[int]:
            yield from range(4)
            joined.enter_context(ray_cluster.node())
            yield from range(4, 600)

        with open_engine("ray", ray_address=ray_cluster.address) as engine:
            for node in engine.map(node_of, tasks()):
                seen.add(node)
                if len(seen) == 2:
                    assert engine.num_workers == 3
                    break
    assert len(seen) == 2


def test_a_folder_that_no_node_sees_is_wrong_use(ray_cluster: NodeProcesses, tmp_path: Path) -> None:
    with open_engine("ray", ray_address=ray_cluster.address) as engine:
        engine.share([REPOSITORY], writes=[tmp_path])
        for mark in tmp_path.iterdir():
            mark.unlink()
        with pytest.raises(ConfigError, match=rf"(?s)no node of the Ray cluster .* does not see the folder {tmp_path}"):
            list(engine.map(node_of, [0]))


class _SilentHandler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web_server() -> Iterator[int]:
    """The port of a server that is no Ray cluster."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _SilentHandler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_nothing_answers_fails_at_once(form: str, corpus: Path) -> None:
    pytest.importorskip("ray")
    result = CliRunner().invoke(
        main, ["validate", str(corpus), "--engine", "ray", "--ray-address", form.format(closed_port())]
    )
    assert result.exit_code == 2
    assert re.search(r"vlprep: no Ray cluster answers at \S+ \(Connection refused\)", result.output)


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_an_address_where_something_else_answers_fails_at_once(
    form: str, corpus: Path, web_server: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(ray_engine_cluster, "_CHECK_TIMEOUT_S", 1.0)
    result = CliRunner().invoke(
        main, ["validate", str(corpus), "--engine", "ray", "--ray-address", form.format(web_server)]
    )
    assert result.exit_code == 2
    assert "is not a Ray cluster" in result.output


@pytest.mark.parametrize("address", ["here", "http://127.0.0.1:8265", "127.0.0.1", "127.0.0.1:99999"])
def test_an_invalid_address_is_wrong_use(address: str, corpus: Path) -> None:
    pytest.importorskip("ray")
    result = CliRunner().invoke(main, ["validate", str(corpus), "--engine", "ray", "--ray-address", address])
    assert result.exit_code == 2
    assert f"vlprep: --ray-address {address}" in result.output or "no Ray cluster answers" in result.output


def blocks_of_guide(language: str) -> list[str]:
    return blocks("cluster.md", "Preparing shards", language)


def test_the_command_of_the_guide_builds_on_a_cluster(
    ray_cluster: NodeProcesses, tiny_checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands there twice: for a cluster that runs, and after the commands that start one."""
    monkeypatch.chdir(tmp_path)
    Path("datasets.toml").write_text(f"[mp_doc]\nannotation_path = {json.dumps(str(corpus))}\n")
    prepare_folder(tiny_checkpoint)
    with guide("cluster.md", "Preparing shards", "Start a cluster by hand") as page:
        build, again = page.take()
    assert build.words == again.words
    here = {"/shared/shards/mp_doc": str(tmp_path / "out"), "10.0.0.1:6379": ray_cluster.address}
    run([here.get(word, word) for word in build.words])
    assert (tmp_path / "out" / "manifest.json").is_file()


SRUN = """
while [[ $1 == -* ]]; do
    case $1 in
        --ntasks=*) num_tasks=${1#*=} ;;
        -w) shift ;;
    esac
    shift
done
for ((task = 0; task < num_tasks; task++)); do "$@" & done
wait
"""

SCONTROL = """
case $1 in
    requeue) echo "$2" >requeued ;;
    *) printf "node-a\nnode-b\n" ;;
esac
"""

RECORD = 'printf "%q " "$(basename "$0")" "$@" >>calls; echo >>calls\n'
RAY = RECORD + "[[ $1 != start ]] || exec sleep 600\n"
STARTED = 'until [[ $(grep -c "^ray start" calls) -ge 2 ]]; do sleep 0.02; done\n'
VLPREP = (
    RECORD + STARTED + '[[ -e endless ]] || exit 0; trap "exit 130" TERM; touch started; while :; do sleep 0.02; done\n'
)


class Slurm:
    """A folder to submit the script of the guide from, with stand-ins for the programs that it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").write_text(f"PATH={shlex.quote(str(programs))}:$PATH\n")
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL), ("ray", RAY), ("vlprep", VLPREP)):
            (programs / name).write_text(f"#!/bin/bash\n{source}")
            (programs / name).chmod(0o755)

    def submit(self) -> subprocess.Popen[bytes]:
        with guide("cluster.md", "Prepare shards with Slurm") as page:
            (script,) = page.take()
        job = {"JOB_ID": "7", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node-[a-b]", "CPUS_PER_TASK": "4"}
        job |= {"MEM_PER_NODE": "8192", "SUBMIT_DIR": str(self.folder)}
        environment = {**os.environ, **{f"SLURM_{name}": value for name, value in job.items()}}
        return subprocess.Popen(["bash", "-c", script.text], env=environment, start_new_session=True)

    def calls(self) -> list[list[str]]:
        """Words of the commands that were started, in any order."""
        return sorted(map(shlex.split, (self.folder / "calls").read_text().splitlines()))


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_the_slurm_script_of_the_guide_starts_a_cluster_and_builds_on_it(slurm: Slurm) -> None:
    pytest.importorskip("ray")
    from ray.scripts.scripts import cli

    job = slurm.submit()
    try:
        assert job.wait(timeout=60) == 0
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    *started, build = slurm.calls()
    assert build[:3] == ["vlprep", "build", "mp_doc"]
    options = main.commands["build"].make_context("build", build[2:]).params
    nodes = [cli.commands["start"].make_context("start", words[2:]).params for words in started if words[1] == "start"]
    assert (options["engine"], options["ray_address"].rpartition(":")[2]) == ("ray", "20007")
    assert sorted((node["head"], node["num_cpus"]) for node in nodes) == [(False, 4), (True, 3)]
    assert {node["address"] for node in nodes} == {None, options["ray_address"]}
    assert not (slurm.folder / "requeued").exists()


def test_a_slurm_job_that_prepares_shards_requeues_itself_at_its_time_limit(slurm: Slurm) -> None:
    (slurm.folder / "endless").touch()
    job = slurm.submit()
    try:
        until = time.monotonic() + 60
        while not (slurm.folder / "started").exists():
            assert job.poll() is None and time.monotonic() < until
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        assert job.wait(timeout=60) == 130
    finally:
        os.killpg(job.pid, signal.SIGKILL)
    assert (slurm.folder / "requeued").read_text() == "7\n"


def test_the_entrypoint_of_the_guide_has_options_that_exist() -> None:
    (manifest,) = blocks_of_guide("yaml")
    program, command, *words = shlex.split(list(yaml.safe_load_all(manifest))[1]["spec"]["entrypoint"])
    assert program == "vlprep"
    assert main.commands[command].make_context(command, words).params["engine"] == "ray"


def test_the_manifest_of_the_guide_mounts_the_same_volume_in_every_pod() -> None:
    (manifest,) = blocks_of_guide("yaml")
    volume, job = yaml.safe_load_all(manifest)
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    pods = [group["template"]["spec"] for group in groups]
    assert (volume["kind"], job["kind"]) == ("PersistentVolumeClaim", "RayJob")
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods:
        (container,) = pod["containers"]
        assert container["volumeMounts"] == [{"name": "data", "mountPath": "/data"}]
        assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": volume["metadata"]["name"]}}]
        assert container["image"] == pods[0]["containers"][0]["image"]
    pinned = re.search(r"(?m)^ray==(.*)$", (REPOSITORY / "constraints.txt").read_text())
    (dockerfile,) = blocks_of_guide("dockerfile")
    assert pinned is not None
    assert cluster["rayVersion"] == pinned[1]
    assert f"FROM rayproject/ray:{pinned[1]}-" in dockerfile
