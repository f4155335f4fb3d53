"""What a burst's steps are fed is what each step by itself is filled with."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sps_runtime.attention.decode_inputs import DecodeInputs
from sps_runtime.attention.row_pages import PageReaders
from sps_runtime.runner.bursts import burst_step
from sps_runtime.types.plan import Burst, SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

PAGE, PER_RANK, STEPS = 4, 100, 19
WINDOWS = (None, 1, 6, 30)


def plan_of(group: tuple[int, ...], ranks: int, draw: random.Random) -> StepPlan:
    """Sequences whose later pages lie in the group, some of the earlier ones elsewhere."""
    sequences = []
    for index in range(draw.choice([1, 3])):
        start = draw.randrange(40)
        known, whole = start // PAGE, (start + STEPS - 1) // PAGE + 1
        owners = [draw.randrange(ranks) if i < known else draw.choice(group) for i in range(whole)]
        pages = [owner * PER_RANK + draw.randrange(PER_RANK) for owner in owners]
        sample = SamplePlan(SamplingParams())
        sequences.append(
            SequencePlan(index, start, 1, pack_ids([5]), pack_ids(pages), sample=sample)
        )
    none = ((),) * len(sequences)
    burst = Burst(STEPS, none, ("",) * len(none), (0,) * len(none))
    return StepPlan(7, group, tuple(sequences), "replicated", "pass_q", "decode", burst)


def inputs_for(plan: StepPlan, rank: int, ranks: int) -> DecodeInputs:
    group = plan.group
    readers = tuple(
        group.index(other) if other in group else other % len(group) for other in range(ranks)
    )
    who = PageReaders(PAGE, PER_RANK, rank, group.index(rank), readers)
    return DecodeInputs(len(plan.sequences), 256, 2, who)


def seen(inputs: DecodeInputs, window: int | None) -> list[tuple]:
    """Of each row: its item but for the places in the lists, and the lists."""
    pages = inputs.lists(window)
    rows = []
    for item in pages.items.tolist():
        begin, end = item[3], item[3] + item[4]
        ids, positions = pages.page_ids[begin:end], pages.page_positions[begin:end]
        rows.append(((*item[:3], *item[4:]), ids.tolist(), positions.tolist()))
    return rows


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("group", "ranks"), [((0,), 1), ((1,), 3), ((0, 1), 2), ((0, 2), 4)])
def test_feeds_are_fills(group: tuple[int, ...], ranks: int, seed: int) -> None:
    plan = plan_of(group, ranks, random.Random(seed))
    for rank in group:
        fed, filled = inputs_for(plan, rank, ranks), inputs_for(plan, rank, ranks)
        first = burst_step(plan, 0, PAGE)
        for inputs in (fed, filled):
            inputs.fill(first, [5] * len(plan.sequences))
            for window in WINDOWS:
                inputs.lists(window)
        feeds = fed.feeds(plan, STEPS)
        for step in range(STEPS):
            for array, values in feeds.feeds:
                assert array.dtype == values.dtype and values.flags.c_contiguous
                array[...] = values[step]
            filled.fill(burst_step(plan, step, PAGE), [5] * len(plan.sequences))
            for one, other in (
                (fed.positions_T, filled.positions_T),
                (fed.slots_T, filled.slots_T),
                (fed.offsets_T, filled.offsets_T),
            ):
                assert np.array_equal(one, other)
            for window in WINDOWS:
                assert seen(fed, window) == seen(filled, window)
                assert feeds.remote_S[window][step] == filled.remote_tokens(window)


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    plan = plan_of((0, 1), 2, random.Random(1))
    short = plan.sequences[0].pages[:-4]
    elsewhere = plan.sequences[0].pages[:-4] + pack_ids([5 * PER_RANK])
    for pages, message in ((short, "do not cover"), (elsewhere, "outside its group")):
        sequence = SequencePlan(0, plan.sequences[0].start, 1, pack_ids([5]), pages)
        wrong = StepPlan(7, (0, 1), (sequence,), "replicated", "pass_q", "decode", plan.burst)
        inputs = inputs_for(wrong, 0, 2)
        inputs.fill(burst_step(wrong, 0, PAGE), [5])
        with pytest.raises(ValueError, match=message):
            inputs.feeds(wrong, STEPS)
