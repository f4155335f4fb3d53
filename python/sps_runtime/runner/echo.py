"""A fake world of ranks that proves a scheduler right: KV that remembers what was written.

The "KV" of a position is (position, token) itself, and the next token is a hash of everything read
through the plan's page table. One page wrong, stale, reused too early or read before it was
written, and the output differs from `echo_generate`, which never saw a page. No torch.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sps_runtime.grammar.matchers import Matchers
from sps_runtime.grammar.protocol import Allowed, GrammarError
from sps_runtime.runner.bursts import burst_step, joined
from sps_runtime.runner.echo_answers import (
    Ints,
    Words,
    echo_ends,
    made_up_counters,
    made_up_hidden,
    made_up_logprobs,
    pick,
    prefix_states,
)
from sps_runtime.types.attention import SparseCounters
from sps_runtime.types.plan import (
    Burst,
    HiddenState,
    PromptLogprobs,
    SampledToken,
    SamplePlan,
    SequencePlan,
    StepCounters,
    StepPlan,
    StepResult,
)
from sps_runtime.types.tokens import pack_ids

EMPTY = -1
"""What a KV entry holds that was never written."""


class EchoFault(Exception):
    """A rank met what a right plan never shows it; becomes `StepResult.error`."""


@dataclass(frozen=True)
class EchoMemory:
    """What ranks share. Plain arrays, so they may lie in memory shared between processes.

    Attributes:
        kv: int64 ``[pages_per_rank, page_size]`` per global rank: position << 32 | token.
        board: int64 ``[slots]``: epoch << 32 | token.
        fences: int64 ``[global ranks]``: the last epoch whose KV a rank has written.
        tp_size: TP peers of each SP rank; global rank = sp_rank * tp_size + tp_rank.
    """

    kv: Sequence[Ints]
    board: Ints
    fences: Ints
    tp_size: int = 1

    @staticmethod
    def allocate(
        sp_size: int, pages_per_rank: int, page_size: int, slots: int, tp_size: int = 1
    ) -> EchoMemory:
        """Fresh memory in this process."""
        world = sp_size * tp_size
        return EchoMemory(
            kv=[np.full((pages_per_rank, page_size), EMPTY, np.int64) for _ in range(world)],
            board=np.full(slots, EMPTY, np.int64),
            fences=np.zeros(world, np.int64),
            tp_size=tp_size,
        )


class EchoRank:
    """One global rank. It executes its plans in order, in steps that never block.

    A plan is written, then - when the group's KV is there - read and answered. Between the two
    other ranks may be anywhere, so a slot reused too early is read with foreign contents.
    """

    def __init__(
        self, rank: int, memory: EchoMemory, vocab: int, matchers: Matchers | None = None
    ) -> None:
        self.rank = rank
        self._matchers = matchers
        self._memory = memory
        self._vocab = vocab
        self._sp_rank, self._tp_rank = divmod(rank, memory.tp_size)
        self._pages_per_rank, self._page_size = memory.kv[rank].shape
        self._plans: deque[StepPlan] = deque()
        self._last_epoch = 0
        self._written = False
        self._burst: list[StepResult] = []
        self._judged = True
        self._leads: bool | None = None

    @property
    def busy(self) -> bool:
        """Whether plans wait or run."""
        return bool(self._plans)

    def submit(self, plan: StepPlan) -> None:
        """Queue a plan, in the order of epochs."""
        self._plans.append(plan)

    def poll(self) -> StepResult | None:
        """Go on with the first plan as far as others allow; its result when it is done."""
        if not self._plans:
            return None
        plan = self._plans[0]
        try:
            result = self._step(plan) if plan.burst is None else self._go_on(plan, plan.burst)
        except EchoFault as fault:
            result = StepResult(plan.epoch, self.rank, error=str(fault))
        if result is not None:
            self._plans.popleft()
            self._written = False
        return result

    def _go_on(self, plan: StepPlan, burst: Burst) -> StepResult | None:
        """A burst's next step; its answer after the last."""
        done = len(self._burst)
        self._leads = self._sp_rank == plan.group[0]
        if not self._judged:
            tokens = self._sampled_in(plan, plan.epoch + done - 1)
            if tokens is None:
                return None
            self._judged = True
            if echo_ends(burst, plan.epoch + done - 1, tokens):
                return self._end_burst(plan)
        result = self._step(burst_step(plan, done, self._page_size))
        if result is None:
            return None
        self._burst.append(result)
        if len(self._burst) == burst.steps:
            return self._end_burst(plan)
        self._written = self._judged = False
        return None

    def _end_burst(self, plan: StepPlan) -> StepResult:
        results, self._burst, self._leads = self._burst, [], None
        return joined(plan, results)

    def _sampled_in(self, plan: StepPlan, epoch: int) -> list[int] | None:
        """What all sequences of a plan sampled in a step, once that is on the board."""
        words = [int(self._memory.board[sequence.slot]) for sequence in plan.sequences]
        if any(word >> 32 != epoch for word in words):
            return None
        return [word & 0xFFFFFFFF for word in words]

    def _step(self, plan: StepPlan) -> StepResult | None:
        if not self._written:
            if not self._tokens_ready(plan):
                return None
            self._check_plan(plan)
            for sequence in plan.sequences:
                self._write(sequence)
            self._memory.fences[self.rank] = plan.epoch
            self._written = True
            return None
        reads_all = any(self._reads_all(sequence) for sequence in plan.sequences)
        if reads_all and not self._group_has_written(plan):
            return None
        sampled, judged, hidden = [], [], []
        for sequence in plan.sequences:
            self._verify_own(sequence)
            if self._reads_all(sequence):
                states = prefix_states(self._read(sequence))
                judged.extend(self._judge(sequence, states))
                if sequence.sample is not None and self._speaks(sequence):
                    sampled.append(self._sample(plan.epoch, sequence, int(states[-1])))
                if sequence.hidden_state and self._owns_last(sequence):
                    hidden.append(HiddenState(sequence.slot, made_up_hidden(int(states[-1]))))
        if self._tp_rank:
            sampled, hidden = [], []
        tokens = sum(len(self._own_positions(sequence)) for sequence in plan.sequences)
        counters = StepCounters(token_layers=tokens)
        sparse = [self._count(s) for s in plan.sequences if s.attention.sparse is not None]
        counted = tuple(part for part in sparse if part.causal_pairs)
        return StepResult(
            plan.epoch,
            self.rank,
            tuple(sampled),
            tuple(judged),
            counters,
            sparse=counted,
            hidden_states=tuple(hidden),
        )

    def _count(self, sequence: SequencePlan) -> SparseCounters:
        """What a rank would report that reads a quarter of everything."""
        tokens = len(self._own_positions(sequence))
        others = int(np.sum(self._pages(sequence) // self._pages_per_rank != self._sp_rank))
        return made_up_counters(sequence, tokens, others, self._page_size)

    def _check_plan(self, plan: StepPlan) -> None:
        if plan.epoch <= self._last_epoch:
            raise EchoFault(f"epoch {plan.epoch} came after {self._last_epoch}")
        self._last_epoch = plan.epoch
        if self._sp_rank not in plan.group or list(plan.group) != sorted(set(plan.group)):
            raise EchoFault(f"rank {self._sp_rank} is not in group {plan.group}")
        for sequence in plan.sequences:
            pages = self._pages(sequence)
            first = sequence.start // self._page_size
            owners = set((pages[first:] // self._pages_per_rank).tolist())
            if not owners <= set(plan.group):
                raise EchoFault(f"epoch {plan.epoch} writes outside its group")

    def _tokens_ready(self, plan: StepPlan) -> bool:
        """Whether the board has what this plan computes here."""
        ready = True
        for sequence in plan.sequences:
            if sequence.board_epoch < 0:
                continue
            epoch = int(self._memory.board[sequence.slot]) >> 32
            here = plan.placement == "replicated" or self._owns_last(sequence)
            if here and epoch > sequence.board_epoch:
                raise EchoFault(f"slot {sequence.slot} has epoch {epoch}'s token already")
            ready = ready and (not here or epoch == sequence.board_epoch)
        return ready

    def _group_has_written(self, plan: StepPlan) -> bool:
        """TP peers count too: a layer's sums keep them together as its attention keeps ranks."""
        tp = self._memory.tp_size
        peers = [rank * tp + peer for rank in plan.group for peer in range(tp)]
        return bool(min(self._memory.fences[peers].tolist()) >= plan.epoch)

    def _pages(self, sequence: SequencePlan) -> Ints:
        pages = np.frombuffer(sequence.pages, np.int32).astype(np.int64)
        if len(pages) != -(-(sequence.start + sequence.count) // self._page_size):
            raise EchoFault("the page table does not cover the step")
        return pages

    def _tokens(self, sequence: SequencePlan) -> Ints:
        tokens = np.frombuffer(sequence.tokens, np.int32).astype(np.int64)
        if sequence.board_epoch >= 0:
            token = int(self._memory.board[sequence.slot]) & 0xFFFFFFFF
            tokens = np.append(tokens, token)
        if len(tokens) != sequence.count:
            raise EchoFault(f"{len(tokens)} tokens for {sequence.count} positions")
        return tokens

    def _owns(self, sequence: SequencePlan, position: int) -> bool:
        page = int(self._pages(sequence)[position // self._page_size])
        return bool(page // self._pages_per_rank == self._sp_rank)

    def _owns_last(self, sequence: SequencePlan) -> bool:
        return self._owns(sequence, sequence.start + sequence.count - 1)

    def _own_positions(self, sequence: SequencePlan) -> Ints:
        """Positions of the step whose pages lie here."""
        positions = np.arange(sequence.start, sequence.start + sequence.count)
        pages = self._pages(sequence)[positions // self._page_size]
        own: Ints = positions[pages // self._pages_per_rank == self._sp_rank]
        return own

    def _reads_all(self, sequence: SequencePlan) -> bool:
        """Whether this rank needs every position: it samples, reports a hidden state, or judges
        prompt tokens."""
        if sequence.prompt_logprobs_from >= 0:
            return len(self._own_positions(sequence)) > 0
        answers = sequence.sample is not None or sequence.hidden_state
        return answers and self._speaks(sequence)

    def _speaks(self, sequence: SequencePlan) -> bool:
        """Whether this rank samples; in a burst its leader does, elsewhere the token's owner."""
        return self._owns_last(sequence) if self._leads is None else self._leads

    def _write(self, sequence: SequencePlan) -> None:
        positions = self._own_positions(sequence)
        if not len(positions):
            return
        tokens = self._tokens(sequence)[positions - sequence.start]
        slots = self._pages(sequence)[positions // self._page_size] % self._pages_per_rank
        kv = self._memory.kv[self.rank]
        kv[slots, positions % self._page_size] = positions << 32 | tokens

    def _verify_own(self, sequence: SequencePlan) -> None:
        """The pages that lie here hold the positions that the plan says."""
        pages = self._pages(sequence)
        own = np.flatnonzero(pages // self._pages_per_rank == self._sp_rank)
        rows = self._memory.kv[self.rank][pages[own] % self._pages_per_rank]
        wanted = own[:, None] * self._page_size + np.arange(self._page_size)[None, :]
        inside = wanted < sequence.start + sequence.count
        if not np.array_equal((rows >> 32)[inside], wanted[inside]):
            raise EchoFault(f"rank {self.rank} holds other positions than slot {sequence.slot}'s")

    def _read(self, sequence: SequencePlan) -> Ints:
        pages = self._pages(sequence)
        rows = np.empty((len(pages), self._page_size), np.int64)
        owners, slots = np.divmod(pages, self._pages_per_rank)
        for owner in set(owners.tolist()):
            where = owners == owner
            kv = self._memory.kv[owner * self._memory.tp_size + self._tp_rank]
            rows[where] = kv[slots[where]]
        entries = rows.reshape(-1)[: sequence.start + sequence.count]
        if not np.array_equal(entries >> 32, np.arange(len(entries))):
            raise EchoFault(f"slot {sequence.slot} reads positions that are not its own")
        return entries

    def _sample(self, epoch: int, sequence: SequencePlan, state: int) -> SampledToken:
        plan = sequence.sample
        assert plan is not None
        history = None
        if plan.params.penalized:
            ids = np.frombuffer(plan.history_ids, np.int32).tolist()
            counts = np.frombuffer(plan.history_counts, np.int32).tolist()
            history = dict(zip(ids, counts, strict=True))
            if sequence.board_epoch >= 0:
                read = int(self._tokens(sequence)[-1])
                history[read] = history.get(read, 0) + 1
        allowed, failure = self._allowed(sequence, plan)
        token = pick(state, self._vocab, plan.forbid_stop, history, allowed)
        if self._tp_rank == 0:
            self._memory.board[sequence.slot] = epoch << 32 | token
        logprobs = None
        if plan.logprobs is not None:
            logprobs = made_up_logprobs(state, token, plan.logprobs, plan.logprob_ids, self._vocab)
        return SampledToken(sequence.slot, token, logprobs, failure)

    def _allowed(
        self, sequence: SequencePlan, sample: SamplePlan
    ) -> tuple[Allowed | None, str | None]:
        """What the grammar allows, or why nothing."""
        grammar = sample.params.grammar
        if not grammar or self._matchers is None:
            return None, "this engine has no grammars" if grammar else None
        on_board = self._tokens(sequence)[-1:] if sequence.board_epoch >= 0 else ()
        generated = sample.generated + pack_ids(map(int, on_board))
        try:
            return self._matchers.allowed(sequence.slot, grammar, generated), None
        except GrammarError as error:
            return None, str(error)

    def _judge(self, sequence: SequencePlan, states: Words) -> list[PromptLogprobs]:
        """Prompt logprobs by the logits of this rank's positions, one piece per run of them."""
        if sequence.prompt_logprobs_from < 0 or self._tp_rank:
            return []
        tokens = [*self._tokens(sequence).tolist()[1:], sequence.next_token]
        pieces: list[PromptLogprobs] = []
        for position in self._own_positions(sequence).tolist():
            token = tokens[position - sequence.start]
            if position + 1 < sequence.prompt_logprobs_from or token < 0:
                continue
            value = made_up_logprobs(
                int(states[position]), token, sequence.prompt_top, sequence.prompt_ids, self._vocab
            )
            if pieces and pieces[-1].start + len(pieces[-1].values) == position + 1:
                last = pieces.pop()
                pieces.append(PromptLogprobs(last.slot, last.start, (*last.values, value)))
            else:
                pieces.append(PromptLogprobs(sequence.slot, position + 1, (value,)))
        return pieces


class EchoWorld:
    """All ranks in one process, in random order: `poll` lets one of them take one small step."""

    def __init__(
        self,
        memory: EchoMemory,
        vocab: int,
        chance: random.Random,
        matchers: Callable[[], Matchers] | None = None,
    ) -> None:
        self.ranks = [
            EchoRank(rank, memory, vocab, matchers() if matchers else None)
            for rank in range(len(memory.kv))
        ]
        self._tp_size = memory.tp_size
        self._chance = chance

    @property
    def busy(self) -> bool:
        return any(rank.busy for rank in self.ranks)

    def submit(self, plan: StepPlan) -> None:
        """Hand a plan to every rank of its group."""
        for sp_rank in plan.group:
            for peer in range(self._tp_size):
                self.ranks[sp_rank * self._tp_size + peer].submit(plan)

    def poll(self) -> StepResult | None:
        """Poll one busy rank, chosen at random; its result if it has one now."""
        busy = [rank for rank in self.ranks if rank.busy]
        return self._chance.choice(busy).poll() if busy else None
