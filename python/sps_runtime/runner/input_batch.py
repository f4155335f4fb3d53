"""From a plan to the tokens one rank computes: vector arithmetic over the plan's packed ids.

What lies where is `attention.shard_layout`'s; here a rank takes its ids, waits for those that are
still being sampled, and finds the rows that go through the language-model head. Every rank derives
how many such rows *each* member has, because the head may cross ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.runner.token_board import TokenBoard
from sps_runtime.types.plan import StepPlan

Ints = npt.NDArray[np.int64]

UNKNOWN = -1
"""Stands for a token that is still on the board, and for "judges nothing"."""


@dataclass(frozen=True)
class RowSet:
    """Rows that go through the last norm, and mostly through the language-model head.

    Attributes:
        rows: int64 ``[n]`` rows among this rank's tokens.
        by_member: for each member of the group, the sequence (index in the plan) of each such row
            that it has.
        member: this rank's index in the group.
    """

    rows: Tensor
    by_member: tuple[Ints, ...]
    member: int

    @property
    def sequences(self) -> Ints:
        """The sequence of each of this rank's rows."""
        return self.by_member[self.member]

    @property
    def per_member(self) -> tuple[int, ...]:
        """How many such rows each member has."""
        return tuple(len(sequences) for sequences in self.by_member)


@dataclass(frozen=True)
class JudgedRows(RowSet):
    """Rows whose logits judge a prompt token.

    Attributes:
        positions: of the judged tokens.
        targets: their ids.
    """

    positions: Ints
    targets: Ints


@dataclass(frozen=True)
class InputBatch:
    """What one rank computes in one step.

    Attributes:
        tokens_T, positions_T: int64 ``[tokens]``.
        sampled: rows to sample from. With replicated tokens every rank has them all, and member 0
            samples.
        judged: rows for prompt logprobs.
        reported: rows whose hidden state is the answer.
        board_tokens: ids that were read from the board, by index of their sequence in the plan.
    """

    tokens_T: Tensor
    positions_T: Tensor
    sampled: RowSet
    judged: JudgedRows
    reported: RowSet
    board_tokens: dict[int, int]


def build_input(
    plan: StepPlan,
    layout: ShardLayout,
    member: int,
    board: TokenBoard,
    timeout_s: float = 60.0,
) -> InputBatch:
    """This rank's part of a step; waits for board tokens that this rank computes.

    Args:
        layout: the plan's.
        member: this rank's index in the plan's group.
        timeout_s: how long such a token may take.

    Raises:
        TimeoutError: when a token that the plan names does not appear on the board.
    """
    token_P, last_S = _flat_tokens(plan, layout)
    mine = layout.token_index(member)
    tokens_T = token_P[mine]
    missing = np.flatnonzero(tokens_T == UNKNOWN)
    board_tokens: dict[int, int] = {}
    if len(missing):
        sequences = layout.sequences(member)[missing].tolist()
        slots = np.array([plan.sequences[i].slot for i in sequences])
        epochs = np.array([plan.sequences[i].board_epoch for i in sequences])
        tokens_T[missing] = board.read(slots, epochs, timeout_s)
        board_tokens = dict(zip(sequences, tokens_T[missing].tolist(), strict=True))
    sampled = [i for i, sequence in enumerate(plan.sequences) if sequence.sample is not None]
    reported = [i for i, sequence in enumerate(plan.sequences) if sequence.hidden_state]
    return InputBatch(
        tokens_T=torch.from_numpy(tokens_T),
        positions_T=torch.from_numpy(layout.positions(member)),
        sampled=_last_rows(sampled, last_S, layout, member),
        judged=_judged(plan, layout, member, token_P, last_S),
        reported=_last_rows(reported, last_S, layout, member),
        board_tokens=board_tokens,
    )


def decode_tokens(
    plan: StepPlan, board: TokenBoard, timeout_s: float = 60.0
) -> tuple[list[int], dict[int, int]]:
    """The ids of a step of one new token a sequence, and those of them that came from the board, by
    index of their sequence; waits for these.

    Raises:
        TimeoutError: when a token that the plan names does not appear on the board.
    """
    tokens = [int.from_bytes(sequence.tokens[:4], "little") for sequence in plan.sequences]
    missing = [i for i, sequence in enumerate(plan.sequences) if sequence.board_epoch >= 0]
    if not missing:
        return tokens, {}
    slots = np.array([plan.sequences[i].slot for i in missing])
    epochs = np.array([plan.sequences[i].board_epoch for i in missing])
    found = dict(zip(missing, board.read(slots, epochs, timeout_s).tolist(), strict=True))
    for index, token in found.items():
        tokens[index] = token
    return tokens, found


def _flat_tokens(plan: StepPlan, layout: ShardLayout) -> tuple[Ints, Ints]:
    """Ids of all tokens of a plan, sequence by sequence, and the index of each sequence's last."""
    last_S = layout.counts.cumsum() - 1
    token_P = np.full(int(last_S[-1]) + 1, UNKNOWN, dtype=np.int64)
    known_P = np.ones(len(token_P), dtype=bool)
    known_P[last_S] = [sequence.board_epoch < 0 for sequence in plan.sequences]
    token_P[known_P] = np.frombuffer(b"".join(s.tokens for s in plan.sequences), dtype=np.int32)
    return token_P, last_S


def _last_rows(wanted: Sequence[int], last_S: Ints, layout: ShardLayout, member: int) -> RowSet:
    """The rows of the last tokens of some sequences."""
    return _row_set(last_S[wanted], np.array(wanted, dtype=np.int64), layout, member)


def _row_set(wanted: Ints, sequences: Ints, layout: ShardLayout, member: int) -> RowSet:
    """The rows of ascending plan-wide token indices `wanted`, of the given sequences."""
    rows_of = [_find(layout.token_index(other), wanted) for other in range(len(layout.group))]
    by_member = tuple(sequences[rows >= 0] for rows in rows_of)
    mine = rows_of[member]
    return RowSet(torch.from_numpy(mine[mine >= 0]), by_member, member)


def _find(index: Ints, wanted: Ints) -> Ints:
    """Where each of `wanted` stands in the ascending `index`; -1 where it does not."""
    if not len(index):
        return np.full(len(wanted), -1, dtype=np.int64)
    place = np.searchsorted(index, wanted)
    return np.where(index[np.minimum(place, len(index) - 1)] == wanted, place, -1)


def _judged(
    plan: StepPlan, layout: ShardLayout, member: int, token_P: Ints, last_S: Ints
) -> JudgedRows:
    """The logits of a row judge the token after it, where that is a wanted prompt token."""
    from_S = np.array([sequence.prompt_logprobs_from for sequence in plan.sequences])
    if (from_S < 0).all():
        none = np.empty(0, dtype=np.int64)
        return JudgedRows(torch.from_numpy(none), (none,) * len(plan.group), member, none, none)
    target_P = np.append(token_P[1:], UNKNOWN)
    target_P[last_S] = [sequence.next_token for sequence in plan.sequences]
    sequence_P = np.repeat(np.arange(len(from_S)), layout.counts)
    position_P = np.arange(len(token_P)) - (last_S - layout.lengths + 1)[sequence_P]
    from_P = from_S[sequence_P]
    wanted_P = (from_P >= 0) & (position_P + 1 >= from_P) & (target_P != UNKNOWN)
    wanted = np.flatnonzero(wanted_P)
    rows = _row_set(wanted, sequence_P[wanted], layout, member)
    mine = layout.token_index(member)[rows.rows.numpy()]
    return JudgedRows(rows.rows, rows.by_member, member, position_P[mine] + 1, target_P[mine])
