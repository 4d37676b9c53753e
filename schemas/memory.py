"""Little memory: whether a program has enough to start, and which errors mean that there is none.

Libraries abort, hang or raise errors of no type of their own when they get no memory, so both programs ask before they
load them. Cost: two system calls; no page is touched.
"""

from __future__ import annotations

import errno
import mmap

from schemas.errors import VlprepError

NO_MEMORY = (
    "the system gives no more memory. Free some, or raise the limit (`ulimit -v`, or that of the job), and rerun the "
    "same command."
)

_NO_MEMORY = ("cannot allocate memory", "failed to map segment", "can't start new thread")
"""What the loader of libraries and the starter of threads say without memory, in errors of no type of their own."""

_MAP_NORESERVE = 0x4000
"""Of Linux; Python has no name for it before 3.13. It keeps the system from counting the pages as used."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, means that the system gives no more memory, or a limit is reached."""
    link: BaseException | None = error
    while link is not None:
        if _says_no_memory(link):
            return True
        link = link.__cause__ or link.__context__
    return False


def _says_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    message = str(error).lower()
    return isinstance(error, (ImportError, RuntimeError)) and any(text in message for text in _NO_MEMORY)


def require_address_space(num_bytes: int) -> None:
    """Check that the limit of this process (``ulimit -v``) leaves some address space.

    Threads of Arrow and of the tokenizer wait for each other, or end the process, when they get none.

    Raises:
        VlprepError: it does not.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        mmap.mmap(-1, num_bytes, flags=flags, prot=mmap.PROT_READ).close()
    except OSError as error:
        raise VlprepError(f"less than {num_bytes >> 20} MiB of address space are left: {NO_MEMORY}") from error
