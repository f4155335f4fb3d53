"""Pages that travel because a reader cannot read its owner's pool in place.

Both sides compute the same `Shipment` from the plan, so nothing but keys and values is sent: whole
pages, K beside V, and of a sequence's last page just the tokens it holds. Rows travel as they lie,
quantised ones in their bytes and scales. Whole pages are attended to where they arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

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
        self.pages = len(slots)
        self.tokens = int(tokens.sum())
        self.order = np.concatenate((np.flatnonzero(whole), np.flatnonzero(~whole)))
        self._whole_slots = torch.from_numpy(slots[whole])
        self._tails = list(zip(slots[~whole].tolist(), tokens[~whole].tolist(), strict=True))

    def elements(self, heads: int, dim: int) -> int:
        """Elements of K and V that travel."""
        return 2 * self.tokens * heads * dim

    def pack(self, k: Tensor, v: Tensor, kv_heads: tuple[int, int]) -> Tensor:
        """Copy the pages out of a layer's pool ``[slots, kv_heads, page_size, row]``, heads
        [begin, end) of it, into one flat message."""
        begin, end = kv_heads
        flat = k.new_empty(self.elements(end - begin, k.shape[-1]))
        whole, tails = self._parts(flat, end - begin, k.shape[-1])
        for side, pool in enumerate((k, v)):
            whole[:, side] = pool[self._whole_slots, begin:end]
            for part, (slot, tokens) in zip(tails, self._tails, strict=True):
                part[side] = pool[slot, begin:end, :tokens]
        return flat

    def spread_tails(self, pages: Tensor) -> None:
        """Put cut pages where pages lie: ``pages [self.pages, 2, heads, page_size, dim]`` begins
        with the message as it arrived; afterwards each page is in its place, whole ones first."""
        if not self._tails:
            return
        heads, dim = pages.shape[2], pages.shape[4]
        message = pages.reshape(-1)[: self.elements(heads, dim)]
        tails = [part.clone() for part in self._parts(message, heads, dim)[1]]
        for page, part in zip(pages[len(self._whole_slots) :], tails, strict=True):
            page.zero_()  # no key is seen there, but a stray NaN times a weight of 0 is NaN
            page[:, :, : part.shape[2]] = part

    def _parts(self, flat: Tensor, heads: int, dim: int) -> tuple[Tensor, list[Tensor]]:
        """A message as whole pages ``[n, 2, heads, page_size, dim]`` and cut ones
        ``[2, heads, tokens, dim]`` each."""
        shape = (len(self._whole_slots), 2, heads, self.page_size, dim)
        at = shape[0] * 2 * heads * self.page_size * dim
        whole = flat[:at].view(shape)
        parts = []
        for _, tokens in self._tails:
            size = 2 * heads * tokens * dim
            parts.append(flat[at : at + size].view(2, heads, tokens, dim))
            at += size
        return whole, parts


class Staging:
    """Where pages from several owners arrive: one pool, a stretch of it for each owner.

    Args:
        shipments: one per owner; empty ones too.

    Attributes:
        slots: pages of the pool, at least 1.
    """

    def __init__(self, shipments: Sequence[Shipment]) -> None:
        self._shipments = shipments
        pages = [shipment.pages for shipment in shipments]
        self._first = [sum(pages[:source]) for source in range(len(pages))]
        self.slots = max(1, sum(pages))

    def page_ids(self, source: int) -> npt.NDArray[np.int32]:
        """Slots of a source's pages, in the order that its shipment was made from."""
        shipment = self._shipments[source]
        ids = np.empty(shipment.pages, dtype=np.int32)
        ids[shipment.order] = self._first[source] + np.arange(shipment.pages)
        return ids

    def allocate(self, like: Tensor, heads: int) -> tuple[Tensor, list[Tensor]]:
        """An empty pool ``[slots, 2, heads, page_size, row]``, and what of it is received into
        from each source; `like` is a pool of the same kind."""
        _, _, page_size, dim = like.shape
        pool = like.new_empty((self.slots, 2, heads, page_size, dim))
        parts = [
            pool[first:].reshape(-1)[: shipment.elements(heads, dim)]
            for first, shipment in zip(self._first, self._shipments, strict=True)
        ]
        return pool, parts

    def settle(self, pool: Tensor) -> tuple[Tensor, Tensor]:
        """K and V ``[slots, heads, page_size, row]`` once everything arrived."""
        for source in range(len(self._shipments)):
            self.spread(pool, source)
        k, v = pool.unbind(1)
        return k, v

    def spread(self, pool: Tensor, source: int) -> None:
        """Put the pages of one source, whose message arrived, in their places."""
        first, shipment = self._first[source], self._shipments[source]
        shipment.spread_tails(pool[first : first + shipment.pages])
