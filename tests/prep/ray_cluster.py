"""A Ray cluster of several node processes on this machine, for tests of the engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Shared memory is small in many containers; tasks and results are smaller.
STORE_BYTES = 80 << 20
NODE_MEMORY_BYTES = 4 << 30
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


class NodeProcesses:
    """A cluster whose head runs no tasks, and whose nodes are process groups on this machine that can be killed.

    Attributes:
        address: ``host:port`` of the head.
    """

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        limits = {
            "health_check_initial_delay_ms": 1000,
            "health_check_failure_threshold": 10,
            "health_check_period_ms": 1000,
        }
        arguments = {"num_cpus": 0, "include_dashboard": False, "_system_config": limits}
        self._cluster = Cluster(initialize_head=True, head_node_args={**arguments, "object_store_memory": STORE_BYTES})
        self.address: str = self._cluster.address

    def add(self, num_cpus: int = 1, **arguments: Any) -> Any:
        """Start a node and wait until the head knows it. ``env_vars`` are its environment."""
        return self._cluster.add_node(
            num_cpus=num_cpus, object_store_memory=STORE_BYTES, memory=NODE_MEMORY_BYTES, **arguments
        )

    @contextmanager
    def apart(self, *mounts: str) -> Iterator[None]:
        """A node with one CPU in its own mount namespace; `mount` runs there first, once for each of ``mounts``."""
        unshare = shutil.which("unshare")
        if unshare is None or subprocess.run([unshare, "--mount", "true"], check=False).returncode:
            pytest.skip("this user may not make a mount namespace")
        script = Path(sys.executable).with_name("ray")
        mounted = " && ".join(f"mount {arguments}" for arguments in mounts)
        command = (
            f"{mounted} && exec '{script}' start --address {self.address} --block --num-cpus 1 "
            f"--object-store-memory {STORE_BYTES} --memory {NODE_MEMORY_BYTES} --disable-usage-stats"
        )
        process = subprocess.Popen(
            [unshare, "--mount", "sh", "-c", command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        assert process.stdout is not None
        try:
            output = ""
            # Ray lets no two nodes of a machine start at the same time.
            while "Ray runtime started" not in output:
                line = process.stdout.readline()
                assert line, f"the node did not start: {output}"
                output += line
            yield
        finally:
            # An orderly shutdown, so that the head removes the node before later tests.
            process.terminate()
            process.communicate()

    @contextmanager
    def node(self, **arguments: Any) -> Iterator[Any]:
        """A node that is removed at the end of the block, unless it was killed."""
        node = self.add(**arguments)
        try:
            yield node
        finally:
            self._cluster.remove_node(node, allow_graceful=True)

    def shutdown(self) -> None:
        """Stop the head and all nodes."""
        self._cluster.shutdown()


@contextmanager
def node_processes() -> Iterator[NodeProcesses]:
    """A cluster until the end of the block."""
    pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        nodes = NodeProcesses()
        try:
            yield nodes
        finally:
            nodes.shutdown()


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    return children


def _title(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def processes_below(process: int) -> list[int]:
    """All descendants of a process."""
    children = _children()
    descendants, pending = [], [process]
    while pending:
        below = children.get(pending.pop(), [])
        descendants += below
        pending += below
    return descendants


def kill_while_it_runs(node: Any, task: str, is_over: Callable[[], bool]) -> bool:
    """SIGKILL a node and all its processes at a moment when it runs a task of that name; False if it never did."""
    (raylet,) = node.all_processes["raylet"]
    while not is_over():
        below = processes_below(raylet.process.pid)
        if any(task in _title(process) for process in below):
            for process in (raylet.process.pid, *below):
                os.kill(process, signal.SIGKILL)
            return True
        time.sleep(0.01)
    return False
