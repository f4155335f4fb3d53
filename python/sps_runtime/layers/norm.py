"""Root-mean-square norm."""

from __future__ import annotations

from torch import Tensor

from sps_runtime.ops.elementwise import Elementwise


class RMSNorm:
    """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019).

    Args:
        weight_D: ``[dim]`` in the model's dtype.
        eps: added to the mean square.
        elementwise: who computes it.
    """

    def __init__(self, weight_D: Tensor, eps: float, elementwise: Elementwise) -> None:
        self.weight_D = weight_D
        self.eps = eps
        self._rms_norm = elementwise.rms_norm

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., dim]`` -> the same shape and dtype."""
        return self._rms_norm(x, self.weight_D, self.eps)
