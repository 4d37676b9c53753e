"""A file server with range requests that can be set to misbehave: ``python tests/train/http_server.py FOLDER``.

It prints its port. The first part of a path says how shards are answered (tables and manifests are always answered
well): ``/plain/...``; ``/slow/...`` after 0.2 s; ``/flaky/...`` with an error first and well when requested again;
``/broken/...`` with an error always; ``/cut/...`` with the connection closed in the middle of the first answer;
``/short/...`` with a complete answer that has too few bytes, the first time; ``/stall/...`` with half an answer, the
first time, and then silence; ``/silent/...`` so always; ``/whole/...`` with the whole file whatever the range;
``/sizeless/...`` without a length; ``/refused/...`` with 403; ``/signed/...`` with 403, tables too, unless the query
is ``?X-Amz-Signature=SECRET``; ``/indexed/...`` with a page of links for a folder;
``/garbled/...`` with something that is not HTTP. ``/stats`` counts requests and how many were answered at once.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path()
LOCK = threading.Lock()
STATS: Counter[str] = Counter()
SEEN: Counter[str] = Counter()
SILENCE_S = 20.0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    content_range = ""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path == "/stats":
            return self.send(200, json.dumps(STATS).encode())
        location, _, query = self.path.partition("?")
        behaviour, _, name = location.lstrip("/").partition("/")
        if behaviour == "signed" and query != "X-Amz-Signature=SECRET":
            return self.send(403, b"")
        path = FOLDER / name
        if behaviour == "indexed" and path.is_dir():
            names = (f"{entry.name}/" if entry.is_dir() else entry.name for entry in path.iterdir())
            return self.send(200, "".join(f'<a href="{name}">{name}</a>\n' for name in names).encode())
        if not path.is_file():
            return self.send(404, b"")
        data = path.read_bytes()
        requested_range = self.headers.get("Range")
        if requested_range is None or self.command == "HEAD" or not name.endswith(".tar"):
            return self.send(200, data, sized=behaviour != "sizeless")
        first, last = (int(offset) for offset in requested_range.removeprefix("bytes=").split("-"))
        self.content_range = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
        with LOCK:
            STATS["requests"] += 1
            STATS["now"] += 1
            STATS["most"] = max(STATS["most"], STATS["now"])
            # A request that resumes a broken answer ends where the first one ended.
            SEEN[f"{self.path} {last}"] += 1
            is_first = SEEN[f"{self.path} {last}"] == 1
        try:
            self.answer(behaviour, data, data[first : last + 1], is_first)
        finally:
            with LOCK:
                STATS["now"] -= 1

    def answer(self, behaviour: str, content: bytes, part: bytes, is_first: bool) -> None:
        if behaviour == "slow":
            time.sleep(0.2)
        elif behaviour == "broken" or (behaviour == "flaky" and is_first):
            return self.send(503, b"busy")
        elif behaviour == "refused":
            return self.send(403, b"")
        elif behaviour == "garbled":
            self.wfile.write(b"not HTTP\r\n\r\n")
            self.close_connection = True
            return None
        elif behaviour == "whole":
            return self.send(200, content)
        elif behaviour == "short" and is_first:
            return self.send(206, part[: len(part) // 2])
        elif behaviour == "silent" or (behaviour in ("cut", "stall") and is_first):
            self.send(206, part[: len(part) // 2], length=len(part))
            self.wfile.flush()
            if behaviour != "cut":
                time.sleep(SILENCE_S)
            self.close_connection = True
            return None
        return self.send(206, part)

    def send(self, status: int, body: bytes, *, length: int | None = None, sized: bool = True) -> None:
        self.send_response(status)
        if sized:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", self.content_range)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    sys.stdout.write(f"{server.server_address[1]}\n")
    sys.stdout.flush()
    threading.Timer(300, server.shutdown).start()  # it ends by itself, whatever becomes of the test
    server.serve_forever()


if __name__ == "__main__":
    main()
