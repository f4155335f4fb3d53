"""Memory of weights: a page of header, then the weights, in a memfd.

A decode step reads all of it. From pages of 4 KiB that is bound by address translation (19 GB/s
instead of 34 on one core of a Zen 4), so the kernels lay it into huge pages where Linux lets them.
"""

from __future__ import annotations

import importlib
import mmap
import warnings
from types import ModuleType

import torch
from torch import Tensor

HEADER_BYTES = 4096
HUGE_BYTES = 2 << 20


def map_writable(fd: int, nbytes: int) -> Tensor:
    """The `nbytes` after the header of a memfd of that size, still empty, uint8, to be filled.

    A byte is written in each huge page before they are gathered: what is not there cannot be
    moved, and filling huge pages is four times as fast as filling small ones.
    """
    kernels = _kernels()
    if kernels is None:
        mapping = mmap.mmap(fd, HEADER_BYTES + nbytes)
        return torch.frombuffer(mapping, dtype=torch.uint8)[HEADER_BYTES:]
    memory = kernels.map_shared(fd, HEADER_BYTES + nbytes, writable=True)
    memory[::HUGE_BYTES] = 0
    kernels.use_huge_pages(memory)
    return torch.from_numpy(memory)[HEADER_BYTES:]


def map_read_only(fd: int, nbytes: int) -> Tensor:
    """The `nbytes` after the header, uint8, shared with whoever maps them too. Nothing writes to
    weights; a stray write faults, which is what a read-only map is for."""
    kernels = _kernels()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given (buffer|NumPy array) is not writable")
        if kernels is None:
            mapping = mmap.mmap(fd, HEADER_BYTES + nbytes, mmap.MAP_SHARED, mmap.PROT_READ)
            return torch.frombuffer(mapping, dtype=torch.uint8)[HEADER_BYTES:]
        memory = kernels.map_shared(fd, HEADER_BYTES + nbytes)
        kernels.use_huge_pages(memory)
        return torch.from_numpy(memory)[HEADER_BYTES:]


def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("sps_kernel")
    except ImportError:
        return None
