"""Our policy: an idle server spreads a prompt over its ranks, a busy one packs."""

from __future__ import annotations

from sps_runtime.costmodel.sparse import attention_share
from sps_runtime.scheduler.budget import pages_for
from sps_runtime.scheduler.chunking import chunk_limit, superblock_pages
from sps_runtime.scheduler.policies.decode import decode_steps
from sps_runtime.scheduler.policies.view import Step, View, mask_ranks, ranks_mask
from sps_runtime.scheduler.sequence import Run

MOST_WAITING = 64
"""More waiting requests than this do not change a degree."""


class Sps:
    """Decode where KV lies, in steps of its own; prefill at the degree that the cost model likes.

    The degree of a chunk (LoongServe's elasticity, Tetris' degree per chunk) minimises the mean
    time to finish, were all n waiting requests like this one: degree d leaves sp / d lanes, each
    of which serves its share in `rounds` steps of as many prompts as fit, T_d seconds each:

        T_d * (rounds + 1) / 2

    With n = 1 that is the fastest degree; with many it is the most efficient one, and short
    prompts, whose T_d hardly falls with d, go to single ranks beside others' long ones. Requests
    that wait for a running prompt's prefix are not counted: the sooner it is computed, the better
    for all of them.

    Long prompts of one group are served one after the other, which ends each as early as it can;
    prompts that end within the step are packed beside them. While requests decode on a group's
    ranks, a packed step is no longer than one chunk, so that tokens do not wait.
    """

    def steps(self, view: View) -> list[Step]:
        return decode_steps(view) + self._prefill_steps(view)

    def _prefill_steps(self, view: View) -> list[Step]:
        runs = [run for run in view.runs.values() if view.may_prefill(run)]
        load = self._load(view) if runs else []
        steps: dict[tuple[int, bool], Step] = {}
        for run in runs:
            mask = self._group(view, run, load)
            apart = run.sparse_now is not None and not view.sparse_mixes
            step = steps.setdefault((mask, apart), Step(mask, [], "prefill"))
            limit = self._limit(view, run, mask.bit_count())
            if step.items:
                left = self._budget(view, mask) - step.tokens
                if run.target - run.sent > (left if limit is None else min(limit, left)):
                    continue
            end = run.chunk_end(view.cache_config.page_size, limit)
            step.items.append((run, end - run.sent))
        return list(steps.values())

    @staticmethod
    def _limit(view: View, run: Run, degree: int) -> int | None:
        """Tokens of a run's next chunk at most; under csa a superblock for every rank at least."""
        limit = chunk_limit(view.config.chunked_prefill_size, degree)
        if limit is None or run.sparse_now is None:
            return limit
        return max(limit, degree * run.sparse_now.superblock_at(run.sent))

    def _budget(self, view: View, mask: int) -> int:
        """New tokens that a packed step of a group may have."""
        per_rank = view.config.max_prefill_tokens
        chunk = view.config.chunked_prefill_size
        if chunk > 0 and any(run.decodes and run.mask & mask for run in view.runs.values()):
            per_rank = min(per_rank, chunk)
        return per_rank * mask.bit_count()

    def _load(self, view: View) -> list[float]:
        """Prompt tokens that each rank has before it, of runs whose group is chosen."""
        load = [0.0] * view.parallel.sp_size
        for run in view.runs.values():
            if run.acked < run.target:
                _add(load, run.mask, run.target - run.acked)
        return load

    def _group(self, view: View, run: Run, load: list[float]) -> int:
        """The group of a run's next chunk, and `load` with the run on it."""
        if view.parallel.arch == "tp":
            return view.all_ranks
        _add(load, run.mask, run.acked - run.target)
        required = view.required(run)
        degree = max(self._degree(view, run), required.bit_count())
        page_size, unit = view.cache_config.page_size, self._unit(view, run)
        missing = -(-self._missing(view, run) // unit)
        room = [pages // unit for pages in view.cache.room()]

        def preference(rank: int) -> tuple[bool, float, int]:
            """Ranks with room, then with the run's pages or little load, then with most room."""
            return room[rank] == 0, load[rank] - run.table.owned[rank] * page_size, -room[rank]

        chosen = list(mask_ranks(required))
        for rank in sorted(set(range(view.parallel.sp_size)) - set(chosen), key=preference):
            enough = sum(room[r] for r in chosen) >= missing
            if chosen and len(chosen) >= degree and enough:
                break
            if room[rank] or not chosen:
                chosen.append(rank)
        mask = ranks_mask(chosen)
        _add(load, mask, run.target - run.acked)
        return mask

    def _degree(self, view: View, run: Run) -> int:
        """The degree with the least mean time to finish, the smaller of equal ones.

        Work is divided by pages, or superblocks, so there are never more ranks than those to fill.
        """
        sp_size = view.parallel.sp_size
        if sp_size == 1:
            return 1
        prefilling = sum(other.prefilling for other in view.runs.values())
        alike = max(1, min(MOST_WAITING, prefilling + view.waiting - view.awaiting))
        tokens = run.target - run.sent

        def mean_time(degree: int) -> float:
            limit = self._limit(view, run, degree)
            budget = view.config.max_prefill_tokens * degree
            packed = 1 if limit is not None and tokens > limit else max(1, budget // tokens)
            share = -(-alike // (sp_size // degree))
            rounds = -(-share // packed)
            works = [(tokens, run.sent)] * min(share, packed)
            return view.costs.prefill_seconds(degree, works, density) * (rounds + 1) / 2

        density = 1.0 if run.sparse_now is None else attention_share(run.sparse_now, run.target)
        parts = -(-self._missing(view, run) // self._unit(view, run))
        return min(range(1, max(1, min(sp_size, parts)) + 1), key=mean_time)

    @staticmethod
    def _missing(view: View, run: Run) -> int:
        """Pages that the rest of a run's prompt needs."""
        return pages_for(run.target, view.cache_config.page_size) - len(run.table.pages)

    @staticmethod
    def _unit(view: View, run: Run) -> int:
        """Pages that must lie on one rank: under csa those of the next superblock, else one."""
        if run.sparse_now is None:
            return 1
        page_size = view.cache_config.page_size
        held = len(run.table.pages) * page_size
        return max(superblock_pages(run.sparse_now, held, run.sparse_end, page_size)[:1] or [1])


def _add(load: list[float], mask: int, tokens: int) -> None:
    """Spread a run's prompt tokens over its group, if it has one."""
    for rank in mask_ranks(mask):
        load[rank] += tokens / mask.bit_count()
