"""The real scheduler core over real ranks in threads: same tokens, whatever it decides.

Pools are small, so that requests wait, share prefixes, are retracted and begin again.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import MARGIN, NEW_TOKENS, first_difference, truth
from test.dist.helpers.thread_engine import ThreadEngine

from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.costmodel.strategy import ModelShape
from sps_runtime.scheduler.scheduler import ModelLimits, Scheduler
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
from sps_runtime.types.messages import LinkCost, TokensOut
from sps_runtime.types.plan import StepPlan
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

KIND = "qwen3"
# sp, tp, arch, strategy, page size, chunk, pages per rank, seconds per message
CELLS = [
    (1, 1, "ntp", "auto", 16, 64, 24, 0.0),
    (2, 1, "ntp", "auto", 16, 64, 16, 1e-6),
    (2, 1, "ntp", "pass_q", 64, -1, 5, 1e-2),
    (3, 1, "tp", "auto", 16, 1000, 12, 1e-6),
    (4, 1, "ntp", "auto", 16, 64, 9, 1e-6),
    (4, 1, "ntp", "ulysses", 64, 1000, 4, 1e-2),
    (2, 2, "ntp", "auto", 16, 64, 16, 1e-6),
    (2, 2, "tp", "pass_kv", 64, -1, 5, 1e-6),
]


EVERYTHING = SparseSettings(budget=1.0, tau=0.0, superblock=64, wide_from=128)
CSA = AttentionSpec("csa", EVERYTHING)
"""Superblocks of one block, then two: chosen, placed and cached as ever, and nothing left out."""
CSA_CELLS = [
    (1, 1, "ntp", "auto", 16, 64, 24, 0.0),
    (2, 1, "ntp", "auto", 16, 64, 16, 1e-6),
    (3, 1, "ntp", "pass_q", 64, -1, 5, 1e-2),
    (4, 1, "ntp", "ulysses", 16, 64, 16, 1e-2),
    (2, 2, "ntp", "auto", 16, 64, 16, 1e-6),
]


def make_scheduler(cell: tuple, bursts: bool = True) -> Scheduler:
    sp, tp, arch, strategy, page_size, chunk, pages, latency = cell
    config = exact_model(KIND).config
    shape = ModelShape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        q_heads=config.num_heads // tp,
        kv_heads=config.num_kv_heads // tp,
        head_dim=config.head_dim,
        linear_params=10**6,
        element_bytes=4,
    )
    return Scheduler(
        SchedulerConfig(chunked_prefill_size=chunk, conservativeness=0.1, csa_min_tokens=0),
        CacheConfig(page_size, pages),
        ParallelConfig(sp, tp, arch, strategy),
        ModelLimits(4096, frozenset(), config.vocab_size),
        StepCosts(shape, LinkCost(latency, 1e9, zero_copy=True), flops_per_s=1e9),
        bursts=bursts,
    )


def traffic(chance: random.Random) -> list[list[int]]:
    """Prompts that share prefixes, of lengths around pages and chunks."""
    base = prompt(150, seed=5)
    prompts = [base, base, base[:64], base[:65] + prompt(7), base[:100] + prompt(40), prompt(1)]
    prompts += [prompt(length, seed=6) for length in (15, 16, 17, 63, 131)]
    chance.shuffle(prompts)
    return prompts


def request(index: int, tokens: list[int], attention: AttentionSpec = EXACT) -> GenerateRequest:
    params = SamplingParams(temperature=0.0, max_new_tokens=NEW_TOKENS, ignore_eos=True)
    return GenerateRequest(f"r{index}", pack_ids(tokens), params, attention=attention)


def serve(
    engine: ThreadEngine,
    scheduler: Scheduler,
    prompts: list[list[int]],
    chance: random.Random,
    sparse: bool = False,
) -> tuple[dict[str, list[int]], list[StepPlan], set[str]]:
    """Run all prompts, added one by one between results; one in four is aborted on the way. With
    `sparse` two in three are csa."""
    outputs: dict[str, list[int]] = {}
    finals: Counter[str] = Counter()
    plans: list[StepPlan] = []
    waiting = [
        request(index, tokens, CSA if sparse and index % 3 else EXACT)
        for index, tokens in enumerate(prompts)
    ]
    doomed = {item.rid: chance.randrange(1, 40) for item in waiting if chance.random() < 0.25}
    owed = 0

    def take(news: list[TokensOut]) -> None:
        for item in news:
            outputs.setdefault(item.rid, []).extend(item.tokens)
            finals[item.rid] += item.finish is not None

    while waiting or owed or not scheduler.idle:
        if waiting and chance.random() < 0.3:
            take(scheduler.add(waiting.pop()))
        for plan in scheduler.next_plans():
            engine.send(plan)
            plans.append(plan)
            owed += len(plan.group) * engine.tp
        if owed:
            take(scheduler.on_result(engine.next_answer().result))
            owed -= 1
        for rid, limit in list(doomed.items()):
            if len(outputs.get(rid, ())) >= limit and not finals[rid]:
                take(scheduler.abort(rid))
                scheduler.check()
    assert set(finals.values()) == {1}, "each request ends with exactly one final message"
    return outputs, plans, {rid for rid in doomed if len(outputs[rid]) < NEW_TOKENS}


@pytest.mark.parametrize("cell", CELLS, ids=["-".join(map(str, cell[:7])) for cell in CELLS])
def test_what_is_scheduled_is_what_one_rank_says(cell: tuple) -> None:
    plans = check(cell, sparse=False)
    slow_messages = cell[-1] > 1e-3  # then groups decode sharded, and only ranks alone in bursts
    assert slow_messages or any(plan.burst for plan in plans)


@pytest.mark.parametrize("cell", CELLS[:4], ids=["-".join(map(str, c[:7])) for c in CELLS[:4]])
def test_so_it_is_without_bursts(cell: tuple) -> None:
    plans = check(cell, sparse=False, bursts=False)
    assert any(s.board_epoch >= 0 for plan in plans for s in plan.sequences)
    assert not any(plan.burst for plan in plans)


@pytest.mark.parametrize("cell", CSA_CELLS, ids=["-".join(map(str, c[:7])) for c in CSA_CELLS])
def test_csa_that_leaves_nothing_out_is_what_one_rank_says(cell: tuple) -> None:
    plans = check(cell, sparse=True)
    prefills = [s for plan in plans for s in plan.sequences if s.attention.mode == "csa"]
    assert len(prefills) > 4


def check(cell: tuple, *, sparse: bool, bursts: bool = True) -> list[StepPlan]:
    """Serve a cell's traffic and compare every answer; the plans."""
    torch.set_num_threads(1)
    sp, tp, arch, _, page_size, _, pages, _ = cell
    model, chance = exact_model(KIND), random.Random(str(cell))
    engine = ThreadEngine(
        model.config,
        model.arena(tp),
        sp=sp,
        tp=tp,
        arch=arch,
        page_size=page_size,
        pages_per_rank=pages,
        record=bursts,
    )
    scheduler, prompts = make_scheduler(cell, bursts), traffic(chance)
    try:
        outputs, plans, aborted = serve(engine, scheduler, prompts, chance, sparse)
    finally:
        engine.close()
    assert bool(engine.loops) == any(plan.burst for plan in plans)
    for item in engine.told:
        whole = outputs[item.rid]
        said = whole[item.first : item.first + 1]
        assert item.tokens == tuple(said) or item.rid in aborted, "told another token"
    for index, tokens in enumerate(prompts):
        expected, got = truth(KIND, tuple(tokens)), outputs[f"r{index}"]
        if f"r{index}" not in aborted:
            assert len(got) == NEW_TOKENS
        same = first_difference(got, expected.tokens[: len(got)])
        assert same == len(got) or expected.margin(same) < MARGIN, (index, same)
    state = scheduler.state()
    assert state.cached_tokens_total > 0
    assert all(rank.used_pages == 0 for rank in state.ranks)
    print(cell, "retractions", state.retractions_total, Counter(p.placement for p in plans))
    return plans
