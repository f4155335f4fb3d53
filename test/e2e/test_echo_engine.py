"""Scheduler and ranks as processes: what they answer is what the page tables say, and no other."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import pytest
import zmq
from test.kit.echo_engine import VOCAB, EchoEngine, request, write_config

from sps_runtime.config.options import EngineOptions
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.ipc.links import new_context
from sps_runtime.runner.echo_answers import echo_generate
from sps_runtime.types.messages import (
    Abort,
    EngineState,
    FlushCache,
    GetState,
    PrefillProgress,
    Reply,
    StopEngine,
    ToFrontend,
    TokensBatch,
)

PAGE = 16


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EchoEngine]:
    options = EngineOptions(
        model_path=str(write_config(tmp_path_factory.mktemp("model"))),
        device="echo",
        page_size=PAGE,
        max_total_tokens=16384,
        parallel=ParallelConfig(sp_size=2),
        scheduler=SchedulerConfig(chunked_prefill_size=256),
        log_level="warning",
    )
    with EchoEngine(options) as running:
        yield running


def prompts(seed: int, count: int, longest: int) -> dict[str, list[int]]:
    rng = random.Random(seed)
    shared = [rng.randrange(VOCAB) for _ in range(longest)]
    chosen = {}
    for number in range(count):
        own = [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 40))]
        chosen[f"{seed}-{number}"] = shared[: rng.randrange(0, longest)] + own
    return chosen


def test_outputs_are_right_cold_and_warm(engine: EchoEngine) -> None:
    for seed in (1, 2):
        asked = prompts(seed, 24, 600)
        answered = engine.generate(asked, max_new_tokens=20)
        expected = {rid: echo_generate(prompt, 20, vocab=VOCAB) for rid, prompt in asked.items()}
        assert answered == expected
    warm = {f"warm-{rid}": prompt for rid, prompt in asked.items()}
    assert list(engine.generate(warm, max_new_tokens=20).values()) == list(expected.values())


def test_a_long_prompt_reports_progress(engine: EchoEngine) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(VOCAB) for _ in range(5000)]
    engine.messages.clear()
    engine.generate({"long": prompt}, max_new_tokens=2)
    done = [m.done for m in engine.messages if isinstance(m, PrefillProgress)]
    assert done == sorted(done) and len(done) >= 2 and done[-1] < 5000


def test_aborted_requests_end_once_and_leave_nothing(engine: EchoEngine) -> None:
    for number in range(10):
        engine.send(request(f"a{number}", [number] * 2000, 5000))
    for number in range(10):
        engine.send(Abort(f"a{number}"))
        engine.send(Abort(f"a{number}"))
    engine.send(Abort("never-seen"))
    ended: list[str] = []
    while len(ended) < 10:
        message = engine.receive()
        if isinstance(message, TokensBatch):
            ended += [news.rid for news in message.items if news.finish is not None]
    assert sorted(ended) == sorted(f"a{number}" for number in range(10))
    wait_idle(engine)


def test_flush_is_refused_while_busy_and_empties_the_pool(engine: EchoEngine) -> None:
    engine.send(request("busy", [1] * 3000, 3000))
    engine.send(FlushCache(7))
    reply = engine.receive_until(lambda m: isinstance(m, Reply))
    assert reply == Reply(7, ok=False, detail="requests are running or waiting")
    engine.send(Abort("busy"))
    state = wait_idle(engine)
    assert any(rank.cached_pages for rank in state.ranks)
    engine.send(FlushCache(8))
    assert engine.receive_until(lambda m: isinstance(m, Reply)) == Reply(8, ok=True)
    assert all(rank.free_pages == rank.total_pages for rank in wait_idle(engine).ranks)


def test_what_cannot_be_served_is_refused_and_others_go_on(engine: EchoEngine) -> None:
    bad = {"empty": [], "far-id": [VOCAB], "negative": [-1], "too-long": [1] * 70000}
    for rid, prompt in bad.items():
        engine.send(request(rid, prompt))
    canary = engine.generate({"canary": [5, 6, 7]}, max_new_tokens=30)
    assert canary["canary"] == echo_generate([5, 6, 7], 30, vocab=VOCAB)
    finals = {
        news.rid: news.finish
        for message in engine.messages
        if isinstance(message, TokensBatch)
        for news in message.items
        if news.rid in bad and news.finish is not None
    }
    assert {rid: finish.status for rid, finish in finals.items()} == dict.fromkeys(bad, 400)


def test_garbage_on_every_link_changes_nothing(engine: EchoEngine) -> None:
    rng = random.Random(11)
    context = new_context()
    endpoints = engine.processes.endpoints
    good = msgspec.msgpack.encode(request("garbage", [1, 2, 3]))
    for endpoint in (endpoints.scheduler, endpoints.results, *endpoints.ranks):
        socket = context.socket(zmq.PUSH)
        socket.connect(endpoint)
        for _ in range(200):
            mutated = bytearray(good)
            mutated[rng.randrange(len(good))] = 0xC1
            socket.send(rng.choice([rng.randbytes(rng.randrange(80)), bytes(mutated[:-1])]))
        socket.close(linger=1000)
    context.term()
    answered = engine.generate({"after-garbage": [9, 8]}, max_new_tokens=10)
    assert answered["after-garbage"] == echo_generate([9, 8], 10, vocab=VOCAB)


def test_it_stops_in_good_order(engine: EchoEngine) -> None:  # the last of this module
    engine.send(StopEngine())
    assert engine.watch.wait_for_deaths(engine.processes.children, 5.0)
    assert [child.process.returncode for child in engine.processes.children] == [0, 0, 0]


def wait_idle(engine: EchoEngine) -> EngineState:
    """Ask until nothing runs and no page is in use."""
    for call in range(1000, 1200):
        engine.send(GetState(call))

        def is_answer(message: ToFrontend, call: int = call) -> bool:
            return isinstance(message, EngineState) and message.call == call

        state = engine.receive_until(is_answer)
        assert isinstance(state, EngineState)
        busy = state.running or state.waiting or any(rank.used_pages for rank in state.ranks)
        if not busy:
            return state
    raise AssertionError(f"the engine does not come to rest: {state}")
