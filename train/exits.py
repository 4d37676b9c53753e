"""How the trainer's tools speak and end: one sentence on stderr and an exit code, as ``train/main.py`` does."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec

import click

from schemas.errors import VlprepError
from schemas.wording import printable

P = ParamSpec("P")

INTERRUPTED = 130
"""Exit code that shells report for a program ended by Ctrl-C."""


def hide_library_output() -> None:
    """Hide progress bars of transformers and warnings of DeepSpeed, for a tool that says what it does itself."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors that a user can fix, and Ctrl-C, into one sentence and an exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except BrokenPipeError:  # `… | head`, which click handles
            raise
        except VlprepError as error:
            _end(f"error: {error}", code=error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _end(f"error: {where}{error.strerror or error}. Fix that and rerun the same command.", code=1)
        except KeyboardInterrupt:
            _end("stopped", code=INTERRUPTED)

    return run


def _end(sentence: str, *, code: int) -> None:
    click.echo(printable(sentence), err=True)
    raise SystemExit(code) from None
