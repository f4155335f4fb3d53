"""Shared memory of one host: how big each region is, and how to map it.

Torch-free, so that the launcher may size and create regions too. Regions are memfds passed by
descriptor; every process that knows the shapes calls `map_region`, and the first one sizes it.
"""

from __future__ import annotations

import mmap
import os

LINE = 64
"""Bytes of a cache line: counters of different writers never share one."""


def fence_bytes(world_size: int) -> int:
    """Bytes of the region of layer fences (`distributed.fences.SharedLayerFence`)."""
    return world_size * LINE


def link_bytes(world_size: int, ring_bytes: int) -> int:
    """Bytes of the region of `distributed.shared_memory`: doorbells, then a ring per directed pair.

    Pages of rings that are never used are never touched, so they cost address space only.
    """
    return doorbell_bytes(world_size) + world_size * world_size * (2 * LINE + ring_bytes)


def doorbell_bytes(world_size: int) -> int:
    """Bytes of the doorbells in front of the rings: one byte per (waiter, ringer), by lines."""
    return world_size * -(-world_size // LINE) * LINE


def create_region(name: str, nbytes: int = 0) -> int:
    """Return the descriptor of a new anonymous shared region; the caller closes it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    os.ftruncate(descriptor, nbytes)
    return descriptor


def map_region(descriptor: int, nbytes: int, *, writable: bool = True) -> mmap.mmap:
    """Map `nbytes` of a region, growing it first where it is smaller.

    Every process computes the same size from the same configuration, so growing is idempotent. The
    descriptor may be closed afterwards: a mapping keeps its memory.

    Raises:
        ValueError: when the region is larger than `nbytes`: two sides disagree on shapes.
    """
    size = os.fstat(descriptor).st_size
    if size > nbytes:
        raise ValueError(f"a shared region has {size} bytes where {nbytes} were expected")
    if size < nbytes:
        os.ftruncate(descriptor, nbytes)
    access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(descriptor, nbytes, mmap.MAP_SHARED, access)
