"""A headless Chromium for tests, driven over the pipe of the Chrome DevTools Protocol. No package is needed for it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find_browser() -> str | None:
    """The program of a Chromium on this machine."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One tab. Messages of its console are collected in ``console``."""

    def __init__(self, requests: Any, answers: Any) -> None:
        self._requests, self._answers = requests, answers
        self._last = 0
        self._session: str | None = None
        self._events: list[str] = []
        self.console: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """Call a method of the protocol and wait for its result."""
        self._last += 1
        message: dict[str, object] = {"id": self._last, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._requests.write(json.dumps(message).encode() + b"\0")
        self._requests.flush()
        while (answer := self._receive()).get("id") != self._last:
            pass
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path, *, width: int, height: int = 900, dark: bool = False, scripts: bool = True) -> None:
        """Load a page in a window of some size, and wait until it is drawn."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setScriptExecutionDisabled", value=not scripts)
        self._events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path, *, height: int, kind: str = "png") -> None:
        """Write an image of the page from its top."""
        width = self.value("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        quality = {} if kind == "png" else {"quality": 80}
        data = self.call("Page.captureScreenshot", format=kind, clip=clip, captureBeyondViewport=True, **quality)
        path.write_bytes(base64.b64decode(data["data"]))

    def _receive(self) -> dict[str, Any]:
        """The next message. Events are noted."""
        data = bytearray()
        while not data.endswith(b"\0"):
            data += self._answers.read(1)
        message: dict[str, Any] = json.loads(data[:-1])
        method = message.get("method", "")
        self._events.append(method)
        if method == "Log.entryAdded" or method == "Runtime.exceptionThrown":
            self.console.append(json.dumps(message["params"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append(json.dumps(message["params"]["args"]))
        return message


@contextlib.contextmanager
def open_tab(program: str) -> Iterator[Tab]:
    """Start a browser with one tab; it ends with the block."""
    to_browser, requests = os.pipe()
    answers, from_browser = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += ["--no-first-run", "--hide-scrollbars", "--disable-dev-shm-usage", f"--user-data-dir={profile}"]
        # The browser reads from descriptor 3 and writes to 4.
        redirect = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        process = subprocess.Popen(
            ["bash", "-c", redirect, "browser", *command],
            pass_fds=(to_browser, from_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        try:
            with open(requests, "wb") as writer, open(answers, "rb") as reader:
                yield Tab(writer, reader)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
