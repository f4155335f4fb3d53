"""Paged attention: the one attention primitive."""

from __future__ import annotations

import math

from sps_kernel import _core
from sps_kernel._core import KVPools
from sps_kernel.arrays import Array, empty_float32, empty_like

#: Columns of the ``items`` array of :func:`paged_attention`.
ITEM_FIELDS = (
    "q_begin",
    "q_count",
    "q_pos",
    "list_begin",
    "list_count",
    "kv_len",
    "head_begin",
    "head_count",
)

__all__ = ["ITEM_FIELDS", "KVPools", "paged_attention"]


def paged_attention(
    q: Array,
    kv: KVPools,
    items: Array,
    page_ids: Array,
    page_pos: Array,
    *,
    out: Array | None = None,
    lse: Array | None = None,
    scale: float | None = None,
    causal: bool = True,
    window: int = 0,
    accumulate: bool = False,
    threads: int = 1,
) -> tuple[Array, Array]:
    """Partial attention of a ragged batch over lists of KV pages; returns ``(out, lse)``.

    One row of ``items`` is one block of consecutive queries over one list of pages, for some of
    the KV heads. Dense, causally trimmed and sparse attention, prefill and decode are the same
    call with different lists. A (token, head) that no item names is left as it was; two items must
    not name the same one.

    Parameters
    ----------
    q : [T, Hq, d], float32 or bfloat16
        Queries; the last dim contiguous. ``Hq`` is a multiple of ``kv.kv_heads``; query head ``h``
        belongs to KV head ``h // (Hq // kv_heads)``.
    kv : KVPools
        K and V of this layer in every pool, of q's dtype or quantised.
    items : [n, 8], int32, contiguous
        Columns (:data:`ITEM_FIELDS`): ``q_begin, q_count`` - rows of ``q``; ``q_pos`` - absolute
        position of the first of them, the others follow; ``list_begin, list_count`` - the item's
        range in ``page_ids`` and ``page_pos``; ``kv_len`` - keys at positions >= kv_len do not
        exist; ``head_begin, head_count`` - the KV heads (and their query heads) attended.
    page_ids : [N], int32
        Pages by global id: ``pool * kv.slots + slot``. In any order within a list.
    page_pos : [N], int32
        Absolute position of each page's first token.
    out : [T, Hq, d], float32 or bfloat16, optional
        Written in place; q's dtype when left out. Take float32 for states that are merged later.
    lse : [T, Hq], float32, optional
        Natural log of the sum of exp(scale * q.k).
    scale : float, optional
        1 / sqrt(d) when left out.
    causal : bool
        Query at position p sees keys at positions <= p.
    window : int
        When > 0, query at position p sees only keys at positions > p - window.
    accumulate : bool
        Merge into what ``out`` and ``lse`` hold instead of overwriting them.
    threads : int
        Threads that run the call, the caller's own among them.

    A row that sees no key gives ``out = 0`` and ``lse = -inf``, never NaN. Keys that no query of
    an item may see are not read into its result, so unwritten memory behind ``kv_len`` is
    harmless. Softmax and accumulation are in float32 (probabilities are rounded to bfloat16 before
    they meet bfloat16 values); float32 inputs are computed in float32 throughout.

    The online softmax over blocks is FlashAttention's (Dao, 2023); the paged layout is
    vLLM's (Kwon et al., 2023).

    Raises
    ------
    ValueError
        Wrong shapes, dtypes or strides; an item, page or head out of range.

    Example
    -------
    >>> kv = KVPools([k], [v])  # [slots, Hkv, page, d] each
    >>> items = np.array([[0, 5, 0, 0, 1, 5, 0, kv.kv_heads]], np.int32)
    >>> out, lse = paged_attention(q, kv, items, np.array([3], np.int32), np.array([0], np.int32))
    """
    tokens, heads, d = _shape3(q)
    if out is None:
        if accumulate:
            raise ValueError("accumulate needs out and lse")
        out = empty_like(q, (tokens, heads, d))
    if lse is None:
        if accumulate:
            raise ValueError("accumulate needs out and lse")
        lse = empty_float32(q, (tokens, heads))
    if scale is None:
        scale = 1.0 / math.sqrt(d) if d else 1.0
    _core.paged_attention(
        q, kv, items, page_ids, page_pos, out, lse, scale, causal, window, accumulate, threads
    )
    return out, lse


def _shape3(q: Array) -> tuple[int, int, int]:
    shape = tuple(q.shape)
    if len(shape) != 3:
        raise ValueError(f"q: needs 3 dims, has {len(shape)}")
    return shape
