"""Partials by FlashInfer's kernels (Ye et al. 2025): paged prefill and decode, planned once a step.

FlashInfer computes in two parts: `plan` reads page tables on the host and schedules work, `run`
launches kernels. All layers of a step read the same tables (`attention.flashinfer_calls`), so a
list of runs is planned when its first layer comes and the plan is kept while the step lasts. Lists
of sparse attention are a layer's own: each is planned, with every KV head as a request by itself
over a view of the pool whose pages hold one head.

Its log-sum-exp is to base 2; ours is natural. Tested with 0.6.4 and 0.7.2's interfaces.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import (
    AttentionBackend,
    PageLists,
    PagePool,
    Partial,
    QueryRun,
)
from sps_runtime.attention.flashinfer_calls import Call, Calls, Ints, Items, plan_calls
from sps_runtime.attention.flashinfer_items import as_runs, by_head, of_lists, of_runs
from sps_runtime.attention.flashinfer_wrappers import Planned, Wrappers
from sps_runtime.ops.kv_rows import row_format
from sps_runtime.ops.merge_state import empty_state, merge_rows_, merge_states

REMEMBERED = 8
"""Lists of runs whose plans are kept: those of a step, by window and range of heads."""
STANDING = 256
"""Lists that stay whose plans are kept: graphs hold their memory, so more than there are graphs."""
LN2 = math.log(2.0)
_NOTHING = -5e4
"""FlashInfer 0.6's log2 of no mass; its merge makes NaN of two -inf."""


@dataclass(frozen=True)
class _Layout:
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


@dataclass(frozen=True)
class _Step:
    """Lists that were planned. Holds on to `lists`, so that no other gets its identity."""

    lists: object
    planned: tuple[tuple[Call, Planned], ...]
    others: tuple[Items, ...]


