"""The scheduler's pure core: requests, aborts and results in; plans and tokens out."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.costmodel.sparse import pays
from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.scheduler.admission import Admission
from sps_runtime.scheduler.budget import most_pages
from sps_runtime.scheduler.figures import Figures
from sps_runtime.scheduler.pipeline import Pipeline, SentStep
from sps_runtime.scheduler.planner import Pages, Planner
from sps_runtime.scheduler.policies import make_policy
from sps_runtime.scheduler.policies.view import Step, View
from sps_runtime.scheduler.queue import WaitingQueue
from sps_runtime.scheduler.results import (
    collect,
    final,
    joined,
    prefill_only,
    shorten,
    take_counters,
)
from sps_runtime.scheduler.runs import Runs
from sps_runtime.scheduler.sequence import Flight, Run, Sequence, new_sequence
from sps_runtime.scheduler.sparsity import SparseRules
from sps_runtime.types.attention import SparseSettings
from sps_runtime.types.errors import EngineDead
from sps_runtime.types.messages import EngineState, PrefillProgress, StopReason, TokensOut
from sps_runtime.types.plan import StepPlan, StepResult
from sps_runtime.types.request import GenerateRequest


@dataclass(frozen=True)
class ModelLimits:
    """What the scheduler must know of the model.

    Attributes:
        context_length: prompt and generated tokens at most.
        eos_ids: ids that end a sequence unless it ignores them.
        vocab: ids are below it.
    """

    context_length: int
    eos_ids: frozenset[int]
    vocab: int


def sparse_rules(view: View, refusal: str) -> SparseRules:
    """What decides whether a request that asks for csa is computed so.

    Args:
        refusal: why ranks cannot; empty where they can.
    """
    config, cache, ranks = view.config, view.cache_config, view.parallel.sp_size
    if view.parallel.arch == "tp":
        refusal = "attention is sharded over heads (sp-arch tp)"
    elif config.policy == "sarathi":
        refusal = "policy sarathi computes every token on all ranks"
    cost = view.costs.prefill_cost(ranks)

    def worth(settings: SparseSettings, tokens: int) -> bool:
        return pays(cost, settings, tokens, ranks, view.parallel.nnodes)

    return SparseRules(
        refusal, cache.page_size, ranks, cache.pages_per_rank, worth, config.csa_min_tokens
    )


def board_slots(config: SchedulerConfig) -> int:
    """Slots that the token board must have. A slot stays taken until a run's plans are answered."""
    return config.max_running_requests


