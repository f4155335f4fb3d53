"""Fill an arena from a checkpoint: convert, cut, and pack what is packed, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from sps_runtime.models.arena import Arena
from sps_runtime.models.checkpoint import TensorSource
from sps_runtime.models.layout import Entry, Part
from sps_runtime.ops.packing import Packing


def fill(arena: Arena, source: TensorSource) -> None:
    """Put every part in its place, in the arena's dtype or packed."""
    packing = arena.layout.packing
    for entry in distinct(arena):
        if packing is not None and entry.kind:
            _pack(arena, entry, source, packing)
        else:
            _copy(arena, entry, source)


def distinct(arena: Arena) -> Iterator[Entry]:
    """Entries, each memory once."""
    filled: set[int] = set()
    for entry in arena.layout.entries.values():
        if entry.offset not in filled:
            filled.add(entry.offset)
            yield entry


def _read(source: TensorSource, part: Part) -> Tensor:
    tensor = source.read(part.source, part.source_shape)
    return tensor.narrow(part.dim, part.begin, part.end - part.begin)


def _copy(arena: Arena, entry: Entry, source: TensorSource) -> None:
    row, target = 0, arena.tensor(entry)
    for part in entry.parts:
        rows = part.shape[0]
        target[row : row + rows].copy_(_read(source, part))
        row += rows


def _pack(arena: Arena, entry: Entry, source: TensorSource, packing: Packing) -> None:
    """Parts begin at panels of their own, so each is packed by itself."""
    begin, target = 0, arena.bytes_of(entry)
    for part in entry.parts:
        n, k = part.shape
        end = begin + packing.nbytes(n, k, entry.kind, entry.cuts)
        weight_NK = _read(source, part).to(arena.layout.dtype)
        packing.pack(weight_NK, entry.kind, target[begin:end], entry.cuts)
        begin = end
