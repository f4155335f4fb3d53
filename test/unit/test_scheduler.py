"""What the scheduler promises, one promise a test."""

from __future__ import annotations

import pytest
from test.kit.echo_server import EchoServer

from sps_runtime.scheduler.scheduler import Scheduler
from sps_runtime.types.errors import ConfigError, EngineDead
from sps_runtime.types.plan import StepResult
from sps_runtime.types.sampling import LogprobParams


@pytest.mark.parametrize("overlap", [True, False])
def test_the_next_plan_goes_before_the_token_is_known(overlap: bool) -> None:
    server = EchoServer(sp=1, overlap=overlap, bursts=False)
    server.add([4, 5, 6], 8, ignore_eos=True)
    server.turn(polls=0)
    assert len(server.plans) == (2 if overlap else 1)
    if overlap:
        sequence = server.plans[1].sequences[0]
        assert (sequence.board_epoch, sequence.tokens) == (1, b"")
    server.run()
    assert any(plan.sequences[0].board_epoch > 0 for plan in server.plans) == overlap


def test_a_second_identical_prompt_waits_for_the_first_ones_pages() -> None:
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=4)
    prompt = list(range(4, 45))
    first, second = server.add(prompt, 3), server.add(prompt, 3)
    other = server.add(list(range(44, 20, -1)), 3)
    server.run()
    assert server.finals[first].cached_tokens == 0
    assert server.finals[second].cached_tokens >= 20
    assert server.finals[other].cached_tokens == 0


def test_generated_pages_serve_the_next_turn_of_a_conversation() -> None:
    server = EchoServer(sp=2, pages=64)
    first = server.add(range(4, 12), 9, ignore_eos=True)
    while first not in server.finals or not server.scheduler.idle:
        server.turn()
    again = server.add([*range(4, 12), *server.tokens[first], 7], 2)
    server.run()
    assert server.finals[again].cached_tokens == 16


def test_tenants_share_nothing() -> None:
    server = EchoServer()
    rids = []
    for tenant in ("a", "b", "a"):
        rids.append(server.add(range(4, 17), 2, tenant=tenant))
        while not server.scheduler.idle:
            server.turn()
    server.run()
    assert [server.finals[rid].cached_tokens for rid in rids] == [0, 0, 12]


def test_prefill_only() -> None:
    server = EchoServer(chunked_prefill_size=4)
    rid = server.add(range(4, 30), 0)
    server.run()
    final = server.finals[rid]
    assert final.finish is not None and final.finish.kind == "length" and final.tokens == ()
    assert all(sequence.sample is None for plan in server.plans for sequence in plan.sequences)


def test_hidden_states_do_not_depend_on_chunks_or_cache() -> None:
    server = EchoServer(sp=2, tp=2, pages=64, chunked_prefill_size=4)
    writer = server.add(range(4, 40), 30, ignore_eos=True)
    for length in (1, 4, 26, 26, 31):
        rid = server.add(range(4, 4 + length), 0, hidden_state=True)
        while rid not in server.finals:
            server.turn()
    assert server.finals[rid].cached_tokens >= 24
    assert writer in server.finals or server.tokens[writer], "others go on meanwhile"
    server.run()
    marked = [s for plan in server.plans for s in plan.sequences if s.hidden_state]
    assert len(marked) == 5 and all(s.sample is None for s in marked)


def test_a_hidden_state_that_no_rank_reports_is_an_error() -> None:
    server = EchoServer(sp=1)
    rid = server.add([4, 5], 0, hidden_state=True)
    (plan,) = server.scheduler.next_plans()
    with pytest.raises(EngineDead, match="hidden state"):
        server.scheduler.on_result(StepResult(plan.epoch, 0))
    assert rid not in server.finals


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("start", [0, 1, 9, 25])
def test_prompt_logprobs_do_not_depend_on_chunks_or_cache(n: int, start: int) -> None:
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=4)
    wants = LogprobParams(top=2, token_ids=(5,), prompt_start=start)
    for _ in range(2):
        rid = server.add(range(4, 30), n, logprobs=wants)
        while rid not in server.finals:
            server.turn()
        assert sum(len(news.prompt_logprobs) for news in server.news if news.rid == rid) == (
            26 - start
        )
    if start:
        assert server.finals[rid].cached_tokens == (start - 1) // 4 * 4
    server.run()


def test_no_stop_below_the_minimum() -> None:
    server = EchoServer(vocab=5)
    rids = [server.add([4, 4, first], 12, min_new_tokens=9) for first in range(4)]
    server.run()
    assert all(len(server.tokens[rid]) >= 9 for rid in rids)


