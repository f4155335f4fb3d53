"""The summaries of pages beside the pages: a rank's own, and its peers' as far as they can be read.

A summary is so many bytes a page, layer and KV head; what they mean is `sparse.operators`' affair.
Memory is touched first when a page is summarised, so that room for all pages costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.distributed.regions import map_region
from sps_runtime.kvstore.pool import tensor_over


@dataclass(frozen=True)
class SummaryShape:
    """uint8 ``[layers, slots, kv_heads, nbytes]`` contiguous.

    Attributes:
        slots, kv_heads: as in `KVShape`.
        nbytes: of one page and KV head.
    """

    layers: int
    slots: int
    kv_heads: int
    nbytes: int

    @property
    def total(self) -> int:
        """Bytes of one rank's region."""
        return self.layers * self.slots * self.kv_heads * self.nbytes

    def view(self, flat: Tensor) -> Tensor:
        return flat.view(self.layers, self.slots, self.kv_heads, self.nbytes)

    def private(self, device: torch.device | None = None) -> Tensor:
        """Room in this process's own memory, or in a GPU's."""
        return self.view(torch.zeros(self.total, dtype=torch.uint8, device=device))

    def shared(self, descriptor: int, *, writable: bool = True) -> Tensor:
        """A shared region: one's own (writable) or a peer's (read only)."""
        memory = map_region(descriptor, self.total, writable=writable)
        return self.view(tensor_over(memory, torch.uint8))


class SummaryStore:
    """A rank's own summaries beside those of its SP peers (same TP rank).

    Args:
        pools: one per SP rank, of another host a mirror that its ranks fill by messages; None where
            there are none.
        sp_rank: which of them is this rank's own.

    Attributes:
        nbytes: of one page and KV head.
    """

    def __init__(self, pools: Sequence[Tensor | None], sp_rank: int) -> None:
        own = pools[sp_rank]
        if own is None:
            raise ValueError("a rank has summaries of its own")
        self.own = own
        self.nbytes = int(own.shape[3])
        empty = own.new_empty((0, *own.shape[2:]))
        self._layers = [
            [empty if pool is None else pool[layer] for pool in pools] for layer in range(len(own))
        ]

    def layer(self, layer: int) -> list[Tensor]:
        """A tensor ``[slots, kv_heads, nbytes]`` per SP rank; 0 slots where there are none."""
        return self._layers[layer]
