"""A real S3 server (moto's, in a process of its own) behind a proxy that can be set to misbehave.

Whether a request fails is decided by a hash of seed, method, path and the count of earlier requests of that kind, so
that a run does not depend on the order of threads. Requests and responses are recorded in order.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

KINDS = ("slowdown", "error", "reset", "cut", "short", "slow")
"""Transient faults: throttling, a server error, a connection closed before and in the middle of the response, a
response with too few bytes, a late response. Others: ``damage`` to an upload, ``stall``, the refusals ``denied`` and
``expired``, and ``opaque``, an ETag that is not a digest, as with encryption."""

STALL_S = 30.0

_ERRORS = {
    "slowdown": (503, "SlowDown", "Please reduce your request rate."),
    "error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "denied": (403, "AccessDenied", "Access Denied"),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
}

Rule = Callable[[str, str, int], "str | None"]
"""From method, key (``bucket/name``) and the number of earlier requests of that kind to a fault, or None."""


def seeded(seed: int, rate: float) -> Rule:
    """Random faults in a share ``rate`` of all requests, at most two in a row for the same method and key."""

    def fault(method: str, key: str, earlier: int) -> str | None:
        draw = int.from_bytes(hashlib.sha256(f"{seed} {method} {key} {earlier}".encode()).digest()[:8], "little")
        if earlier % 3 == 2 or (draw >> 16) % 1000 >= rate * 1000:
            return None
        return KINDS[draw % len(KINDS)]

    return fault


@dataclass(frozen=True)
class Seen:
    """A request that was answered: by the server where ``fault`` is None."""

    method: str
    key: str
    query: str
    status: int
    fault: str | None


class Proxy(ThreadingHTTPServer):
    """The proxy; set :attr:`rule` to make it misbehave."""

    daemon_threads = True
    # Sixteen connections at once from each of several processes.
    request_queue_size = 256

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind
        self.rule: Rule = lambda method, key, earlier: None
        self.seen: list[Seen] = []
        self.counts: Counter[tuple[str, str]] = Counter()
        self.lock = threading.Lock()
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def reset(self) -> None:
        """Stop misbehaving, and clear the recorded requests."""
        self.released.set()
        self.released = threading.Event()
        with self.lock:
            self.rule = lambda method, key, earlier: None
            self.seen.clear()
            self.counts.clear()

    def stored(self) -> list[str]:
        """Keys in the order in which their uploads were completed."""
        return [
            seen.key.partition("/")[2]
            for seen in self.seen
            if seen.status == 200
            and (
                (seen.method == "PUT" and "partNumber" not in seen.query)
                or (seen.method == "POST" and "uploadId" in seen.query)
            )
        ]

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore it: tests make clients disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self) -> None:
        parts = urlsplit(self.path)
        key = unquote(parts.path).lstrip("/")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        part = re.search(r"partNumber=\d+|uploadId|uploads", parts.query)
        what = (self.command, f"{key} {self.headers.get('Range', '')} {part[0] if part else ''}")
        with self.server.lock:
            earlier = self.server.counts[what]
            self.server.counts[what] += 1
            fault = self.server.rule(self.command, key, earlier)
        if fault in _ERRORS:
            status, code, message = _ERRORS[fault]
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.note(key, parts.query, status, fault)
            return self.send(status, {"Content-Type": "application/xml"}, b"" if self.command == "HEAD" else text)
        if fault == "reset":
            self.note(key, parts.query, 0, fault)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return None
        if fault == "stall":
            self.note(key, parts.query, 0, fault)
            self.server.released.wait(STALL_S)
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(0.1)
        if fault == "damage" and body:
            body = body[:-1] + bytes([body[-1] ^ 1])
        status, headers, data = self.forward(body)
        if fault == "opaque" and "ETag" in headers:
            headers["ETag"] = f'"{hashlib.sha256(headers["ETag"].encode()).hexdigest()[:32]}"'
        is_read = self.command == "GET" and status in (200, 206) and len(data) > 1
        if fault == "short" and is_read:
            data = data[: len(data) // 2]
        self.note(key, parts.query, status, fault)
        if fault == "cut" and is_read:
            self.send(status, headers, data[: len(data) // 2], length=len(data))
            self.close_connection = True
            return None
        return self.send(status, headers, data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = answer

    def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.behind, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
            connection.request(self.command, self.path, body=body, headers=headers)
            response = connection.getresponse()
            response_headers = {name: value for name, value in response.getheaders() if name.lower() not in _HOP_BY_HOP}
            if self.command == "HEAD":
                response_headers["Content-Length"] = response.getheader("Content-Length") or "0"
            return response.status, response_headers, response.read()
        finally:
            connection.close()

    def note(self, key: str, query: str, status: int, fault: str | None) -> None:
        with self.server.lock:
            self.server.seen.append(Seen(self.command, key, query, status, fault))

    def send(self, status: int, headers: dict[str, str], data: bytes, *, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


_HOP_BY_HOP = frozenset({"connection", "transfer-encoding", "content-length", "server", "date", "keep-alive"})


@contextmanager
def s3_server() -> Iterator[Proxy]:
    """Start server and proxy. Both stop at the end of the block, and the server also when this process ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from moto.server import main; from prep.engines.processes import die_with_parent; "
        "die_with_parent(); "
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code + "main(['-H', '127.0.0.1', '-p', sys.argv[1]])", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
    )
    try:
        _wait_for(port, server)
        proxy = Proxy(port)
        thread = threading.Thread(target=proxy.serve_forever, daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.reset()
            proxy.shutdown()
            proxy.server_close()
            thread.join()
    finally:
        server.kill()
        server.wait()


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("the S3 server did not start")