class FlashInferBackend:
    """`attention.backend.AttentionBackend` over `flashinfer`.

    Args:
        library: the module.
        fallback: computes windows over lists with gaps, which FlashInfer cannot express.
        device: where pools and queries lie.
    """

    name = "flashinfer"
    recordable = True

    def __init__(
        self, library: ModuleType, fallback: AttentionBackend, device: torch.device
    ) -> None:
        self._library = library
        self._fallback = fallback
        self._wrappers = Wrappers(library, device)
        self._steps: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()
        self._standing: OrderedDict[tuple[Any, ...], _Step] = OrderedDict()

    def partial(
        self,
        q_THD: Tensor,
        runs: Sequence[QueryRun],
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
        kv_heads: tuple[int, int] | None = None,
    ) -> Partial:
        if not runs or not q_THD.numel():
            return Partial(*empty_state(q_THD))
        pools = _cut_heads(pool, kv_heads)
        layout = _layout(q_THD, pools)
        key = (id(runs), layout, scale, window)
        step = self._steps.get(key) or self._plan(key, runs, of_runs(runs), layout, scale, window)
        return self._attend(step, q_THD, pools, layout, scale, window)

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        items = lists.items.cpu().numpy().astype(np.int64)
        if not len(items) or not q_THD.numel():
            return Partial(*empty_state(q_THD))
        if (items[:, 7] == _heads(pool)).all():
            layout = _layout(q_THD, pool)
            key = (id(lists), layout, scale, window)
            step = (self._standing if lists.standing else self._steps).get(key)
            if step is None:
                found = of_lists(lists, items)
                room = len(lists.page_ids) if lists.standing else None
                step = self._plan(key, lists, found, layout, scale, window, room)
            partial = self._attend(step, q_THD, pool, layout, scale, window)
            return partial if lists.standing else Partial(partial.o.float(), partial.lse)
        return self._each_head(q_THD, lists, items, pool, scale, window)

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        dtypes = {partial.o.dtype for partial in partials}
        if len(partials) < 2 or dtypes != {out_THD.dtype} or out_THD.dtype == torch.float32:
            out_THD.copy_(merge_states([(partial.o, partial.lse) for partial in partials])[0])
            return
        o, lse = _base2(partials[0])
        for partial in partials[1:]:
            o, lse = self._library.merge_state(o, lse, *_base2(partial))
        out_THD.copy_(o)

    def refresh(self, lists: PageLists) -> bool:
        found = [(key, step) for key, step in self._standing.items() if step.lists is lists]
        planned = [self._plan_again(key, step, lists) for key, step in found]
        return bool(planned) and all(planned)

    def _plan_again(self, key: tuple[Any, ...], step: _Step, lists: PageLists) -> bool:
        """Plan the same wrappers, which a graph may hold, for other values; where these need other
        calls, forget the plan."""
        _, layout, scale, window = key
        items = of_lists(lists, lists.items.cpu().numpy().astype(np.int64))
        found = plan_calls(items, layout.rows, layout.page_size, layout.slots, window)
        shapes = [[_shape(call) for call in calls] for calls in (found.calls, _calls(step))]
        if shapes[0] != shapes[1] or found.others or step.others:
            del self._standing[key]
            self._wrappers.give_back(planned for _, planned in step.planned)
            return False
        pairs = []
        for call, (_, planned) in zip(found.calls, step.planned, strict=True):
            planned.plan(call, **_arguments(layout, scale, window))
            pairs.append((call, planned))
        self._standing[key] = replace(step, planned=tuple(pairs))
        return True

    def _plan(
        self,
        key: tuple[Any, ...],
        lists: object,
        items: Items,
        layout: _Layout,
        scale: float,
        window: int | None,
        room: int | None = None,
    ) -> _Step:
        """Plan lists, and remember that.

        Args:
            room: entries that they will ever have, where they are planned again and again.
        """
        steps, most = self._steps, REMEMBERED
        if room is not None:
            steps, most = self._standing, STANDING
        while len(steps) >= most:
            _, old = steps.popitem(last=False)
            self._wrappers.give_back(planned for _, planned in old.planned)
        found = plan_calls(items, layout.rows, layout.page_size, layout.slots, window)
        plans = self._plans(found, layout, scale, window, room)
        step = _Step(lists, plans, found.others)
        steps[key] = step
        return step

    def _plans(
        self,
        found: Calls,
        layout: _Layout,
        scale: float,
        window: int | None,
        room: int | None = None,
    ) -> tuple[tuple[Call, Planned], ...]:
        plans = []
        for call in found.calls:
            planned = self._wrapper(call, layout, room)
            planned.plan(call, **_arguments(layout, scale, window))
            plans.append((call, planned))
        return tuple(plans)

    def _wrapper(self, call: Call, layout: _Layout, room: int | None) -> Planned:
        group = layout.heads // layout.kv_heads
        if room is not None and call.kind == "decode" and call.rows is None:
            return self._wrappers.standing(call, group, layout.kv_dtype, room)
        return self._wrappers.take(call, group, layout.kv_dtype)

    def _attend(
        self,
        step: _Step,
        q_THD: Tensor,
        pool: PagePool,
        layout: _Layout,
        scale: float,
        window: int | None,
    ) -> Partial:
        partial = self._run(step, q_THD, pool, layout)
        for others in step.others:
            rest = as_runs(others)
            other = self._fallback.partial(q_THD, rest, pool, scale=scale, window=window)
            merge_rows_(partial.o, partial.lse, None, other.o, other.lse)
        return partial

    def _run(self, step: _Step, q_THD: Tensor, pool: PagePool, layout: _Layout) -> Partial:
        """All calls of a step over one layer; rows in no call get (0, -inf)."""
        calls = step.planned
        if len(calls) == 1 and calls[0][0].rows is None and not step.others:
            call, planned = calls[0]
            o, lse = planned.run(q_THD, *_sides(pool, call.pool, layout))
            return Partial(o, lse.mul_(LN2))
        partial = Partial(*empty_state(q_THD))
        seen: set[int] = set()
        for call, planned in calls:
            rows = planned.rows
            q = q_THD if rows is None else q_THD[rows]
            o, lse = planned.run(q, *_sides(pool, call.pool, layout))
            lse = lse.mul_(LN2)
            if seen <= {call.pool}:  # rows of one pool's calls are not in one another
                at = slice(None) if rows is None else rows
                partial.o[at], partial.lse[at] = o.float(), lse
            else:
                merge_rows_(partial.o, partial.lse, rows, o, lse)
            seen.add(call.pool)
        return partial

    def _each_head(
        self,
        q_THD: Tensor,
        lists: PageLists,
        items: Ints,
        pool: PagePool,
        scale: float,
        window: int | None,
    ) -> Partial:
        """Lists of their own for KV heads: heads outside of tokens, pages of one head each."""
        tokens, heads, dim = q_THD.shape
        kv_heads = _heads(pool)
        group = heads // kv_heads
        q = q_THD.view(tokens, kv_heads, group, dim).transpose(0, 1).reshape(-1, group, dim)
        flat = PagePool(
            [_one_head(side) for side in pool.k],
            [_one_head(side) for side in pool.v],
            pool.slots_per_rank * kv_heads,
        )
        layout = _layout(q, flat)
        each = by_head(of_lists(lists, items), items, kv_heads, tokens)
        found = plan_calls(each, layout.rows, layout.page_size, layout.slots, window)
        if found.others:
            return self._fallback.partial_lists(q_THD, lists, pool, scale=scale, window=window)
        plans = self._plans(found, layout, scale, window)
        step = _Step(lists, plans, found.others)
        partial = self._run(step, q, flat, layout)
        self._wrappers.give_back(planned for _, planned in plans)
        o = q_THD.new_empty((tokens, kv_heads, group, dim), dtype=torch.float32)
        o.copy_(partial.o.view(kv_heads, tokens, group, dim).transpose(0, 1))
        lse = partial.lse.view(kv_heads, tokens, group).transpose(0, 1).reshape(tokens, heads)
        return Partial(o.view(q_THD.shape), lse)


