"""``vlprep`` in processes of its own, for tests that send signals to a command or limit what it may use.

A server imports the program and reads the tokenizer once, and forks itself for every command. So a command is a process
like any other, and costs no new interpreter. The server runs one command at a time and ends with the tests.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import prep.build.pipeline
import prep.build.summary
import prep.cli
from prep.samples.tokenizer import find_model_files, load_tokenizer, read_fingerprints

REPOSITORY = Path(__file__).resolve().parents[2]


@lru_cache(maxsize=1)
def _server() -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "tests.prep.commands"]
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


class Command:
    """A running ``vlprep``.

    Args:
        arguments: of the command line.
        folder: existing folder for its output.
        environment: variables to set.
        max_file_bytes: limit on the size of a file that it writes.
    """

    def __init__(
        self,
        *arguments: object,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        max_file_bytes: int | None = None,
    ) -> None:
        self.returncode: int | None = None
        self._output, self._errors = folder / "output.txt", folder / "errors.txt"
        request = {
            "arguments": list(map(str, arguments)),
            "streams": [str(self._output), str(self._errors)],
            "environment": dict(environment or {}),
            "max_file_bytes": max_file_bytes,
        }
        server = _server()
        assert server.stdin is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        self.pid = self._answer()

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while the command runs."""
        if self.returncode is None and select.select([_server().stdout], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code, once the command has ended."""
        if self.returncode is None:
            self.returncode = self._answer()
        return self.returncode

    def send(self, kind: signal.Signals) -> None:
        os.kill(self.pid, kind)

    @property
    def output(self) -> str:
        return self._output.read_text()

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def _answer(self) -> int:
        server = _server()
        assert server.stdout is not None
        return int(server.stdout.readline())


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        _read_tokenizer(request["arguments"])
        pid = os.fork()
        if not pid:
            _run(request)
        _say(pid)
        _say(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _run(request: dict[str, Any]) -> NoReturn:
    """The command, in the fork. It ends with SystemExit."""
    for descriptor, stream in enumerate([os.devnull, *request["streams"]]):
        with open(stream, "w" if descriptor else "r") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.update(request["environment"])
    if request["max_file_bytes"] is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_file_bytes"], hard))
    prep.cli.main(request["arguments"], prog_name="vlprep")
    raise AssertionError("a command ends with SystemExit")


def _say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def _read_tokenizer(arguments: list[str]) -> None:
    """Read what the command would read itself: it is kept in memory, also in that of the command."""
    if "--model" in arguments:
        files = find_model_files(arguments[arguments.index("--model") + 1])
        load_tokenizer(files.tokenizer, read_fingerprints(files).tokenizer)


if __name__ == "__main__":
    _serve()
