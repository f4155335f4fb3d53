"""The shape of a rank's KV pool; torch-free, so that it can be counted before ranks start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class KVShape:
    """K, then V, each ``[layers, slots, kv_heads, page_size, row]`` contiguous.

    Attributes:
        slots: pages of one SP rank (`CacheConfig.pages_per_rank`).
        kv_heads: KV heads of the TP slice.
        itemsize: bytes of an element.
        scale_bytes: bytes behind each row's elements (`ops.kv_rows`).
    """

    layers: int
    slots: int
    kv_heads: int
    page_size: int
    head_dim: int
    itemsize: int
    scale_bytes: int = 0

    @property
    def row(self) -> int:
        """Elements of one token's row of one head."""
        return self.head_dim + self.scale_bytes // self.itemsize

    @property
    def half_elements(self) -> int:
        """Elements of K alone."""
        return self.layers * self.slots * self.kv_heads * self.page_size * self.row

    @property
    def nbytes(self) -> int:
        """Bytes of the pool of one global rank."""
        return 2 * self.half_elements * self.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in one layer."""
        return 2 * self.kv_heads * self.row * self.itemsize
