"""The process group: which rank this process is, joining the other ranks, waiting for them, leaving.

Ranks wait for each other in three ways. First they meet through a key-value store, for as long as
``--rendezvous_timeout_s``: a rank may end while it starts. Between steps they wait in collectives, which fail after
DeepSpeed's timeout (10 minutes, or ``DEEPSPEED_TIMEOUT``). For work that the first rank does alone, they wait at a
:func:`barrier` in the store. It needs no connection between ranks but the one that each has to the store.

DeepSpeed 0.19 needs three workarounds on a CPU: it would compile a communication kernel at every start (27 s), ZeRO-3
would run ``numactl`` for every bucket of gradients, and a process that leaves without a barrier sometimes aborts.
"""

from __future__ import annotations

import gc
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch._C._distributed_c10d import TCPStore
from torch.distributed import DistError, DistNetworkError, DistStoreError
from torch.distributed.distributed_c10d import _get_default_store

from schemas.errors import ConfigError, VlprepError
from train.settings.declarations import RENDEZVOUS_TIMEOUT_S

BARRIER_TIMEOUT = timedelta(days=1)
"""How long ranks wait for work that the first rank does alone, such as writing a model of 140 GB. Ranks that wait for
one that fails are told, and end at once. If a rank is killed, the launcher ends the others."""

_POLL_S = 0.1
_SHOWN_RANKS = 8

_ARRIVALS = "vlprep/arrivals"
"""Key of the store that counts all arrivals at barriers."""

_OPEN, _FAILED = "open", "failed"
"""States of a barrier that nobody waits at any longer."""

logger = logging.getLogger(__name__)

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


@contextmanager
def joined(device: torch.device, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> Iterator[None]:
    """Join the process group for a ``with`` block. Collective, also at the end, unless the block has left the group.

    If the block fails, the ranks that wait for this one at a barrier, now or later, fail as well.

    Raises:
        ConfigError, VlprepError: as :func:`join`.
    """
    join(device, timeout_s)
    # What imports leave is never garbage. In bfloat16 DeepSpeed starts with 14 collections, of 0.3 s each otherwise.
    gc.freeze()
    try:
        yield
    except BaseException:  # whatever ends this rank, the others must not wait for it
        if torch.distributed.is_initialized():
            with suppress(DistError):  # the store has ended with the first rank
                store, world = _get_default_store(), torch.distributed.get_world_size()
                store.compare_set(_barrier_key(store.add(_ARRIVALS, 0) // world), "", _FAILED)
        raise
    if torch.distributed.is_initialized():
        leave()


def join(device: torch.device, timeout_s: float = RENDEZVOUS_TIMEOUT_S) -> None:
    """Join the process group. Collective.

    Args:
        device: of this rank.
        timeout_s: how long to wait for the other ranks to start.

    Raises:
        ConfigError: the ranks cannot connect.
        VlprepError: some ranks have not come in time.
    """
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # As its own launcher says: how many ranks this machine has.
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _meet(address, timeout_s)
        deepspeed.init_distributed()
    except (DistNetworkError, DistStoreError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise _no_meeting(address, timeout_s, reason) from error
    del store  # on the first rank it has kept the server running until the process group uses it


def _meet(address: str, timeout_s: float) -> TCPStore:
    """Wait until all ranks have started. Returns the store through which they meet.

    Raises:
        ConfigError: nothing answers at the address.
        VlprepError: some ranks have not come in time.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    is_served_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host, _, port = address.rpartition(":")
    is_server = rank == 0 and not is_served_by_torchrun
    deadline = time.monotonic() + timeout_s
    while not is_server:  # the store's own client prints its stack when it gives up
        try:
            socket.create_connection((host, int(port)), timeout=1.0).close()
            break
        except OSError as error:
            if time.monotonic() >= deadline:
                raise _no_meeting(address, timeout_s, error.strerror or str(error)) from error
            time.sleep(_POLL_S)
    store = TCPStore(
        host,
        int(port),
        is_master=is_server,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=not is_served_by_torchrun,
    )
    meeting = f"vlprep/meeting/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store.set(f"{meeting}/{rank}", "")
    if store.add(f"{meeting}/count", 1) == world:
        store.set(f"{meeting}/complete", "")
    while not store.check([f"{meeting}/complete"]):
        if time.monotonic() >= deadline:
            missing = [str(other) for other in range(world) if not store.check([f"{meeting}/{other}"])]
            shown = ", ".join(missing[:_SHOWN_RANKS]) + (", …" if len(missing) > _SHOWN_RANKS else "")
            raise VlprepError(
                f"{world - len(missing)} of {world} ranks came to {address} within {timeout_s:g} s; missing: rank "
                f"{shown}. See its message, above or in its log; if it needs longer to start, raise "
                "--rendezvous_timeout_s."
            )
        time.sleep(_POLL_S)
    return store


def _no_meeting(address: str, timeout_s: float, reason: str) -> ConfigError:
    return ConfigError(
        f"the ranks cannot meet at {address} within {timeout_s:g} s ({reason}): if rank 0 has ended, see its message, "
        "above or in its log. Else give the launcher another --master_port, or check its --master_addr."
    )


def barrier() -> None:
    """Wait until every rank is here, for at most :data:`BARRIER_TIMEOUT`. Collective.

    Raises:
        VlprepError: a rank has failed.
    """
    store, world = _get_default_store(), torch.distributed.get_world_size()
    try:
        # No rank arrives at the next barrier before all have arrived at this one.
        arrivals = store.add(_ARRIVALS, 1)
        key = _barrier_key((arrivals - 1) // world)
        if arrivals % world == 0:
            store.compare_set(key, "", _OPEN)
        store.wait([key], BARRIER_TIMEOUT)
        state = store.get(key).decode()
    except DistError as error:
        raise VlprepError(
            f"the ranks cannot wait for each other ({error}): the first one has ended, see its message, above or in "
            "its log."
        ) from error
    if state == _FAILED:
        raise VlprepError("another rank failed while this one waited for it: see its message, above or in its log.")


def leave() -> None:
    """Leave the process group. Collective."""
    barrier()
    torch.distributed.barrier()  # the store ends with the first rank, when all have been told that they are here
    torch.distributed.destroy_process_group()


def warn_of_long_reads(read_timeout_s: float) -> None:
    """Warn if ranks give up waiting for one that reads before its own time limit could name what it reads."""
    from deepspeed.constants import default_pg_timeout

    if read_timeout_s >= default_pg_timeout.total_seconds():
        logger.warning(
            "--read_timeout_s %g is not below the %g s after which ranks stop waiting for each other: a slow read "
            "would end the run without the name of its bin. Lower it, or raise DEEPSPEED_TIMEOUT (minutes)",
            read_timeout_s,
            default_pg_timeout.total_seconds(),
        )


def _barrier_key(index: int) -> str:
    return f"vlprep/barrier/{index}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
