"""What a layer may know of the step it runs in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sps_runtime.ops.weight import Weight


class LinearPlacement(Protocol):
    """Where tokens and weights of linear layers lie in this step (docs/design.md, contract 3).

    A block of linear layers is ``enter -> column(s) -> row -> leave``; between column and row the
    columns lie spread. `to_tokens` and `to_columns` change between "my tokens, all columns" (what
    attention needs) and "all tokens, my columns". Weights come as this rank's TP slice (cut once,
    when loading); what a placement cuts further is that slice over the SP ranks of the group, in
    shares of whole `unit`s (`distributed.mesh.shares`), so that heads stay whole where they must.

    Three placements: sharded tokens with full weights (SP-NTP), sharded tokens with sharded weights
    (SP-TP), replicated tokens with sharded weights (small decode batches). Row counts per member of
    the group are the placement's own.

    A model gets a second placement, over the sampled rows, for its language-model head:
    ``gather_vocab(to_tokens(column(enter(h), W_head), columns), vocab)``.

    """

    @property
    def whole(self) -> bool:
        """Whether this rank's TP slice is not cut further (SP-NTP, or a group of one).

        `column` and `row` then use all of the weight they are given, `enter`, `to_tokens` and
        `to_columns` return what they are given, and a layer may multiply weights that lie adjacent
        in memory (q, k, v; gate, up) in one call. Only `leave` and `gather_vocab` may still cross
        ranks.
        """
        ...

    def enter(self, x_TD: Tensor) -> Tensor:
        """Local tokens -> the tokens that this rank's weight slice multiplies."""
        ...

    def column(
        self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None, unit: int = 1
    ) -> Tensor:
        """x @ W[my rows].T + b[my rows]: this rank's columns of the output."""
        ...

    def row(self, y_TN: Tensor, weight_DN: Weight, unit: int = 1) -> Tensor:
        """y @ W[:, my columns].T: this rank's part of a sum; `leave` completes it."""
        ...

    def leave(self, x_TD: Tensor) -> Tensor:
        """Sum the parts over TP peers, and over SP ranks where weights are cut; back to local
        tokens. Summed in fp32 in rank order, so every rank has the same bits."""
        ...

    def to_tokens(self, y_TN: Tensor, columns: int, unit: int = 1) -> Tensor:
        """All tokens x my columns -> my tokens x all `columns` of my TP slice."""
        ...

    def to_tokens_each(
        self, ys_TN: Sequence[Tensor], columns: Sequence[int], unit: int = 1
    ) -> list[Tensor]:
        """`to_tokens` of several outputs (q, k, v); a placement may send them in one exchange."""
        return [self.to_tokens(y, count, unit) for y, count in zip(ys_TN, columns, strict=True)]

    def gather_vocab(self, y_RN: Tensor, vocab: int) -> Tensor:
        """My rows x the vocabulary slice of my TP rank (`distributed.mesh.shares(vocab, tp)`) ->
        my rows x all `vocab` columns. Without TP it returns `y_RN`."""
        ...

    def to_columns(self, y_TN: Tensor, unit: int = 1) -> Tensor:
        """My tokens x all columns of my TP slice -> all tokens x my columns."""
        ...


class SequenceAttention(Protocol):
    """Attention of one step over all its ranks; writes the new KV into the pool first."""

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        """q, k, v of this rank's tokens (rope applied), heads of its TP slice -> o_THD, q's dtype.

        With replicated tokens only the heads in this rank's share (`distributed.mesh.shares` of the
        TP slice's heads over the group) are filled, the others are zero: `to_columns` with
        ``unit=head_dim`` keeps just these.
        """
        ...


@dataclass(frozen=True)
class StepContext:
    """Passed down a model's forward; models hand it on and never look inside.

    Attributes:
        positions_T: int64 ``[tokens]`` absolute positions of this rank's tokens.
        linear: where linear layers lie.
        attend: attention over the group.
    """

    positions_T: Tensor
    linear: LinearPlacement
    attend: SequenceAttention
