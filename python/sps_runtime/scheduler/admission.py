"""Which waiting requests get pages and a slot, and when."""

from __future__ import annotations

from sps_runtime.kvcache.radix_tree import Match
from sps_runtime.scheduler.budget import promised_pages, reserved_pages
from sps_runtime.scheduler.chunking import chunk_limit
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.queue import WaitingQueue
from sps_runtime.scheduler.runs import Runs
from sps_runtime.scheduler.sequence import Run, Sequence


class Admission:
    """Starts runs while prompts are wanted and their pages can be promised.

    Admission is late on purpose: a request is matched against the cache only when a step can take
    it, and one that shares a long prefix with a prompt being computed waits for that prefix.
    """

    def __init__(self, view: View, queue: WaitingQueue, runs: Runs) -> None:
        self._view = view
        self._queue = queue
        self._runs = runs
        self._refused = (-1, 0)

    def admit(self) -> list[Run]:
        """Start the runs that can start now; return them."""
        admitted: list[Run] = []
        if not self._queue or self._runs.full or not self._wanted():
            return admitted
        for sequence in self._queue.ordered(self._matched):
            if len(self._runs) >= self._view.config.max_running_requests or self._runs.full:
                break
            if not self._wanted():
                break
            if self._prefix_under_way(sequence):
                continue
            if not self._fits(sequence):
                break
            self._queue.take(sequence)
            admitted.append(self._runs.start(sequence))
        return admitted

    def _wanted(self) -> bool:
        """Whether the next prefill steps have tokens to spare beside the prompts running."""
        view = self._view
        limit = chunk_limit(view.config.chunked_prefill_size, view.parallel.sp_size)
        unsent = (run.target - run.sent for run in self._runs.live.values() if run.prefilling)
        backlog = sum(tokens if limit is None else min(tokens, limit) for tokens in unsent)
        return backlog < view.config.max_prefill_tokens * view.parallel.sp_size

    def _match(self, sequence: Sequence) -> Match:
        tokens, limit = sequence.packed_tokens(), sequence.match_limit
        return self._view.cache.match(sequence.namespace, tokens, limit)

    def _matched(self, sequence: Sequence) -> int:
        return len(self._match(sequence).pages)

    def _prefix_under_way(self, sequence: Sequence) -> bool:
        """Whether a prompt being computed will soon give this one half of what it lacks."""
        cache, size = self._view.cache, self._view.cache_config.page_size
        if not cache.enabled:
            return False
        matched = self._matched(sequence) * size
        worth = matched + max(size, (len(sequence.tokens) - matched) // 2)
        if worth > sequence.match_limit:
            return False
        return any(
            run.acked < worth <= run.target
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
        view, size = self._view, self._view.cache_config.page_size
        if not self._runs.live and not self._runs.draining:
            return True
        factor = view.config.conservativeness
        promised = sum(promised_pages(run, size, factor) for run in self._runs.live.values())
        spare = sum(view.cache.room()) + view.cache.quarantined() - promised
        if self._refused[0] == sequence.arrival and spare <= self._refused[1]:
            return False
        fits = reserved_pages(sequence, size, factor) - self._match(sequence).held <= spare
        self._refused = (-1, 0) if fits else (sequence.arrival, spare)
        return fits
