"""Anonymous shared memory: nothing has a name, so nothing can be left behind."""

from __future__ import annotations

import fcntl
import mmap
import os


def create_memory(name: str, size: int = 0) -> int:
    """Return the descriptor of a zeroed memfd of `size` bytes that cannot shrink or grow.

    Of size 0: an empty one that whoever knows its shape grows when mapping it. `name` shows up in
    /proc/*/fd alone. Pages are allocated when they are first touched.
    """
    descriptor = os.memfd_create(f"sps-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    if not size:
        return descriptor
    try:
        os.ftruncate(descriptor, size)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def map_memory(descriptor: int) -> mmap.mmap:
    """Map all of a memfd, shared, readable and writable."""
    return mmap.mmap(descriptor, os.fstat(descriptor).st_size, mmap.MAP_SHARED)
