"""Requests that share an uncached prefix and arrive together: one computes it, the others wait."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test.kit.echo_server import AnyDegree, EchoServer

from sps_runtime.scheduler import prefix_waits
from sps_runtime.scheduler.prefix_waits import MOST_WAITS
from sps_runtime.scheduler.runs import Runs
from sps_runtime.scheduler.sequence import PrefixWait
from sps_runtime.types.attention import AttentionSpec, SparseSettings
from sps_runtime.types.sampling import LogprobParams

DOCUMENT = [4 + (7 * n + n // 40) % 40 for n in range(80)]


def forks(server: EchoServer, document: list[int], count: int, n: int = 2) -> list[str]:
    """Add `count` requests that continue one document, each in its own way."""
    return [server.add([*document, 4 + k % 40, 5 + k // 40], n) for k in range(count)]


def cached(server: EchoServer, rids: list[str]) -> list[int]:
    return [server.finals[rid].cached_tokens for rid in rids]


def computed(server: EchoServer, tokens: int) -> int:
    """How many of the first `tokens` positions plans computed, those of all sequences summed."""
    items = [item for plan in server.plans for item in plan.sequences]
    return sum(max(0, min(tokens, item.start + item.count) - item.start) for item in items)


@settings(max_examples=60, deadline=None)
@given(
    sp=st.integers(1, 3),
    tp=st.integers(1, 2),
    arch=st.sampled_from(["ntp", "tp"]),
    page_size=st.sampled_from([1, 2, 4]),
    chunk=st.sampled_from([3, 8, -1]),
    overlap=st.booleans(),
    zero_copy=st.booleans(),
    order=st.sampled_from(["fcfs", "lpm"]),
    slots=st.sampled_from([2, 16]),
    count=st.integers(2, 24),
    n=st.integers(0, 3),
    tokens=st.integers(8, 80),
    any_degree=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_prefix_of_requests_that_arrive_together_is_computed_once(
    sp, tp, arch, page_size, chunk, overlap, zero_copy, order, slots, count, n, tokens, any_degree,
    seed,
) -> None:  # fmt: skip
    server = EchoServer(
        sp=sp,
        tp=tp,
        page_size=page_size,
        pages=400,
        seed=seed,
        zero_copy=zero_copy,
        chunked_prefill_size=chunk,
        overlap=overlap,
        schedule_policy=order,
        max_running_requests=slots,
        parallel={"arch": arch},
    )
    if any_degree:
        server.scheduler._policy = AnyDegree(random.Random(seed))
    rids = forks(server, DOCUMENT[:tokens], count, n)
    server.run(check=False)
    whole = tokens // page_size * page_size
    assert computed(server, whole) == whole
    assert cached(server, rids) == [0] + [whole] * (count - 1)
    assert server.scheduler.state().prefix_waits_total > 0


@pytest.mark.parametrize("end", ["abort", "retract"])
@pytest.mark.parametrize("turns", [1, 3, 5, 8, 12, 20])
def test_when_the_one_that_computes_goes_the_next_goes_on(end: str, turns: int) -> None:
    """With what the first has written; one that is retracted goes on itself, being the oldest."""
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=4, seed=turns)
    rids = forks(server, DOCUMENT, 4)
    for _ in range(turns):
        server.turn()
    first = server.scheduler._run_of.get(rids[0])
    if end == "abort":
        server.abort(rids[0])
    elif first is not None:
        server.scheduler._retract(first)
    server.run()
    assert computed(server, 80) == 80
    written = 80 if first is None or end == "retract" else min(80, first.acked)
    assert cached(server, rids[1:]) == [written, 80, 80]


@pytest.mark.parametrize("late", [0, 1, 2])
def test_one_that_ends_before_all_ranks_have_answered_still_gives_its_pages(late: int) -> None:
    """The sampling rank's answer ends a request while another rank's is under way.

    `late` requests come only then, the others with the first.
    """
    ended_early = 0
    for seed in range(30):
        server = EchoServer(sp=2, pages=64, seed=seed)
        rids = forks(server, DOCUMENT, 3 - late, n=1)
        while rids[0] not in server.finals:
            server.turn()
        ended_early += bool(server.scheduler._runs.draining)
        rids += [server.add([*DOCUMENT, 40 + k], 1) for k in range(late)]
        server.run(check=False)
        assert cached(server, rids) == [0, 80, 80], f"seed {seed}"
    assert ended_early > 3


def test_these_tests_see_who_waits_for_the_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    over = property(lambda self: self.run.acked >= self.until)
    monkeypatch.setattr(PrefixWait, "over", over)
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=4)
    rids = forks(server, DOCUMENT, 4)
    server.turn()
    server.abort(rids[0])
    with pytest.raises(AssertionError, match="no progress"):
        server.run(limit=1000)


def test_these_tests_see_who_overlooks_ended_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Runs, "writing", lambda self: list(self.live.values()))
    with pytest.raises(AssertionError, match="seed"):
        test_one_that_ends_before_all_ranks_have_answered_still_gives_its_pages(late=2)


def test_a_waiting_request_can_be_aborted() -> None:
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=4)
    rids = forks(server, DOCUMENT, 3)
    server.turn()
    assert server.scheduler.state().waiting == 2
    server.abort(rids[1])
    finish = server.finals[rids[1]].finish
    assert finish is not None and finish.kind == "abort"
    server.run()
    assert cached(server, rids) == [0, 0, 80]


def test_those_behind_are_not_held_up() -> None:
    """However many wait, a request that shares nothing is admitted at once."""
    server = EchoServer(sp=1, pages=200, chunked_prefill_size=4, max_running_requests=100)
    waiting = forks(server, DOCUMENT, 60)
    other = server.add(range(20, 32), 1)
    server.turn()
    assert server.scheduler._run_of.keys() == {waiting[0], other}
    server.run(check=False)
    assert cached(server, waiting) == [0] + [80] * 59


def test_waiting_compares_no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request is compared when it comes and when its wait is over, not every turn."""
    right, calls = prefix_waits._common_pages, []

    def counted(*args: int) -> int:
        calls.append(args)
        return right(*args)

    monkeypatch.setattr(prefix_waits, "_common_pages", counted)
    server = EchoServer(sp=1, pages=300, chunked_prefill_size=4, max_running_requests=50)
    forks(server, DOCUMENT, 40)
    server.run(check=False)
    assert len(server.plans) > 20 and 39 <= len(calls) <= 80


