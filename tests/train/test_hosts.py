"""Two hosts, each with its own launcher, compute what one host with as many ranks does. The guide's script runs.

The hosts are two launches on this machine that know what hosts of a cluster know: address and port of the first host,
and their own index. Every rank is the only one of its host. Stand-ins for ``ssh`` and ``pdsh`` write down what they
should run on every host. A stand-in for Slurm starts tasks and forwards signals as ``srun`` does.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.guides import blocks, guide, page_commands
from tests.train.launching import (
    ENVIRONMENT,
    REPOSITORY,
    as_flags,
    assert_same_run,
    fingerprint_of,
    free_port,
    launch_forked,
    made_once,
    read_metrics,
    read_untimed,
    read_weights,
    run_once,
    start_forked,
)
from tests.train.synthetic import make_medium, make_sample, write_shards
from train.run.run_dir import list_checkpoints

pytestmark = pytest.mark.slow

NUM_STEPS = 3
ADDRESS = "127.0.0.1"


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run with images on one rank and text on the other in every micro-step."""
    rng = np.random.default_rng(0)
    bins = [
        [make_sample(rng, [make_medium(rng, 8, 8)]) if bin_id % 2 else make_sample(rng, num_text=30)]
        for bin_id in range(8)
    ]
    fingerprint = fingerprint_of(tiny_checkpoint)
    shards = made_once(tmp_path_factory, "hosts-shards", lambda out: write_shards(out, bins, tokenizer=fingerprint))
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "max_steps": NUM_STEPS,
        "tune_mm_vision": True,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    return as_flags(settings)


