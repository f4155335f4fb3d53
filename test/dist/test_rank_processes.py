"""The real rank process over shared memory: a pairwise subset of the matrix, and how it ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from test.dist.helpers.exact_models import exact_model
from test.dist.helpers.exactness import TIGHT_PAGES, check_tokens, requests_of_a_cell
from test.dist.helpers.planner import Planner, Shape
from test.dist.helpers.process_engine import ProcessEngine
from test.dist.helpers.thread_engine import drive

from sps_runtime.types.plan import SequencePlan, StepPlan
from sps_runtime.types.tokens import pack_ids

KIND = "qwen3"
# (sp, tp, arch, page size, strategies): every pair of values of two columns occurs, 18 cells.
ENGINES = [
    (1, 1, "ntp", 16, ("pass_kv",)),
    (1, 2, "ntp", 64, ("pass_kv",)),
    (2, 1, "ntp", 64, ("pass_kv", "pass_q")),
    (2, 1, "tp", 16, ("ulysses", "pass_kv")),
    (3, 1, "ntp", 16, ("pass_q", "ulysses")),
    (3, 1, "tp", 64, ("pass_kv", "ulysses")),
    (4, 1, "ntp", 64, ("ulysses", "pass_kv")),
    (4, 1, "tp", 16, ("pass_q", "ulysses")),
    (2, 2, "ntp", 16, ("pass_kv", "ulysses")),
    (2, 2, "tp", 64, ("pass_q", "pass_kv")),
]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.timeout(400)  # four processes on a machine whose cores are busy
@pytest.mark.parametrize("cell", ENGINES, ids=["-".join(map(str, cell[:4])) for cell in ENGINES])
def test_processes_say_what_one_rank_says(cell: tuple) -> None:
    sp, tp, arch, page_size, strategies = cell
    pages = TIGHT_PAGES[page_size]
    engine = ProcessEngine(
        exact_model(KIND).directory,
        sp=sp,
        tp=tp,
        arch=arch,
        page_size=page_size,
        pages_per_rank=pages,
    )
    shape = Shape(sp, page_size, pages, dealing="random", seed=sp * 7 + tp)
    epoch = 0
    try:
        assert {ready.pages for ready in engine.ready.values()} == {pages}
        assert len({ready.link for ready in engine.ready.values()}) == 1
        for strategy in strategies:
            requests = requests_of_a_cell(page_size)
            planner = Planner(replace(shape, strategy=strategy), epoch)
            run = drive(engine, planner, requests)
            check_tokens(KIND, requests)
            epoch = planner.epoch
            sent = sum(r.counters.sent_bytes for results in run.results for r in results)
            assert (sent > 0) == (sp > 1)
        assert engine.stop() == [0] * sp * tp
    finally:
        engine.close()


@pytest.fixture
def one_rank() -> Iterator[ProcessEngine]:
    engine = ProcessEngine(exact_model(KIND).directory, pages_per_rank=8)
    yield engine
    engine.close()


def test_a_step_that_fails_is_told_and_ends_the_process(one_rank: ProcessEngine) -> None:
    """The token's page lies on a rank that is not in the group."""
    broken = SequencePlan(0, 0, 1, pack_ids([1]), pack_ids([8]))
    plan = StepPlan(1, (0,), (broken,))
    one_rank.send(plan)
    with pytest.raises(RuntimeError, match=r"rank 0: ValueError: .*outside its group"):
        one_rank.receive(plan)
    assert one_rank.children[0].process.wait(10.0) == 1
