"""Whether the system would give the memory that a program needs, before libraries that abort or hang without it ask.

In: a number of bytes. Out: nothing, or one sentence. Cost: two system calls; no page is touched.
"""

from __future__ import annotations

import mmap

from schemas.errors import NO_MEMORY, VlprepError

_MAP_NORESERVE = 0x4000
"""Of Linux; Python has no name for it before 3.13. It keeps the system from counting the pages as used."""


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
