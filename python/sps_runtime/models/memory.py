"""Memory of weights: a page of header, then the weights, in a file or a memfd."""

from __future__ import annotations

import mmap
import warnings

import torch
from torch import Tensor

HEADER_BYTES = 4096


def map_read_only(fd: int, nbytes: int) -> Tensor:
    """The `nbytes` after the header, uint8, shared with whoever maps them too. Nothing writes to
    weights; a stray write faults, which is what a read-only map is for."""
    mapping = mmap.mmap(
        fd, HEADER_BYTES + nbytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)[HEADER_BYTES:]
