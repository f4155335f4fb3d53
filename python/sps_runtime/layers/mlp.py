"""The gated feed-forward block."""

from __future__ import annotations

from torch import Tensor

from sps_runtime.layers.linear import ColumnLinear, RowLinear
from sps_runtime.layers.step import LinearPlacement
from sps_runtime.ops.operators import Operators


class GatedMLP:
    """down(silu(gate(x)) * up(x)) (SwiGLU, Shazeer 2020)."""

    def __init__(self, gate_up: ColumnLinear, down: RowLinear, ops: Operators) -> None:
        self.gate_up, self.down = gate_up, down
        self._ops = ops

    def __call__(self, linear: LinearPlacement, x_TD: Tensor) -> Tensor:
        """``[my tokens, hidden]`` -> the same."""
        gate, up = self.gate_up(linear, linear.enter(x_TD))
        return self.down(linear, self._ops.silu_mul(gate, up))
