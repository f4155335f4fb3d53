"""Which requests wait in the queue until a run has written the prefix that they share with it."""

from __future__ import annotations

from collections.abc import Iterable

from sps_runtime.scheduler.chunking import chunk_limit
from sps_runtime.scheduler.figures import Figures
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.runs import cached_prefix
from sps_runtime.scheduler.sequence import PrefixWait, Run, Sequence

MOST_WAITS = 16
"""A request begins to wait so often at most, whatever becomes of the runs: nothing starves it."""


class PrefixWaits:
    """Keeps requests waiting for pages that are being written, where that pays (ADR 26).

    SGLang's in-batch prefix caching puts off requests whose prefix another *waiting* one shares.
    Here they are compared with what runs, which covers those admitted a moment ago as well.

    A request holds nothing while it waits, so no run can wait for it in turn. Its wait is over when
    the pages are cached, or when the run has ended without them; then it is looked at afresh.
    """

    def __init__(self, view: View, figures: Figures) -> None:
        self._view = view
        self._figures = figures

    def keep(self, sequence: Sequence, writing: Iterable[Run]) -> bool:
        """Whether a waiting request waits on, or begins to.

        Args:
            writing: runs that will give pages to the radix tree (`Runs.writing`).
        """
        if sequence.awaited is not None:
            if not sequence.awaited.over:
                return True
            sequence.awaited = None
        if sequence.awaits < MOST_WAITS and self._view.cache.enabled:
            sequence.awaited = self._longest(sequence, writing)
        if sequence.awaited is None:
            return False
        self._figures.prefix_waits_total += sequence.awaits == 0
        sequence.awaits += 1
        return True

    def _longest(self, sequence: Sequence, writing: Iterable[Run]) -> PrefixWait | None:
        """The wait for the longest prefix of those worth waiting for; the older run's of equals."""
        size = self._view.cache_config.page_size
        kin = [run for run in writing if _same_page(sequence, run.sequence, 0, size)]
        if not kin:
            return None
        cached = len(cached_prefix(self._view.cache, sequence).pages) * size
        longest: PrefixWait | None = None
        for run in kin:
            # Where prompts part is seen at the first page that is not cached, but for few.
            if not _same_page(sequence, run.sequence, cached, size):
                continue
            until = self._shared(sequence, run)
            if until > (longest.until if longest else cached) and self._pays(run, cached, until):
                longest = PrefixWait(run, until)
        return longest

    def _shared(self, sequence: Sequence, run: Run) -> int:
        """Tokens of a request that a run will have cached: whole pages, under csa superblocks."""
        size = self._view.cache_config.page_size
        most = min(sequence.match_limit, run.will_cache) // size
        ours, theirs = sequence.packed_tokens(), run.sequence.packed_tokens()
        return sequence.aligned(_common_pages(ours, theirs, most, size * 4) * size)

    def _pays(self, run: Run, cached: int, until: int) -> bool:
        """Whether waiting for positions [cached, until) is no dearer than computing them.

        It saves the ranks the seconds that these take, if they take longer than a step costs
        anyhow, since a request that waits is computed in a step more. It costs the request no time
        while the run's steps go first on every rank. Where other ranks may be idle the request
        loses the run's seconds less its own; it may lose as many as it saves.
        """
        # One degree and dense attention for both sides: only their ratio matters.
        cost = self._view.costs.prefill_cost(1)
        itself = cost.seconds([(until - cached, cached)]) - cost.a
        if itself < cost.a:
            return False
        if self._has_all_ranks(run):
            return True
        end = self._step_end(run, until)
        return cost.seconds([(end - run.acked, run.acked)]) - cost.a <= 2 * itself

    def _has_all_ranks(self, run: Run) -> bool:
        """Whether a run's steps take all ranks; before its first one, whether they are expected
        to, because that is the fastest degree."""
        view = self._view
        ranks = view.parallel.sp_size
        if ranks == 1 or view.parallel.arch == "tp":
            return True
        if run.mask:
            return run.mask == view.all_ranks
        rest = [(run.target - run.sent, run.sent)]
        degrees = range(1, ranks + 1)
        return ranks == min(degrees, key=lambda degree: view.costs.prefill_seconds(degree, rest))

    def _step_end(self, run: Run, position: int) -> int:
        """Where the step of a run ends that writes the token before `position`."""
        for flight in run.flights:
            if flight.end >= position:
                return flight.end
        view = self._view
        degree = run.mask.bit_count() or view.parallel.sp_size
        limit = chunk_limit(view.config.chunked_prefill_size, degree)
        if limit is None:
            return run.target
        steps = -(-(position - run.sent) // limit)
        return min(run.target, run.sent + steps * limit)


def _same_page(ours: Sequence, theirs: Sequence, begin: int, size: int) -> bool:
    """Whether two requests may share pages, and have the `size` tokens from `begin` in common."""
    page = slice(begin, begin + size)
    return ours.namespace == theirs.namespace and ours.tokens[page] == theirs.tokens[page]


def _common_pages(ours: bytes, theirs: bytes, most: int, page_bytes: int) -> int:
    """How many of the first `most` pages of packed tokens are equal, found by halving."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        part = slice(low * page_bytes, middle * page_bytes)
        if ours[part] == theirs[part]:
            low = middle
        else:
            high = middle - 1
    return low
