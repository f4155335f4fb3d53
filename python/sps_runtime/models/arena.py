"""The memory that weights lie in: one shared mapping for all ranks of a host, or private memory.

A shared arena is a memfd that the launcher makes and every rank of the host inherits. The first
rank sizes and fills it, then sets the ready mark in its header; the others wait for the mark and
map it read-only. So a host holds the weights once, however many ranks it runs.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from sps_runtime.models.layout import Entry, Layout
from sps_runtime.ops.weight import PlainWeight, Weight
from sps_runtime.types.errors import ConfigError

HEADER_BYTES = 4096
HEADER = struct.Struct("<8s32sQ")
STATE = struct.Struct("<Q")
MAGIC = b"spsweigh"
READY, FAILED = 1, 2
POLL_S = 0.01


class Arena:
    """Filled memory with a layout.

    Args:
        memory: uint8 ``[layout.nbytes]``.
    """

    def __init__(self, layout: Layout, memory: Tensor) -> None:
        self.layout, self.memory = layout, memory

    def tensor(self, entry: Entry) -> Tensor:
        """The tensor of a plain entry, a view."""
        return self.bytes_of(entry).view(self.layout.dtype).view(entry.shape)

    def bytes_of(self, entry: Entry) -> Tensor:
        """An entry's memory: uint8, a view."""
        return self.memory[entry.offset : entry.offset + entry.nbytes]

    def matrix(self, entry: Entry) -> Weight:
        """The weight of a linear entry, a view."""
        if self.layout.packing is None or not entry.kind:
            return PlainWeight(self.tensor(entry))
        rows, columns = entry.shape
        return self.layout.packing.weight(self.bytes_of(entry), rows, columns, entry.kind)

    def tensors(self, tp_rank: int) -> dict[str, Tensor]:
        """name -> view of tables, norms and biases, for one TP rank."""
        return {name: self.tensor(entry) for name, entry in self.layout.of(tp_rank, linear=False)}

    def matrices(self, tp_rank: int) -> dict[str, Weight]:
        """name -> view of the weights of linear layers, for one TP rank."""
        return {name: self.matrix(entry) for name, entry in self.layout.of(tp_rank, linear=True)}


def private_arena(layout: Layout, fill: Callable[[Arena], None]) -> Arena:
    """An arena in this process's own memory."""
    arena = Arena(layout, torch.empty(layout.nbytes, dtype=torch.uint8))
    fill(arena)
    return arena


def create_shared_arena(layout: Layout, fd: int, fill: Callable[[Arena], None]) -> Arena:
    """Size and fill the memfd `fd`, set its ready mark, and return it mapped read-only.

    When filling fails the mark says so, so that the ranks that wait do not wait on.
    """
    os.ftruncate(fd, HEADER_BYTES + layout.nbytes)
    state = FAILED
    try:
        writable = mmap.mmap(fd, HEADER_BYTES + layout.nbytes)
        fill(Arena(layout, torch.frombuffer(writable, dtype=torch.uint8)[HEADER_BYTES:]))
        state = READY
    finally:
        # The state last and by itself: who reads it has everything before it.
        os.pwrite(fd, MAGIC + layout.digest(), 0)
        os.pwrite(fd, STATE.pack(state), HEADER.size - STATE.size)
    return _map_read_only(layout, fd)


def open_shared_arena(layout: Layout, fd: int, timeout_s: float = 600.0) -> Arena:
    """Wait until the memfd `fd` is ready and return it mapped read-only.

    Raises:
        ConfigError: when the first rank failed, laid it out differently, or takes too long.
    """
    deadline = time.monotonic() + timeout_s
    while (header := _read_header(fd)) is None:
        if time.monotonic() > deadline:
            raise ConfigError(f"the first rank has not loaded the weights within {timeout_s:g} s")
        time.sleep(POLL_S)
    digest, state = header
    if state != READY:
        raise ConfigError("the first rank of this host could not load the weights")
    if digest != layout.digest():
        raise ConfigError("the first rank of this host laid the weights out differently")
    return _map_read_only(layout, fd)


def _read_header(fd: int) -> tuple[bytes, int] | None:
    raw = os.pread(fd, HEADER.size, 0)
    if len(raw) < HEADER.size:
        return None
    magic, digest, state = HEADER.unpack(raw)
    return (digest, state) if magic == MAGIC and state else None


def _map_read_only(layout: Layout, fd: int) -> Arena:
    mapping = mmap.mmap(
        fd,
        HEADER_BYTES + layout.nbytes,
        flags=mmap.MAP_SHARED | mmap.MAP_POPULATE,
        prot=mmap.PROT_READ,
    )
    with warnings.catch_warnings():
        # Nothing writes to weights; a stray write faults, which is what a read-only map is for.
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        memory = torch.frombuffer(mapping, dtype=torch.uint8)
    return Arena(layout, memory[HEADER_BYTES:])
