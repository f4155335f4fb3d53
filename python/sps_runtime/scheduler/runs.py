"""Runs: sequences that hold pages and a board slot."""

from __future__ import annotations

from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.kvcache.radix_tree import Match
from sps_runtime.scheduler.sequence import Run, Sequence


class Runs:
    """Starts and ends runs.

    A run that ends with plans under way drains first: its pages and its slot stay its own until
    every rank has answered, and what those plans wrote of known tokens is still worth caching.

    Attributes:
        live: runs by handle, in order of admission.
        draining: runs that have ended but have plans under way.
    """

    def __init__(self, cache: PrefixCache, slots: int) -> None:
        self.live: dict[int, Run] = {}
        self.draining: dict[int, Run] = {}
        self._cache = cache
        self._slots = slots
        self._free_slots = list(range(slots - 1, -1, -1))
        self._handles = 0

    def __len__(self) -> int:
        return len(self.live)

    @property
    def full(self) -> bool:
        """Whether no board slot is free."""
        return not self._free_slots

    def writing(self) -> list[Run]:
        """Runs, ended ones too, whose plans will still give pages of known tokens to the tree."""
        runs = (*self.live.values(), *self.draining.values())
        return [run for run in runs if run.acked < run.will_cache]

    def newest(self) -> Run:
        """The live run that arrived last: the first to be retracted."""
        return max(self.live.values(), key=lambda run: run.sequence.arrival)

    def start(self, sequence: Sequence) -> Run:
        """Give a sequence a slot and the cached prefix of its tokens."""
        self._handles += 1
        tokens, limit = sequence.packed_tokens(), sequence.match_limit
        if sequence.sparse is not None:
            limit = len(cached_prefix(self._cache, sequence).pages) * self._cache.page_size
        table = self._cache.open(self._handles, sequence.namespace, tokens, limit)
        cached = len(table.pages) * self._cache.page_size
        run = Run(
            sequence=sequence,
            handle=self._handles,
            slot=self._free_slots.pop(),
            table=table,
            target=len(sequence.tokens),
            sent=cached,
            acked=cached,
            sparse_end=_sparse_end(sequence),
        )
        self.live[run.handle] = run
        return run

    def end(self, run: Run) -> None:
        """End a live run: its sequence has finished, was aborted, or is retracted."""
        del self.live[run.handle]
        run.live = False
        run.known = run.sequence.commit_limit
        self.draining[run.handle] = run
        self.settle(run)

    def settle(self, run: Run) -> None:
        """Retire the run's plans that every rank has answered; commit what they wrote."""
        while run.flights and self._retired(run):
            run.acked = run.flights.popleft().end
        known = run.sequence.commit_limit if run.live else run.known
        self._commit(run, min(run.acked, known))
        if not run.live and not run.flights:
            del self.draining[run.handle]
            self._cache.close(run.handle)
            self._free_slots.append(run.slot)

    def check(self) -> None:
        """Raise AssertionError unless slots and handles are accounted for."""
        runs = [*self.live.values(), *self.draining.values()]
        slots = [run.slot for run in runs] + self._free_slots
        assert sorted(slots) == list(range(self._slots)), "board slots are lost or shared"
        assert {run.handle for run in runs} == self._cache.directory.tables().keys()
        for run in runs:
            self._check_run(run)

    def _check_run(self, run: Run) -> None:
        sequence, size = run.sequence, self._cache.page_size
        assert run.acked <= run.sent <= len(run.table.pages) * size, "a token without a page"
        assert [flight.end for flight in run.flights][-1:] in ([], [run.sent]), "plans out of step"
        assert run.live or run.flights, "a drained run stays"
        shared = self._cache.shared(run.handle)
        assert shared * size <= max(run.acked, 0), "a page was cached before it was written"
        if run.live:
            assert (run.handle in self.live) and (run.handle not in self.draining)
            due = sum(flight.due for flight in run.flights)
            assert run.unknown == due, "tokens under way are miscounted"
            if not run.prefilling and sequence.max_new:
                assert run.sent + 1 == len(sequence.tokens) + run.unknown, "positions out of step"

    @staticmethod
    def _retired(run: Run) -> bool:
        flight = run.flights[0]
        return flight.complete and not (flight.due and run.live)

    def _commit(self, run: Run, written: int) -> None:
        size = self._cache.page_size
        begin = self._cache.shared(run.handle) * size
        if written - begin >= size:
            tokens = run.sequence.tokens[begin:written].tobytes()
            replaced = self._cache.commit(run.handle, tokens, written)
            if replaced is not None:
                reached = {r: min(p, replaced * size) for r, p in run.summarised.items()}
                run.summarised = reached


def cached_prefix(cache: PrefixCache, sequence: Sequence) -> Match:
    """The cached pages that a sequence may start with: under csa whole superblocks only."""
    match = cache.match(sequence.namespace, sequence.packed_tokens(), sequence.match_limit)
    pages = sequence.aligned(len(match.pages) * cache.page_size) // cache.page_size
    return Match(match.pages[:pages], min(match.held, pages))


def _sparse_end(sequence: Sequence) -> int:
    """Where csa ends in a sequence's next run.

    Tokens that were generated before a retraction are computed again as they were at first.
    """
    if sequence.sparse is None:
        return 0
    return sequence.prompt_len if sequence.sparse.decode == "exact" else len(sequence.tokens)
