"""Pages of several ranks, read where they lie.

A kernel gets the first rank's tensor and, for each rank, how many elements further its own begins:
pools of ranks on one host are mapped into one address space (CUDA IPC, or another stream's memory),
so any of them is within reach of any pointer. A table of addresses would do as well, but what is
cast to a pointer has lost its alignment, and loads would go by single elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ALIGNED = 16
"""Elements; kernels are told that every page begins at a multiple of so many."""
_REMEMBERED = 1024


@triton.jit
def page_pointer(base, offsets, page_id, slots_per_rank, slot_stride):
    """Where pages begin; page_id = rank * slots_per_rank + slot, a scalar or a block."""
    page = page_id.to(tl.int64)
    further = tl.load(offsets + page // slots_per_rank)
    further = tl.multiple_of(further, 16)
    return base + further + page % slots_per_rank * slot_stride


@dataclass(frozen=True)
class PoolTable:
    """Pools of one layer as kernels take them.

    Attributes:
        base: the first pool that can be read; its strides are all pools'.
        offsets: int64, one for each rank, on base's device.
    """

    base: Tensor
    offsets: Tensor


class PoolTables:
    """Tables of pools, made once: the offsets of a layer's pools do not change, and copying them to
    a device for each call would."""

    def __init__(self) -> None:
        self._offsets: dict[tuple[object, ...], Tensor] = {}

    def table(self, pools: Sequence[Tensor]) -> PoolTable:
        """The table of one layer's pools; those of 0 slots are never looked at.

        Raises:
            ValueError: pools differ in strides or dtype, or lie so that pages are not aligned.
        """
        base = next(pool for pool in pools if pool.numel())
        addresses = [(pool if pool.numel() else base).data_ptr() for pool in pools]
        key = (str(base.device), base.element_size(), base.data_ptr(), *addresses)
        offsets = self._offsets.get(key)
        if offsets is None:
            _check(base, pools)
            if len(self._offsets) >= _REMEMBERED:
                del self._offsets[next(iter(self._offsets))]
            apart = [(at - base.data_ptr()) // base.element_size() for at in addresses]
            offsets = torch.tensor(apart, dtype=torch.int64, device=base.device)
            self._offsets[key] = offsets
        return PoolTable(base, offsets)


def _check(base: Tensor, pools: Sequence[Tensor]) -> None:
    step = ALIGNED * base.element_size()
    for pool in pools:
        if pool.numel() and (pool.stride() != base.stride() or pool.dtype != base.dtype):
            raise ValueError("pools of ranks differ in strides or dtype")
        if pool.numel() and (pool.data_ptr() - base.data_ptr()) % step:
            raise ValueError(f"pools of ranks do not lie multiples of {step} bytes apart")