@pytest.fixture(scope="module")
def one_host(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_once(tmp_path_factory, "one-host", 2, *flags)


def write_program(path: Path, source: str, interpreter: str = "/bin/bash") -> None:
    """Write a stand-in for a program."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{source}")
    path.chmod(0o755)


def write_run_file(folder: Path, flags: list[str], run: str) -> None:
    """A folder to start ranks from, with the flags of a run in ``run.toml``."""
    (folder / "train").symlink_to(REPOSITORY / "train")
    lines = [f"{name} = {value}\n" for name, value in toml_values(flags).items()]
    (folder / "run.toml").write_text("".join([*lines, f'output_dir = "{run}"\n']))


def launchers(kind: str, folder: Path) -> list[list[str]]:
    """The command of the guide for each host, with one rank per host on this machine."""
    with guide("cluster.md", "Start ranks by hand") as page:
        commands = dict(zip(("ssh", "deepspeed", "torchrun"), page.take(), strict=True))
    (hostfile,) = blocks("cluster.md", "Start ranks by hand", "text")
    (folder / "hostfile").write_text(hostfile.replace("slots=8", "slots=1"))
    port = str(free_port())
    if kind == "ssh":
        return reached_by_ssh([*commands[kind].words[:1], "--master_port", port, *commands[kind].words[1:]], folder)
    programs = {
        "deepspeed": [str(Path(sys.executable).with_name("deepspeed"))],
        "torchrun": [sys.executable, "-m", "torch.distributed.run"],
    }
    here = {"8": "1", "node-a": ADDRESS, "29500": port}
    words = [here.get(word, word) for word in commands[kind].words[1:]]
    own = words.index("--node_rank") + 1
    return [[*programs[kind], *words[:own], node_rank, *words[own + 1 :]] for node_rank in "01"]


def reached_by_ssh(words: list[str], folder: Path) -> list[list[str]]:
    """What a launcher that reaches the hosts by ``ssh`` runs on each, in the folder that it was started in."""
    programs = folder / "bin"
    write_program(programs / "ssh", f"echo {ADDRESS}\n")
    write_program(programs / "pdsh", 'printf "%s\\n" "$@" >on-every-host\n')
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    environment = {"PATH": f"{programs}:{os.environ['PATH']}"}
    done = launch_forked(deepspeed, *words[1:], folder=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    options, _, remote = (folder / "on-every-host").read_text().partition("\nexport ")
    assert options.splitlines()[-1] == "node-a,node-b"
    assert f"\ncd {folder};\n" in remote
    launch = remote[remote.index(f"\n{sys.executable}\n") + 1 :].splitlines()
    return [[word.replace("%n", node_rank) for word in launch if word != "-u"] for node_rank in "01"]


def run_hosts(commands: list[list[str]], folder: Path) -> None:
    """Run the hosts at the same time, each in a session of its own, to their ends."""
    hosts = [start_forked(*command, folder=folder) for command in commands]
    try:
        errors = [host.communicate(timeout=300)[1] for host in hosts]
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
    assert [host.returncode for host in hosts] == [0, 0], "\n".join(errors)


@pytest.mark.parametrize("kind", ["ssh", "deepspeed", "torchrun"])
def test_two_hosts_train_what_one_host_trains(kind: str, flags: list[str], one_host: Path, tmp_path: Path) -> None:
    """They run the commands of the guide."""
    run = tmp_path / "run"
    write_run_file(tmp_path, flags, "run")
    run_hosts(launchers(kind, tmp_path), tmp_path)
    assert_same_run(run, one_host)
    assert len(read_untimed(run)) == NUM_STEPS


def test_two_hosts_resume_a_run_of_one(flags: list[str], one_host: Path, tmp_path: Path) -> None:
    """The hosts see the same files: resumed from step 2, they end with the losses and weights of the first run."""
    run = tmp_path / "run"
    write_run_file(tmp_path, [*flags, "--resume", str(one_host / "checkpoint-2")], "run")
    run_hosts(launchers("torchrun", tmp_path), tmp_path)
    (last,) = read_untimed(run)
    assert last == read_untimed(one_host)[-1]
    weights, expected = read_weights(run), read_weights(one_host)
    assert [name for name, weight in expected.items() if not torch.equal(weights[name], weight)] == []


SRUN = """\
import os, signal, subprocess, sys, time

if "SRUN_CPUS_PER_TASK" not in os.environ:
    sys.exit("each task gets one CPU")
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
tasks = []
for number in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
    tasks.append(subprocess.Popen(command, env={**os.environ, **place}, start_new_session=True))


def pass_on(number, frame):
    for task in tasks:
        os.killpg(task.pid, number)


signal.signal(signal.SIGUSR1, pass_on)
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        pass_on(signal.SIGKILL, None)
    time.sleep(0.1)
sys.exit(max(abs(task.returncode) for task in tasks))
"""

SCONTROL = """\
import sys

if sys.argv[1] == "requeue":
    open("requeued", "a").write(sys.argv[2])
else:
    print("127.0.0.1", "node-b", sep="\\n")
"""


class Slurm:
    """A folder to submit the guide's script from, with stand-ins for the programs of Slurm."""

    def __init__(self, folder: Path, flags: list[str]) -> None:
        self.folder = folder
        self.run = folder / "runs" / "mp_doc"
        programs = folder / ".venv" / "bin"
        for name, source in (("srun", SRUN), ("scontrol", SCONTROL)):
            write_program(programs / name, source, sys.executable)
        path = f"{programs}:{Path(sys.executable).parent}"
        (programs / "activate").write_text(f"export PATH={shlex.quote(path)}:$PATH\n")
        write_run_file(folder, flags, "runs/mp_doc")

    def submit(self) -> subprocess.Popen[str]:
        with guide("cluster.md", "Train with Slurm") as page:
            (script,) = page.take()
        job = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": str(free_port() - 20000), "SLURM_JOB_NODELIST": "node-[a-b]"}
        job["SLURM_CPUS_PER_TASK"] = "1"
        return subprocess.Popen(
            ["bash", "-c", script.text],
            env={**ENVIRONMENT, **job, "SLURM_SUBMIT_DIR": str(self.folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


def toml_values(flags: list[str]) -> dict[str, object]:
    """Flags as a file of flags has them."""
    values: dict[str, object] = {}
    for name, value in zip(flags[::2], flags[1::2]):
        is_bare = value in ("True", "False") or value.replace(".", "").isdigit()
        values[name.removeprefix("--")] = value.lower() if is_bare else f'"{value}"'
    return values


def test_the_slurm_script_of_the_guide_trains(flags: list[str], one_host: Path, tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, flags)
    job = slurm.submit()
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert read_untimed(slurm.run) == read_untimed(one_host)
    assert (slurm.run / "final").is_dir()
    assert not slurm.requeued


def test_a_slurm_job_at_its_time_limit_saves_and_requeues_itself(flags: list[str], tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, [*flags, "--max_steps", "5000", "--save_steps", "0"])
    job = slurm.submit()
    try:
        until = time.monotonic() + 240
        while not (slurm.run / "metrics.jsonl").exists() or not read_metrics(slurm.run):
            assert job.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        (srun,) = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        os.kill(int(srun), signal.SIGUSR1)
        _, errors = job.communicate(timeout=240)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode == 0, errors
    assert slurm.requeued
    (saved,) = list_checkpoints(slurm.run)
    assert saved[0] == read_metrics(slurm.run)[-1]["step"]
    assert not (slurm.run / "final").exists()


MPIRUN = """
while [[ $1 == -* ]]; do
    case $1 in
        -np) num_ranks=$2 ;;
        -x) [[ $2 == *=* ]] && passed+=("$2") || passed+=("$2=${!2}") ;;
    esac
    shift 2
done
for ((rank = 0; rank < num_ranks; rank++)); do
    env -i "${passed[@]}" OMPI_COMM_WORLD_RANK=$rank OMPI_COMM_WORLD_LOCAL_RANK=$((rank % 8)) "$@"
done
"""

PYTHON = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >>ranks\n'


def test_the_mpi_command_of_the_guide_starts_every_rank_with_its_variables(tmp_path: Path) -> None:
    """Stand-ins write down what ``mpirun`` would start: eight ranks on each of two hosts."""
    for name, source in (("mpirun", MPIRUN), ("python", PYTHON)):
        write_program(tmp_path / "bin" / name, source)
    with guide("cluster.md", "Train with MPI") as page:
        (command,) = page.take()
        environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-ec", command.text], cwd=tmp_path, env=environment, check=True)
    ranks = [f"{rank} {rank % 8} 16 node-a 29500 train/main.py --config run.toml" for rank in range(16)]
    assert (tmp_path / "ranks").read_text().splitlines() == ranks


def test_commands_and_manifest_of_the_guide_fit_together() -> None:
    typed = "\n".join(command.text for command in page_commands("cluster.md") if "Training" in command.headings)
    assert re.findall(r"train/main.py (\S+ [\w.]+)", typed) == ["--config run.toml"] * 5
    (manifest,) = blocks("cluster.md", "Training", "yaml")
    service, job = yaml.safe_load_all(manifest)
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    flags = {part.partition("=")[0]: part.partition("=")[2] for part in container["args"]}
    assert container["args"][-2:] == ["train/main.py", "--config=/data/run.toml"]
    assert int(flags["--nnodes"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert flags["--master_addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert int(flags["--shutdown-timeout"]) < pod["terminationGracePeriodSeconds"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(flags["--nproc_per_node"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
