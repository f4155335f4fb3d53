"""Root-mean-square norm."""

from __future__ import annotations

import torch
from torch import Tensor


class RMSNorm:
    """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019).

    Rounds where transformers does: the normalised value is computed in fp32, rounded to x's dtype,
    and multiplied by the weight in that dtype.

    Args:
        weight_D: ``[dim]`` in the model's dtype.
        eps: added to the mean square.
    """

    def __init__(self, weight_D: Tensor, eps: float) -> None:
        self.weight_D = weight_D
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """``[..., dim]`` -> the same shape and dtype."""
        x_fp32 = x.float()
        mean_square = x_fp32.square().mean(-1, keepdim=True)
        normed = x_fp32 * torch.rsqrt(mean_square + self.eps)
        return self.weight_D * normed.to(x.dtype)
