"""The memory that weights lie in: one shared mapping for all ranks of a host, or private memory.

A shared arena is a memfd that the launcher makes and every rank of the host inherits. The first
rank sizes and fills it, then sets the ready mark in its header; the others wait for the mark and
map it read-only. So a host holds the weights once, however many ranks it runs.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sps_runtime.models.layout import Entry, Layout
from sps_runtime.models.memory import HEADER_BYTES, map_read_only, map_writable
from sps_runtime.ops.weight import PlainWeight, Weight
from sps_runtime.types.errors import ConfigError

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
        packed, packing = self.bytes_of(entry), self.layout.packing
        return packing.weight(packed, rows, columns, entry.kind, entry.cuts)

    def tensors(self, tp_rank: int) -> dict[str, Tensor]:
        """name -> view of tables, norms and biases, for one TP rank."""
        return {name: self.tensor(entry) for name, entry in self.layout.of(tp_rank, linear=False)}

    def matrices(self, tp_rank: int) -> dict[str, Weight]:
        """name -> view of the weights of linear layers, for one TP rank."""
        return {name: self.matrix(entry) for name, entry in self.layout.of(tp_rank, linear=True)}


def private_arena(
    layout: Layout, fill: Callable[[Arena], None], device: torch.device | None = None
) -> Arena:
    """An arena in this process's own memory, or in a GPU's."""
    arena = Arena(layout, torch.empty(layout.nbytes, dtype=torch.uint8, device=device))
    fill(arena)
    return arena


@contextmanager
def first_rank(layout: Layout, fd: int) -> Iterator[None]:
    """While the first rank loads: a failure sets a mark, so that the ranks that wait do not wait
    on."""
    try:
        yield
    except BaseException:
        _mark(layout, fd, FAILED)
        raise


def create_shared_arena(layout: Layout, fd: int, fill: Callable[[Arena], None]) -> Arena:
    """Size and fill the memfd `fd`, set its ready mark, and return it mapped read-only."""
    os.ftruncate(fd, HEADER_BYTES + layout.nbytes)
    fill(Arena(layout, map_writable(fd, layout.nbytes)))
    _mark(layout, fd, READY)
    return Arena(layout, map_read_only(fd, layout.nbytes))


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
    if state == FAILED:
        raise ConfigError("the first rank of this host could not load the weights")
    if digest != layout.digest():
        raise ConfigError("the first rank of this host laid the weights out differently")
    return Arena(layout, map_read_only(fd, layout.nbytes))


def _mark(layout: Layout, fd: int, state: int) -> None:
    """The state last and by itself: who reads it has everything before it."""
    os.pwrite(fd, MAGIC + layout.digest(), 0)
    os.pwrite(fd, STATE.pack(state), HEADER.size - STATE.size)


def _read_header(fd: int) -> tuple[bytes, int] | None:
    raw = os.pread(fd, HEADER.size, 0)
    if len(raw) < HEADER.size:
        return None
    magic, digest, state = HEADER.unpack(raw)
    return (digest, state) if magic == MAGIC and state else None
