"""Operators of block-sparse attention: summaries of pages, shares, choice, tail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sps_kernel import _core
from sps_kernel.arrays import Array, empty_float32, is_torch

#: Columns of ``blocks``.
BLOCK_FIELDS = ("row", "count", "position", "superblock", "list_begin", "kv_len")

__all__ = [
    "BLOCK_FIELDS",
    "PageChoice",
    "choose_pages",
    "page_shares",
    "summarise_pages",
    "summary_nbytes",
    "tail_attention",
]


@dataclass(frozen=True)
class PageChoice:
    """Which pages each (block, KV head) reads. Row i of `items` and `dropped` belongs to block
    ``i // kv_heads`` and KV head ``i % kv_heads``.

    Attributes:
        items: int32 [n, 8], as :func:`sps_kernel.paged_attention` takes them.
        page_ids, page_pos: int32 [N], of `items`: chosen pages and the block's own, in order.
        dropped: int32 [n, 2]: first and number of the item's entries in `dropped_ids`.
        dropped_ids: int32, the pages before each block that it does not read.
    """

    items: Array
    page_ids: Array
    page_pos: Array
    dropped: Array
    dropped_ids: Array


def summary_nbytes(page_size: int, head_dim: int, itemsize: int) -> int:
    """Bytes of the summary of one page and KV head: mean key, mean value, low and step of each
    channel in the pages' dtype, then 2 bits for each channel of each key, four channels a byte.

    >>> summary_nbytes(64, 64, 2)
    1536
    """
    return _core.summary_nbytes(page_size, head_dim, itemsize)


def summarise_pages(k: Array, v: Array, slots: Array, out: Array, *, threads: int = 1) -> None:
    """Summarise full pages.

    A channel's codes say where each key lies between the page's least and greatest, to the nearest
    of four places (KIVI's per-channel form, Liu et al. 2024): ``key = low + code * step``.

    Parameters
    ----------
    k, v : [slots, Hkv, page, d], float32 or bfloat16
        One layer's pool; page a multiple of 16, d a multiple of 8 from 16 to 512.
    slots : [n], int32
        The pages to summarise, all of their tokens written.
    out : [slots, Hkv, nbytes], uint8
        Written at the same slots; the others are left as they are.
    """
    _core.summarise_pages(k, v, slots, out, threads)


def page_shares(
    q: Array,
    blocks: Array,
    page_ids: Array,
    summaries: Sequence[Array],
    k_pools: Sequence[Array],
    *,
    slots: int,
    rows: int | npt.NDArray[np.integer[Any]],
    block: int,
    scale: float,
    threads: int = 1,
) -> Array:
    """The estimated share of each block's attention that each page before it gets: the norm of the
    shares that its scored rows give it in all query heads of a KV head.

    Parameters
    ----------
    q : [T, Hq, d], float32 or bfloat16
    blocks : [n, 6], int32
        Columns (:data:`BLOCK_FIELDS`): rows of ``q``, position of the first (a multiple of the
        page), number of the superblock, first of its sequence's entries in ``page_ids``, kv_len.
        Those of a superblock stand together, in order of position.
    page_ids : [N], int32
        Pages of each sequence from position 0 on, ``pool * slots + slot``; a block's own pages
        follow those before it.
    summaries : arrays [slots, Hkv, nbytes], uint8
        One for each pool; 0 slots where none can be read.
    k_pools : arrays [slots, Hkv, page, d] of q's dtype
        Read for blocks' own pages.
    rows : int, or [n] of numpy
        Rows of a whole block that are scored, evenly spaced, the last among them; 0 for all.
    block : int
        Tokens of a whole block. All rows of a shorter one are scored; with 0, of none.

    Returns float32, for each block ``[Hkv, pages before it]``, one after another.

    A page's mass is the sum of exp(scale * q.key) over its sketched keys; the block's own keys up to
    the row are taken as they are. Rows times steps are rounded to signed bytes and multiplied by
    the codes in integers: log masses are within 0.02 times the spread of a page's scores of those
    of unrounded rows. A block's shares do not depend on the other blocks of a call or on `threads`.
    """
    heads = _kv_heads(k_pools)
    index = np.asarray(blocks)
    page = next(int(k.shape[2]) for k in k_pools if len(k))
    out = empty_float32(q, (int((index[:, 2] // page).sum()) * heads,))
    if np.min(rows, initial=0) < 0 or block < 0:
        raise ValueError("rows and block must not be negative")
    whole = (index[:, 1] == block) | (block == 0)
    some = whole & (np.asarray(rows) > 0) & (index[:, 1] > rows)
    scored = np.where(some, rows, index[:, 1]).astype(np.int32)
    _core.page_shares(q, blocks, page_ids, summaries, k_pools, slots, out, scored, scale, threads)
    return out


def choose_pages(
    shares: Array,
    blocks: Array,
    page_ids: Array,
    *,
    page_size: int,
    kv_heads: int,
    tau: float,
    budget: float,
    minimum: int,
    sink: int,
    window: int,
    block: int,
    superblocks: bool = True,
    threads: int = 1,
) -> PageChoice:
    """For each (block, KV head) the smallest set of pages before it whose complement has a share of
    at most ``tau``, within bounds.

    Parameters
    ----------
    shares, blocks, page_ids :
        Of :func:`page_shares`. NaN is no share.
    budget : float
        At most this share of the pages up to the block's end, ...
    minimum : int
        ... but at least so many, the block's own included.
    sink, window : int
        Pages always kept: the first ones of all, the last ones before the block.
    block : int
        Tokens of a whole block.
    superblocks : bool
        The blocks of a superblock choose from one set of the pages before it, itself chosen by the
        norm of the shares that a page has for each. One of a single token reads all pages.
    """
    index = np.asarray(blocks)
    before = int((index[:, 2] // page_size).sum()) * kv_heads
    own = int((-(-index[:, 1] // page_size)).sum()) * kv_heads
    n = len(index) * kv_heads
    items, dropped = _ints(blocks, (n, 8)), _ints(blocks, (n, 2))
    ids, pos = _ints(blocks, (before + own,)), _ints(blocks, (before + own,))
    dropped_ids, totals = _ints(blocks, (before,)), np.zeros(2, np.int64)
    settings = (tau, budget, minimum, sink, window, max(1, block // page_size), superblocks)
    out = (items, ids, pos, dropped, dropped_ids, totals)
    _core.select_pages(shares, blocks, page_ids, page_size, kv_heads, settings, out, threads)
    kept, gone = (int(total) for total in totals)
    return PageChoice(items, ids[:kept], pos[:kept], dropped, dropped_ids[:gone])


def tail_attention(
    q: Array,
    blocks: Array,
    dropped: Array,
    dropped_ids: Array,
    summaries: Sequence[Array],
    *,
    slots: int,
    page_size: int,
    out: Array,
    lse: Array,
    scale: float,
    accumulate: bool = False,
    threads: int = 1,
) -> None:
    """Partial attention over the pages that blocks do not read, each of whose tokens is taken for
    the page's mean key with its mean value.

    ``blocks``, ``dropped`` and ``dropped_ids`` are :func:`choose_pages`'. ``out`` float32
    [T, Hq, d] and ``lse`` float32 [T, Hq] are written where a block drops pages; the rest is left
    as it was. With ``accumulate`` the partial is merged into what they hold.
    """
    _core.tail_attention(
        q,
        blocks,
        dropped,
        dropped_ids,
        summaries,
        slots,
        page_size,
        out,
        lse,
        scale,
        accumulate,
        threads,
    )


def _kv_heads(pools: Sequence[Array]) -> int:
    return next(int(pool.shape[1]) for pool in pools if len(pool))


def _ints(like: Array, shape: tuple[int, ...]) -> Array:
    if is_torch(like):
        return like.new_empty(shape)
    return np.empty(shape, np.int32)
