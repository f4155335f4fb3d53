"""Which waiting requests get pages and a slot, and when."""

from __future__ import annotations

from sps_runtime.scheduler.budget import promised_pages, reserved_pages
from sps_runtime.scheduler.chunking import chunk_limit
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.queue import WaitingQueue
from sps_runtime.scheduler.runs import Runs, cached_prefix
from sps_runtime.scheduler.sequence import Run, Sequence

MOST_SKIPPED = 16
"""Requests passed over in one turn because their prefix is under way; more would cost time."""


class Admission:
    """Starts runs while prompts are wanted and their pages can be promised.

    Admission is late on purpose: a request is matched against the cache only when a step can take
    it, and one that shares a long prefix with a prompt being computed waits for that prefix.
    """

    def __init__(self, view: View, queue: WaitingQueue, runs: Runs) -> None:
        self._view = view
        self._queue = queue
        self._runs = runs
        self._refused: tuple[Sequence, int] | None = None

    def admit(self) -> list[Run]:
        """Start the runs that can start now; return them."""
        admitted: list[Run] = []
        if not self._queue or not self._may_start() or self._still_refused():
            return admitted
        skipped = 0
        for sequence in self._queue.ordered(self._matched):
            if skipped > MOST_SKIPPED or not self._may_start():
                break
            if self._prefix_under_way(sequence):
                skipped += 1
                continue
            if not self._fits(sequence):
                break
            self._queue.take(sequence)
            admitted.append(self._runs.start(sequence))
        return admitted

    def _may_start(self) -> bool:
        runs = self._runs
        if any(run.short for run in runs.live.values()):
            return False  # Its superblock needs pages on one rank: others would go on taking them.
        room = len(runs) < self._view.config.max_running_requests and not runs.full
        return room and self._wanted()

    def _wanted(self) -> bool:
        """Whether the next prefill steps have tokens to spare beside the prompts running."""
        view = self._view
        limit = chunk_limit(view.config.chunked_prefill_size, view.parallel.sp_size)
        unsent = (run.target - run.sent for run in self._runs.live.values() if run.prefilling)
        backlog = sum(tokens if limit is None else min(tokens, limit) for tokens in unsent)
        return backlog < view.config.max_prefill_tokens * view.parallel.sp_size

    def _matched(self, sequence: Sequence) -> int:
        return len(cached_prefix(self._view.cache, sequence).pages)

    def _prefix_under_way(self, sequence: Sequence) -> bool:
        """Whether a prompt being computed will soon give this one half of what it lacks."""
        cache, size = self._view.cache, self._view.cache_config.page_size
        if not cache.enabled:
            return False
        matched = self._matched(sequence) * size
        worth = sequence.aligned(matched + max(size, (len(sequence.tokens) - matched) // 2))
        if not matched < worth <= sequence.match_limit:
            return False
        return any(
            run.acked < worth <= min(run.target, run.sequence.commit_limit)
            and run.sequence.namespace == sequence.namespace
            and run.sequence.tokens[:size] == sequence.tokens[:size]
            and run.sequence.tokens[:worth] == sequence.tokens[:worth]
            for run in self._runs.live.values()
        )

    def _fits(self, sequence: Sequence) -> bool:
        """Whether the pool can keep its promises to all runs and this one.

        Alone, everything that was accepted fits. Of the pages that the request finds in the cache
        those that others hold cost nothing; the others stop being evictable.
        """
        if self._alone:
            return True
        view, spare = self._view, self._spare()
        size, factor = view.cache_config.page_size, view.config.conservativeness
        held = cached_prefix(view.cache, sequence).held
        fits = reserved_pages(sequence, size, factor) - held <= spare
        self._refused = None if fits else (sequence, spare)
        return fits

    def _still_refused(self) -> bool:
        """Whether the request refused last waits on, with no more pages than then."""
        if self._refused is None or self._alone or self._refused[0] not in self._queue:
            return False
        return self._spare() <= self._refused[1]

    @property
    def _alone(self) -> bool:
        return not self._runs.live and not self._runs.draining

    def _spare(self) -> int:
        """Pages that are free, evictable or about to be free, less those promised to runs."""
        view, size = self._view, self._view.cache_config.page_size
        factor = view.config.conservativeness
        promised = sum(promised_pages(run, size, factor) for run in self._runs.live.values())
        return sum(view.cache.room()) + view.cache.quarantined() - promised
