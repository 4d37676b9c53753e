"""The usable nodes of a Ray cluster: those that see the files of the build and have its software.

A tiny task checks every node once, including nodes that join while a build runs. A node with unmet requirements gets no
work and one warning that names them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import prep
from prep.engines.processes import ONE_THREAD
from prep.engines.ray_cluster import import_ray
from prep.engines.requirements import WorkerRequirements, unmet
from schemas.errors import ConfigError, VlprepError
from schemas.wording import counted

logger = logging.getLogger(__name__)

TASK_MEMORY_BYTES = 1 << 30
"""Memory that Ray reserves for a task, so that a node runs no more tasks than it has room for."""

_NODE_ID = "ray.io/node-id"
_ANSWER_TIMEOUT_S = 90.0
"""Time for the first nodes to answer. They import the pipeline first, maybe on a busy machine."""
_CHECK_INTERVAL_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    name: str
    slots: int


class RayNodes:
    """Keeps track of the nodes that get work. A node is checked for the ``requirements`` at the time it is first seen.

    Args:
        cluster: name of the cluster in messages.
        requirements: what a node needs.
    """

    def __init__(self, cluster: str, requirements: WorkerRequirements) -> None:
        self._cluster = cluster
        self._requirements = requirements
        self._usable: dict[str, _Node] = {}
        self._pending: dict[Any, tuple[str, _Node]] = {}
        self._refused: dict[str, str] = {}
        self._last_check = 0.0
        self._last_usable = time.monotonic()

    @property
    def num_slots(self) -> int:
        """Number of tasks that the usable nodes have room for."""
        return sum(node.slots for node in self._usable.values())

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the usable nodes."""
        return frozenset(self._usable)

    def name(self, node: str) -> str:
        """Name of a node in messages."""
        return self._usable[node].name

    def await_some(self) -> None:
        """Check all nodes and wait for their answers.

        Raises:
            ConfigError: no node meets the requirements; the message gives the reasons of each.
        """
        ray = import_ray()
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while True:
            self._check(ray)
            left = deadline - time.monotonic()
            if left <= 0 or (not self._pending and (self._usable or self._refused)):
                break
            if self._pending:
                ray.wait(list(self._pending), num_returns=len(self._pending), timeout=min(left, _CHECK_INTERVAL_S))
            else:
                time.sleep(min(left, 1.0))
        silent = [f"node {node.name}: no answer within {_ANSWER_TIMEOUT_S:g} s" for _, node in self._pending.values()]
        for reason in silent:
            logger.warning("ray: no work yet for %s", reason)
        if not self._usable:
            listed = [*self._refused.values(), *silent] or ["it has no node with a CPU"]
            reasons = "".join(f"\n  {reason}" for reason in listed)
            raise ConfigError(
                f"no node of the Ray cluster at {self._cluster} can do the work:{reasons}\nAnnotations, media, "
                "tokenizer and output must lie on a file system that the nodes see at the same path, and their Python "
                "must have the same packages."
            )
        nodes, tasks = counted(len(self._usable), "node"), counted(self.num_slots, "task")
        logger.info("ray: %s with room for %s at %s", nodes, tasks, self._cluster)

    def look_again(self) -> bool:
        """Every few seconds, look for nodes that joined or were lost. Returns whether any was lost.

        Raises:
            VlprepError: all nodes are lost, and none has joined for a while.
        """
        now = time.monotonic()
        if now - self._last_check < _CHECK_INTERVAL_S:
            return False
        before = self.ids
        self._check(import_ray())
        if self._usable:
            self._last_usable = now
        elif now - self._last_usable > _ANSWER_TIMEOUT_S:
            raise VlprepError(
                f"all nodes of the Ray cluster at {self._cluster} that did the work are lost. Once there are "
                "nodes again, run the same command to resume."
            )
        return bool(before - self.ids)

    def _check(self, ray: Any) -> None:
        self._last_check = time.monotonic()
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for lost in self._usable.keys() - alive.keys():
            logger.warning("ray: node %s is lost; other nodes take over its work", self._usable.pop(lost).name)
        pending = {node for node, _ in self._pending.values()}
        for new in alive.keys() - self._usable.keys() - self._refused.keys() - pending:
            self._start_check(ray, new, alive[new])
        answered, _ = (
            ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0) if self._pending else ([], [])
        )
        for reference in answered:
            identity, node = self._pending.pop(reference)
            reasons = _answer(ray, reference)
            if identity not in alive:
                continue
            if reasons:
                self._refuse(identity, node, reasons)
            else:
                self._usable[identity] = node

    def _start_check(self, ray: Any, identity: str, description: Mapping[str, Any]) -> None:
        resources = description["Resources"]
        num_cpus = int(resources.get("CPU", 0))
        node = _Node(
            name=f"{description['NodeName']} ({identity[:8]})",
            slots=min(num_cpus, int(resources.get("memory", 0)) // TASK_MEMORY_BYTES),
        )
        if not num_cpus:
            # A head node without work.
            return
        if not node.slots:
            self._refuse(identity, node, [f"it has less memory than a task needs ({TASK_MEMORY_BYTES >> 20} MiB)"])
            return
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(identity, soft=False)
        task = ray.remote(unmet).options(num_cpus=0, scheduling_strategy=strategy, **_common_options())
        self._pending[task.remote(self._requirements)] = (identity, node)

    def _refuse(self, identity: str, node: _Node, reasons: list[str]) -> None:
        self._refused[identity] = f"node {node.name}: {'; '.join(reasons)}"
        logger.warning("ray: no work for %s", self._refused[identity])


def _common_options() -> dict[str, Any]:
    """Options of every task. All have the same environment, so any worker process can run any task."""
    root = Path(prep.__path__[0]).parent
    # Ray sends no code. A checkout that is not installed is used in place, if the node sees it.
    checkout = {"PYTHONPATH": str(root)} if (root / "pyproject.toml").is_file() else {}
    return {
        # The engine retries lost tasks itself. It counts attempts, whatever Ray calls the loss.
        "max_retries": 0,
        "runtime_env": {"env_vars": {**ONE_THREAD, **checkout}},
    }


def task_options(nodes: frozenset[str]) -> dict[str, Any]:
    """Options of a pipeline task that may run on any of ``nodes``."""
    return {
        **_common_options(),
        "num_cpus": 1,
        "memory": TASK_MEMORY_BYTES,
        "label_selector": {_NODE_ID: f"in({','.join(sorted(nodes))})"},
    }


def _answer(ray: Any, reference: Any) -> list[str]:
    try:
        reasons: list[str] = ray.get(reference)
    except ray.exceptions.RayError as error:
        # For example, its Python has no vlprep, or the node is gone.
        last = str(error).strip().splitlines()[-1]
        return [f"it cannot run vlprep: {last}"]
    return reasons