class Scheduler:
    """Continuous batching over SP ranks, without clock, socket, thread or tensor.

    The caller sends what `next_plans` returns to the ranks named in each plan's group, hands every
    `StepResult` to `on_result`, and passes on the tokens. Each accepted request gets exactly one
    message with `finish` set. After any call, `next_plans` may have more to send.

    Args:
        no_sparse: why ranks cannot run sparse attention; empty where they can.
        bursts: ranks run bursts.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        cache_config: CacheConfig,
        parallel: ParallelConfig,
        limits: ModelLimits,
        costs: StepCosts,
        no_sparse: str = "",
        bursts: bool = False,
    ) -> None:
        self._limits = limits
        self._cache = PrefixCache(
            cache_config.page_size,
            parallel.sp_size,
            cache_config.pages_per_rank,
            enabled=cache_config.enable_prefix_cache,
            eviction=cache_config.eviction,
        )
        self._runs = Runs(self._cache, board_slots(config))
        self._view = View(config, cache_config, parallel, costs, self._cache, self._runs.live)
        if bursts and config.overlap and parallel.nnodes == 1:
            self._view.burst = config.max_burst_steps
        self._queue = WaitingQueue(config.schedule_policy, config.max_queued_requests)
        self._figures = Figures()
        self._admission = Admission(self._view, self._queue, self._runs, self._figures)
        self._pipeline = Pipeline(self._cache, parallel.tp_size, config.max_steps_in_flight)
        self._planner = Planner(self._view)
        self._policy = make_policy(config.policy)
        self._sparse_rules = sparse_rules(self._view, no_sparse)
        self._sequences: dict[str, Sequence] = {}
        self._run_of: dict[str, Run] = {}
        self._arrivals = 0
        self._progress: dict[str, PrefillProgress] = {}
        self._flush_due = False
        self._hurry = False

    def add(self, request: GenerateRequest) -> list[TokensOut]:
        """Accept a request. Returns its final message when it can never be served, or not now.

        A request id that is live already is ignored: ids are unique by contract.
        """
        if request.rid in self._sequences:
            return []
        sequence = new_sequence(
            request,
            self._arrivals,
            kv_dtype=self._view.cache_config.kv_dtype,
            context_length=self._limits.context_length,
            eos_ids=self._limits.eos_ids,
            sparsity=self._sparse_rules.decide(request.attention, len(request.tokens) // 4),
        )
        refusal = self._refusal(sequence)
        if refusal is not None:
            return [final(sequence, refusal)]
        self._arrivals += 1
        self._hurry = True
        self._sequences[sequence.rid] = sequence
        self._queue.push(sequence)
        return []

    def abort(self, rid: str, message: str = "aborted") -> list[TokensOut]:
        """End a request now, wherever it is. Unknown and finished ids give nothing."""
        sequence = self._sequences.get(rid)
        if sequence is None:
            return []
        self._figures.aborts_total += 1
        self._hurry = True
        return [self._finish(sequence, StopReason("abort", message=message))]

    def flush(self) -> bool:
        """Drop every cached page; refused while requests run or wait.

        Pages that surplus plans of ended requests still read go when those are answered.
        """
        if self._sequences:
            return False
        self._cache.flush()
        self._flush_due = bool(self._runs.draining)
        return True

    def next_plans(self) -> list[StepPlan]:
        """Every plan that may be sent now, to be sent in this order."""
        plans: list[StepPlan] = []
        stuck = False
        while self._pipeline.any_room():
            if not stuck:
                self._admit()
            step = self._next_step()
            stuck = step is None
            if step is not None:
                plans.append(self._send(step))
            elif self._pipeline.idle and len(self._runs) > 1:
                self._retract(self._runs.newest())
            elif self._pipeline.idle and any(run.short for run in self._runs.live.values()):
                alone = self._runs.newest()
                self._retract(alone)
                alone.sequence.run_exact("no rank had room for a superblock")
                stuck = False
            else:
                break
        return plans

    def on_result(self, result: StepResult) -> list[TokensOut]:
        """Take one rank's answer to one plan.

        Raises:
            EngineDead: the step failed, or the rank owed no such answer: ranks may have diverged.
        """
        if result.error is not None:
            raise EngineDead(f"rank {result.rank} failed in epoch {result.epoch}: {result.error}")
        if not self._pipeline.expects(result.epoch, result.rank):
            raise EngineDead(f"rank {result.rank} owes no answer to epoch {result.epoch}")
        flights = self._answered(result).flights
        for sampled in result.sampled:
            flights[sampled.slot][1].tokens.append(sampled)
        for piece in result.prompt_logprobs:
            flights[piece.slot][0].prompt_pieces.append(piece)
        for hidden in result.hidden_states:
            flights[hidden.slot][0].hidden_state = hidden.values
        self._figures.add_counters(result.counters)
        for counted in result.sparse:
            take_counters(flights[counted.slot][0], flights[counted.slot][1], counted)
        complete = self._pipeline.acknowledge(result.epoch, result.rank)
        self._figures.steps_total += result.steps * complete
        runs = [run for run, _ in flights.values()]
        if not complete:
            slots = dict.fromkeys(sampled.slot for sampled in result.sampled)
            runs = [flights[slot][0] for slot in slots]
        news = [item for run in runs for item in self._advance(run)]
        if self._flush_due and not self._runs.draining:
            self._cache.flush()
            self._flush_due = False
        return news

    def hurry(self) -> list[int]:
        """Global ranks that must be told to end their burst (`EndBurst`): since the last call
        something came that a plan may follow from."""
        hurried, self._hurry = self._hurry, False
        return self._pipeline.hurry() if hurried else []

    def take_progress(self) -> list[PrefillProgress]:
        """How far prompts have come that take several steps, since the last call."""
        progress, self._progress = self._progress, {}
        return list(progress.values())

    def state(self) -> EngineState:
        """A snapshot; `step_age_s` is left to whoever has a clock."""
        return self._figures.state(self._cache, len(self._runs), len(self._queue))

    @property
    def no_sparse(self) -> str:
        """Why requests for csa run exact here, all of them; empty where they do not."""
        return self._sparse_rules.refusal

    @property
    def idle(self) -> bool:
        """Whether nothing runs, waits or is under way."""
        return not self._sequences and self._pipeline.idle

    def check(self) -> None:
        """Raise AssertionError unless every invariant holds (for tests; O(pool))."""
        self._cache.check()
        self._runs.check()
        self._pipeline.check()
        waiting = {sequence.rid for sequence in self._queue}
        running = {run.sequence.rid for run in self._runs.live.values()}
        assert len(waiting) == len(self._queue) and not waiting & running, "a request is twice"
        assert waiting | running == self._sequences.keys(), "a request is nowhere"
        assert {rid: run for rid, run in self._run_of.items() if run.live} == self._run_of
        assert self._run_of.keys() == running, "a run is lost"
        if self._pipeline.idle:
            assert not self._runs.draining, "a run drains for ever"
            assert self._cache.quarantined() == 0, "a page is quarantined for ever"

    def _refusal(self, sequence: Sequence) -> StopReason | None:
        context, size = self._limits.context_length, self._view.cache_config.page_size
        length, pages = sequence.prompt_len, most_pages(sequence, size)
        if length == 0:
            return StopReason("abort", message="the prompt is empty", status=400)
        if length > context or (length == context and sequence.request.sampling.max_new_tokens):
            message = f"the prompt has {length} tokens; the context has room for {context}"
            return StopReason("abort", message=message, status=400)
        if min(sequence.tokens) < 0 or max(sequence.tokens) >= self._limits.vocab:
            message = f"token ids must lie in [0, {self._limits.vocab})"
            return StopReason("abort", message=message, status=400)
        total = self._cache.allocator.total
        if pages > total:
            message = (
                f"prompt and max_new_tokens need {pages * size} tokens of KV cache; "
                f"the server has {total * size}"
            )
            return StopReason("abort", message=message, status=400)
        if self._queue.full:
            return StopReason("abort", message="the waiting queue is full", status=503)
        return None

    def _admit(self) -> None:
        self._view.waiting = len(self._queue)
        for run in self._admission.admit():
            sequence = run.sequence
            self._run_of[sequence.rid] = run
            if sequence.first_run:
                sequence.first_run = False
                sequence.cached = run.sent
                self._figures.prompt_tokens_total += sequence.prompt_len
                self._figures.cached_tokens_total += run.sent
        self._view.waiting = len(self._queue)
        self._view.awaiting = self._queue.awaiting

    def _next_step(self) -> Step | None:
        """The step whose turn it is, with its pages; None when nothing can go now."""
        while True:
            for step in self._pipeline.turns(self._policy.steps(self._view)):
                outcome = self._planner.reserve(step)
                if outcome is Pages.READY:
                    return step
                if outcome is Pages.CHANGED or self._made_room(step):
                    break
            else:
                return None

    def _made_room(self, step: Step) -> bool:
        """Retract the newest run for decodes that are out of pages, unless pages will come free."""
        coming = self._cache.quarantined() or self._runs.draining
        if step.phase == "prefill" or coming or len(self._runs) < 2:
            return False
        newest = self._runs.newest()
        if any(flight.samples > 1 for flight in newest.flights):
            self._hurry = True  # Of a burst's tokens the client has been told already.
            return False
        self._retract(newest)
        return True

    def _retract(self, run: Run) -> None:
        """Take a run's pages away; its sequence starts again from all its tokens."""
        sequence = run.sequence
        sequence.retractions += 1
        self._figures.retractions_total += 1
        del self._run_of[sequence.rid]
        self._runs.end(run)
        self._queue.push(sequence)

    def _send(self, step: Step) -> StepPlan:
        epoch = self._pipeline.send(step)
        plan = self._planner.build(epoch, step)
        flights = self._pipeline.sent[epoch].flights
        for run, count in step.items:
            samples = step.steps * self._planner.samples(run, count)
            count += step.steps - 1
            flight = Flight(epoch, run.sent + count, samples)
            flight.sparse, flight.burst = run.sparse_now is not None, step.steps > 1
            run.flights.append(flight)
            if run.sparse_now is not None:
                self._planner.summarise(run, run.sent + count, step.mask)
            run.sent += count
            run.unknown += flight.samples
            run.mask = step.mask
            flights[run.slot] = (run, flight)
        return plan

    def _answered(self, result: StepResult) -> SentStep:
        """The plan that a rank answers; of a burst, cut to the steps that were run."""
        sent = self._pipeline.sent[result.epoch]
        if not (1 <= result.steps <= sent.steps) or (sent.answered and result.steps != sent.steps):
            raise EngineDead(f"rank {result.rank} ran {result.steps} steps of epoch {result.epoch}")
        for run, flight in sent.flights.values() if result.steps < sent.steps else ():
            shorten(run, flight, result.steps)
        sent.steps, sent.answered = result.steps, True
        return sent

    def _advance(self, run: Run) -> list[TokensOut]:
        """Take a run's new tokens, commit its new pages, end it where it ends."""
        acked = run.acked
        if not run.live or run.sequence.prompt_logprobs_due or not run.sequence.max_new:
            self._runs.settle(run)
        if not run.live:
            return []
        news = joined(collect(run))
        self._figures.generated_tokens_total += sum(len(item.tokens) for item in news)
        if not run.sequence.max_new and (message := prefill_only(run)):
            news = [message]
        if news and news[-1].finish is not None:
            self._end(run)
            return news
        self._runs.settle(run)
        if acked < run.acked < run.target:
            rid = run.sequence.rid
            self._progress[rid] = PrefillProgress(rid, run.acked, run.target)
        return news

    def _finish(self, sequence: Sequence, reason: StopReason) -> TokensOut:
        """End a request that waits or runs, with a message of no tokens."""
        run = self._run_of.get(sequence.rid)
        if run is None:
            self._queue.remove(sequence)
            del self._sequences[sequence.rid]
        else:
            self._end(run)
        return final(sequence, reason)

    def _end(self, run: Run) -> None:
        rid = run.sequence.rid
        del self._sequences[rid], self._run_of[rid]
        self._progress.pop(rid, None)
        self._runs.end(run)