def test_the_context_ends_a_request() -> None:
    server = EchoServer(context=10)
    rid = server.add(range(4, 11), 50, ignore_eos=True)
    server.run()
    assert len(server.tokens[rid]) == 3


@pytest.mark.parametrize(
    ("prompt", "n", "status", "says"),
    [
        ([], 1, 400, "empty"),
        (range(4, 44), 1, 400, "context"),
        ([4] * 30, 10, 400, "KV cache"),
        ([4, 50], 1, 400, "token ids"),
        ([4, -1], 1, 400, "token ids"),
    ],
)
def test_what_can_never_run_is_refused_at_once(prompt, n, status, says) -> None:
    server = EchoServer(sp=1, pages=8, context=40)
    finish = server.scheduler.add(request_of(server, prompt, n))[0].finish
    assert finish is not None and (finish.kind, finish.status) == ("abort", status)
    assert says in finish.message
    assert server.scheduler.idle


def request_of(server: EchoServer, prompt, n):
    scheduler, server.scheduler = server.scheduler, type("Sink", (), {"add": lambda *_: []})()
    rid = server.add(prompt, n)
    server.scheduler = scheduler
    del server.tokens[rid]
    return server.requests.pop(rid)


def test_a_full_queue_refuses() -> None:
    server = EchoServer(max_queued_requests=2)
    for _ in range(3):
        server.add([4, 5], 1)
    finish = server.finals["r2"].finish
    assert finish is not None and finish.status == 503


def test_a_lone_request_may_use_the_whole_pool() -> None:
    server = EchoServer(sp=2, pages=8, page_size=4, chunked_prefill_size=8)
    server.add(range(4, 40), 29, ignore_eos=True)
    server.run()
    server = EchoServer(sp=2, pages=8, page_size=4)
    server.add([5], 64, ignore_eos=True)
    server.run()


def test_contention_retracts_the_newest_and_changes_no_answer() -> None:
    server = EchoServer(sp=2, pages=4, page_size=2, conservativeness=0.0, vocab=40)
    rids = [server.add([4 + first, 5], 12, ignore_eos=True) for first in range(4)]
    server.run()
    assert server.scheduler.state().retractions_total > 0
    assert server.finals[rids[0]].retractions == 0, "the oldest goes on"
    assert max(server.finals[rid].retractions for rid in rids) >= 1


def test_a_reserving_server_never_retracts() -> None:
    server = EchoServer(sp=2, pages=4, page_size=2, conservativeness=1.0)
    for first in range(6):
        server.add([4 + first, 5], 12, ignore_eos=True)
    server.run()
    assert server.scheduler.state().retractions_total == 0


@pytest.mark.parametrize("turns", range(0, 24, 2))
def test_abort_at_any_moment_is_final_once(turns: int) -> None:
    server = EchoServer(sp=2, chunked_prefill_size=4, seed=turns)
    rid = server.add(range(4, 24), 6, ignore_eos=True)
    other = server.add(range(4, 20), 6)
    for _ in range(turns):
        server.turn()
    server.abort(rid)
    server.abort(rid)
    server.abort("nobody")
    server.run()
    finish = server.finals[rid].finish
    assert finish is not None and (finish.kind == "abort") == (len(server.tokens[rid]) < 6)
    assert server.finals[other].finish is not None


def test_an_id_that_lives_is_not_taken_twice() -> None:
    server = EchoServer()
    rid = server.add([4, 5], 2)
    assert server.scheduler.add(server.requests[rid]) == []
    server.run()


def test_flush_waits_for_requests_and_takes_everything() -> None:
    server = EchoServer(sp=2)
    rid = server.add(range(4, 24), 5)
    assert not server.scheduler.flush()
    while rid not in server.finals:
        server.turn()
    assert server.scheduler.flush(), "surplus plans do not hold it up"
    while not server.scheduler.idle:
        server.turn()
    state = server.scheduler.state()
    assert all(rank.free_pages == rank.total_pages for rank in state.ranks)


def test_state_counts_pages_and_tokens() -> None:
    server = EchoServer(sp=2, pages=16, page_size=4)
    server.add(range(4, 24), 5, ignore_eos=True)
    server.turn(polls=0)
    state = server.scheduler.state()
    assert (state.running, state.waiting, state.max_total_tokens) == (1, 0, 128)
    assert state.used_tokens == sum(rank.used_pages for rank in state.ranks) * 4 > 0
    for rank in state.ranks:
        assert rank.free_pages + rank.cached_pages + rank.used_pages == rank.total_pages
    server.run(check=False)
    state = server.scheduler.state()
    assert (state.prompt_tokens_total, state.generated_tokens_total) == (20, 5)
    assert state.steps_total == len(server.plans)


