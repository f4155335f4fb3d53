"""The three placements of linear layers on a group of ranks (docs/design.md, contract 3).

=====================  ================  ==========================================================
class                  tokens, weights   known as
=====================  ================  ==========================================================
`WholeWeights`         sharded, whole    SP-NTP: no traffic but that of TP peers
`ShardedWeights`       sharded, cut      SP-TP: all-gather before, reduce-scatter after
`ReplicatedTokens`     replicated, cut   TP over the whole group, for small decode batches
=====================  ================  ==========================================================

"Whole" and "cut" speak of this rank's TP slice of a weight; the slice itself was cut when loading.
A placement is built for one step from the rows that each member of the group holds; it is cheap to
build, and another one with other rows (`placed`) serves the few rows that reach the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from sps_runtime.distributed.collectives import (
    all_gather,
    all_reduce,
    all_to_all,
    reduce_scatter,
)
from sps_runtime.distributed.communicator import Communicator
from sps_runtime.distributed.mesh import shares
from sps_runtime.layers.step import LinearPlacement
from sps_runtime.ops.moves import Moves
from sps_runtime.ops.operators import TORCH, Operators
from sps_runtime.ops.weight import Weight


@dataclass(frozen=True)
class GroupLinks:
    """The communicators of one group as one of its ranks sees them.

    Attributes:
        sp: the ranks of the group with this rank's TP rank, in the group's order.
        tp: this SP rank's TP peers.
        world: all of the group's ranks, TP peers included, ascending by global rank.
    """

    sp: Communicator
    tp: Communicator
    world: Communicator

    @property
    def recordable(self) -> bool:
        """Whether everything that crosses ranks is a kernel's call."""
        return all(link.size == 1 or link.recordable for link in (self.sp, self.tp, self.world))


