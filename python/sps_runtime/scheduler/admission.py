"""Which waiting requests get pages and a slot, and when."""

from __future__ import annotations

from sps_runtime.scheduler.budget import promised_pages, reserved_pages
from sps_runtime.scheduler.chunking import chunk_limit
from sps_runtime.scheduler.figures import Figures
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.prefix_waits import PrefixWaits
from sps_runtime.scheduler.queue import WaitingQueue
from sps_runtime.scheduler.runs import Runs, cached_prefix
from sps_runtime.scheduler.sequence import Run, Sequence


class Admission:
    """Starts runs while prompts are wanted and their pages can be promised.

    Admission is late on purpose: a request is matched against the cache only when a step can take
    it, and one that shares a prefix with a prompt being computed waits for that prefix, while
    those behind it go on (`prefix_waits`).
    """

    def __init__(self, view: View, queue: WaitingQueue, runs: Runs, figures: Figures) -> None:
        self._view = view
        self._queue = queue
        self._runs = runs
        self._waits = PrefixWaits(view, figures)
        self._refused: tuple[Sequence, int] | None = None

    def admit(self) -> list[Run]:
        """Start the runs that can start now; return them."""
        admitted: list[Run] = []
        if not self._queue or not self._may_start() or self._still_refused():
            return admitted
        writing = self._runs.writing()
        for sequence in self._queue.ordered(self._matched):
            if self._waits.keep(sequence, writing):
                continue
            if not self._fits(sequence):
                break
            self._queue.take(sequence)
            run = self._runs.start(sequence)
            admitted.append(run)
            writing.append(run)
            if not self._may_start():
                break
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
        """Whether the request refused last waits on for pages, with no more of them than then."""
        if self._refused is None or self._alone or self._refused[0] not in self._queue:
            return False
        sequence, spare = self._refused
        return sequence.awaited is None and self._spare() <= spare

    @property
    def _alone(self) -> bool:
        return not self._runs.live and not self._runs.draining

    def _spare(self) -> int:
        """Pages that are free, evictable or about to be free, less those promised to runs."""
        view, size = self._view, self._view.cache_config.page_size
        factor = view.config.conservativeness
        promised = sum(promised_pages(run, size, factor) for run in self._runs.live.values())
        return sum(view.cache.room()) + view.cache.quarantined() - promised
