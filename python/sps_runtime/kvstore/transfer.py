"""Pages that travel because a reader cannot read its owner's pool in place.

Both sides compute the same `Shipment` from the plan, so nothing but keys and values is sent: whole
pages as they lie, and of a sequence's last page just the tokens it holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]


class Shipment:
    """Pages of one owner that one reader gets, in one layer.

    Args:
        slots: their slots in the owner's pool.
        tokens: tokens wanted of each, from its first.
        page_size: tokens of a whole page.
    """

    def __init__(self, slots: Ints, tokens: Ints, page_size: int) -> None:
        whole = tokens == page_size
        self.page_size = page_size
        self.whole_places = np.flatnonzero(whole)
        self.tail_places = np.flatnonzero(~whole)
        self.whole_slots = torch.from_numpy(slots[whole])
        self.tails = list(zip(slots[~whole].tolist(), tokens[~whole].tolist(), strict=True))
        self.tokens = int(tokens.sum())

    def elements(self, heads: int, dim: int) -> int:
        """Elements of K and V that travel."""
        return 2 * self.tokens * heads * dim

    def whole_part(self, flat: Tensor, heads: int, dim: int) -> Tensor:
        """The whole pages in a travelling buffer: ``[2, pages, heads, page_size, dim]``."""
        shape = (2, len(self.whole_slots), heads, self.page_size, dim)
        return flat[: 2 * len(self.whole_slots) * heads * self.page_size * dim].view(shape)

    def tail_parts(self, flat: Tensor, heads: int, dim: int) -> list[Tensor]:
        """The cut pages behind them: ``[2, heads, tokens, dim]`` each."""
        parts = []
        at = 2 * len(self.whole_slots) * heads * self.page_size * dim
        for _, tokens in self.tails:
            size = 2 * heads * tokens * dim
            parts.append(flat[at : at + size].view(2, heads, tokens, dim))
            at += size
        return parts

    def pack(self, k: Tensor, v: Tensor, kv_heads: tuple[int, int]) -> Tensor:
        """Copy the pages out of a layer's pool ``[slots, kv_heads, page_size, head_dim]``, heads
        [begin, end) of it, into one flat buffer."""
        begin, end = kv_heads
        dim = k.shape[-1]
        flat = k.new_empty(self.elements(end - begin, dim))
        whole = self.whole_part(flat, end - begin, dim)
        tails = self.tail_parts(flat, end - begin, dim)
        for side, pool in enumerate((k, v)):
            if len(self.whole_slots):
                torch.index_select(pool[:, begin:end], 0, self.whole_slots, out=whole[side])
            for part, (slot, tokens) in zip(tails, self.tails, strict=True):
                part[side] = pool[slot, begin:end, :tokens]
        return flat


@dataclass(frozen=True)
class Staging:
    """How pages from several owners lie once they arrived: one pool per owner for whole pages, one
    more for all cut ones.

    Attributes:
        shipments: one per owner; empty ones too.
        slots_per_rank: of the staged pool's page ids.
    """

    shipments: Sequence[Shipment]
    slots_per_rank: int

    @classmethod
    def of(cls, shipments: Sequence[Shipment]) -> Staging:
        tails = sum(len(shipment.tails) for shipment in shipments)
        return cls(shipments, max(tails, 1, *(len(s.whole_slots) for s in shipments)))

    def page_ids(self, source: int) -> npt.NDArray[np.int32]:
        """Staged page ids of a source's pages, in the order its shipment was made from."""
        shipment = self.shipments[source]
        ids = np.empty(len(shipment.whole_places) + len(shipment.tail_places), dtype=np.int32)
        ids[shipment.whole_places] = source * self.slots_per_rank + np.arange(
            len(shipment.whole_places)
        )
        before = sum(len(s.tails) for s in self.shipments[:source])
        ids[shipment.tail_places] = (
            len(self.shipments) * self.slots_per_rank
            + before
            + np.arange(len(shipment.tail_places))
        )
        return ids

    def buffers(self, like: Tensor, heads: int) -> list[Tensor]:
        """Empty buffers to receive into, one per source; `like` is a pool of the same kind."""
        dim = like.shape[-1]
        return [like.new_empty(s.elements(heads, dim)) for s in self.shipments]

    def pools(self, flats: Sequence[Tensor], heads: int, dim: int) -> tuple[list[Tensor], ...]:
        """K and V pools over received buffers; whole pages stay where they arrived."""
        wholes = [s.whole_part(f, heads, dim) for s, f in zip(self.shipments, flats, strict=True)]
        tails = [
            part
            for shipment, flat in zip(self.shipments, flats, strict=True)
            for part in shipment.tail_parts(flat, heads, dim)
        ]
        page_size = self.shipments[0].page_size
        cut = flats[0].new_zeros(2, len(tails), heads, page_size, dim)
        for index, part in enumerate(tails):
            cut[:, index, :, : part.shape[2]] = part
        return tuple([*(whole[side] for whole in wholes), cut[side]] for side in (0, 1))
