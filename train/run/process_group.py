"""The process group: which rank this process is, joining the other ranks, waiting for them, leaving.

DeepSpeed 0.19 needs two workarounds on a CPU: it would compile a communication kernel at every start (27 s), and a
process that leaves without a barrier sometimes aborts.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import cache

import torch

from schemas.errors import ConfigError

BARRIER_TIMEOUT = timedelta(days=1)
"""How long ranks wait for work that the first rank does alone, such as writing a model of 140 GB. If a rank ends, the
ranks that wait for it still fail at once."""

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """Position of this process among all ranks. ``local`` is its index on this machine."""

    rank: int
    local: int
    world: int

    @property
    def is_first(self) -> bool:
        """Whether this process logs and writes for all ranks."""
        return self.rank == 0


def read_ranks(local_rank: int) -> Ranks:
    """Read the position of this process from the environment that ``deepspeed`` and ``torchrun`` set.

    Without a launcher, the process is the only rank, and its environment is completed to say so.

    Args:
        local_rank: the flag that the ``deepspeed`` launcher appends; -1 if absent.

    Raises:
        ConfigError: the flag contradicts the environment, or the environment is incomplete.
    """
    if not any(name in os.environ for name in _LAUNCHER_VARIABLES):
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    elif "LOCAL_RANK" not in os.environ and local_rank >= 0:
        os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        rank, world, local = (int(os.environ[name]) for name in _LAUNCHER_VARIABLES)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"the environment does not say which rank this is ({error}): start with `deepspeed` or `torchrun`, which "
            f"set {', '.join(_LAUNCHER_VARIABLES)}."
        ) from error
    if not 0 <= rank < world or local < 0:
        raise ConfigError(
            f"the environment has RANK {rank}, WORLD_SIZE {world} and LOCAL_RANK {local}, but ranks count from 0 to "
            "WORLD_SIZE - 1: start with `deepspeed` or `torchrun`, which set them."
        )
    if local_rank not in (-1, local):
        raise ConfigError(f"--local_rank is {local_rank}, but LOCAL_RANK is {local}: leave the flag to the launcher.")
    return Ranks(rank=rank, local=local, world=world)


def join(device: torch.device) -> None:
    """Join the process group. Collective.

    Raises:
        ConfigError: the ranks cannot connect.
    """
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed()
    except torch.distributed.DistNetworkError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"the ranks cannot meet at {address} ({reason}): give the launcher another --master_port, or check its "
            "--master_addr."
        ) from error
    _barrier_group()


def barrier() -> None:
    """Wait until every rank is here, for at most :data:`BARRIER_TIMEOUT`. Collective."""
    torch.distributed.barrier(group=_barrier_group())


def leave() -> None:
    """Leave the process group. Collective."""
    barrier()
    torch.distributed.destroy_process_group()
    _barrier_group.cache_clear()


@cache
def _barrier_group() -> torch.distributed.ProcessGroup | None:
    """All ranks with a long timeout. The default group keeps DeepSpeed's timeout, which bounds waits between steps."""
    group: torch.distributed.ProcessGroup | None = torch.distributed.new_group(backend="gloo", timeout=BARRIER_TIMEOUT)
    return group


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
