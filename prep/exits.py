"""How a command of ``vlprep`` ends: its result on stdout, or one sentence on stderr and an exit code."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any, ParamSpec

import click

from schemas.errors import VlprepError
from schemas.memory import NO_MEMORY, lacks_memory, require_address_space
from schemas.wording import printable

P = ParamSpec("P")

INTERRUPTED = 130
"""Exit code of shells after SIGINT. SIGTERM gets the same."""

_LEAST_BYTES = (512 + 80 * min(os.cpu_count() or 1, 8)) << 20
"""Address space of a command, of which it uses a part: threads reserve 72 MiB each, and Arrow starts one for each core
and 8 more. With some of them missing it waits for ever."""


def guarded(command: Callable[P, int | None]) -> Callable[P, None]:
    """Turn errors that a user can fix into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            require_address_space(_LEAST_BYTES)
            code = command(*args, **kwargs)
        except VlprepError as error:
            if click.get_current_context().find_root().params["debug"]:
                raise
            click.echo(f"vlprep: {printable(str(error))}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:
            if click.get_current_context().find_root().params["debug"]:
                raise
            where = f"{error.filename}: " if error.filename else ""
            click.echo(
                f"vlprep: {printable(where)}{error.strerror or error}. Fix that and rerun the same command.", err=True
            )
            sys.exit(1)
        except (MemoryError, ImportError, RuntimeError) as error:
            if not lacks_memory(error) or click.get_current_context().find_root().params["debug"]:
                raise
            click.echo(f"vlprep: {NO_MEMORY} Or use fewer --workers, where the command has them.", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("vlprep: stopped. No file is half written; rerun the same command to continue.", err=True)
            sys.exit(INTERRUPTED)
        sys.exit(code or 0)

    return run


def run_process(command: Callable[[], object]) -> None:
    """Run a command to which this process belongs, and end the process with it.

    The interpreter does not take apart everything that it has loaded, which would take 0.1 s. It does so as usual if
    there are other threads, or if the output cannot be written.
    """
    try:
        command()
    except SystemExit as end:
        if (end.code is None or isinstance(end.code, int)) and threading.active_count() == 1:
            atexit._run_exitfuncs()
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code or 0)
        raise


def print_result(text: str, *, is_styled: bool = False) -> None:
    """Print the result of a command, with control characters escaped unless it ``is_styled`` by them.

    If the reader of a pipe is gone (``vlprep show … | head``), the rest is dropped and the exit code is unchanged.
    """
    try:
        click.echo(text if is_styled else printable(text))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(content: dict[str, Any]) -> None:
    """Print the result of a command for programs: one JSON object on one line, in ASCII."""
    print_result(json.dumps(content))
