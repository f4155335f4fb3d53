"""Matrices of linear layers, in the form in which they lie in memory.

A layer multiplies by a whole weight, by parts of it (q, k, v lie in one), or by the share that its
rank has of it. All of these are views; which of them a form can express is known when loading.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Weight(Protocol):
    """W ``[outputs, inputs]`` of ``x @ W.T``; rows are outputs, columns are inputs."""

    @property
    def shape(self) -> tuple[int, int]: ...

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

    def rows(self, begin: int, end: int) -> PlainWeight:
        return PlainWeight(self.tensor_NK[begin:end])

    def columns(self, begin: int, end: int) -> PlainWeight:
        return PlainWeight(self.tensor_NK[:, begin:end])

    def split(self, sizes: Sequence[int]) -> list[PlainWeight]:
        return [PlainWeight(part) for part in self.tensor_NK.split(list(sizes))]

    def to(self, device: str | torch.device) -> PlainWeight:
        return PlainWeight(self.tensor_NK.to(device))
