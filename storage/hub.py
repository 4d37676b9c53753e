"""Tells quickly whether the Hugging Face hub can be reached, before its client retries for a long time.

In: the settings of ``huggingface_hub`` and the proxies of the environment. Out: the reason why not. Cost: one
connection.
"""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants

_TIMEOUT_S = 1.5


def unreachable_reason() -> str | None:
    """Why the hub cannot be reached. None if it can, or if ``HF_HUB_OFFLINE`` keeps its client from trying."""
    if constants.HF_HUB_OFFLINE:
        return None
    endpoint = urlsplit(constants.ENDPOINT)
    host = endpoint.hostname or ""
    proxy = None if proxy_bypass(host) else getproxies().get(endpoint.scheme)
    target = urlsplit(proxy if "://" in proxy else f"http://{proxy}") if proxy else endpoint
    address = (target.hostname or "", target.port or (443 if target.scheme == "https" else 80))
    reasons: list[str | None] = []
    # A thread, because the name lookup has no timeout.
    thread = threading.Thread(target=lambda: reasons.append(_connect(address)), daemon=True)
    thread.start()
    thread.join(_TIMEOUT_S)
    reason = reasons[0] if reasons else f"no answer within {_TIMEOUT_S} s"
    return None if reason is None else f"no connection to {address[0]}: {reason}"


def _connect(address: tuple[str, int]) -> str | None:
    try:
        socket.create_connection(address, timeout=_TIMEOUT_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return None
