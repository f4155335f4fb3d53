"""How queries and pools look to FlashInfer's plans, and pools as its kernels take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sps_runtime.attention.backend import PagePool
from sps_runtime.attention.shared_prefix import ReadCost
from sps_runtime.ops.kv_rows import row_format


@dataclass(frozen=True)
class Layout:
    """How queries and pools look to a plan.

    Attributes:
        heads, kv_heads: of a call; 1 KV head where each head is a request of its own.
        rows: query rows of a call that takes all of them.
    """

    heads: int
    kv_heads: int
    dim: int
    rows: int
    page_size: int
    slots: int
    q_dtype: torch.dtype
    kv_dtype: torch.dtype


def read_cost(layout: Layout, least_bytes: int) -> ReadCost:
    """What sharing saves (pages), and what it costs: a second partial of each row is written, moved
    and read by the merge, and its query is moved."""
    page = 2 * layout.kv_heads * layout.page_size * layout.dim * layout.kv_dtype.itemsize
    row = layout.heads * (layout.dim * layout.q_dtype.itemsize + 4)
    return ReadCost(page, 4 * row, least_bytes)


def plan_arguments(layout: Layout, scale: float, window: int | None) -> dict[str, Any]:
    return {
        "rows": layout.rows,
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "dim": layout.dim,
        "page_size": layout.page_size,
        "scale": scale,
        "window": window,
        "q_dtype": layout.q_dtype,
        "kv_dtype": layout.kv_dtype,
    }


def kv_heads_of(pool: PagePool) -> int:
    return int(next(side for side in pool.k if len(side)).shape[1])


def layout_of(q_THD: Tensor, pool: PagePool) -> Layout:
    rows, heads, dim = q_THD.shape
    shape = (heads, kv_heads_of(pool), dim, rows, pool.page_size, pool.slots_per_rank)
    kv_dtype = torch.float8_e4m3fn if pool.k[0].dtype == torch.uint8 else pool.k[0].dtype
    return Layout(*shape, q_THD.dtype, kv_dtype)


def cut_heads(pool: PagePool, kv_heads: tuple[int, int] | None) -> PagePool:
    if kv_heads is None:
        return pool
    heads = slice(*kv_heads)
    k, v = ([side[:, heads] for side in sides] for sides in (pool.k, pool.v))
    return PagePool(k, v, pool.slots_per_rank)


def one_head(side: Tensor) -> Tensor:
    """A pool ``[slots, kv_heads, page_size, row]`` as pages of one head."""
    return side.flatten(0, 1)[:, None]


def sides_of(pool: PagePool, index: int, layout: Layout) -> tuple[Tensor, Tensor]:
    k, v = pool.k[index], pool.v[index]
    kv_format = row_format(k, layout.dim)
    if kv_format == "native":
        return k, v
    if kv_format != "fp8_e4m3":
        raise ValueError(f"FlashInfer reads no {kv_format} pages")
    return k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
