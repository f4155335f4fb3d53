"""Linear layers: weights, and how they go through a step's placement."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sps_runtime.layers.step import LinearPlacement
from sps_runtime.ops.moves import Moves
from sps_runtime.ops.weight import Weight


class ColumnLinear:
    """One or several column-parallel linear layers over one input, adjacent in memory.

    q, k and v are one of these, gate and up another. Where the placement keeps weights whole they
    are one multiplication, otherwise each is cut by itself, in whole `unit`s.

    Args:
        weight_ND: ``[sum(sizes), in]``, this rank's TP slice.
        bias_N: ``[sum(sizes)]`` or None.
        sizes: columns of each part.
        unit: columns that stay together when ranks share them (head_dim for q, k, v).
    """

    def __init__(
        self, weight_ND: Weight, bias_N: Tensor | None, sizes: Sequence[int], unit: int = 1
    ) -> None:
        self.weight_ND, self.bias_N = weight_ND, bias_N
        self.sizes, self.unit = tuple(sizes), unit
        weights = weight_ND.split(self.sizes)
        biases = [None] * len(weights) if bias_N is None else bias_N.split(self.sizes)
        self._parts = list(zip(weights, biases, strict=True))

    def __call__(self, linear: LinearPlacement, x_TD: Tensor) -> Sequence[Tensor]:
        """Entered tokens ``[tokens, in]`` -> this rank's columns of each part."""
        if linear.whole:
            y_TN = linear.column(x_TD, self.weight_ND, self.bias_N, self.unit)
            parts: Sequence[Tensor] = y_TN.split(self.sizes, dim=-1)
            return parts
        return [linear.column(x_TD, weight, bias, self.unit) for weight, bias in self._parts]


class RowLinear:
    """A row-parallel linear layer, which ends a block: its parts are summed by `leave`.

    Args:
        weight_DN: ``[out, in]``, this rank's TP slice of the columns.
        bias_D: ``[out]`` or None; added once, after the sum.
        unit: as in `ColumnLinear`.
    """

    def __init__(self, weight_DN: Weight, bias_D: Tensor | None = None, unit: int = 1) -> None:
        self.weight_DN, self.bias_D, self.unit = weight_DN, bias_D, unit

    def __call__(self, linear: LinearPlacement, y_TN: Tensor) -> Tensor:
        """This rank's columns ``[all tokens, in]`` -> ``[my tokens, out]``."""
        x_TD = linear.leave(linear.row(y_TN, self.weight_DN, self.unit))
        return x_TD if self.bias_D is None else x_TD + self.bias_D


class Embedding:
    """Token ids -> rows of a table ``[vocab, hidden]``, which every rank has whole; it may be the
    head's weight, packed."""

    def __init__(self, weight_VD: Weight, moves: Moves) -> None:
        self.weight_VD = weight_VD
        self._moves = moves

    def __call__(self, input_ids_T: Tensor) -> Tensor:
        return self._moves.look_up(input_ids_T, self.weight_VD)


class LanguageModelHead:
    """Hidden states -> logits over the whole vocabulary.

    Args:
        weight_VD: ``[slice, hidden]``, this TP rank's share of the rows.
        vocab: the whole vocabulary.
        unit: as in `ColumnLinear`.
    """

    def __init__(self, weight_VD: Weight, vocab: int, unit: int = 1) -> None:
        self.weight_VD, self.vocab, self.unit = weight_VD, vocab, unit

    def __call__(self, linear: LinearPlacement, hidden_RD: Tensor) -> Tensor:
        """``[my rows, hidden]`` -> ``[my rows, vocab]``, in the weights' dtype."""
        y_RN = linear.column(linear.enter(hidden_RD), self.weight_VD, unit=self.unit)
        y_RV = linear.to_tokens(y_RN, self.weight_VD.shape[0], self.unit)
        return linear.gather_vocab(y_RV, self.vocab)