def test_progress_of_long_prompts() -> None:
    server = EchoServer(sp=1, pages=64, chunked_prefill_size=8)
    server.add(range(4, 44), 1)
    seen = []
    while not server.scheduler.idle:
        server.turn()
        seen += [(item.done, item.total) for item in server.scheduler.take_progress()]
    assert seen == [(8, 40), (16, 40), (24, 40), (32, 40)]


def test_a_failed_step_and_a_foreign_answer_end_the_engine() -> None:
    server = EchoServer(sp=1)
    server.add([4, 5], 2)
    server.turn(polls=0)
    with pytest.raises(EngineDead, match="out of luck"):
        server.scheduler.on_result(StepResult(1, 0, error="out of luck"))
    with pytest.raises(EngineDead, match="owes no answer"):
        server.scheduler.on_result(StepResult(1, 7))
    with pytest.raises(EngineDead, match="no rank sampled"):
        server.scheduler.on_result(StepResult(1, 0))


def test_unknown_names_are_refused() -> None:
    for options in ({"policy": "magic"}, {"schedule_policy": "magic"}):
        with pytest.raises(ConfigError, match="magic"):
            EchoServer(**options)


def test_longest_prefix_goes_first_but_starves_nobody() -> None:
    server = EchoServer(sp=1, pages=200, schedule_policy="lpm", max_running_requests=1)
    base = list(range(4, 24))
    warm = server.add(base, 1)
    while warm not in server.finals:
        server.turn()
    cold = server.add([40, 41, 42], 1)
    rids = [server.add([*base, 4 + k % 40, 5 + k // 40], 1) for k in range(80)]
    server.run(check=False)
    order = [news.rid for news in server.news if news.finish is not None]
    assert 60 <= order.index(cold) - 1 <= 66
    assert order.index(rids[-1]) > order.index(cold)


def test_many_waiting_for_one_prefix_all_hit_it() -> None:
    server = EchoServer(sp=2, pages=64, chunked_prefill_size=8, max_running_requests=32)
    base = [*range(4, 44)] * 2
    rids = [server.add([*base, 4 + k], 1) for k in range(30)]
    server.run()
    assert [server.finals[rid].cached_tokens for rid in rids] == [0] + [80] * 29


def test_a_huge_limit_does_not_reserve_the_pool() -> None:
    """Clients ask for all the context has room for, and stop long before."""
    server = EchoServer(sp=1, pages=1500, page_size=4, context=6000)
    for first in range(3):
        server.add([4 + first, 6], 5990)
    server.turn()
    assert server.scheduler.state().running == 1
    server = EchoServer(sp=1, pages=3000, page_size=4, context=12_000)
    for first in range(2):
        server.add([4 + first, 6], 11_000)
    server.turn()
    assert server.scheduler.state().running == 2


def test_scheduler_takes_no_clock_and_no_torch() -> None:
    import sys

    module = sys.modules[Scheduler.__module__]
    assert not {"time", "zmq", "torch"} & set(vars(module))


def test_a_grammar_without_a_next_token_ends_its_request_alone() -> None:
    server = EchoServer(sp=2, pages=64)
    dead = server.add([4, 5, 6], 20, grammar="dead 3", ignore_eos=True)
    other = server.add([7, 8, 9], 20, ignore_eos=True)
    while not server.scheduler.idle:
        server.turn()
        server.scheduler.check()
    finish = server.finals[dead].finish
    assert finish is not None and (finish.kind, finish.status) == ("abort", 400)
    assert finish.message == "nothing may follow"
    assert len(server.tokens[dead]) <= 3
    server.compare(other)
    assert len(server.tokens[other]) == 20


def test_plans_under_a_grammar_carry_what_was_generated() -> None:
    server = EchoServer(sp=1, pages=64)
    server.add([4, 5, 6], 9, grammar="7", min_new_tokens=9)
    server.add([4, 5, 6], 9, ignore_eos=True)
    server.run()
    samples = [s.sample for plan in server.plans for s in plan.sequences if s.sample is not None]
    assert any(len(sample.generated) == 4 * 5 for sample in samples)
    assert not any(sample.generated for sample in samples if not sample.params.grammar)
