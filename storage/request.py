"""One request to a store, retried until it succeeds, gets a final answer, or the retry policy ends.

fsspec's own thread does not survive a fork. A build that has asked a store spawns its workers instead, and each opens
its own connections, which its threads share.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.errors import ConfigError
from schemas.wording import counted
from storage.errors import Verdict, describe, explained, verdict
from storage.urls import Url

if TYPE_CHECKING:
    import tenacity

logger = logging.getLogger(__name__)

T = TypeVar("T")

S3 = ("s3", "s3a")

MAX_REQUESTS = 16
"""Requests that one process has in flight at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """How long a request is retried.

    Attributes:
        attempts: requests before giving up.
        timeout_s: a request without a complete answer after this time counts as failed.
        first_delay_s: pause after the first failure. It doubles with each further failure. Up to as much again is
            added at random, so that workers do not retry in step.
        max_delay_s: longest pause, without the random part.
    """

    attempts: int = 7
    timeout_s: float = 60.0
    first_delay_s: float = 0.5
    max_delay_s: float = 20.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.timeout_s > 0 or self.first_delay_s < 0 or self.max_delay_s < 0:
            raise ConfigError(
                f"retries with {self.attempts} attempts of {self.timeout_s} s and pauses of {self.first_delay_s} to "
                f"{self.max_delay_s} s; allowed: 1 or more attempts, a positive timeout, pauses of 0 or more."
            )


DEFAULT_POLICY = RetryPolicy()


def retry(
    call: Callable[[], T],
    where: object,
    *,
    policy: RetryPolicy | None = None,
    stop_event: threading.Event | None = None,
) -> T:
    """Call until the call succeeds.

    Args:
        call: makes one attempt.
        where: what the messages name: a URL, or a place inside the file.
        policy: :data:`DEFAULT_POLICY` if not given.
        stop_event: once set, no further attempt is made.

    Raises:
        NotThereError, RefusedError: the store's answer is final.
        StorageError: no attempt succeeded.
    """
    # Here, because most commands read local files alone.
    import tenacity

    policy = policy or DEFAULT_POLICY
    stop_event = stop_event or threading.Event()
    start = time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_is_transient),
        stop=tenacity.stop_any(tenacity.stop_after_attempt(policy.attempts), tenacity.stop_when_event_set(stop_event)),
        wait=tenacity.wait_exponential(multiplier=policy.first_delay_s, max=policy.max_delay_s)
        + tenacity.wait_random(0, policy.first_delay_s),
        sleep=tenacity.sleep_using_event(stop_event),
        before_sleep=lambda state: _log_failure(where, state),
        reraise=True,
    )
    try:
        return retrying(call)
    except Exception as error:  # every file system behind fsspec raises its own errors
        attempts = retrying.statistics.get("attempt_number", 1)
        duration = f"{counted(attempts, 'attempt')} over {time.monotonic() - start:.0f} s"
        raise explained(error, where, duration) from error


def file_system(url: Url, policy: RetryPolicy | None = None, *, uploads: bool = False) -> tuple[Any, str]:
    """The fsspec file system behind a URL, and the path that it knows the URL by.

    Args:
        url: a file or folder.
        policy: its timeout applies to the connections.
        uploads: whether the file system retries by itself too, so that one failed part of a large upload does not
            repeat the others.

    Raises:
        ConfigError: fsspec does not know the protocol, or its package is not installed.
    """
    import fsspec.core

    try:
        if "::" in url.url.partition("://")[0]:
            system, path = fsspec.core.url_to_fs(url.url)
            return system, path
        with _open_lock:
            system = _system(url.root, (policy or DEFAULT_POLICY).timeout_s, uploads)
    except ImportError as error:
        raise ConfigError(
            f"{url} needs a package that is not installed: pip install {_package(url.protocol)} ({error})."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{url} cannot be used: {error}. Give a path, or a URL with a protocol that fsspec knows."
        ) from error
    return system, system._strip_protocol(url.url)


def time_limit(system: Any, policy: RetryPolicy | None = None, *, factor: float = 1.0, plus_s: float = 0.0) -> Any:
    """Argument that makes an asynchronous file system abandon a request. Others have their own limits.

    Args:
        system: of :func:`file_system`.
        policy: gives the timeout.
        factor: multiplies it, for calls that make many requests.
        plus_s: added to it, for calls that send much.
    """
    return {"timeout": (policy or DEFAULT_POLICY).timeout_s * factor + plus_s} if system.async_impl else {}


_open_lock = threading.Lock()


@lru_cache(maxsize=256)
def _system(root: str, timeout_s: float, uploads: bool) -> Any:
    """One file system per bucket or host for all threads. fsspec would make one per thread, each with its own pool."""
    import fsspec.config
    import fsspec.core

    options: dict[str, Any] = {"use_listings_cache": False}
    if Url(root).protocol in S3:
        connection = {
            "connect_timeout": min(10.0, timeout_s),
            "read_timeout": timeout_s,
            "max_pool_connections": 2 * MAX_REQUESTS,
            "retries": {"mode": "standard", "total_max_attempts": 3 if uploads else 1},
        }
        options["config_kwargs"] = {**connection, **fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}
    system, _ = fsspec.core.url_to_fs(root, **options)
    if Url(root).protocol in S3 and not uploads:
        system.retries = 1
    return system


def _package(protocol: str) -> str:
    """The package that pip installs for a protocol."""
    from fsspec.registry import known_implementations

    if protocol in ("http", "https"):
        return "aiohttp"
    return str(known_implementations[protocol]["class"]).partition(".")[0]


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, Exception) and verdict(error) is Verdict.TRANSIENT


def _log_failure(where: object, state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    if error is not None:
        logger.debug("%s: attempt %d failed: %s", where, state.attempt_number, describe(error))
