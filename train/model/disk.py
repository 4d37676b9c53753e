"""Writing checkpoints and models: one sentence if the disk is full or cannot be written to.

The file system, torch and safetensors each report that in their own way, torch without the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from schemas.errors import VlprepError

_TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter", "inline_container.cc")
"""Parts of the message of torch's zip writer for any failed write."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write to a folder inside the ``with`` block.

    Raises:
        VlprepError: a write failed.
    """
    try:
        yield
    except OSError as error:
        raise _cannot_write(Path(error.filename or folder), error.strerror or str(error)) from error
    except SafetensorError as error:
        raise _cannot_write(folder, str(error)) from error
    except RuntimeError as error:
        if not any(phrase in str(error) for phrase in _TORCH_CANNOT_WRITE):
            raise
        raise _cannot_write(folder, "a write failed") from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or the closest parent that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def _cannot_write(path: Path, reason: str) -> VlprepError:
    free = shutil.disk_usage(nearest_existing(path)).free
    return VlprepError(
        f"{path} cannot be written ({reason}; {free / 1e9:.2f} GB are free there). Free some space or fix the cause, "
        "then run the same command again. Files that were complete before are unchanged."
    )
