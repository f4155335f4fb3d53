"""Memory in huge pages: reading weights or KV from 4 KiB pages is bound by address translation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sps_kernel import _core
from sps_kernel.arrays import Array


def map_shared(fd: int, nbytes: int, writable: bool = False) -> npt.NDArray[np.uint8]:
    """Map the first ``nbytes`` of a file or memfd at an address that is a multiple of 2 MiB.

    Only there can :func:`use_huge_pages` work on shared memory (``mmap.mmap`` leaves the address to
    the kernel, which aligns it to 4 KiB). Unmapped when the last array over it is gone. Raises
    ``ValueError`` when the file is shorter, or cannot be mapped.
    """
    mapped: Any = _core.map_shared(fd, nbytes, writable)
    return mapped  # type: ignore[no-any-return]


def use_huge_pages(array: Array) -> bool:
    """Gather the memory of a contiguous array into pages of 2 MiB, now; contents are kept.

    Works on private memory, and (Linux 6.1, MADV_COLLAPSE) on shared memory from
    :func:`map_shared` whatever ``shmem_enabled`` says; only pages of 2 MiB that lie whole inside of
    the array are changed. Fill the array first: of a memfd, memory that was never written becomes
    real. Takes about 5 ms per MiB where pages must be moved. Every process that maps a memfd calls
    it on its own mapping; for all but the first that is quick.

    Returns whether all of it lies in huge pages now. False is no error: all works, only slower.
    """
    return _core.use_huge_pages(array)
