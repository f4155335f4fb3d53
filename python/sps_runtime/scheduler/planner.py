"""From a proposed step to a `StepPlan`: pages for its tokens, and every field filled in."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

from sps_runtime.costmodel.strategy import AttentionWork
from sps_runtime.kvcache.placement import (
    contiguous,
    divide,
    divide_units,
    make_placement,
    next_owner,
)
from sps_runtime.scheduler.budget import pages_for
from sps_runtime.scheduler.bursts import plan_burst
from sps_runtime.scheduler.chunking import superblock_pages
from sps_runtime.scheduler.policies.view import Step, View, mask_ranks
from sps_runtime.scheduler.sequence import Run, Sequence
from sps_runtime.types.attention import SparseSettings
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan, Strategy


class Pages(Enum):
    """What became of a step's wish for pages."""

    READY = "ready"
    CHANGED = "changed"
    """A page was placed on a rank outside the group: propose steps again."""
    SHORT = "short"


class Planner:
    """Fills steps with pages and turns them into plans."""

    def __init__(self, view: View, placement: str = "zigzag") -> None:
        self._view = view
        self._cache = view.cache
        self._page_size = view.cache_config.page_size
        self._place = make_placement(placement)

    def reserve(self, step: Step) -> Pages:
        """Give every item the pages of its new tokens; cut or drop prefill items that get none."""
        kept: list[tuple[Run, int]] = []
        for run, count in step.items:
            if run.prefilling:
                end = self._reserve_chunk(run, run.sent + count, step.mask)
                if end > run.sent:
                    kept.append((run, end - run.sent))
                continue
            if run.sent == len(run.table.pages) * self._page_size:
                owner = self._reserve_token(run, step)
                if owner is None:
                    return Pages.SHORT
                if not step.mask >> owner & 1:
                    return Pages.CHANGED
            kept.append((run, count))
        step.items = kept
        if step.steps > 1:
            step.steps = min(self._reserve_ahead(run, step) for run, _ in kept)
        return Pages.READY if kept else Pages.SHORT

    def build(self, epoch: int, step: Step) -> StepPlan:
        """The plan of a step whose pages are reserved."""
        group = mask_ranks(step.mask)
        return StepPlan(
            epoch=epoch,
            group=group,
            sequences=tuple(
                self._sequence_plan(run, count, step.mask, step.steps) for run, count in step.items
            ),
            placement=step.placement if len(group) > 1 else "sharded",
            strategy=step.strategy or self._strategy(step, group),
            phase=step.phase,
            burst=plan_burst(step) if step.steps > 1 else None,
        )

    def samples(self, run: Run, count: int) -> bool:
        """Whether a plan of `count` more tokens ends at a position whose logits are wanted."""
        sequence = run.sequence
        wanted = sequence.generated + run.unknown < sequence.max_new
        return run.sent + count >= run.target and wanted

    def _reserve_token(self, run: Run, step: Step) -> int | None:
        """Place a decoding run's next page; its rank, or None when no rank can give one now."""
        owners = mask_ranks(step.mask if step.spread else run.table.owner_mask)
        owner = next_owner(owners, self._cache.room())
        if owner is None or not self._cache.allocate(run.handle, [owner]):
            return None
        return owner

    def _reserve_ahead(self, run: Run, step: Step) -> int:
        """Place the pages of a burst's further tokens, as far as the run's ranks have room; the
        steps that they serve."""
        ranks = mask_ranks(step.mask if step.spread else run.table.owner_mask)
        while True:
            steps = len(run.table.pages) * self._page_size - run.sent
            room = self._cache.room()
            owner = max(ranks, key=lambda rank: room[rank])
            if steps >= step.steps or not room[owner]:
                return min(steps, step.steps)
            if not self._cache.allocate(run.handle, [owner]):
                return steps

    def _reserve_chunk(self, run: Run, end: int, mask: int) -> int:
        """Place the pages of positions up to `end`, or to where the group has room; that end."""
        held = len(run.table.pages)
        room = {rank: self._cache.available(rank) for rank in mask_ranks(mask)}
        room = dict(sorted(room.items(), key=lambda item: -item[1]))
        if run.sparse_now is not None:
            return self._reserve_superblocks(run, run.sparse_now, end, room)
        most = held + sum(room.values())
        if pages_for(end, self._page_size) > most:
            end = run.chunk_end(self._page_size, end - run.sent, most)
        missing = pages_for(end, self._page_size) - held
        if missing <= 0:
            return end
        quotas = divide(missing, room)
        if quotas is None or not self._cache.allocate(run.handle, self._place(quotas)):
            return min(end, held * self._page_size)
        return end

    def _reserve_superblocks(
        self, run: Run, settings: SparseSettings, end: int, room: Mapping[int, int]
    ) -> int:
        """Place superblocks up to `end`, each on one rank, as far as ranks have room; that end."""
        end = run.chunk_end(self._page_size, end - run.sent)
        held = len(run.table.pages) * self._page_size
        sizes = superblock_pages(settings, held, end, self._page_size)
        if sizes:
            # Neighbouring superblocks share pages, so where pages cross, they lie side by side.
            neighbours = settings.estimator == "stride" or not self._view.costs.in_place
            place = contiguous if neighbours else self._place
            ranks = divide_units(sizes, room, place)
            if not ranks or not self._cache.allocate(run.handle, ranks):
                end = held
            else:
                end = min(end, len(run.table.pages) * self._page_size)
        run.short = end <= run.sent
        return end

    def _sequence_plan(self, run: Run, count: int, mask: int, steps: int = 1) -> SequencePlan:
        sequence, start, end = run.sequence, run.sent, run.sent + count
        tokens = sequence.tokens[start:end]
        judged = self._prompt_logprobs_from(sequence, end)
        wants = sequence.request.logprobs
        return SequencePlan(
            slot=run.slot,
            start=start,
            count=count,
            tokens=tokens.tobytes(),
            pages=run.table.packed(pages_for(end + steps - 1, self._page_size)),
            board_epoch=run.flights[-1].epoch if len(tokens) < count else -1,
            sample=self._sample_plan(run) if self.samples(run, count) else None,
            prompt_logprobs_from=judged,
            next_token=sequence.tokens[end] if judged >= 0 and end < sequence.prompt_len else -1,
            attention=run.attention_now,
            prompt_top=wants.top if wants is not None and judged >= 0 else 0,
            prompt_ids=wants.token_ids if wants is not None and judged >= 0 else (),
            summaries_from=self._summaries_from(run, mask) if run.sparse_now else 0,
            hidden_state=sequence.request.hidden_state and end >= run.target,
        )

    def summarise(self, run: Run, end: int, mask: int) -> None:
        """Note that a plan up to `end` gives its whole group the summaries of all full pages."""
        whole = end - end % self._page_size
        run.summarised.update(dict.fromkeys(mask_ranks(mask), whole))

    @staticmethod
    def _summaries_from(run: Run, mask: int) -> int:
        """Below it, every rank of the group has been sent the summaries of the run's pages."""
        return min(run.summarised.get(rank, 0) for rank in mask_ranks(mask))

    @staticmethod
    def _prompt_logprobs_from(sequence: Sequence, end: int) -> int:
        wants = sequence.request.logprobs
        if wants is None or not sequence.prompt_logprobs_due:
            return -1
        first = max(1, wants.prompt_start)
        return first if first <= end else -1

    @staticmethod
    def _sample_plan(run: Run) -> SamplePlan:
        sequence = run.sequence
        sampling, wants = sequence.request.sampling, sequence.request.logprobs
        early = sequence.generated + run.unknown < sampling.min_new_tokens
        history = sequence.history.packed() if sequence.history is not None else (b"", b"")
        return SamplePlan(
            params=sampling,
            forbid_stop=tuple(sorted(sequence.stop_ids)) if early else (),
            history_ids=history[0],
            history_counts=history[1],
            logprobs=wants.top if wants is not None else None,
            logprob_ids=wants.token_ids if wants is not None else (),
            generated=sequence.packed_generated() if sampling.grammar else b"",
        )

    def _strategy(self, step: Step, group: tuple[int, ...]) -> Strategy:
        """What the operator forced, or what costs least; pages outside the group are read in
        place, and only pass-KV does that."""
        forced = self._view.parallel.strategy
        if len(group) == 1 or any(run.sparse_now for run, _ in step.items):
            return "pass_kv"
        if forced != "auto":
            return forced
        if any(run.table.owner_mask & ~step.mask for run, _ in step.items):
            return "pass_kv"
        owned = [sum(run.table.owned[rank] for run, _ in step.items) for rank in group]
        works = tuple((count, run.sent) for run, count in step.items)
        share = max(owned) / sum(owned)
        return self._view.costs.strategy(AttentionWork(len(group), works, share))
