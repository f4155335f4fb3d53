"""Pages into messages and out of them: the bytes of `kvstore.transfer` and of torch's indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sps_runtime.kvstore.transfer import Shipment, Staging
from sps_runtime.ops.triton.kv_gather import gather_units, pack_pages, scatter_units, spread_pages

PAGE, HEADS, SLOTS = 16, 3, 7
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])


def pools(dtype: torch.dtype, row: int) -> tuple[Tensor, Tensor]:
    bits = torch.randint(0, 200, (2, SLOTS, HEADS, PAGE, row))
    return bits[0].to(dtype), bits[1].to(dtype)


@DTYPES
@pytest.mark.parametrize("count", [0, 1, 9])
def test_units(dtype: torch.dtype, count: int) -> None:
    pool, other = pools(dtype, 136)  # more than one chunk
    places = torch.randperm(SLOTS * HEADS)[:count]
    slots, heads = places // HEADS, places % HEADS
    packed = gather_units(pool, slots, heads)
    assert torch.equal(packed, pool[slots, heads])
    want = other.clone()
    want[slots, heads] = packed
    scatter_units(packed, other, slots, heads)
    assert torch.equal(other, want)


@DTYPES
@pytest.mark.parametrize("share", [(0, 3), (1, 2)])
def test_pages_travel_as_a_shipment(dtype: torch.dtype, share: tuple[int, int]) -> None:
    row = 20
    k, v = pools(dtype, row)
    slots, tokens = np.array([5, 0, 3, 6]), np.array([16, 7, 16, 1])
    shipment = Shipment(slots, tokens, PAGE)
    want = shipment.pack(k, v, share)
    order, heads = shipment.order, share[1] - share[0]
    held = torch.from_numpy(tokens[order]).int()
    ends = (held.long() * 2 * heads * row).cumsum(0)
    starts = ends - held * 2 * heads * row
    message = torch.zeros_like(want)
    pack_pages(k, v, torch.from_numpy(slots[order]).int(), held, starts, message, share)
    assert torch.equal(message, want)

    staging = Staging([shipment])
    pool, parts = staging.allocate(k, heads)
    parts[0].copy_(want)
    settled = staging.settle(pool)
    room = k.new_full((2, len(slots), heads, PAGE, row), 9)
    spread_pages(message, held, starts, room[0], room[1])
    for got, side in zip(room, settled, strict=True):
        assert torch.equal(got, side)


def test_no_pages() -> None:
    k, v = pools(torch.float32, 8)
    nothing = torch.zeros(0, dtype=torch.int32)
    pack_pages(k, v, nothing, nothing, nothing.long(), k.new_zeros(0), (0, HEADS))
    spread_pages(k.new_zeros(0), nothing, nothing.long(), k, v)
