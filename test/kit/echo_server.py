"""A scheduler over echo ranks in one process, with a referee between them. No tests in here."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.costmodel.strategy import ModelShape
from sps_runtime.grammar.matchers import Matchers
from sps_runtime.runner.echo import EchoMemory, EchoWorld
from sps_runtime.runner.echo_answers import (
    ECHO_DENSITY,
    echo_generate,
    echo_hidden,
    echo_prompt_logprobs,
)
from sps_runtime.scheduler.policies.sps import Sps
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.scheduler import ModelLimits, Scheduler, board_slots
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.attention import EXACT, AttentionSpec
from sps_runtime.types.messages import DecodeCost, LinkCost, TokensOut
from sps_runtime.types.plan import StepPlan, StepResult
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import LogprobParams, SamplingParams
from sps_runtime.types.tokens import pack_ids, unpack_ids
from test.kit.sparse_referee import SparseReferee
from test.kit.toy_grammar import ToyGrammars

SLICES = DecodeCost(rows=(1,), sharded_s=(2.0,), replicated_s=(1.0,), ranks=2)
"""Slices of the weights are always cheaper to decode with."""
SHAPE = ModelShape(layers=2, hidden=64, q_heads=4, kv_heads=2, head_dim=16, linear_params=100_000)
EOS = 3


class AnyDegree(Sps):
    """Chooses degrees at random, anew for every chunk."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def _degree(self, view: View, run: Run) -> int:
        return self._chance.randint(1, view.parallel.sp_size)


class Referee:
    """Checks every plan against the contract of `types.plan`, knowing only plans and answers."""

    def __init__(self, tp_size: int, depth: int, in_place: bool, one_host: bool) -> None:
        self._tp_size, self._depth = tp_size, depth
        self._in_place, self._one_host = in_place and one_host, one_host
        self._pending: dict[int, tuple[tuple[int, ...], set[int]]] = {}
        self._written_in: dict[int, int] = {}
        self._uses: dict[int, dict[int, tuple[int, int]]] = {}
        self._epoch = 0

    def plan(self, plan: StepPlan, page_size: int, pages_per_rank: int) -> None:
        assert plan.epoch == self._epoch + 1, "epochs grow by one"
        assert plan.sequences, "a plan has a sequence"
        slots = [sequence.slot for sequence in plan.sequences]
        assert len(set(slots)) == len(slots), "a slot is in a plan twice"
        self._epoch = plan.epoch + plan.steps - 1
        writes: set[int] = set()
        uses: dict[int, tuple[int, int]] = {}
        for sequence in plan.sequences:
            pages = unpack_ids(sequence.pages)
            begin = sequence.start // page_size
            for page in pages:
                owner, epoch = page // pages_per_rank, self._written_in.get(page, 0)
                if owner not in plan.group:
                    assert self._in_place, "a page outside the group cannot be read here"
                    assert plan.strategy == "pass_kv" and plan.placement == "sharded"
                    assert epoch not in self._pending, "an uncommitted page is outside the group"
            for index in range(begin, len(pages)):
                assert pages[index] not in writes, "two sequences write one page"
                self._check_unused(pages[index], (sequence.slot, index))
            writes |= set(pages[begin:])
            uses.update((page, (sequence.slot, index)) for index, page in enumerate(pages))
            if sequence.board_epoch in self._pending:
                group = self._pending[sequence.board_epoch][0]
                assert set(plan.group) <= set(group), "the board's group is smaller"
                assert self._one_host or plan.group == group, "a board is not shared by hosts"
        for page in writes:
            self._written_in[page] = plan.epoch
        ranks = {
            rank * self._tp_size + peer for rank in plan.group for peer in range(self._tp_size)
        }
        self._pending[plan.epoch] = (plan.group, ranks)
        self._uses[plan.epoch] = uses
        for rank in ranks:
            count = sum(rank in waiting for _, waiting in self._pending.values())
            assert count <= self._depth, "too many plans under way"

    def answer(self, epoch: int, rank: int) -> None:
        waiting = self._pending[epoch][1]
        waiting.remove(rank)
        if not waiting:
            del self._pending[epoch], self._uses[epoch]

    def _check_unused(self, page: int, use: tuple[int, int]) -> None:
        """A page is not written while a plan under way knows it as another page."""
        for epoch, uses in self._uses.items():
            assert uses.get(page, use) == use, f"page {page} is written under epoch {epoch}"


