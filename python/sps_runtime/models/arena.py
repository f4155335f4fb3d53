"""The memory that weights lie in: one shared mapping for all ranks of a host, or private memory.

A shared arena is a memfd that the launcher makes and every rank of the host inherits. The first
rank sizes and fills it, then sets the ready mark in its header; the others wait for the mark and
map it read-only. Where the weights lie in a file already (`models.weight_cache`), the memfd says
which, and all map that. So a host holds the weights once, however many ranks it runs.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sps_runtime.models.layout import Entry, Layout
from sps_runtime.models.memory import HEADER_BYTES, map_read_only
from sps_runtime.models.weight_cache import Found, open_cached
from sps_runtime.ops.weight import PlainWeight, Weight
from sps_runtime.types.errors import ConfigError

HEADER = struct.Struct("<8s32sQ")
STATE = struct.Struct("<Q")
ELSEWHERE = struct.Struct("<HH")
"""Sizes of the file's header and of its path, which follow."""
MAGIC = b"spsweigh"
READY, FAILED, CACHED = 1, 2, 3
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
    writable = mmap.mmap(fd, HEADER_BYTES + layout.nbytes)
    fill(Arena(layout, torch.frombuffer(writable, dtype=torch.uint8)[HEADER_BYTES:]))
    _mark(layout, fd, READY)
    return Arena(layout, map_read_only(fd, layout.nbytes))


def announce_cached(layout: Layout, fd: int, found: Found) -> Arena:
    """Tell the other ranks of the file in which the weights lie."""
    path = os.fsencode(found.path)
    told = ELSEWHERE.pack(len(found.header), len(path)) + found.header + path
    if HEADER.size + len(told) > HEADER_BYTES:
        raise ConfigError(f"the path of the weight cache is too long: {found.path}")
    os.pwrite(fd, told, HEADER.size)
    _mark(layout, fd, CACHED)
    return Arena(layout, found.memory)


def open_shared_arena(layout: Layout, fd: int, timeout_s: float = 600.0) -> Arena:
    """Wait until the memfd `fd` is ready and return it, or the file it tells of, mapped read-only.

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
    if state == CACHED:
        return Arena(layout, _open_announced(fd))
    return Arena(layout, map_read_only(fd, layout.nbytes))


def _open_announced(fd: int) -> Tensor:
    begin = HEADER.size + ELSEWHERE.size
    header_size, path_size = ELSEWHERE.unpack(os.pread(fd, ELSEWHERE.size, HEADER.size))
    header = os.pread(fd, header_size, begin)
    path = Path(os.fsdecode(os.pread(fd, path_size, begin + header_size)))
    try:
        return open_cached(path, header).memory
    except OSError as error:
        raise ConfigError(f"cached weights that the first rank found are gone: {error}") from None


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
