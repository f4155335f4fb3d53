"""Calls that read a prefix once for all requests that begin with it: a cascade of two levels.

FlashInfer's own `MultiLevelCascadeAttentionWrapper` is not used: it returns no log-sum-exp, which
partials over several ranks are merged by, and takes all rows at every level. Its parts are: a
paged prefill without a mask over each shared prefix, with the queries of all its requests as rows;
the ordinary decode call over the pages that are each request's own; `merge_state_in_place`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
import numpy.typing as npt

from sps_runtime.attention.flashinfer.calls import Call, Calls, Ints
from sps_runtime.attention.shared_prefix import ReadCost, SharedPrefix, shared_prefixes

LEAST_BYTES = 32 << 20
"""Of KV that sharing saves a layer, or it is left alone. The prefix's kernels, the moves of rows
and the merge are about six launches of 2 microseconds in a graph: at 3.3 TB/s as long as reading
40 MB. Of that a part would have come from the L2 cache (50 MB on an H100) anyway. For an 8B Llama
in bf16 (512 KiB a page of 128 tokens): two requests behind 8,192 tokens, or sixteen behind 640."""
MOST_GROUPS = 4
"""Of a call whose shape stays: its requests are there in every step, with or without rows."""
ROWS_A_GROUP = 8


@dataclass(frozen=True)
class Sharing:
    """When calls are split.

    Attributes:
        cost: what a group saves.
        standing: calls keep their shape from step to step: no request loses all of its pages, and
            groups are no more than `group_limit`.
    """

    cost: ReadCost
    standing: bool = False


def group_limit(rows: int) -> int:
    """Groups of a shared call whose shape stays. FlashInfer cuts rows into tiles by what the
    longest request would have if the others had one row: few requests, large tiles, and a tile
    reads its prefix by itself."""
    return min(MOST_GROUPS, max(1, rows // ROWS_A_GROUP))


def share(calls: Calls, rows: int, page_size: int, sharing: Sharing) -> Calls:
    """The same attention with shared prefixes in calls of their own, behind those they come from.

    Single rows only: a chunk of a prompt reads its prefix once for its many rows anyway. Calls that
    are told a window stay: windows go by a request's own length.

    Args:
        rows: of the query tensor.
    """
    parts = (_share(call, rows, page_size, sharing) for call in calls.calls)
    return replace(calls, calls=tuple(chain.from_iterable(parts)))


def _share(call: Call, rows: int, page_size: int, sharing: Sharing) -> tuple[Call, ...]:
    if call.window or call.kind not in ("decode", "causal") or call.requests < 2:
        return (call,)
    limit = np.diff(call.kv_indptr).astype(np.int64)
    limit -= 1 if sharing.standing else (call.last_page_len < page_size)
    limit[np.diff(call.qo_indptr) != 1] = 0
    groups = shared_prefixes(
        call.indices.astype(np.int64),
        call.kv_indptr[:-1].astype(np.int64),
        limit,
        sharing.cost,
        group_limit(rows) if sharing.standing else None,
    )
    if not groups:
        return (call,)
    own = _without(call, groups, rows)
    return (*([own] if own.requests else []), _shared(call, groups, page_size))


def _shared(call: Call, groups: list[SharedPrefix], page_size: int) -> Call:
    """A request for each group: the rows of its members over the pages that they share."""
    members = np.array([i for group in groups for i in group.members])
    at = call.qo_indptr[members].astype(np.int64)
    first = (call.kv_indptr[group.members[0]] for group in groups)
    pages = [
        call.indices[begin : begin + group.pages]
        for begin, group in zip(first, groups, strict=True)
    ]
    return Call(
        pool=call.pool,
        kind="shared",
        window=False,
        rows=at if call.rows is None else call.rows[at],
        qo_indptr=_indptr([len(group.members) for group in groups]),
        kv_indptr=_indptr([group.pages for group in groups]),
        indices=np.concatenate(pages),
        last_page_len=np.full(len(groups), page_size, dtype=np.int32),
    )


def _without(call: Call, groups: list[SharedPrefix], rows: int) -> Call:
    """A call without the pages that its requests share; requests that have no others go."""
    cut = np.zeros(call.requests, dtype=np.int64)
    for group in groups:
        cut[list(group.members)] = group.pages
    pages = np.diff(call.kv_indptr) - cut
    place = np.arange(len(call.indices)) - np.repeat(call.kv_indptr[:-1], np.diff(call.kv_indptr))
    kept = place >= np.repeat(cut, np.diff(call.kv_indptr))
    left, counts = pages > 0, np.diff(call.qo_indptr)
    at: Ints | None = call.rows
    if not left.all():
        every = np.arange(rows) if at is None else at
        at = every[np.repeat(left, counts)]
    return replace(
        call,
        rows=at,
        qo_indptr=_indptr(counts[left]),
        kv_indptr=_indptr(pages[left]),
        indices=call.indices[kept],
        last_page_len=call.last_page_len[left],
    )


def padded(call: Call, rows: int) -> Call:
    """A shared call in the shape that all of so many query rows have: `group_limit` groups, some of
    them without rows, and one more request for the rows of no group. That one reads a page, and
    what comes of it is not merged."""
    assert call.rows is not None
    limit = group_limit(rows)
    empty = limit - call.requests
    others = np.setdiff1d(np.arange(rows), call.rows)
    some_page = call.indices[:1]
    pages = [*np.diff(call.kv_indptr).tolist(), *[1] * (empty + 1)]
    filler = np.full(empty + 1, call.last_page_len[0], dtype=np.int32)
    return replace(
        call,
        rows=np.concatenate((call.rows, others)),
        qo_indptr=_indptr([*np.diff(call.qo_indptr).tolist(), *[0] * empty, len(others)]),
        kv_indptr=_indptr(pages),
        indices=np.concatenate((call.indices, np.repeat(some_page, empty + 1))),
        last_page_len=np.concatenate((call.last_page_len, filler)),
        fillers=len(others),
    )


def places(call: Call, rows: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """For each query row its place among a shared call's rows (0 where it has none), and whether it
    has one."""
    assert call.rows is not None
    real = call.rows[: call.tokens - call.fillers]
    back, has = np.zeros(rows, dtype=np.int64), np.zeros(rows, dtype=np.bool_)
    back[real], has[real] = np.arange(len(real)), True
    return back, has


def _indptr(counts: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
