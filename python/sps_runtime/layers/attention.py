"""The attention block around a step's attention: projections, norms of heads, rope."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sps_runtime.layers.linear import ColumnLinear, RowLinear
from sps_runtime.layers.norm import RMSNorm
from sps_runtime.layers.step import StepContext
from sps_runtime.ops.elementwise import Rotate


@dataclass(frozen=True)
class Attention:
    """Grouped-query self-attention (Ainslie et al. 2023) of one layer.

    Attributes:
        layer: its number, which names its KV.
        qkv: q, k and v of this rank's TP slice of the heads.
        output: back to the hidden dim.
        head_dim: scores are scaled by head_dim ** -0.5.
        window: sliding window in tokens, None for none.
        q_norm, k_norm: norms over every head, before rope (Qwen3), or None.
    """

    layer: int
    qkv: ColumnLinear
    output: RowLinear
    head_dim: int
    window: int | None = None
    q_norm: RMSNorm | None = None
    k_norm: RMSNorm | None = None

    def __call__(self, x_TD: Tensor, rotate: Rotate, step: StepContext) -> Tensor:
        """``[my tokens, hidden]`` -> the same."""
        linear, unit = step.linear, self.head_dim
        parts = self.qkv(linear, linear.enter(x_TD))
        q_THD, k_TKD, v_TKD = (
            part.unflatten(-1, (-1, unit))
            for part in linear.to_tokens_each(parts, self.qkv.sizes, unit)
        )
        if self.q_norm is not None:
            q_THD = self.q_norm(q_THD)
        if self.k_norm is not None:
            k_TKD = self.k_norm(k_TKD)
        q_THD, k_TKD = rotate(q_THD, k_TKD)
        o_THD = step.attend(self.layer, q_THD, k_TKD, v_TKD, scale=unit**-0.5, window=self.window)
        return self.output(linear, linear.to_columns(o_THD.flatten(1), unit))
