"""Micro-batches in flight between hosts: the same answers and bytes, whatever waits for what."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import NEW_TOKENS, TIGHT_PAGES, check
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import Run, ThreadEngine, drive

from sps_runtime.attention.backend import Partial
from sps_runtime.attention.sequence_parallel.in_flight.baton import Baton
from sps_runtime.attention.sequence_parallel.in_flight.cut import cut
from sps_runtime.attention.sequence_parallel.in_flight.flight import Flight
from sps_runtime.attention.sequence_parallel.in_flight.parcels import Courier
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.types.plan import SequencePlan, StepPlan
from sps_runtime.types.tokens import pack_ids


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def engine_between_hosts(
    kind: str, sp: int, page_size: int, pipeline: bool, per_host: int = 1
) -> ThreadEngine:
    model = exact_model(kind)
    return ThreadEngine(
        model.config,
        model.arena(1),
        sp=sp,
        page_size=page_size,
        pages_per_rank=TIGHT_PAGES[page_size],
        hosts=tuple(rank // per_host for rank in range(sp)),
        pipeline=pipeline,
    )


def run_alone(engine: ThreadEngine, planner: Planner, requests: list[Request]) -> Run:
    """One request after the other, so that every prefill is a step of one sequence."""
    whole = Run({}, [], [])
    for request in requests:
        run = drive(engine, planner, [request])
        whole.logits |= {request.slot: run.logits[request.slot]}
        whole.plans += run.plans
        whole.results += run.results
    return whole


@pytest.mark.parametrize(
    ("kind", "sp", "dealing", "page_size", "strategy", "per_host"),
    [
        ("llama", 2, "zigzag", 16, "pass_kv", 1),
        ("qwen3", 2, "contiguous", 64, "pass_kv", 1),
        ("window", 2, "random", 16, "pass_kv", 1),
        ("window", 3, "zigzag", 64, "pass_kv", 1),
        ("llama", 4, "contiguous", 16, "pass_kv", 1),
        ("qwen3", 4, "zigzag", 16, "ulysses", 1),
        ("llama", 2, "zigzag", 64, "ulysses", 1),
        ("window", 3, "random", 16, "ulysses", 1),
        ("llama", 4, "zigzag", 16, "pass_kv", 2),
        ("window", 4, "random", 16, "ulysses", 2),
    ],
)
def test_the_same_tokens_and_bytes(
    kind: str, sp: int, dealing: str, page_size: int, strategy: str, per_host: int
) -> None:
    sent = {}
    for pipeline in (False, True):
        engine = engine_between_hosts(kind, sp, page_size, pipeline, per_host)
        pages = TIGHT_PAGES[page_size]
        shape = Shape(
            sp, page_size, pages, dealing=dealing, strategy=strategy, decode="sharded", overlap=False
        )
        first = Request(prompt(1037), NEW_TOKENS, chunk=0)
        requests = [
            first,
            Request(prompt(1037, seed=5), NEW_TOKENS, chunk=512),
            Request(first.prompt, NEW_TOKENS, prefix_of=first, chunk=0),
            Request(first.prompt[:700] + prompt(333, seed=8), NEW_TOKENS, prefix_of=first, chunk=0),
        ]
        try:
            run = run_alone(engine, Planner(shape), requests)
            check(kind, engine, shape, requests, run)
        finally:
            engine.close()
        prefills = [
            sum(result.counters.sent_bytes for result in results)
            for plan, results in zip(run.plans, run.results, strict=True)
            if plan.sequences[0].count > 1
        ]
        sent[pipeline] = prefills
    assert sent[True] == sent[False]
    assert sum(sent[True]) > 0


@pytest.mark.parametrize("strategy", ["pass_kv", "ulysses"])
def test_what_others_wait_for_is_made_first(
    strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block writes its KV of the first layer before any attends, so that it can leave."""
    events, wrote, attend = [], Flight.wrote, Courier.attend

    def writes(self: Flight, block: int, layer: int) -> None:
        events.append((self, "wrote", block, layer))
        wrote(self, block, layer)

    def attends(self: Courier, block: int, layer: int, *arguments: Any) -> Partial:
        events.append((self.flight, "attends", block, layer))
        return attend(self, block, layer, *arguments)

    monkeypatch.setattr(Flight, "wrote", writes)
    monkeypatch.setattr(Courier, "attend", attends)
    engine = engine_between_hosts("llama", 2, 64, True)
    try:
        shape = Shape(2, 64, TIGHT_PAGES[64], strategy=strategy, decode="sharded", overlap=False)
        run_alone(engine, Planner(shape), [Request(prompt(1037), 1, chunk=0)])
    finally:
        engine.close()
    flights = {flight for flight, *_ in events}
    assert len(flights) == 2
    for flight in flights:
        order = [what for of, what, _, layer in events if of is flight and layer == 0]
        count = len(flight.blocks)
        assert count > 1 and order == ["wrote"] * count + ["attends"] * count


