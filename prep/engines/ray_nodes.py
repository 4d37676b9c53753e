"""The nodes of a Ray cluster that may do the work: those that see the files of the build and have its software.

Every node is asked once, by a tiny task that runs on it; nodes that join while a build runs are asked too. What a node
lacks is said once, as a warning, and it gets no work.
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

logger = logging.getLogger(__name__)

TASK_MEMORY_BYTES = 1 << 30
"""Memory that a task may use; Ray reserves it, so that a node runs no more tasks than it has room for."""

_NODE_ID = "ray.io/node-id"
_ANSWER_LIMIT_S = 90.0
"""Time for the first nodes to come up and answer; they import the pipeline first, on a busy machine maybe."""
_LOOK_AGAIN_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Node:
    name: str
    slots: int


class RayNodes:
    """Which nodes get work. They are asked for what ``requirements`` held when they were first seen.

    Args:
        cluster: what to call the cluster in messages.
        requirements: what a node must see.
    """

    def __init__(self, cluster: str, requirements: WorkerRequirements) -> None:
        self._cluster = cluster
        self._requirements = requirements
        self._usable: dict[str, _Node] = {}
        self._asked: dict[Any, tuple[str, _Node]] = {}
        self._refused: dict[str, str] = {}
        self._looked = 0.0
        self._last_usable = time.monotonic()

    @property
    def num_slots(self) -> int:
        """Tasks that the usable nodes have room for."""
        return sum(node.slots for node in self._usable.values())

    @property
    def ids(self) -> frozenset[str]:
        """The usable nodes."""
        return frozenset(self._usable)

    def name(self, node: str) -> str:
        """What to call a node in messages."""
        return self._usable[node].name

    def await_some(self) -> None:
        """Ask all nodes, and wait for their answers.

        Raises:
            ConfigError: none can do the work; it says why for each.
        """
        ray = import_ray()
        deadline = time.monotonic() + _ANSWER_LIMIT_S
        while True:
            self._look(ray)
            left = deadline - time.monotonic()
            if left <= 0 or (not self._asked and (self._usable or self._refused)):
                break
            if self._asked:
                ray.wait(list(self._asked), num_returns=len(self._asked), timeout=min(left, _LOOK_AGAIN_S))
            else:
                time.sleep(min(left, 1.0))
        silent = [
            f"node {node.name}: it has not answered within {_ANSWER_LIMIT_S:g} s" for _, node in self._asked.values()
        ]
        for lack in silent:
            logger.warning("ray: no work yet for %s", lack)
        if not self._usable:
            lacks = [*self._refused.values(), *silent] or ["it has no node with a CPU"]
            reasons = "".join(f"\n  {lack}" for lack in lacks)
            raise ConfigError(
                f"no node of the Ray cluster at {self._cluster} can do the work:{reasons}\nAnnotations, media, "
                "tokenizer and output must lie on a file system that the nodes see at the same path, and their Python "
                "must have the same packages."
            )
        logger.info("ray: %d nodes with room for %d tasks at %s", len(self._usable), self.num_slots, self._cluster)

    def look_again(self) -> bool:
        """Note nodes that joined or were lost since the last time, every few seconds. True if any was lost.

        Raises:
            VlprepError: all are lost, and none has come for a while.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN_S:
            return False
        before = self.ids
        self._look(import_ray())
        if self._usable:
            self._last_usable = now
        elif now - self._last_usable > _ANSWER_LIMIT_S:
            raise VlprepError(
                f"all nodes of the Ray cluster at {self._cluster} that did the work are lost. The same command goes on "
                "where it was, once there are nodes again."
            )
        return bool(before - self.ids)

    def _look(self, ray: Any) -> None:
        self._looked = time.monotonic()
        alive = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for lost in self._usable.keys() - alive.keys():
            logger.warning("ray: node %s is lost; others do its work", self._usable.pop(lost).name)
        asked = {node for node, _ in self._asked.values()}
        for new in alive.keys() - self._usable.keys() - self._refused.keys() - asked:
            self._ask(ray, new, alive[new])
        answered, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0) if self._asked else ([], [])
        for reference in answered:
            identity, node = self._asked.pop(reference)
            lacks = _answer(ray, reference)
            if identity not in alive:
                continue
            if lacks:
                self._refuse(identity, node, lacks)
            else:
                self._usable[identity] = node

    def _ask(self, ray: Any, identity: str, found: Mapping[str, Any]) -> None:
        resources = found["Resources"]
        num_cpus = int(resources.get("CPU", 0))
        node = _Node(
            name=f"{found['NodeName']} ({identity[:8]})",
            slots=min(num_cpus, int(resources.get("memory", 0)) // TASK_MEMORY_BYTES),
        )
        if not num_cpus:
            # A head that is to do no work.
            return
        if not node.slots:
            self._refuse(identity, node, [f"it has less memory than a task needs ({TASK_MEMORY_BYTES >> 20} MiB)"])
            return
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(identity, soft=False)
        task = ray.remote(unmet).options(num_cpus=0, scheduling_strategy=strategy, **_common_options())
        self._asked[task.remote(self._requirements)] = (identity, node)

    def _refuse(self, identity: str, node: _Node, lacks: list[str]) -> None:
        self._refused[identity] = f"node {node.name}: {'; '.join(lacks)}"
        logger.warning("ray: no work for %s", self._refused[identity])


def _common_options() -> dict[str, Any]:
    """Options of every task; all have the same environment, so that a worker process serves any of them."""
    root = Path(prep.__path__[0]).parent
    # Code is not sent along. A checkout that is not installed is used from where it lies, if the node sees it.
    checkout = {"PYTHONPATH": str(root)} if (root / "pyproject.toml").is_file() else {}
    return {
        # Lost tasks are run again by the engine, which counts how often, whatever Ray calls the loss.
        "max_retries": 0,
        "runtime_env": {"env_vars": {**ONE_THREAD, **checkout}},
    }


def task_options(nodes: frozenset[str]) -> dict[str, Any]:
    """Options of a task of the pipeline that may run on any of some nodes."""
    return {
        **_common_options(),
        "num_cpus": 1,
        "memory": TASK_MEMORY_BYTES,
        "label_selector": {_NODE_ID: f"in({','.join(sorted(nodes))})"},
    }


def _answer(ray: Any, reference: Any) -> list[str]:
    try:
        lacks: list[str] = ray.get(reference)
    except ray.exceptions.RayError as error:
        # Its Python has no vlprep, say, or it is gone again.
        last = str(error).strip().splitlines()[-1]
        return [f"it cannot run vlprep: {last}"]
    return lacks
