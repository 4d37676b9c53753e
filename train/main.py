"""Entry point: ``deepspeed train/main.py --shards DIR``, or ``torchrun --nproc_per_node N train/main.py …``."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

if not __package__:
    # Started as a script: import modules from the repository, not from this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from schemas.errors import VlprepError
from schemas.memory import NO_MEMORY, lacks_memory, require_address_space
from schemas.wording import printable
from train.run.terminal import keys_to_ranks
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments

_INTERRUPTED = 130
"""Exit code of :mod:`train.run.interrupt` for Ctrl-C, before that can be imported."""

_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "remote process exit")
"""What gloo and NCCL say in ranks that wait for one that has ended."""

REPORT_TIMEOUT_S = 60
"""Seconds in which the first rank of a machine has started and reported an error that all ranks have."""

_FIRST_REPORT_S = 2
"""The same for Ctrl-C, which the first rank may see later than the others: it comes between two imports."""

_LEAST_BYTES = 2816 << 20
"""Address space that torch and its threads need at least."""

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Where torch 2.13 reads the settings of its GPU memory allocator."""


def main(argv: list[str]) -> int:
    """Parse the flags, then train, or check with ``--dry_run`` whether a run would succeed.

    Returns:
        Exit code: 0 done, 1 problems in the data, 2 wrong use, 85 stopped on request (rerun to resume), 130 stopped by
        Ctrl-C before the first step.
    """
    rank = int(os.environ.get("RANK", "0"))
    try:
        args = parse_arguments(argv, note=_note if rank == 0 else _ignore)
    except VlprepError as error:
        # All ranks have the same command line, so one of a machine reports for all. A launcher ends all ranks as soon
        # as one has ended, so the others leave it the time to report.
        if int(os.environ.get("LOCAL_RANK", rank)) != 0:
            time.sleep(REPORT_TIMEOUT_S)
            return error.exit_code
        return _fail(error)
    try:
        with keys_to_ranks(int(os.environ.get("LOCAL_RANK", "0"))):
            return _run(args, argv, is_first=rank == 0)
    except VlprepError as error:
        if args.debug:
            raise
        return _fail(error)
    except OSError as error:
        # for example, a full disk
        if args.debug:
            raise
        path = f"{error.filename}: " if error.filename else ""
        return _fail(VlprepError(f"{path}{error.strerror or error}. Fix that and rerun the same command to resume."))
    except KeyboardInterrupt:
        if args.debug:
            raise
        if rank == 0:
            sys.stderr.write("\nstopped before the first step: nothing was trained; rerun the same command to start\n")
        else:
            with suppress(KeyboardInterrupt):
                time.sleep(_FIRST_REPORT_S)
        return _INTERRUPTED
    except (MemoryError, ImportError, RuntimeError) as error:
        if not args.debug and lacks_memory(error):
            return _fail(VlprepError(NO_MEMORY))
        if args.debug or not any(phrase in str(error) for phrase in _LOST_RANK):
            raise
        # Not reported to `torchrun`, which looks for the first rank that failed.
        return _report(VlprepError("another rank has failed: see its message, above or in its log."))


def _run(args: TrainArguments, argv: list[str], *, is_first: bool) -> int:
    """Train or check. Returns the exit code."""
    require_address_space(_LEAST_BYTES)
    _configure_output(is_first=is_first)
    use_expandable_segments()
    # Imports take seconds, so Ctrl-C may come here too.
    from train.preflight.dry_run import preflight
    from train.run.interrupt import REQUEUE_EXIT_CODE
    from train.run.loop import train

    if args.dry_run:
        preflight(args)
        return 0
    if train(args, argv):
        return 0
    _tell_torchrun("stopped on request, with a checkpoint: rerun the same command to resume")
    return REQUEUE_EXIT_CODE


class _LogLine(logging.Formatter):
    """A line of the log, which says whether it is a warning or worse."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Format a record."""
        record.kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return super().formatMessage(record)


class _Unbroken(io.FileIO):
    """A file whose writes are lost, rather than fail, once its reader has ended."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(memoryview(data).cast("B"))


def outlive_readers() -> None:
    """Let a run go on without a screen: Ctrl-C also ends the ``tee`` that its output is piped to."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell
            continue
        stream.flush()
        raw = _Unbroken(stream.fileno(), "w", closefd=False)
        setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, write_through=True))


def use_expandable_segments() -> None:
    """Let segments of GPU memory grow, so that bins of different sizes do not fragment it.

    Call it before torch starts CUDA. Settings of the environment have precedence.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def _note(text: str) -> None:
    sys.stderr.write(f"note: {text}\n")


def _ignore(text: str) -> None:
    """All ranks have the same command line, so the first one notes for all."""


def _fail(error: VlprepError) -> int:
    _tell_torchrun(str(error))
    return _report(error)


def _report(error: VlprepError) -> int:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    sys.stderr.write(f"error{rank}: {printable(str(error))}\n")
    return error.exit_code


def _tell_torchrun(reason: str) -> None:
    """Leave the reason of an exit where `torchrun` looks for one: it ends its report on a failed rank with it."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": reason, "timestamp": int(time.time())}))


def _configure_output(*, is_first: bool) -> None:
    """Log progress on the first rank, and warnings on all."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LogLine("%(asctime)s %(name)s: %(kind)s%(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO if is_first else logging.WARNING, handlers=[handler])
    # DeepSpeed 0.19 calls deprecated names of these functions.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    if not (is_first and sys.stderr.isatty()):
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    outlive_readers()
    exit_code = main(sys.argv[1:])
    if exit_code == _INTERRUPTED:
        # Shutting the interpreter down would wait for threads, and for ranks that have ended.
        os._exit(exit_code)
    sys.exit(exit_code)
