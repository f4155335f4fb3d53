"""The paged KV of one rank, and what it sees of its peers'."""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.distributed.regions import map_region
from sps_runtime.kvstore.shape import KVShape


class KVPool:
    """K and V of one global rank, ``[layers, slots, kv_heads, page_size, row]`` each; rows are
    head_dim elements, or as `ops.kv_rows` has them.

    Heads lie outside tokens in a page, so that one head's page is one contiguous
    ``[page_size, row]`` block: what an attention kernel streams, and what a transfer of a head
    share copies.
    """

    def __init__(self, shape: KVShape, flat: Tensor) -> None:
        if flat.numel() != 2 * shape.half_elements or flat.element_size() != shape.itemsize:
            raise ValueError(f"{flat.numel()} x {flat.element_size()} bytes do not make {shape}")
        self.shape = shape
        self.k, self.v = flat.view(
            2, shape.layers, shape.slots, shape.kv_heads, shape.page_size, shape.row
        ).unbind(0)

    @classmethod
    def private(
        cls, shape: KVShape, dtype: torch.dtype, device: torch.device | None = None
    ) -> KVPool:
        """A pool in this process's own memory, or in a GPU's."""
        return cls(shape, torch.zeros(2 * shape.half_elements, dtype=dtype, device=device))

    @classmethod
    def shared(
        cls, shape: KVShape, dtype: torch.dtype, descriptor: int, *, writable: bool = True
    ) -> KVPool:
        """A pool in a shared region: one's own (writable) or a peer's (read only)."""
        memory = map_region(descriptor, shape.nbytes, writable=writable)
        return cls(shape, tensor_over(memory, dtype))


def tensor_over(memory: mmap.mmap, dtype: torch.dtype) -> Tensor:
    """A flat tensor over mapped memory, which it keeps alive; nothing is copied."""
    with warnings.catch_warnings():
        # A peer's pool is mapped read only and never written: torch only warns that it could be.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(memory, dtype=dtype)


class KVStore:
    """A rank's own pool beside those of its SP peers (same TP rank), as far as they can be read.

    Args:
        pools: one per SP rank; None where memory cannot be read from here.
        sp_rank: which of them is this rank's own.
    """

    def __init__(self, pools: Sequence[KVPool | None], sp_rank: int) -> None:
        own = pools[sp_rank]
        if own is None:
            raise ValueError("a rank has a pool of its own")
        self.own = own
        self.shape = own.shape
        self.readable = tuple(pool is not None for pool in pools)
        empty = own.k.new_empty((0, *own.k.shape[2:]))
        self._layers = [
            (
                [empty if pool is None else pool.k[layer] for pool in pools],
                [empty if pool is None else pool.v[layer] for pool in pools],
            )
            for layer in range(own.shape.layers)
        ]

    def layer(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """K and V of one layer, a tensor ``[slots, kv_heads, page_size, row]`` per SP rank;
        0 slots where memory cannot be read."""
        return self._layers[layer]
