"""A rank's rows of a plan, against a slow and obvious computation."""

from __future__ import annotations

import mmap
import random

import pytest

from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.runner.input_batch import InputBatch, build_input
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids, unpack_ids

PAGE, PAGES_PER_RANK = 4, 100
SAMPLE = SamplePlan(SamplingParams())


def random_plan(rng: random.Random, group: tuple[int, ...], placement: str) -> StepPlan:
    sequences = []
    for slot in range(rng.randint(1, 5)):
        start, count = rng.randint(0, 9), rng.randint(1, 11)
        from_board = rng.random() < 0.4
        pages = [
            rng.choice(group) * PAGES_PER_RANK + rng.randrange(PAGES_PER_RANK)
            for _ in range(-(-(start + count) // PAGE))
        ]
        sequences.append(
            SequencePlan(
                slot=slot,
                start=start,
                count=count,
                tokens=pack_ids(rng.randrange(500) for _ in range(count - from_board)),
                pages=pack_ids(pages),
                board_epoch=7 if from_board else -1,
                sample=SAMPLE if rng.random() < 0.6 else None,
                prompt_logprobs_from=rng.choice([-1, 0, 1, start + 2]),
                next_token=rng.choice([-1, 499]),
                hidden_state=rng.random() < 0.3,
            )
        )
    return StepPlan(9, group, tuple(sequences), placement=placement)  # type: ignore[arg-type]


def expected(plan: StepPlan, member: int) -> tuple[list, list, list, list]:
    """(token, position), sampled (row, sequence), judged (row, sequence, position, target),
    reported (row, sequence)."""
    rows, sampled, judged, reported = [], [], [], []
    for index, s in enumerate(plan.sequences):
        tokens = list(unpack_ids(s.tokens))
        known = len(tokens)
        if s.board_epoch >= 0:
            tokens.append(1000 + s.slot)
        pages = unpack_ids(s.pages)
        for offset in range(s.count):
            position = s.start + offset
            owner = pages[position // PAGE] // PAGES_PER_RANK
            if plan.placement == "sharded" and plan.group[member] != owner:
                continue
            if offset == s.count - 1 and s.sample is not None:
                sampled.append((len(rows), index))
            if offset == s.count - 1 and s.hidden_state:
                reported.append((len(rows), index))
            target = s.next_token if offset == s.count - 1 else tokens[offset + 1]
            is_prompt = target >= 0 and (offset == s.count - 1 or offset + 1 < known)
            if s.prompt_logprobs_from >= 0 and position + 1 >= s.prompt_logprobs_from and is_prompt:
                judged.append((len(rows), index, position + 1, target))
            rows.append((tokens[offset], position))
    return rows, sampled, judged, reported


def build(plan: StepPlan, member: int, board: TokenBoard) -> InputBatch:
    layout = ShardLayout(plan, page_size=PAGE, pages_per_rank=PAGES_PER_RANK)
    return build_input(plan, layout, member, board)


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
@pytest.mark.parametrize("group", [(2,), (0, 1), (0, 2, 3)])
def test_every_rank_takes_its_rows(placement: str, group: tuple[int, ...]) -> None:
    board = TokenBoard(mmap.mmap(-1, board_bytes(8)))
    board.write(7, list(range(5)), [1000 + slot for slot in range(5)])
    for seed in range(60):
        plan = random_plan(random.Random(seed), group, placement)
        parts = [expected(plan, member) for member in range(len(group))]
        for member, (rows, sampled, judged, reported) in enumerate(parts):
            batch = build(plan, member, board)
            got = zip(batch.tokens_T.tolist(), batch.positions_T.tolist(), strict=True)
            assert list(got) == rows, f"seed {seed}"
            assert batch.board_tokens.keys() <= set(range(len(plan.sequences)))
            got = zip(batch.sampled.rows.tolist(), batch.sampled.sequences, strict=True)
            assert list(got) == sampled, f"seed {seed}"
            assert batch.sampled.per_member == tuple(len(part[1]) for part in parts)
            got = zip(batch.reported.rows.tolist(), batch.reported.sequences, strict=True)
            assert list(got) == reported, f"seed {seed}"
            j = batch.judged
            got = zip(j.rows.tolist(), j.sequences, j.positions, j.targets, strict=True)
            assert list(got) == judged, f"seed {seed}"
            assert j.per_member == tuple(len(part[2]) for part in parts)


def test_a_rank_waits_only_for_the_tokens_it_computes() -> None:
    """The board is empty; rank 0 owns no unknown token and goes on."""
    board = TokenBoard(mmap.mmap(-1, board_bytes(1)))
    pages = pack_ids([0, PAGES_PER_RANK])
    sequence = SequencePlan(0, 2, 3, pack_ids([8, 9]), pages, board_epoch=3)
    batch = build(StepPlan(4, (0, 1), (sequence,)), 0, board)
    assert batch.tokens_T.tolist() == [8, 9]
    assert batch.positions_T.tolist() == [2, 3]
