"""A bound on what is dropped, held between hosts: one host's result, and no byte too many."""

from __future__ import annotations

import pytest
from test.dist.sparse_case import LAYERS, SLOTS, Outcome, Prompt, SparseCase
from test.dist.test_csa import BOUND, settled
from test.dist.test_csa_audit import records
from test.dist.test_csa_in_flight import run, same

from sps_runtime.attention.sparse_audit import ROWS
from sps_runtime.types.attention import EXACT, SparseCounters

SUMS = ("read_pairs", "causal_pairs", "fetched_units", "remote_units", "fallbacks")
FREE, HELD, WIDENED, SOME_FALL, ALL_FALL, HOPELESS = (
    {"superblock": 128, "budget": budget, "max_tau": max_tau}
    for budget, max_tau in ((0.2, 1), (0.2, 0.95), (0.4, 0.6), (0.2, 0.7), (0.2, 0.1), (0.2, 0.04))
)
EVERY_ROW = {**HELD, "superblock": 64}
"""As many rows would be audited as there are."""


def assert_same(found: Outcome, alone: Outcome) -> None:
    for got, want in zip(found.outs, alone.outs, strict=True):
        assert float((got - want).abs().max()) < BOUND
    assert found.counters.keys() == alone.counters.keys()
    for slot, wanted in alone.counters.items():
        assert sums(found.counters[slot]) == sums(wanted)
        got, want = records(found, slot), records(alone, slot)
        assert got.keys() == want.keys()
        assert all(abs(got[key][i] - want[key][i]) < 1e-4 for key in got for i in range(2))


def sums(counters: SparseCounters) -> dict[str, int]:
    return {name: getattr(counters, name) for name in SUMS}


@pytest.mark.parametrize("hosts", [(0, 1), (0, 0, 1, 1), (0, 1, 2)])
@pytest.mark.parametrize("changes", [HELD, WIDENED, SOME_FALL, HOPELESS, EVERY_ROW])
def test_hosts_change_nothing(hosts: tuple[int, ...], changes: dict[str, float]) -> None:
    prompt = Prompt(485, (256,), settled(**changes))
    settings = {"sp": len(hosts), "deal": 1, "data": 6}
    alone = SparseCase([prompt], **settings).run()
    assert_same(SparseCase([prompt], hosts=hosts, **settings).run(), alone)


def test_tp_ranks_ask_about_their_own_heads() -> None:
    prompt = Prompt(485, (256,), settled(**SOME_FALL))
    alone = SparseCase([prompt], sp=2, tp=2, data=6).run()
    assert_same(SparseCase([prompt], sp=2, tp=2, hosts=(0, 1), data=6).run(), alone)


def test_the_cases_are_what_they_are_called() -> None:
    """Nothing is widened, much is and nothing falls back, some falls back, all does."""
    free, held, widened, some, everything = (
        SparseCase([Prompt(485, (256,), settled(**changes))], sp=2, deal=1, data=6)
        .run()
        .counters[0]
        for changes in (FREE, HELD, WIDENED, SOME_FALL, ALL_FALL)
    )
    assert sums(held) == sums(free) and free.fallbacks == 0
    assert widened.fallbacks == 0 and free.read_pairs < widened.read_pairs < widened.causal_pairs
    assert 0 < some.fallbacks < everything.fallbacks
    assert everything.read_pairs == everything.causal_pairs


@pytest.mark.parametrize("hosts", [(0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("changes", [HELD, SOME_FALL, ALL_FALL, HOPELESS])
def test_bytes_are_those_of_pages_summaries_and_audits(
    hosts: tuple[int, ...], changes: dict[str, float]
) -> None:
    case = SparseCase(
        [Prompt(485, (), settled(**changes))], sp=len(hosts), hosts=hosts, deal=2, data=6
    )
    found, unit = case.run(), 2 * case.page * case.dim * 4
    counters, owner = found.counters[0], [page // SLOTS for page in case.pages[0]]
    asks = changes is not HOPELESS
    reads: dict[int, int] = {}  # pages before the end of a reader's last superblock
    rows = summaries = questions = 0
    for begin, end in ((0, 128), (128, 256), (256, 485)):  # twice as wide from 256 on
        reader = owner[begin // 16]
        reads[reader] = end // 16
        rows += asks * len({*owner[: begin // 16]} - {reader}) * ROWS
    for reader, last in reads.items():
        for other in {*range(case.sp)} - {reader}:
            units = owner[:last].count(other) * case.kv_heads
            summaries += units * case.operators.summary_nbytes(case.page, case.dim, 4)
            questions += (3 if asks else 1) * -(-units // 8)
    audits = rows * case.heads * (case.dim * 4 + 4)
    each_layer = summaries + questions + audits
    assert counters.remote_bytes == counters.fetched_units * unit + LAYERS * each_layer
    assert found.attention_bytes == counters.remote_bytes
    if changes is HELD:
        assert 0 < counters.fetched_units < 0.6 * counters.remote_units
    if changes in (ALL_FALL, HOPELESS):
        assert counters.fetched_units == counters.remote_units


def test_each_sequence_is_held_to_its_own() -> None:
    """Bounded sequences, one that is not and an exact one in the same steps."""
    prompts = [
        Prompt(300, (128,), settled(**SOME_FALL)),
        Prompt(70, (7,), EXACT),
        Prompt(485, (128, 256), settled(**HELD)),
        Prompt(257, (256,)),
        Prompt(200, (64,), settled(estimator="xattention", superblock=128, max_tau=0.5)),
    ]
    alone = SparseCase(prompts, sp=3, data=5).run()
    found = SparseCase(prompts, sp=3, hosts=(0, 1, 1), data=5).run()
    assert_same(found, alone)
    assert found.counters[0].fallbacks > 0
    assert sum(one.remote_bytes for one in found.counters.values()) < found.attention_bytes


@pytest.mark.parametrize(
    ("kind", "hosts", "page_size"), [("llama", (0, 1), 64), ("qwen3", (0, 1, 1), 16)]
)
@pytest.mark.parametrize("max_tau", [0.9, 0.65])
def test_bounds_are_held_in_flight(
    kind: str, hosts: tuple[int, ...], page_size: int, max_tau: float
) -> None:
    alone = run(kind, (0,) * len(hosts), page_size, False, max_tau=max_tau)
    together = run(kind, hosts, page_size, False, max_tau=max_tau)
    in_flight = run(kind, hosts, page_size, True, max_tau=max_tau)
    same(together, alone)
    same(in_flight, alone)
    assert abs(sum(in_flight.sent) - sum(together.sent)) < 0.05 * sum(together.sent)
