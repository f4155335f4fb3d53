"""The pure scheduler over echo ranks as a state machine: every invariant after every step."""

from __future__ import annotations

import random

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test.kit.echo_server import AnyDegree, EchoServer

from sps_runtime.scheduler.policies import make_policy
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
from sps_runtime.types.sampling import LogprobParams

PREFIXES = [[5] * 12, [5, 6] * 8, [7] * 3]
SETTINGS = SparseSettings(block=2, superblock=4, wide_from=8)
CSA = AttentionSpec("csa", SETTINGS)
SPARSE_DECODE = AttentionSpec("csa", msgspec.structs.replace(SETTINGS, decode="sparse"))


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come and are aborted, ranks answer in any order, policies and degrees change."""

    @initialize(
        sp=st.integers(1, 3),
        tp=st.integers(1, 2),
        arch=st.sampled_from(["ntp", "tp"]),
        page_size=st.sampled_from([1, 2, 4]),
        chunk=st.sampled_from([3, 8, -1]),
        conservativeness=st.sampled_from([0.0, 1.0]),
        overlap=st.booleans(),
        zero_copy=st.booleans(),
        seed=st.integers(0, 2**16),
        sparse=st.booleans(),
        slices=st.booleans(),
    )
    def start(
        self,
        sp,
        tp,
        arch,
        page_size,
        chunk,
        conservativeness,
        overlap,
        zero_copy,
        seed,
        sparse,
        slices,
    ):
        self.sparse = sparse
        self.server = EchoServer(
            sp=sp,
            tp=tp,
            page_size=page_size,
            pages=-(-36 // (page_size * sp)),
            seed=seed,
            vocab=9,
            zero_copy=zero_copy,
            chunked_prefill_size=chunk,
            max_prefill_tokens=16,
            max_running_requests=4,
            conservativeness=conservativeness,
            overlap=overlap,
            slices=slices,
            csa_min_tokens=0 if sparse else 10_000,
            parallel={"arch": arch},
        )

    @rule(
        prefix=st.sampled_from(PREFIXES),
        shared=st.integers(0, 12),
        own=st.lists(st.integers(4, 8), max_size=4),
        n=st.integers(0, 10),
        ignore_eos=st.booleans(),
        penalty=st.sampled_from([0.0, 0.5]),
        min_new=st.integers(0, 2),
        wants=st.sampled_from([None, None, -1, 0, 3]),
        tenant=st.sampled_from(["", "", "other"]),
        attention=st.sampled_from([EXACT, EXACT, CSA, SPARSE_DECODE]),
    )
    def add(self, prefix, shared, own, n, ignore_eos, penalty, min_new, wants, tenant, attention):
        prompt = (prefix[:shared] + own) or [5]
        logprobs = None if wants is None else LogprobParams(top=1, prompt_start=wants)
        if logprobs is not None and wants >= len(prompt):
            logprobs = None
        self.server.add(
            prompt,
            n,
            tenant=tenant,
            logprobs=logprobs,
            attention=attention,
            ignore_eos=ignore_eos,
            presence_penalty=penalty,
            min_new_tokens=min(min_new, n),
        )

    @rule(prefix=st.sampled_from(PREFIXES), count=st.integers(2, 5), n=st.integers(0, 3))
    def fork(self, prefix, count, n):
        """Requests that arrive together behind one prefix, among whatever there is."""
        for k in range(count):
            self.server.add([*prefix, 4 + k], n)

    @precondition(lambda self: self.server.scheduler.idle)
    @rule(prefix=st.lists(st.integers(4, 8), min_size=8, max_size=12), count=st.integers(2, 3))
    def fork_alone(self, prefix, count):
        """Where nothing is retracted, evicted or aborted, their prefix is computed once."""
        self.server.scheduler.flush()
        rids = [self.server.add([*prefix, 4 + k], 1) for k in range(count)]
        while not self.server.scheduler.idle:
            self.server.turn()
        whole = len(prefix) - len(prefix) % self.server.page_size
        cached = [self.server.finals[rid].cached_tokens for rid in rids]
        assert cached == [0] + [whole] * (count - 1)

    @rule(data=st.data())
    def abort(self, data):
        rids = [*self.server.requests, "unknown"]
        self.server.abort(data.draw(st.sampled_from(rids)))

    @rule(polls=st.integers(0, 12))
    def turn(self, polls):
        self.server.turn(polls)

    @rule()
    def flush(self):
        alive = self.server.requests.keys() - self.server.finals.keys()
        assert self.server.scheduler.flush() == (not alive)

    @rule(policy=st.sampled_from(["sps", "sarathi", "any"]))
    def change_policy(self, policy):
        if policy == "sarathi" and self.sparse:
            return  # It refuses csa when the server starts.
        chance = random.Random(self.server.chance.random())
        chosen = AnyDegree(chance) if policy == "any" else make_policy(policy)
        self.server.scheduler._policy = chosen

    @precondition(lambda self: hasattr(self, "server"))
    @invariant()
    def sound(self):
        self.server.scheduler.check()

    @precondition(lambda self: hasattr(self, "server"))
    @invariant()
    def nobody_waits_for_the_dead(self):
        """Where nothing runs, no wait for a run goes on."""
        scheduler = self.server.scheduler
        if not scheduler._runs.live and not scheduler._runs.draining:
            assert all(s.awaited is None or s.awaited.over for s in scheduler._queue)

    def teardown(self):
        if hasattr(self, "server"):
            self.server.run(check=False)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
