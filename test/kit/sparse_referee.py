"""What plans must be under csa (`types.plan`), checked against plans and runs. No tests in here."""

from __future__ import annotations

from sps_runtime.scheduler.scheduler import Scheduler
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.attention import SparseSettings
from sps_runtime.types.plan import SequencePlan, StepPlan
from sps_runtime.types.tokens import unpack_ids


class SparseReferee:
    """Remembers which rank has been sent which page's summary, and checks every csa plan.

    Attributes:
        prefills, repeated: csa prefill plans seen, and those that rely on earlier summaries.
    """

    def __init__(self, scheduler: Scheduler, page_size: int, pages_per_rank: int) -> None:
        self._scheduler = scheduler
        self._page_size, self._pages_per_rank = page_size, pages_per_rank
        self._known: dict[tuple[Run, int], set[int]] = {}
        self.prefills = self.repeated = 0

    def plan(self, plan: StepPlan) -> None:
        flights = self._scheduler._pipeline.sent[plan.epoch].flights
        for sequence in plan.sequences:
            run = flights[sequence.slot][0]
            settings = sequence.attention.sparse
            generated = sequence.start >= run.sequence.prompt_len
            if settings is None:
                assert run.sequence.sparse is None or generated, "a csa prompt is computed exactly"
                assert sequence.summaries_from == 0
            elif settings.decode == "sparse" and sequence.start >= run.target:
                assert sequence.count == 1
            else:
                self._prefill(plan, sequence, run, settings)

    def _prefill(
        self, plan: StepPlan, sequence: SequencePlan, run: Run, settings: SparseSettings
    ) -> None:
        start, end = sequence.start, sequence.start + sequence.count
        target = run.target if settings.decode == "sparse" else run.sequence.prompt_len
        assert (plan.strategy, plan.placement) == ("pass_kv", "sharded")
        assert start == settings.align(start), "a csa step begins within a superblock"
        assert end in (target, settings.align(end)), "a csa step ends within a superblock"
        assert run.sequence.namespace[2] == run.sequence.attention.fidelity != "exact"
        pages = unpack_ids(sequence.pages)
        while start < end:
            stop = min(end, settings.superblock_end(start))
            new = pages[start // self._page_size : -(-stop // self._page_size)]
            owners = {page // self._pages_per_rank for page in new}
            assert len(owners) == 1, "a superblock lies on several ranks"
            start = stop
        self._summaries(plan, sequence, run, list(pages[: end // self._page_size]))
        self.prefills += 1

    def _summaries(
        self, plan: StepPlan, sequence: SequencePlan, run: Run, pages: list[int]
    ) -> None:
        assert sequence.summaries_from % self._page_size == 0
        before = pages[: sequence.summaries_from // self._page_size]
        self.repeated += bool(before)
        for rank in plan.group:
            known = self._known.setdefault((run, rank), set())
            assert known >= set(before), "a summary was never sent to a rank that counts on it"
            known.update(pages)
