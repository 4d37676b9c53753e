"""Writing what is large: checkpoints and models -> one sentence where the disk is full or cannot be written to.

The file system, torch and safetensors each say that in their own way, torch without the reason.

Cost: none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from schemas.errors import VlprepError

_TORCH_CANNOT_WRITE = ("iostream error", "PytorchStreamWriter", "inline_container.cc")
"""What the zip writer of torch says of any failed write."""


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Write to a folder inside the ``with`` block.

    Raises:
        VlprepError: that failed.
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


def nearest_existing(place: Path) -> Path:
    """The place itself, or the closest folder above it that is there."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def _cannot_write(place: Path, reason: str) -> VlprepError:
    free = shutil.disk_usage(nearest_existing(place)).free
    return VlprepError(
        f"{place} cannot be written ({reason}; {free / 1e9:.2f} GB are free there). Make room or mend that, and start "
        "the same command again: what was complete before is as it was."
    )
