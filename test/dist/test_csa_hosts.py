"""Block-sparse prefill over several hosts: the reference's choices, outputs and bytes."""

from __future__ import annotations

import pytest
from test.dist.sparse_case import Outcome, Prompt, SparseCase
from test.dist.test_csa import BOUND, assert_exact, assert_reference, settled

from sps_runtime.types.attention import EXACT

HOSTS = [(0, 1), (0, 0, 1, 1), (0, 1, 2, 3), (0, 1, 1)]


def same(found: Outcome, alone: Outcome) -> None:
    assert found.read == alone.read
    for got, want in zip(found.outs, alone.outs, strict=True):
        assert float((got - want).abs().max()) < BOUND


@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("cuts", [(), (256,), (64, 128, 384)])
@pytest.mark.parametrize("from_start", [False, True])
def test_hosts_change_nothing(
    hosts: tuple[int, ...], cuts: tuple[int, ...], from_start: bool
) -> None:
    """Odd lengths, chunks, summaries that came in earlier steps: what one host computes."""
    settings = {"sp": len(hosts), "deal": 3, "data": 4, "summaries_from_start": from_start}
    case = SparseCase([Prompt(485, cuts)], hosts=hosts, **settings)
    found, alone = case.run(), SparseCase([Prompt(485, cuts)], **settings).run()
    same(found, alone)
    assert_reference(case, found)
    counters, want = found.counters[0], alone.counters[0]
    assert (counters.fetched_units, counters.remote_units) == (want.fetched_units, want.remote_units)
    questions = counters.remote_bytes - want.remote_bytes
    assert 0 < questions < 0.1 * want.remote_bytes
    assert found.attention_bytes - alone.attention_bytes == questions


@pytest.mark.parametrize("hosts", HOSTS)
def test_mixed_steps(hosts: tuple[int, ...]) -> None:
    prompts = [
        Prompt(200, (64,), settled(tail="none")),
        Prompt(70, (7,), EXACT),
        Prompt(485, (128, 256), settled(budget=0.5)),
        Prompt(257, (256,)),
    ]
    case = SparseCase(prompts, sp=len(hosts), hosts=hosts, data=5, window=40)
    found = case.run()
    same(found, SparseCase(prompts, sp=len(hosts), data=5, window=40).run())
    assert_exact(case, found, 1, window=40)


@pytest.mark.parametrize("changes", [{"max_tau": 0.05}, {"estimator": "xattention"}])
def test_what_reads_everything_fetches_everything(changes: dict[str, object]) -> None:
    prompt = Prompt(485, (256,), settled(**changes))
    case = SparseCase([prompt], sp=2, hosts=(0, 1), data=6)
    same(case.run(), SparseCase([prompt], sp=2, data=6).run())
