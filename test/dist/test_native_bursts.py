"""Bursts whose steps run in a native loop are those whose steps are executed one by one: tokens,
logprobs, bytes, ends; whichever ranks of a group run them which way."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import msgspec
import pytest
import torch
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.thread_engine import ThreadEngine

from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.types.plan import (
    Burst,
    SamplePlan,
    SequencePlan,
    StepPlan,
    StepResult,
)
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

pytestmark = pytest.mark.skipif(choose_ops().kernels is None, reason="replays need the kernels")

PAGE, PAGES = 16, 64
GREEDY = SamplePlan(SamplingParams(temperature=0.0))
DRAWN = SamplePlan(SamplingParams(temperature=0.8, top_p=0.9, seed=7))
JUDGED = SamplePlan(SamplingParams(temperature=0.0), logprobs=2, logprob_ids=(3,))
PENALIZED = SamplePlan(SamplingParams(temperature=0.0, frequency_penalty=0.5))


@dataclass(frozen=True)
class Cell:
    """A mesh, what its sequences want, and the ranks that run natively."""

    kind: str
    sp: int
    tp: int
    samples: tuple[SamplePlan, ...]
    native: tuple[int, ...] | None = None
    dtype: str = "float32"


@dataclass
class Sequence:
    slot: int
    tokens: list[int]
    pages: list[int]
    sample: SamplePlan


class Driver:
    """Prefills some sequences and then plans bursts of them."""

    def __init__(self, cell: Cell) -> None:
        torch.set_num_threads(1)
        model = exact_model(cell.kind)
        self.engine = ThreadEngine(
            model.config,
            model.arena(cell.tp, cell.dtype),
            sp=cell.sp,
            tp=cell.tp,
            page_size=PAGE,
            pages_per_rank=PAGES,
            record=True,
            native=cell.native,
        )
        self._group, self._epoch = tuple(range(cell.sp)), 0
        free = [[rank * PAGES + slot for slot in range(PAGES)] for rank in range(cell.sp)]
        draw = random.Random(3)
        self.sequences = [
            Sequence(
                slot=2 * index + 1,
                tokens=prompt((13, 45, 30)[index % 3], seed=index),
                pages=[free[draw.randrange(cell.sp)].pop() for _ in range(9)],
                sample=sample,
            )
            for index, sample in enumerate(cell.samples)
        ]

    def run(self, sequences: list[SequencePlan], burst: Burst | None) -> list[StepResult]:
        self._epoch += 1
        decode = burst is not None or sequences[0].count == 1
        alone = len(self._group) == 1
        plan = StepPlan(
            self._epoch,
            self._group,
            tuple(sequences),
            "replicated" if decode and not alone else "sharded",
            "pass_q" if decode else "pass_kv",
            "decode" if decode else "prefill",
            burst,
        )
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan) == plan
        self.engine.send(plan)
        results = [answer.result for answer in self.engine.receive(plan)]
        self._epoch += plan.steps - 1
        found = [token for result in results for token in result.sampled]
        for sequence in self.sequences:
            sequence.tokens += [each.token for each in found if each.slot == sequence.slot]
        return sorted(results, key=lambda result: result.rank)

    def prefill(self) -> list[StepResult]:
        return self.run([self._plan(s, 0, len(s.tokens), s.tokens) for s in self.sequences], None)

    def burst(self, steps: int, stops: int = -1, live: bool = False) -> list[StepResult]:
        plans = [
            self._plan(s, len(s.tokens) - 1, 1, s.tokens[-1:], steps) for s in self.sequences
        ]
        ends = ((stops,), *((),) * (len(plans) - 1))
        rids = tuple(f"r{s.slot}" if live else "" for s in self.sequences)
        return self.run(plans, Burst(steps, ends, rids, tuple(len(s.tokens) for s in self.sequences)))

    def read_board(self, epoch: int) -> list[StepResult]:
        """A step whose tokens are those that the step `epoch` left on the board."""
        plans = [self._plan(s, len(s.tokens) - 1, 1, []) for s in self.sequences]
        return self.run([msgspec.structs.replace(p, board_epoch=epoch) for p in plans], None)

    def _plan(
        self, sequence: Sequence, start: int, count: int, tokens: list[int], steps: int = 1
    ) -> SequencePlan:
        pages = sequence.pages[: (start + count + steps - 2) // PAGE + 1]
        return SequencePlan(
            sequence.slot, start, count, pack_ids(tokens), pack_ids(pages), sample=sequence.sample
        )


def counts(result: StepResult) -> tuple[int, ...]:
    found = result.counters
    return found.sent_bytes, found.linear_bytes, found.physical_bytes, found.token_layers


def observed(results: list[StepResult]) -> list[tuple]:
    return [(r.rank, r.epoch, r.steps, r.sampled, counts(r)) for r in results]


def serve(cell: Cell) -> tuple[list[list[tuple]], list[int], list]:
    """Bursts over several pages: silent, told of, stopped on the way; and a step behind them."""
    driver = Driver(cell)
    try:
        found = [driver.prefill(), driver.burst(3), driver.burst(30)]
        stop = driver.sequences[0].tokens[-1]
        found += [driver.burst(20, live=True), driver.burst(25, stop)]
        last = found[-1][0]
        found.append(driver.read_board(last.epoch + last.steps - 1))
        assert last.steps < 25 or stop not in driver.sequences[0].tokens[-26:-2]
        told = sorted((item.rid, item.first, item.tokens) for item in driver.engine.told)
        return [observed(results) for results in found], driver.engine.loops, told
    finally:
        driver.engine.close()


SEVERAL = (GREEDY, GREEDY, GREEDY)
CELLS = [
    Cell("llama", 1, 1, (GREEDY,)),
    Cell("qwen3", 2, 1, (GREEDY,)),
    Cell("qwen3", 2, 1, SEVERAL, dtype="bfloat16"),
    Cell("qwen3", 1, 2, SEVERAL),
    Cell("qwen3", 2, 2, SEVERAL),
    Cell("window", 2, 1, SEVERAL),
    Cell("window", 3, 1, SEVERAL, native=(0,)),
    Cell("qwen3", 3, 1, SEVERAL, native=(1, 2)),
    Cell("qwen3", 2, 1, (GREEDY, DRAWN, JUDGED)),
    Cell("qwen3", 2, 1, (DRAWN, DRAWN), native=(1,)),
]


def name(cell: Cell) -> str:
    return f"{cell.kind}-{cell.sp}-{cell.tp}-{len(cell.samples)}-{cell.native}"


@pytest.mark.parametrize("cell", CELLS, ids=name)
def test_a_native_burst_is_an_executed_one(cell: Cell) -> None:
    natively, loops, told = serve(cell)
    executed, none, told_alike = serve(replace(cell, native=()))
    assert natively == executed and told == told_alike and told
    everyone = range(cell.sp * cell.tp) if cell.native is None else cell.native
    # The first burst meets a shape that is not recorded yet, but records it in its first step.
    assert sorted(loops) == sorted([*everyone] * 4) and not none


def test_what_needs_other_tokens_is_executed() -> None:
    driver = Driver(Cell("qwen3", 1, 1, (GREEDY, PENALIZED)))
    try:
        driver.prefill()
        assert driver.burst(4)[0].steps == 4 and not driver.engine.loops
    finally:
        driver.engine.close()