def _calls(step: _Step) -> list[Call]:
    return [call for call, _ in step.planned]


def _shape(call: Call) -> tuple[object, ...]:
    """What stays while a wrapper's plan is made again."""
    return call.pool, call.kind, call.window, call.requests, call.rows is None


def _arguments(layout: _Layout, scale: float, window: int | None) -> dict[str, Any]:
    return {
        "heads": layout.heads,
        "kv_heads": layout.kv_heads,
        "dim": layout.dim,
        "page_size": layout.page_size,
        "scale": scale,
        "window": window,
        "q_dtype": layout.q_dtype,
        "kv_dtype": layout.kv_dtype,
    }


def _heads(pool: PagePool) -> int:
    return int(next(side for side in pool.k if len(side)).shape[1])


def _layout(q_THD: Tensor, pool: PagePool) -> _Layout:
    rows, heads, dim = q_THD.shape
    shape = (heads, _heads(pool), dim, rows, pool.page_size, pool.slots_per_rank)
    kv_dtype = torch.float8_e4m3fn if pool.k[0].dtype == torch.uint8 else pool.k[0].dtype
    return _Layout(*shape, q_THD.dtype, kv_dtype)


def _cut_heads(pool: PagePool, kv_heads: tuple[int, int] | None) -> PagePool:
    if kv_heads is None:
        return pool
    heads = slice(*kv_heads)
    k, v = ([side[:, heads] for side in sides] for sides in (pool.k, pool.v))
    return PagePool(k, v, pool.slots_per_rank)


def _one_head(side: Tensor) -> Tensor:
    """A pool ``[slots, kv_heads, page_size, row]`` as pages of one head."""
    return side.flatten(0, 1)[:, None]


def _sides(pool: PagePool, index: int, layout: _Layout) -> tuple[Tensor, Tensor]:
    k, v = pool.k[index], pool.v[index]
    kv_format = row_format(k, layout.dim)
    if kv_format == "native":
        return k, v
    if kv_format != "fp8_e4m3":
        raise ValueError(f"FlashInfer reads no {kv_format} pages")
    return k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)


def _base2(partial: Partial) -> tuple[Tensor, Tensor]:
    return partial.o.contiguous(), (partial.lse / LN2).clamp_min(_NOTHING)
