"""Connecting to a Ray cluster: one that is named, one that is found, or a new one on this machine.

Ray waits minutes for an address where no cluster is, so every address is first spoken to here, for a few seconds.
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
_ANSWER_LIMIT_S = 10.0
_OBJECT_STORE_BYTES = 256 << 20
"""Of a cluster that is started here. Only tasks and results go through it, never media or shards."""

# What an HTTP/2 connection begins with, which is what a cluster speaks: a greeting and empty settings (RFC 9113, 3.4).
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS_FRAME = 4


def import_ray() -> ModuleType:
    """The package ``ray``.

    Raises:
        ConfigError: it is not installed.
    """
    # Ray would announce a future default for GPUs, of which no task here wants any.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
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
        address: ``auto``, ``local`` (a new one), ``host:port`` or ``ray://host:port``; None for the cluster of
            ``RAY_ADDRESS`` or of this machine, or else a new one.
        num_cpus: tasks at the same time of a new one.

    Returns:
        What to call the cluster in messages.

    Raises:
        ConfigError: there is no cluster at the address, or not one that this process can use.
    """
    ray = import_ray()
    address = address or os.environ.get("RAY_ADDRESS") or _last_cluster() or "local"
    if address == "auto":
        address = _last_cluster() or "auto"
    if address not in ("auto", "local"):
        _greet(address)
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
            f"no Ray cluster can be used at {address}: {_first_line(error)}. `ray start --head` prints host:port; the "
            "port for ray:// is another one, 10001 as a rule. Without --ray-address a new cluster is started here."
        ) from error
    except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
        # Another version of Ray or Python, or no token for it.
        raise ConfigError(f"the Ray cluster at {address} cannot be used from here: {_first_line(error)}.") from error
    return "this machine" if address == "local" else address


def _last_cluster() -> str | None:
    """Address of the cluster that `ray start` started last on this machine, if it still answers."""
    note = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / "ray_current_cluster"
    try:
        address = note.read_text().strip()
        _greet(address)
    except (OSError, ConfigError):
        return None
    return address


def _greet(address: str) -> None:
    """Hold that something at an address speaks HTTP/2.

    Raises:
        ConfigError: it is not an address, nothing answers there, or something else does.
    """
    parts = _ADDRESS.fullmatch(address)
    if parts is None:
        raise ConfigError(
            f"--ray-address {address} is not auto, local, host:port or ray://host:port. `ray start --head` prints it."
        )
    try:
        with socket.create_connection((parts["host"].strip("[]"), int(parts["port"])), _ANSWER_LIMIT_S) as connection:
            if os.environ.get("RAY_USE_TLS", "0") != "0":
                return
            connection.settimeout(_ANSWER_LIMIT_S)
            connection.sendall(_GREETING)
            answer = connection.recv(4)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(
            f"no Ray cluster answers at {address} ({reason}). Is it running (`ray status` there), and is the port the "
            "one that `ray start --head` printed?"
        ) from error
    if answer[3:] != bytes([_SETTINGS_FRAME]):
        raise ConfigError(f"what answers at {address} is not a Ray cluster. `ray start --head` prints the address.")


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's answers to signals: Ray puts its own in their place."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
