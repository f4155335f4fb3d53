"""Partials by FlashInfer's kernels (Ye et al. 2025): paged prefill and decode, planned once a step.

FlashInfer computes in two parts: `plan` reads page tables on the host and schedules work, `run`
launches kernels. All layers of a step read the same tables (`attention.flashinfer.calls`), so a
list of runs is planned when its first layer comes and the plan is kept while the step lasts. Lists
of sparse attention are a layer's own: each is planned, with every KV head as a request by itself
over a view of the pool whose pages hold one head.

Single rows that begin with the same pages read these once (`attention.flashinfer.shared`), where
that saves enough.

Its log-sum-exp is to base 2; ours is natural. Tested with 0.6.4 and 0.7.2's interfaces.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
from sps_runtime.attention.flashinfer.calls import Call, Calls, Ints, Items, plan_calls
from sps_runtime.attention.flashinfer.items import as_runs, by_head, of_lists, of_runs
from sps_runtime.attention.flashinfer.layout import (
    Layout,
    cut_heads,
    kv_heads_of,
    layout_of,
    one_head,
    plan_arguments,
    read_cost,
    sides_of,
)
from sps_runtime.attention.flashinfer.merges import LN2, base2, merge_shared_, merges
from sps_runtime.attention.flashinfer.shared import LEAST_BYTES, Sharing, padded, share
from sps_runtime.attention.flashinfer.wrappers import Planned, Wrappers
from sps_runtime.ops.merge_state import empty_state, merge_rows_, merge_states

REMEMBERED = 8
"""Lists of runs whose plans are kept: those of a step, by window and range of heads."""
STANDING = 256
"""Lists that stay whose plans are kept: graphs hold their memory, so more than there are graphs."""


@dataclass(frozen=True)
class _Step:
    """Lists that were planned. Holds on to `lists`, so that no other gets its identity.

    Attributes:
        kept: of lists that stay, the wrappers by their calls' kind; they outlast the calls.
    """

    lists: object
    planned: tuple[tuple[Call, Planned], ...]
    others: tuple[Items, ...]
    kept: dict[str, Planned] = field(default_factory=dict)

    @property
    def form(self) -> str | None:
        """The calls' kinds, where a graph may hold them: their wrappers and shapes stay."""
        return "+".join(call.kind for call, _ in self.planned) if self.kept else None


