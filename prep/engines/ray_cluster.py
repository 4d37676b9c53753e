"""Connects to a Ray cluster: at a given address, one of this machine, or a new one.

At an address without a cluster, ``ray.init`` waits for minutes, and Ray's own check (``GcsClient``) ends the process.
So each address is first checked here, for a few seconds.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from schemas.errors import ConfigError

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"(?P<client>ray://)?(?P<host>[^/\s]+):(?P<port>[0-9]{1,5})")
_CHECK_TIMEOUT_S = 5.0
_OBJECT_STORE_BYTES = 256 << 20
"""Object store of a new cluster. Only tasks and results pass through it, never media or shards."""


def import_ray() -> ModuleType:
    """The package ``ray``.

    Raises:
        ConfigError: it is not installed.
    """
    # Otherwise Ray warns about a future default for GPUs, which no task here uses.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import grpc  # noqa: F401  (a dependency of ray[client], used to check addresses)
        import ray
    except ImportError as error:
        raise ConfigError(
            f"--engine ray needs ray, which cannot be imported ({error}); install it with: pip install 'ray[client]'"
        ) from error
    logging.getLogger("ray").setLevel(logging.ERROR)
    return ray


def connect(address: str | None, num_cpus: int) -> str:
    """Connect this process to a cluster.

    Args:
        address: ``auto``, ``local`` (a new cluster), ``host:port`` or ``ray://host:port``. None for the cluster of
            ``RAY_ADDRESS``, or the one of this machine, or a new one.
        num_cpus: tasks that a new cluster runs at the same time.

    Returns:
        The name of the cluster in messages.

    Raises:
        ConfigError: no cluster answers at the address, or this process cannot use it.
    """
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or _last_cluster() or "local"
    if address == "auto":
        address = _last_cluster() or "auto"
    if address not in ("auto", "local"):
        _require_cluster(address)
    options = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": _OBJECT_STORE_BYTES}
    try:
        with _own_signals():
            ray.init(
                address=address,
                log_to_driver=False,
                configure_logging=False,
                logging_level=logging.ERROR,
                **(options if address == "local" else {}),
            )
    except ConnectionError as error:
        raise ConfigError(
            f"cannot connect to a Ray cluster at {address}: {_first_line(error)}. `ray start --head` prints host:port. "
            "ray:// has its own port, usually 10001. Without --ray-address a new cluster starts on this machine."
        ) from error
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        # Its Ray or Python has another version, or the token is missing.
        raise ConfigError(f"the Ray cluster at {address} cannot be used from here: {_first_line(error)}.") from error
    return "this machine" if address == "local" else address


def _last_cluster() -> str | None:
    """Address of the latest cluster that `ray start` started on this machine, if it still answers."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        _require_cluster(address)
    except (OSError, ConfigError):
        return None
    return address


def _require_cluster(address: str) -> None:
    """Check within seconds that a cluster answers at an address.

    Raises:
        ConfigError: it is not an address, nothing answers there, or something else does.
    """
    import grpc

    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise ConfigError(
            f"--ray-address {address} is not auto, local, host:port or ray://host:port. `ray start --head` prints it."
        )
    try:
        socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), _CHECK_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"no Ray cluster answers at {address} ({reason}). Is it running (`ray status` there), and is the port the "
            "one that `ray start --head` printed?"
        ) from error
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    target = f"{parts['host']}:{parts['port']}"
    try:
        # A cluster speaks gRPC. Like Ray, do not go through the proxy of the environment.
        with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
            grpc.channel_ready_future(channel).result(timeout=_CHECK_TIMEOUT_S)
    except grpc.FutureTimeoutError as error:
        raise ConfigError(
            f"the server at {address} is not a Ray cluster. `ray start --head` prints the address."
        ) from error


@contextmanager
def _own_signals() -> Iterator[None]:
    """Restore this process's signal handlers, which Ray replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