def test_a_small_part_is_computed_rather_than_waited_for() -> None:
    """Four tokens cost less than a step does anyhow."""
    server = EchoServer(sp=2, pages=64)
    for first in (10, 20):
        server.add([5, 6, 7, 8, *range(first, first + 20)], 1)
    server.turn()
    assert server.scheduler.state().running == 2
    assert server.scheduler.state().prefix_waits_total == 0
    server.run()


@pytest.mark.parametrize(("sp", "own", "waits"), [(1, 18, 1), (3, 18, 0), (3, 60, 1)])
def test_a_step_of_others_tokens_is_waited_for_only_where_it_goes_first(
    sp: int, own: int, waits: int
) -> None:
    """8 tokens shared: on one rank, or all, the step goes first anyhow; else a rank is idle."""
    server = EchoServer(sp=sp, pages=64, chunked_prefill_size=-1)
    tails = [20 + n % 30 for n in range(own)], [20, 21]
    rids = [server.add([*DOCUMENT[:8], *tail], 1) for tail in tails]
    server.run()
    assert server.scheduler.state().prefix_waits_total == waits
    assert cached(server, rids) == [0, 8 * waits]


def test_a_prompt_that_others_wait_for_is_spread_as_if_it_were_alone() -> None:
    alone, waited_for, crowd = (EchoServer(sp=4, pages=400, chunked_prefill_size=-1) for _ in "123")
    document = DOCUMENT * 5
    forks(alone, document, 1)
    forks(waited_for, document, 8)
    for k in range(8):
        crowd.add([5 + k, *document], 2)
    for server in (alone, waited_for, crowd):
        server.turn()
    assert len(alone.plans[0].group) == len(waited_for.plans[0].group) > len(crowd.plans[0].group)


def test_other_keys_are_not_waited_for() -> None:
    """Tenants, fidelities, prompts whose logits are wanted, and servers without a cache."""
    csa = AttentionSpec("csa", SparseSettings(block=2, superblock=4, wide_from=8))
    judged = LogprobParams(top=1, prompt_start=0)
    for wishes in ({"tenant": "other"}, {"attention": csa}, {"logprobs": judged}):
        server = EchoServer(sp=2, pages=100, csa_min_tokens=0)
        server.add([*DOCUMENT, 5], 2)
        server.add([*DOCUMENT, 6], 2, **wishes)
        server.turn()
        assert server.scheduler.state().running == 2, wishes
        server.run()
    server = EchoServer(sp=2, pages=100, cache={"enable_prefix_cache": False})
    forks(server, DOCUMENT, 2)
    server.turn()
    assert server.scheduler.state().running == 2
    server.run()


def test_csa_waits_for_whole_superblocks() -> None:
    settings = SparseSettings(block=4, superblock=16, wide_from=8)
    server = EchoServer(sp=2, pages=100, csa_min_tokens=0, chunked_prefill_size=16)
    csa = AttentionSpec("csa", settings)
    rids = [server.add([*DOCUMENT[:70], end], 2, attention=csa) for end in (5, 6, 7)]
    server.run()
    assert cached(server, rids) == [0, 64, 64]


def test_a_longer_prefix_is_waited_for_next() -> None:
    """Of two that share more with one another than with the first, one waits twice."""
    server = EchoServer(sp=1, pages=100, chunked_prefill_size=8)
    first = server.add([*DOCUMENT[:40], 5], 2)
    pair = forks(server, DOCUMENT, 2)
    server.run()
    assert cached(server, [first, *pair]) == [0, 40, 80]
    assert server.scheduler.state().prefix_waits_total == 2


def test_nothing_waits_for_ever() -> None:
    """Who has waited for so many runs computes what it lacks."""
    server = EchoServer(sp=1, pages=100, chunked_prefill_size=4)
    rids = forks(server, DOCUMENT, 3)
    server.scheduler._sequences[rids[1]].awaits = MOST_WAITS
    server.turn()
    assert server.scheduler._run_of.keys() == set(rids[:2])
    server.run()
    assert cached(server, rids) == [0, 0, 80]