def plan_of(owners: list[int], start: int, count: int, page_size: int, slots: int) -> StepPlan:
    pages = [owner * slots + index for index, owner in enumerate(owners)]
    sequence = SequencePlan(
        slot=0, start=start, count=count, tokens=pack_ids([1] * count), pages=pack_ids(pages)
    )
    return StepPlan(epoch=1, group=tuple(sorted(set(owners))), sequences=(sequence,))


def test_blocks_cover_the_step_and_end_with_pages() -> None:
    draw = random.Random(11)
    for _ in range(300):
        ranks, size = draw.randint(2, 5), draw.choice((16, 64))
        owners = [draw.randrange(ranks) for _ in range(draw.randint(ranks, 60))]
        owners[:ranks] = range(ranks)
        total = (len(owners) - 1) * size + draw.randint(1, size)
        start = draw.randrange(total)
        plan = plan_of(owners, start, total - start, size, slots=100)
        layout = ShardLayout(plan, page_size=size, pages_per_rank=100)
        blocks = [block.sequences[0] for block in cut(plan, layout)]
        assert (blocks[0].start, blocks[-1].start + blocks[-1].count) == (start, total)
        for before, after in zip(blocks, blocks[1:], strict=False):
            assert before.count > 0 and before.start + before.count == after.start
            assert after.start % size == 0


def test_a_zigzag_is_cut_where_owners_change_and_in_between() -> None:
    owners = [0] * 32 + [1] * 32 + [1] * 32 + [0] * 31
    plan = plan_of(owners, 0, 127 * 16 - 3, 16, slots=200)
    layout = ShardLayout(plan, page_size=16, pages_per_rank=200)
    assert [b.sequences[0].start for b in cut(plan, layout)] == [0, 256, 512, 768, 1024, 1280, 1536]


def test_the_earliest_layer_goes_first_and_one_at_a_time() -> None:
    baton, order, inside = Baton(), [], []
    baton.take((0, 9))

    def work(turn: tuple[int, int]) -> None:
        baton.take(turn)
        inside.append(turn)
        assert len(inside) == 1
        order.append(turn)
        time.sleep(0.001)
        inside.remove(turn)
        baton.give()

    turns = [(2, 0), (1, 1), (0, 3), (1, 0), (0, 2)]
    threads = [threading.Thread(target=work, args=(turn,)) for turn in turns]
    for thread in threads:
        thread.start()
    while len(baton.waiting) < len(turns):
        time.sleep(0.001)
    baton.give()
    for thread in threads:
        thread.join(5)
    assert order == sorted(turns)


def test_a_block_that_fails_ends_the_others() -> None:
    kind, page_size = "llama", 16
    engine = engine_between_hosts(kind, 2, page_size, True)
    model = engine.models[1]
    forward, calls = model.forward, []

    def failing(*arguments: object) -> object:
        calls.append(None)
        if len(calls) == 2:
            raise ZeroDivisionError("a block's own trouble")
        return forward(*arguments)

    model.forward = failing
    shape = Shape(2, page_size, TIGHT_PAGES[page_size], decode="sharded", overlap=False)
    began = time.monotonic()
    with pytest.raises((ZeroDivisionError, ConnectionError)):
        drive(engine, Planner(shape), [Request(prompt(600), 4, chunk=0)])
    assert time.monotonic() - began < 30
    engine.close()