class EchoServer:
    """Drives a scheduler over echo ranks, checks every plan, and compares every answer."""

    def __init__(
        self,
        *,
        sp: int = 2,
        tp: int = 1,
        page_size: int = 4,
        pages: int = 16,
        vocab: int = 50,
        context: int = 1000,
        seed: int = 0,
        zero_copy: bool = True,
        no_sparse: str = "",
        bursts: bool = True,
        slices: bool = False,
        parallel: dict[str, object] | None = None,
        cache: dict[str, object] | None = None,
        **config: object,
    ) -> None:
        self.chance = random.Random(seed)
        self.vocab, self.context, self.pages, self.page_size = vocab, context, pages, page_size
        scheduler_config = SchedulerConfig(**{"max_running_requests": 16, **config})
        self.parallel = ParallelConfig(sp_size=sp, tp_size=tp, **(parallel or {}))
        self.scheduler = Scheduler(
            scheduler_config,
            CacheConfig(page_size=page_size, pages_per_rank=pages, **(cache or {})),
            self.parallel,
            ModelLimits(context, frozenset({EOS}), vocab),
            StepCosts(
                SHAPE,
                LinkCost(1e-5, 1e9, zero_copy),
                1e9,
                decode=SLICES if slices else DecodeCost(),
            ),
            no_sparse,
            bursts,
        )
        memory = EchoMemory.allocate(sp, pages, page_size, board_slots(scheduler_config), tp)
        self.grammars = ToyGrammars(vocab, EOS)
        self.world = EchoWorld(memory, vocab, self.chance, lambda: Matchers(lambda: self.grammars))
        one_host = self.parallel.nnodes == 1
        self.referee = Referee(tp, scheduler_config.max_steps_in_flight, zero_copy, one_host)
        self.sparse_referee = SparseReferee(self.scheduler, page_size, pages)
        self._mail: dict[int, deque[StepResult]] = {}
        self.requests: dict[str, GenerateRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finals: dict[str, TokensOut] = {}
        self.news: list[TokensOut] = []
        self.plans: list[StepPlan] = []
        self.hurried: list[int] = []
        self.on_plan: Callable[[StepPlan], None] = self.plans.append

    def add(
        self,
        prompt: Sequence[int],
        n: int = 4,
        *,
        tenant: str = "",
        logprobs: LogprobParams | None = None,
        attention: AttentionSpec = EXACT,
        hidden_state: bool = False,
        **sampling: object,
    ) -> str:
        """Add a request; its rid."""
        rid = f"r{len(self.requests)}"
        request = GenerateRequest(
            rid=rid,
            tokens=pack_ids(prompt),
            sampling=SamplingParams(max_new_tokens=n, **sampling),
            tenant=tenant,
            attention=attention,
            logprobs=logprobs,
            hidden_state=hidden_state,
        )
        self.requests[rid] = request
        self.tokens[rid] = []
        self._hear(self.scheduler.add(request))
        return rid

    def abort(self, rid: str) -> None:
        self._hear(self.scheduler.abort(rid))

    def turn(self, polls: int = 1) -> None:
        """Send what may be sent, then poll random ranks."""
        for plan in self.scheduler.next_plans():
            self.referee.plan(plan, self.page_size, self.pages)
            self.sparse_referee.plan(plan)
            self.on_plan(plan)
            self.world.submit(plan)
        self.hurried += self.scheduler.hurry()
        for _ in range(polls):
            if not self.world.busy or (self._mail and self.chance.random() < 0.5):
                self._deliver()
            elif (result := self.world.poll()) is not None:
                self._mail.setdefault(result.rank, deque()).append(result)

    def _deliver(self) -> None:
        """Hand over the oldest answer of a random rank: ranks overtake one another."""
        if self._mail:
            rank = self.chance.choice(sorted(self._mail))
            result = self._mail[rank].popleft()
            if not self._mail[rank]:
                del self._mail[rank]
            self.referee.answer(result.epoch, result.rank)
            self._hear(self.scheduler.on_result(result))

    def run(self, check: bool = True, limit: int = 200_000) -> None:
        """Until everything has ended; every invariant after every turn if `check`."""
        for _ in range(limit):
            self.turn()
            if check:
                self.scheduler.check()
            if self.scheduler.idle:
                break
        else:
            raise AssertionError("the server makes no progress")
        self.assert_idle()

    def assert_idle(self) -> None:
        """Everything was answered, rightly, and nothing is left behind."""
        assert self.scheduler.next_plans() == [] and not self.world.busy
        self.scheduler.check()
        state = self.scheduler.state()
        assert (state.running, state.waiting) == (0, 0)
        assert all(rank.used_pages == 0 for rank in state.ranks), "pages are lost"
        assert self.finals.keys() == self.requests.keys(), "a request has no final message"
        for rid in self.requests:
            self.compare(rid)
        assert self.scheduler.flush()
        state = self.scheduler.state()
        assert all(rank.free_pages == rank.total_pages for rank in state.ranks)
        self.scheduler.check()

    def expected(self, rid: str) -> list[int]:
        request = self.requests[rid]
        sampling, prompt = request.sampling, list(unpack_ids(request.tokens))
        ignores_eos = sampling.ignore_eos and not sampling.grammar
        stops = set(sampling.stop_token_ids) | (set() if ignores_eos else {EOS})
        return echo_generate(
            prompt,
            min(sampling.max_new_tokens, self.context - len(prompt)),
            vocab=self.vocab,
            stop_ids=stops,
            min_new=sampling.min_new_tokens,
            penalized=sampling.penalized,
            matcher=self.grammars.matcher(sampling.grammar) if sampling.grammar else None,
        )

    def compare(self, rid: str) -> None:
        """The answer is what echo_generate says, or the beginning of it if it was aborted."""
        self._compare_report(rid)
        self._compare_hidden_state(rid)
        finish, tokens, expected = self.finals[rid].finish, self.tokens[rid], self.expected(rid)
        assert finish is not None
        self._compare_logprobs(rid)
        if finish.kind == "abort":
            assert tokens == expected[: len(tokens)], f"{rid}: {tokens} != {expected}"
            return
        assert tokens == expected, f"{rid}: {tokens} != {expected}"
        stopped = bool(expected) and expected[-1] == finish.matched
        assert finish.kind == ("stop" if stopped else "length")

    def _compare_hidden_state(self, rid: str) -> None:
        """With the last message, and only for who asked for it."""
        request, finish = self.requests[rid], self.finals[rid].finish
        asked = request.hidden_state and finish is not None and finish.kind != "abort"
        right = echo_hidden(unpack_ids(request.tokens)) if asked else b""
        assert self.finals[rid].hidden_state == right

    def _compare_report(self, rid: str) -> None:
        """The last message of a request that asked for csa says what every echo rank counted."""
        final, finish = self.finals[rid], self.finals[rid].finish
        report, asked = final.attention, self.requests[rid].attention.mode == "csa"
        early = [item for item in self.news if item.rid == rid and item.attention is not None]
        assert len(early) <= 2 and all(item.attention == report for item in early[-1:])
        if finish is not None and finish.kind != "abort":
            assert asked == (report is not None)
        if report is not None:
            assert (report.mode == "exact") == bool(report.reason)
            if report.mode == "csa" and finish is not None and finish.kind != "abort":
                assert report.density == ECHO_DENSITY

    def _compare_logprobs(self, rid: str) -> None:
        """One entry per token, and the prompt's once, whatever the chunks and the cache were."""
        request, news = self.requests[rid], [item for item in self.news if item.rid == rid]
        wants, prompt = request.logprobs, list(unpack_ids(request.tokens))
        heard = [entry.token for item in news for entry in item.logprobs]
        assert heard == (self.tokens[rid] if wants is not None else [])
        judged = [entry for item in news for entry in item.prompt_logprobs]
        if wants is None or wants.prompt_start < 0 or not (self.tokens[rid] or judged):
            assert not judged
            return
        right = echo_prompt_logprobs(prompt, wants, self.vocab)
        assert judged == right[wants.prompt_start :]

    def _hear(self, news: list[TokensOut]) -> None:
        for item in news:
            assert item.rid not in self.finals, "news after the final message"
            self.news.append(item)
            self.tokens[item.rid].extend(item.tokens)
            if item.finish is not None:
                self.finals[item.rid] = item