class FlashInferBackend:
    """`attention.backend.AttentionBackend` over `flashinfer`.

    Args:
        library: the module.
        fallback: computes windows over lists with gaps, which FlashInfer cannot express.
        device: where pools and queries lie.
        least_bytes: sharing prefixes must save so much of a layer's reads (`ReadCost`).
    """

    name = "flashinfer"
    recordable = True

    def __init__(
        self,
        library: ModuleType,
        fallback: AttentionBackend,
        device: torch.device,
        least_bytes: int = LEAST_BYTES,
    ) -> None:
        self._library = library
        self._least_bytes = least_bytes
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
        pools = cut_heads(pool, kv_heads)
        layout = layout_of(q_THD, pools)
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
        if (items[:, 7] == kv_heads_of(pool)).all():
            layout = layout_of(q_THD, pool)
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
        if len(partials) < 2 or dtypes != {out_THD.dtype} or not merges(out_THD):
            out_THD.copy_(merge_states([(partial.o, partial.lse) for partial in partials])[0])
            return
        o, lse = base2(partials[0])
        for partial in partials[1:]:
            o, lse = self._library.merge_state(o, lse, *base2(partial))
        out_THD.copy_(o)

    def refresh(self, lists: PageLists) -> bool:
        found = [(key, step) for key, step in self._standing.items() if step.lists is lists]
        planned = [self._plan_again(key, step, lists) for key, step in found]
        return bool(planned) and all(planned)

    def form(self, lists: PageLists) -> str | None:
        forms = [step.form for step in self._standing.values() if step.lists is lists]
        return None if not forms or None in forms else " ".join(map(str, forms))

    def _plan_again(self, key: tuple[Any, ...], step: _Step, lists: PageLists) -> bool:
        """Plan the same wrappers, which graphs may hold, for other values; where these need other
        calls, forget the plan."""
        _, layout, scale, window = key
        items = of_lists(lists, lists.items.cpu().numpy().astype(np.int64))
        found, stays = self._calls(items, layout, window, standing=True)
        if not stays or not step.kept:
            del self._standing[key]
            self._wrappers.give_back(planned for _, planned in step.planned)
            return False
        plans = self._plans(found, layout, scale, window, len(lists.page_ids), step.kept)
        self._standing[key] = replace(step, planned=plans)
        return True

    def _plan(
        self,
        key: tuple[Any, ...],
        lists: object,
        items: Items,
        layout: Layout,
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
        found, stays = self._calls(items, layout, window, standing=room is not None)
        kept: dict[str, Planned] = {}
        plans = self._plans(found, layout, scale, window, room, kept if stays else None)
        step = _Step(lists, plans, found.others, kept)
        steps[key] = step
        return step

    def _calls(
        self, items: Items, layout: Layout, window: int | None, standing: bool
    ) -> tuple[Calls, bool]:
        """The calls of some lists, and whether they will have few shapes when the lists have other
        values."""
        found = plan_calls(items, layout.rows, layout.page_size, layout.slots, window)
        alike = len(found.calls) == 1 and not found.others and _every_row(found.calls[0])
        stays = standing and alike
        sharing = Sharing(read_cost(layout, self._least_bytes), stays)
        found = share(found, layout.rows, layout.page_size, sharing)
        if stays:
            own, *shared = found.calls
            found = replace(found, calls=(own, *(padded(call, layout.rows) for call in shared)))
        return found, stays

    def _plans(
        self,
        found: Calls,
        layout: Layout,
        scale: float,
        window: int | None,
        room: int | None = None,
        kept: dict[str, Planned] | None = None,
    ) -> tuple[tuple[Call, Planned], ...]:
        """Plan calls.

        Args:
            room: of lists that stay.
            kept: wrappers that stay by their calls' kind; those that are missing are put there.
                None: any wrapper does.
        """
        plans, group = [], layout.heads // layout.kv_heads
        for call in found.calls:
            if kept is None or room is None:
                planned = self._wrappers.take(call, group, layout.kv_dtype)
            elif (planned := kept.get(call.kind)) is None:  # type: ignore[assignment]
                planned = kept[call.kind] = self._wrappers.standing(
                    call, group, layout.kv_dtype, room, layout.rows
                )
            planned.plan(call, **plan_arguments(layout, scale, window))
            plans.append((call, planned))
        return tuple(plans)

    def _attend(
        self,
        step: _Step,
        q_THD: Tensor,
        pool: PagePool,
        layout: Layout,
        scale: float,
        window: int | None,
    ) -> Partial:
        partial = self._run(step, q_THD, pool, layout)
        for others in step.others:
            rest = as_runs(others)
            other = self._fallback.partial(q_THD, rest, pool, scale=scale, window=window)
            merge_rows_(partial.o, partial.lse, None, other.o, other.lse)
        return partial

    def _run(self, step: _Step, q_THD: Tensor, pool: PagePool, layout: Layout) -> Partial:
        """All calls of a step over one layer; rows in no call get (0, -inf)."""
        calls = step.planned
        if calls and calls[0][0].rows is None and not step.others:
            rest = [call for call, _ in calls[1:]]
            if all(call.kind == "shared" and call.pool == calls[0][0].pool for call in rest):
                return self._cascade(calls, q_THD, pool, layout)
        partial = Partial(*empty_state(q_THD))
        seen: set[int] = set()
        for call, planned in calls:
            rows = planned.rows
            q = q_THD if rows is None else q_THD[rows]
            o, lse = planned.run(q, *sides_of(pool, call.pool, layout))
            lse = lse.mul_(LN2)
            # Rows of one pool's calls are not in one another, but for those of shared pages.
            if seen <= {call.pool} and call.kind != "shared":
                at = slice(None) if rows is None else rows
                partial.o[at], partial.lse[at] = o.float(), lse
            else:
                merge_rows_(partial.o, partial.lse, rows, o, lse)
            seen.add(call.pool)
        return partial

    def _cascade(
        self,
        calls: Sequence[tuple[Call, Planned]],
        q_THD: Tensor,
        pool: PagePool,
        layout: Layout,
    ) -> Partial:
        """One call for all rows, and calls over pages that some of them share."""
        first, planned = calls[0]
        sides = sides_of(pool, first.pool, layout)
        o, lse = planned.run(q_THD, *sides)
        for _, shared in calls[1:]:
            assert shared.rows is not None and shared.back is not None and shared.has is not None
            found = shared.run(q_THD[shared.rows], *sides)
            merge_shared_(self._library, o, lse, found, shared.back, shared.has)
        return Partial(o, lse.mul_(LN2))

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
        kv_heads = kv_heads_of(pool)
        group = heads // kv_heads
        q = q_THD.view(tokens, kv_heads, group, dim).transpose(0, 1).reshape(-1, group, dim)
        flat = PagePool(
            [one_head(side) for side in pool.k],
            [one_head(side) for side in pool.v],
            pool.slots_per_rank * kv_heads,
        )
        layout = layout_of(q, flat)
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


def _every_row(call: Call) -> bool:
    return call.kind == "decode" and call.rows is None
