"""A small planner for tests: it deals pages to ranks in many ways and keeps its own token record.

No policy and no proof of anything: only plans that are legal (`types.plan`), of as many shapes as
possible. The real planner is `scheduler`'s.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
from sps_runtime.types.plan import (
    Placement,
    SamplePlan,
    SequencePlan,
    StepPlan,
    StepResult,
    Strategy,
    TokenLogprobs,
)
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

GREEDY = SamplingParams(temperature=0.0)
Dealing = Literal["zigzag", "contiguous", "random"]


@dataclass
class Request:
    """One prompt and what becomes of it.

    Attributes:
        arrival: turn in which it may be planned first.
        cancel_after: None, or how many steps it takes part in before it is dropped.
        forced: continue with these tokens whatever is sampled (teacher forcing).
        chunk: as in `Shape`, for this request alone.
        prefix_of: another request, whose whole pages of the common prefix are shared once they are
            acknowledged; not planned before.
        attention: under csa, steps of the prompt end with superblocks, each on one rank.
        judge_from: first prompt position whose logprob is wanted, -1 for none.
    """

    prompt: list[int]
    max_new: int = 64
    arrival: int = 0
    cancel_after: int | None = None
    forced: list[int] | None = None
    chunk: int | None = None
    prefix_of: Request | None = None
    params: SamplingParams = GREEDY
    judge_from: int = -1
    logprobs: int | None = None
    attention: AttentionSpec = EXACT
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    shared: int = 0
    computed: int = 0
    committed: int = 0
    steps: int = 0
    samples_planned: int = 0
    last_sample: int = -1
    sampled: list[int] = field(default_factory=list)
    logprob_entries: list[TokenLogprobs | None] = field(default_factory=list)
    done: bool = False

    @property
    def length(self) -> int:
        """Tokens that exist, those still being sampled included."""
        return len(self.prompt) + self.samples_planned

    @property
    def known(self) -> list[int]:
        """Tokens whose ids are known here."""
        return self.prompt + (self.sampled if self.forced is None else self.forced)


@dataclass(frozen=True)
class Shape:
    """What a cell of the matrix fixes.

    Attributes:
        chunk: new tokens of one sequence in one step; 0 for whole prompts.
        elastic: every step runs on a random legal sub-group.
        decode: how tokens after the prompt run: in the sharded step, replicated, or by turns.
    """

    sp: int
    page_size: int
    pages_per_rank: int
    chunk: int = 0
    dealing: Dealing = "zigzag"
    strategy: Strategy = "pass_kv"
    decode: Literal["sharded", "replicated", "turns"] = "turns"
    overlap: bool = True
    elastic: bool = False
    seed: int = 0


class Planner:
    """Plans requests to their end; `results` come back through `acknowledge`."""

    def __init__(self, shape: Shape, epoch: int = 0) -> None:
        self.shape = shape
        self.epoch = epoch
        self.turn = 0
        self.rng = random.Random(shape.seed)
        self.free = {
            rank: list(range(rank * shape.pages_per_rank, (rank + 1) * shape.pages_per_rank))
            for rank in range(shape.sp)
        }
        for pages in self.free.values():
            self.rng.shuffle(pages)
        self.requests: list[Request] = []
        self.planned: dict[int, list[tuple[Request, int]]] = {}
        self.freeing: dict[int, list[int]] = defaultdict(list)
        self.acknowledged = epoch
        self.next_slot = 0

    def add(self, *requests: Request) -> None:
        for request in requests:
            request.slot, self.next_slot = self.next_slot, self.next_slot + 1
        self.requests += requests

    def plans(self) -> list[StepPlan]:
        """The plans of one turn, one or two, in the order of their epochs."""
        turn, self.turn = self.turn, self.turn + 1
        ready = [
            r for r in self.requests if not r.done and r.arrival <= turn and self._has_prefix(r)
        ]
        for request in ready:
            if request.cancel_after is not None and request.steps >= request.cancel_after:
                self.end(request)
        ready = [r for r in ready if not r.done and r.samples_planned < r.max_new]
        decoding = [r for r in ready if r.computed >= len(r.prompt)]
        apart = self.shape.decode == "replicated" or (self.shape.decode == "turns" and turn % 2)
        if apart and self.shape.sp > 1:
            others = [r for r in ready if r not in decoding]
            batches: list[tuple[list[Request], Placement]] = [
                (others, "sharded"),
                (decoding, "replicated"),
            ]
        else:
            batches = [(ready, "sharded")]
        return [self._plan(batch, placement) for batch, placement in batches if batch]

    def _has_prefix(self, request: Request) -> bool:
        """Whether a request may start; takes over the pages that it shares."""
        source, page_size = request.prefix_of, self.shape.page_size
        if source is None or request.pages:
            return True
        pairs = zip(request.prompt[:-1], source.prompt, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        common = min(len(request.prompt) - 1, len(source.prompt)) if same is None else same
        sparse = request.attention.sparse
        request.shared = (sparse.align(common) if sparse else common) // page_size
        if source.committed < request.shared * page_size:
            return False
        request.pages = source.pages[: request.shared]
        request.computed = request.shared * page_size
        return True

    def _plan(self, batch: list[Request], placement: Placement) -> StepPlan:
        self.epoch += 1
        group = self._group(batch)
        sequences = tuple(self._sequence(request, group) for request in batch)
        self.planned[self.epoch] = [(request, request.computed) for request in batch]
        return StepPlan(self.epoch, group, sequences, placement, self.shape.strategy)

    def _group(self, batch: list[Request]) -> tuple[int, ...]:
        everyone = tuple(range(self.shape.sp))
        if not self.shape.elastic:
            return everyone
        needed = {
            request.pages[-1] // self.shape.pages_per_rank
            for request in batch
            if request.computed % self.shape.page_size
        }
        more = self.rng.sample(everyone, self.rng.randint(1, self.shape.sp))
        return tuple(sorted(needed | set(more)))

    def _sequence(self, request: Request, group: tuple[int, ...]) -> SequencePlan:
        start, known = request.computed, request.known
        chunk = self.shape.chunk if request.chunk is None else request.chunk
        count = min(chunk or request.length, request.length - start)
        end = start + count
        sparse = request.attention.sparse
        if sparse and start < end < len(request.prompt):
            end = max(sparse.align(end), start + sparse.superblock_at(start))
            end = min(end, len(request.prompt))
            count = end - start
        self._deal(request, end, group)
        whole = end == request.length
        prefill = start < len(request.prompt)
        request.computed, request.steps = end, request.steps + 1
        from_board = request.last_sample if end > len(known) else -1
        if whole:
            request.samples_planned, request.last_sample = request.samples_planned + 1, self.epoch
        return SequencePlan(
            slot=request.slot,
            start=start,
            count=count,
            tokens=pack_ids(known[start:end]),
            pages=pack_ids(request.pages),
            board_epoch=from_board,
            sample=SamplePlan(request.params, logprobs=request.logprobs) if whole else None,
            prompt_logprobs_from=request.judge_from if prefill else -1,
            next_token=request.prompt[end] if end < len(request.prompt) else -1,
            prompt_top=2,
            attention=request.attention,
        )

    def _deal(self, request: Request, end: int, group: tuple[int, ...]) -> None:
        if request.attention.sparse and request.computed < len(request.prompt):
            self._deal_superblocks(request, request.attention.sparse, end, group)
            return
        wanted = -(-end // self.shape.page_size) - len(request.pages)
        size = len(group)
        for index in range(wanted):
            if self.shape.dealing == "random" or wanted == 1:
                rank = self.rng.choice(group)
            elif self.shape.dealing == "contiguous":
                rank = group[index * size // wanted]
            else:
                block = index * 2 * size // wanted
                rank = group[min(block, 2 * size - 1 - block)]
            request.pages.append(self.free[rank].pop())

    def _deal_superblocks(
        self, request: Request, sparse: SparseSettings, end: int, group: tuple[int, ...]
    ) -> None:
        """All new pages of a superblock to one rank."""
        owners: dict[int, int] = {}
        for position in range(len(request.pages) * self.shape.page_size, end, self.shape.page_size):
            rank = owners.setdefault(sparse.align(position), self.rng.choice(group))
            request.pages.append(self.free[rank].pop())

    def acknowledge(self, epoch: int, results: list[StepResult]) -> None:
        """All ranks of a plan have answered; called in the order of epochs."""
        by_slot = {token.slot: token for result in results for token in result.sampled}
        assert len(by_slot) == sum(len(result.sampled) for result in results), "sampled twice"
        self.acknowledged = epoch
        for request, computed in self.planned.pop(epoch):
            request.committed = computed
            token = by_slot.pop(request.slot, None)
            if token is None or request.done:
                continue
            request.sampled.append(token.token)
            request.logprob_entries.append(token.logprobs)
            if len(request.sampled) == request.max_new:
                self.end(request)
        assert not by_slot, "sampled without being asked"
        self._free(lambda end: end <= epoch)

    def end(self, request: Request) -> None:
        """Drop a request; its own pages are free once what is in flight is acknowledged. Whole
        pages of finished prompts stay, so that a later request can share them."""
        request.done = True
        keep = request.shared
        if request.cancel_after is None:
            keep = max(keep, len(request.prompt) // self.shape.page_size)
        loose, request.pages = request.pages[keep:], request.pages[:keep]
        self.freeing[self.epoch] += loose
        self._free(lambda end: end <= self.acknowledged)

    def _free(self, may: Callable[[int], bool]) -> None:
        for epoch in [epoch for epoch in self.freeing if may(epoch)]:
            for page in self.freeing.pop(epoch):
                self.free[page // self.shape.pages_per_rank].append(page)