def unit_shares(columns: int, unit: int, parts: int) -> list[tuple[int, int]]:
    """(begin, end) columns of each part, in whole units; the last unit may be short."""
    units = shares(-(-columns // unit), parts)
    return [(min(begin * unit, columns), min(end * unit, columns)) for begin, end in units]


@dataclass(frozen=True)
class WholeWeights:
    """SP-NTP: each rank multiplies its own tokens with its whole (TP slice of the) weights."""

    links: GroupLinks
    ops: Operators = TORCH
    whole: ClassVar[bool] = True

    def enter(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        return self.ops.linear(x_TD, weight_ND, bias_N)

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        return self.ops.linear(y_TN, weight_DN)

    def leave(self, x_TD: Tensor) -> Tensor:
        return all_reduce(self.links.tp, x_TD, "linear")

    def to_tokens(self, y_TN: Tensor, columns: int, unit: int = 1) -> Tensor:
        return y_TN

    def to_tokens_each(
        self, ys_TN: Sequence[Tensor], columns: Sequence[int], unit: int = 1
    ) -> list[Tensor]:
        return list(ys_TN)

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        return gather_columns(self.links.tp, self.ops.moves, y_RN, vocab)

    def to_columns(self, y_TN: Tensor, unit: int = 1) -> Tensor:
        return y_TN


def my_share(columns: int, unit: int, sp: Communicator) -> tuple[int, int]:
    """(begin, end) of this member's columns: of an activation, hence rows of the weight that makes
    them, and columns of the one that takes them."""
    return unit_shares(columns, unit, sp.size)[sp.rank]


def gather_columns(
    comm: Communicator, moves: Moves, y_TN: Tensor, columns: int, unit: int = 1
) -> Tensor:
    """My columns (`unit_shares`) of all rows -> all `columns` of all rows, on every member."""
    if comm.size == 1:
        return y_TN
    bounds = unit_shares(columns, unit, comm.size)
    shapes = [(len(y_TN), end - begin) for begin, end in bounds]
    send = [moves.contiguous(y_TN)] * comm.size
    return moves.beside(all_to_all(comm, send, shapes, "linear"))


def widths_each(columns: Sequence[int], unit: int, parts: int) -> list[list[int]]:
    """For each member, its width of each output of `columns` columns."""
    each = [unit_shares(count, unit, parts) for count in columns]
    return [[end - begin for begin, end in bounds] for bounds in zip(*each, strict=True)]


def columns_each(
    moves: Moves, parts: Sequence[Tensor], widths: Sequence[Sequence[int]]
) -> list[Tensor]:
    """From what every member sent, its outputs side by side: each output with all its columns."""
    pieces = [part.split(list(width), dim=1) for part, width in zip(parts, widths, strict=True)]
    return [moves.beside(of_output) for of_output in zip(*pieces, strict=True)]


@dataclass(frozen=True)
class ShardedWeights:
    """SP-TP: tokens are gathered, multiplied with a share of the weights, and scattered again.

    Attributes:
        rows: tokens of each member of the group.
    """

    links: GroupLinks
    rows: tuple[int, ...]
    ops: Operators = TORCH
    whole: ClassVar[bool] = False

    def enter(self, x_TD: Tensor) -> Tensor:
        return all_gather(self.links.sp, x_TD, self.rows, "linear")

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        begin, end = my_share(weight_ND.shape[0], unit, self.links.sp)
        bias = None if bias_N is None else bias_N[begin:end]
        return self.ops.linear(x_TD, weight_ND.rows(begin, end), bias)

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        mine = my_share(weight_DN.shape[1], unit, self.links.sp)
        return self.ops.linear(y_TN, weight_DN.columns(*mine))

    def leave(self, x_TD: Tensor) -> Tensor:
        mine_TD = reduce_scatter(self.links.sp, x_TD, self.rows, "linear")
        return all_reduce(self.links.tp, mine_TD, "linear")

    def to_tokens(self, y_TN: Tensor, columns: int, unit: int = 1) -> Tensor:
        return self.to_tokens_each([y_TN], [columns], unit)[0]

    def to_tokens_each(
        self, ys_TN: Sequence[Tensor], columns: Sequence[int], unit: int = 1
    ) -> list[Tensor]:
        sp, moves = self.links.sp, self.ops.moves
        widths = widths_each(columns, unit, sp.size)
        shapes = [(self.rows[sp.rank], sum(width)) for width in widths]
        parts = all_to_all(sp, moves.beside(ys_TN).split(self.rows), shapes, "linear")
        return columns_each(moves, parts, widths)

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        return gather_columns(self.links.tp, self.ops.moves, y_RN, vocab)

    def to_columns(self, y_TN: Tensor, unit: int = 1) -> Tensor:
        sp = self.links.sp
        bounds = unit_shares(y_TN.shape[1], unit, sp.size)
        begin, end = bounds[sp.rank]
        out_TN = y_TN.new_empty(sum(self.rows), end - begin)
        send = [self.ops.moves.contiguous(y_TN[:, low:high]) for low, high in bounds]
        sp.exchange(send, out_TN.split(self.rows), "linear")
        return out_TN


@dataclass(frozen=True)
class ReplicatedTokens:
    """TP over the whole group: every rank has all tokens and multiplies a share of the columns."""

    links: GroupLinks
    ops: Operators = TORCH
    whole: ClassVar[bool] = False

    def enter(self, x_TD: Tensor) -> Tensor:
        return x_TD

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        begin, end = my_share(weight_ND.shape[0], unit, self.links.sp)
        bias = None if bias_N is None else bias_N[begin:end]
        return self.ops.linear(x_TD, weight_ND.rows(begin, end), bias)

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        mine = my_share(weight_DN.shape[1], unit, self.links.sp)
        return self.ops.linear(y_TN, weight_DN.columns(*mine))

    def leave(self, x_TD: Tensor) -> Tensor:
        return all_reduce(self.links.world, x_TD, "linear")

    def to_tokens(self, y_TN: Tensor, columns: int, unit: int = 1) -> Tensor:
        return gather_columns(self.links.sp, self.ops.moves, y_TN, columns, unit)

    def to_tokens_each(
        self, ys_TN: Sequence[Tensor], columns: Sequence[int], unit: int = 1
    ) -> list[Tensor]:
        sp, moves = self.links.sp, self.ops.moves
        widths = widths_each(columns, unit, sp.size)
        together = moves.beside(ys_TN)
        shapes = [(len(together), sum(width)) for width in widths]
        parts = all_to_all(sp, [together] * sp.size, shapes, "linear")
        return columns_each(moves, parts, widths)

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        return gather_columns(self.links.tp, self.ops.moves, y_RN, vocab)

    def to_columns(self, y_TN: Tensor, unit: int = 1) -> Tensor:
        return y_TN[:, slice(*my_share(y_TN.shape[1], unit, self.links.sp))]


def place(
    placement: Literal["sharded", "replicated"],
    arch: Literal["ntp", "tp"],
    links: GroupLinks,
    rows: Sequence[int],
    ops: Operators = TORCH,
) -> LinearPlacement:
    """The placement of one step.

    Args:
        placement: the plan's.
        arch: what sharded tokens meet: whole weights (``ntp``) or cut ones (``tp``).
        rows: tokens of each member of the group, in the group's order.
        ops: what multiplies.
    """
    if links.sp.size == 1 or (placement == "sharded" and arch == "ntp"):
        return WholeWeights(links, ops)
    if placement == "sharded":
        return ShardedWeights(links, tuple(rows), ops)
    return ReplicatedTokens(links, ops)
