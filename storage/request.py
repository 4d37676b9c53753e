"""One request to a store, made again until it succeeds, a final answer comes, or patience is at its end.

fsspec's own thread does not survive a fork; the workers of a build are started afresh, and each makes its connections
by itself. Threads share them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import tenacity

from schemas.errors import ConfigError
from storage.errors import Verdict, describe, explained, verdict
from storage.urls import Url

logger = logging.getLogger(__name__)

T = TypeVar("T")

S3 = ("s3", "s3a")

REQUESTS_AT_ONCE = 16
"""Requests that one process has under way at the same time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a store is asked.

    Attributes:
        attempts: requests before giving up.
        timeout_s: after which a request without a complete answer counts as failed.
        first_delay_s: pause after the first failure, doubled with each further one; a random part of up to as much is
            added, so that workers do not come back all at once.
        max_delay_s: longest pause.
    """

    attempts: int = 7
    timeout_s: float = 60.0
    first_delay_s: float = 0.5
    max_delay_s: float = 20.0


PATIENCE = Patience()


def persist(call: Callable[[], T], url: Url, stopped: threading.Event | None = None) -> T:
    """What ``call`` returns once it succeeds.

    Args:
        call: makes one attempt.
        url: what it asks for, for messages.
        stopped: once set, no further attempt is made.

    Raises:
        NotThereError, RefusedError: the store's answer is final.
        StorageError: no good answer in all attempts.
    """
    patience = PATIENCE
    stopped = stopped or threading.Event()
    began = time.monotonic()
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        stop=tenacity.stop_any(tenacity.stop_after_attempt(patience.attempts), tenacity.stop_when_event_set(stopped)),
        wait=tenacity.wait_exponential(multiplier=patience.first_delay_s, max=patience.max_delay_s)
        + tenacity.wait_random(0, patience.first_delay_s),
        sleep=tenacity.sleep_using_event(stopped),
        before_sleep=lambda state: _log_failure(url, state),
        reraise=True,
    )
    try:
        return retrying(call)
    except Exception as error:  # every system behind fsspec raises errors of its own
        attempts = retrying.statistics.get("attempt_number", 1)
        raise explained(error, url, f"{attempts} attempts over {time.monotonic() - began:.0f} s") from error


def opened(url: Url, *, uploads: bool = False) -> tuple[Any, str]:
    """The fsspec system behind a URL, and what it calls the place.

    Args:
        url: the place.
        uploads: whether requests are made again inside the system too, so that one part of a large upload that fails
            does not cost the others.

    Raises:
        ConfigError: fsspec does not know the protocol, or its package is not installed.
    """
    import fsspec.core

    try:
        if "::" in url.url.partition("://")[0]:
            system, place = fsspec.core.url_to_fs(url.url)
            return system, place
        with _opening:
            system = _system(url.root, PATIENCE.timeout_s, uploads)
    except ImportError as error:
        raise ConfigError(
            f"{url} needs a package that is not installed: pip install {_package(url.protocol)} ({error})."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{url} cannot be used: {error}. Give a path, or a URL of a kind that fsspec knows."
        ) from error
    return system, system._strip_protocol(url.url)


def time_limit(system: Any, limit_s: float | None = None) -> dict[str, float]:
    """Argument that makes an asynchronous system give up on a request; others have limits of their own."""
    return {"timeout": limit_s or PATIENCE.timeout_s} if system.async_impl else {}


_opening = threading.Lock()


@lru_cache(maxsize=256)
def _system(root: str, timeout_s: float, uploads: bool) -> Any:
    """One system a bucket or host for all threads; fsspec by itself makes one a thread, with connections of its own."""
    import fsspec.config
    import fsspec.core

    options: dict[str, Any] = {"use_listings_cache": False}
    if Url(root).protocol in S3:
        connection = {
            "connect_timeout": min(10.0, timeout_s),
            "read_timeout": timeout_s,
            "max_pool_connections": 2 * REQUESTS_AT_ONCE,
            "retries": {"mode": "standard", "total_max_attempts": 3 if uploads else 1},
        }
        options["config_kwargs"] = {**connection, **fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}
    system, _ = fsspec.core.url_to_fs(root, **options)
    if Url(root).protocol in S3 and not uploads:
        system.retries = 1
    return system


def _package(protocol: str) -> str:
    """What pip installs for a protocol."""
    from fsspec.registry import known_implementations

    if protocol in ("http", "https"):
        return "aiohttp"
    return str(known_implementations[protocol]["class"]).partition(".")[0]


def _may_pass(error: BaseException) -> bool:
    return isinstance(error, Exception) and verdict(error) is Verdict.TRANSIENT


def _log_failure(url: Url, state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    if error is not None:
        logger.debug("%s: attempt %d failed: %s", url, state.attempt_number, describe(error))
