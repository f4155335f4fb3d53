"""Root-mean-square norm."""

from __future__ import annotations

from torch import Tensor

from sps_runtime.ops.operators import Operators


class RMSNorm:
    """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019).

    Args:
        weight_D: ``[dim]`` in the model's dtype.
        eps: added to the mean square.
        ops: what computes it.
    """

    def __init__(self, weight_D: Tensor, eps: float, ops: Operators) -> None:
        self.weight_D = weight_D
        self.eps = eps
        self._ops = ops

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, dim]`` or ``[tokens, heads, dim]`` -> the same shape and dtype."""
        return self._ops.rms_norm(x, self.weight_D, self.eps)

    def add(self, stream_TD: Tensor, update_TD: Tensor | None) -> Tensor:
        """Add an update to the residual stream, in place, and norm the sum; None adds nothing."""
        if update_TD is None:
            return self._ops.rms_norm(stream_TD, self.weight_D, self.eps)
        return self._ops.add_rms_norm(update_TD, stream_TD, self.weight_D, self.eps)
