"""A layout against the plainest loop over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps_runtime.attention.page_reads import cut_pieces, needed, query_runs
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.types.plan import SequencePlan, StepPlan

PAGES_PER_RANK = 50


@st.composite
def plans(draw: st.DrawFn) -> tuple[StepPlan, int]:
    page = draw(st.sampled_from([1, 4, 16]))
    group = tuple(sorted(draw(st.sets(st.integers(0, 4), min_size=1, max_size=4))))
    sequences = []
    for slot in range(draw(st.integers(1, 4))):
        start, count = draw(st.integers(0, 40)), draw(st.integers(1, 40))
        total = -(-(start + count) // page)
        owners = draw(st.lists(st.sampled_from(group), min_size=total, max_size=total))
        pages = [
            owner * PAGES_PER_RANK + index % PAGES_PER_RANK for index, owner in enumerate(owners)
        ]
        extra = [0] * draw(st.integers(0, 2))  # pages allocated ahead are ignored
        sequences.append(
            SequencePlan(
                slot=slot, start=start, count=count, tokens=b"",
                pages=np.asarray(pages + extra, dtype=np.int32).tobytes(),
            )
        )  # fmt: skip
    placement = draw(st.sampled_from(["sharded", "replicated"]))
    return StepPlan(1, group, tuple(sequences), placement), page


def owner_of(plan: StepPlan, sequence: int, position: int, page: int) -> tuple[int, int]:
    """(SP rank, slot) of a position's page."""
    ids = np.frombuffer(plan.sequences[sequence].pages, dtype=np.int32)
    return divmod(int(ids[position // page]), PAGES_PER_RANK)


@settings(deadline=None, max_examples=150)
@given(plans())
def test_rows_writes_runs_and_last_rows(drawn: tuple[StepPlan, int]) -> None:
    plan, page = drawn
    layout = ShardLayout(plan, page_size=page, pages_per_rank=PAGES_PER_RANK)
    tokens = [
        (index, position)
        for index, sequence in enumerate(plan.sequences)
        for position in range(sequence.start, sequence.start + sequence.count)
    ]
    for member, sp_rank in enumerate(plan.group):
        owned = [token for token in tokens if owner_of(plan, *token, page)[0] == sp_rank]
        mine = owned if plan.placement == "sharded" else tokens
        assert layout.rows[member] == len(mine)
        assert [tokens[i] for i in layout.token_index(member)] == mine
        assert layout.positions(member).tolist() == [position for _, position in mine]
        assert layout.sequences(member).tolist() == [sequence for sequence, _ in mine]
        walked = [
            (sequence, position + i)
            for sequence, row, count, position in layout.runs(member)
            for i in range(count)
            if mine[row + i] == (sequence, position + i)
        ]
        assert walked == mine
        writes = layout.writes(member)
        rows = range(len(mine)) if writes.rows is None else writes.rows.tolist()
        assert [mine[row] for row in rows] == owned
        assert list(zip(writes.slots.tolist(), writes.offsets.tolist(), strict=True)) == [
            (owner_of(plan, *token, page)[1], token[1] % page) for token in owned
        ]
    for index, sequence in enumerate(plan.sequences):
        last = sequence.start + sequence.count - 1
        member, row = layout.last_row(index)
        assert plan.group[member] == owner_of(plan, index, last, page)[0]
        assert tokens[layout.token_index(member)[row]] == (index, last)


@settings(deadline=None, max_examples=150)
@given(plans(), st.one_of(st.none(), st.integers(1, 50)))
def test_pieces_cover_what_is_seen_and_no_more(
    drawn: tuple[StepPlan, int], window: int | None
) -> None:
    plan, page = drawn
    layout = ShardLayout(plan, page_size=page, pages_per_rank=PAGES_PER_RANK)
    for member in range(len(plan.group)):
        runs = layout.runs(member)
        sees = {
            (sequence, row + i, flat)
            for sequence, row, count, position in runs
            for i in range(count)
            for flat in range(layout.pages.first[sequence], layout.pages.first[sequence + 1])
            for key in range(int(layout.pages.tokens[flat]))
            if 0 <= position + i - (layout.pages.positions[flat] + key) < (window or 10**9)
        }
        assert set(np.flatnonzero(needed(layout, runs, window))) == {flat for *_, flat in sees}
        for sp_rank in plan.group:
            index = np.flatnonzero(layout.pages.owners == sp_rank)
            pieces = cut_pieces(layout, runs, index, window)
            listed = query_runs(layout, pieces, index)
            offered = {
                (sequence, run.row + i, int(flat))
                for (sequence, *_), run, begin, end in zip(
                    pieces.runs, listed, pieces.begin, pieces.end, strict=True
                )
                for i in range(run.count)
                for flat in index[begin:end]
            }
            assert {s for s in sees if s[2] in set(index)} <= offered
            seeing = {row for _, row, flat in sees if flat in set(index)}
            if window is None:
                assert set(pieces.rows().tolist()) == seeing
            else:
                assert set(pieces.rows().tolist()) >= seeing


def test_a_plan_that_contradicts_itself_is_refused() -> None:
    def plan(pages: list[int], group: tuple[int, ...]) -> StepPlan:
        packed = np.asarray(pages, dtype=np.int32).tobytes()
        sequence = SequencePlan(slot=0, start=0, count=20, tokens=b"", pages=packed)
        return StepPlan(3, group, (sequence,))

    with pytest.raises(ValueError, match="do not cover"):
        ShardLayout(plan([0], (0, 1)), page_size=16, pages_per_rank=PAGES_PER_RANK)
    with pytest.raises(ValueError, match="outside its group"):
        ShardLayout(plan([0, 120], (0, 1)), page_size=16, pages_per_rank=PAGES_PER_RANK)
