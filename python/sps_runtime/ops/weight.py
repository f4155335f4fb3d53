"""Matrices of linear layers, in the form in which they lie in memory.

A layer multiplies by a whole weight, by parts of it (q, k, v lie in one), or by the share that its
rank has of it. All of these are views; which of them a form can express is known when loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor


class Weight(Protocol):
    """W ``[outputs, inputs]`` of ``x @ W.T``; rows are outputs, columns are inputs."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def nbytes(self) -> int:
        """Of this share, as it lies in memory."""
        ...

    def rows(self, begin: int, end: int) -> Weight:
        """Outputs `begin` to `end`, a view."""
        ...

    def columns(self, begin: int, end: int) -> Weight:
        """Inputs `begin` to `end`, a view."""
        ...

    def split(self, sizes: Sequence[int]) -> Sequence[Weight]:
        """Consecutive rows, `sizes` of them, as views."""
        ...

    def to(self, device: str | torch.device) -> Weight:
        """The same on another device."""
        ...


@dataclass(frozen=True)
class PlainWeight:
    """A tensor ``[N, K]``; elements of a row are adjacent, rows may lie apart."""

    tensor_NK: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.tensor_NK.shape
        return rows, columns

    @property
    def nbytes(self) -> int:
        return self.tensor_NK.nbytes

    def rows(self, begin: int, end: int) -> PlainWeight:
        return PlainWeight(self.tensor_NK[begin:end])

    def columns(self, begin: int, end: int) -> PlainWeight:
        return PlainWeight(self.tensor_NK[:, begin:end])

    def split(self, sizes: Sequence[int]) -> list[PlainWeight]:
        return [PlainWeight(part) for part in self.tensor_NK.split(list(sizes))]

    def to(self, device: str | torch.device) -> PlainWeight:
        return PlainWeight(self.tensor_NK.to(device))


PANEL_ROWS = 16
"""Outputs of a panel: packed weights are cut between panels only."""


@dataclass(frozen=True)
class PackedWeight:
    """A share of a weight ``[n, k]`` as `sps_kernel.packed` lays it out: panels of 16 outputs.

    Attributes:
        packed: uint8, of the whole weight.
        kind: ``bf16``, ``fp32``, ``int8`` or ``int4``.
        group: columns that share a scale, where there are scales.
        cuts: columns between which the weight lies in memory of its own.
        row_range: outputs of this share; multiples of `PANEL_ROWS`, or n.
        column_range: inputs of this share; multiples of `column_step`, or k.
    """

    packed: Tensor
    n: int
    k: int
    kind: str
    group: int
    cuts: tuple[int, ...]
    row_range: tuple[int, int]
    column_range: tuple[int, int]

    @classmethod
    def whole(
        cls, packed: Tensor, n: int, k: int, kind: str, group: int, cuts: tuple[int, ...] = ()
    ) -> PackedWeight:
        return cls(packed, n, k, kind, group, cuts, (0, n), (0, k))

    @property
    def shape(self) -> tuple[int, int]:
        (top, bottom), (left, right) = self.row_range, self.column_range
        return bottom - top, right - left

    @property
    def nbytes(self) -> int:
        rows, columns = self.shape
        return self.packed.nbytes * rows * columns // max(1, self.n * self.k)

    def rows(self, begin: int, end: int) -> PackedWeight:
        first = self.row_range[0]
        return replace(self, row_range=(first + begin, first + end))

    def columns(self, begin: int, end: int) -> PackedWeight:
        first = self.column_range[0]
        return replace(self, column_range=(first + begin, first + end))

    def split(self, sizes: Sequence[int]) -> list[PackedWeight]:
        ends = list(accumulate(sizes))
        return [self.rows(end - size, end) for size, end in zip(sizes, ends, strict=True)]

    def to(self, device: str | torch.device) -> PackedWeight:
        raise ValueError(f"packed weights are for CPUs, not for {device}")


def column_step(kind: str, group: int) -> int:
    """Columns of a packed weight that cannot be cut apart."""
    return {"fp32": 1, "bf16": 2}.get(kind, group)
