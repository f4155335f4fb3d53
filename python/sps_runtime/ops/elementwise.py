"""Norm, rotary embedding and gate of a layer: one pass over memory each, or torch's operators.

torch's versions walk memory once per operator: at 512 rows of 896 the kernel's norm is more than
ten times as fast.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(q, k ``[tokens, heads, head_dim]``) -> both rotated, perhaps in place."""


class Elementwise(Protocol):
    """What layers do between their products."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019), in x's dtype."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up (Shazeer 2020); may overwrite `gate`."""
        ...

    def rotation(self, cos_TF: Tensor, sin_TF: Tensor, dtype: torch.dtype) -> Rotate:
        """The rotation of one step's tokens (Su et al. 2021); dims i and i + head_dim / 2 form a
        pair. cos and sin are fp32 ``[tokens, head_dim / 2]``; q and k will be of `dtype`."""
        ...


class TorchElementwise:
    """Rounds where transformers does: norms are rounded before they meet the weight, cos and sin
    are rounded to the model's dtype."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_fp32 = x.float()
        mean_square = x_fp32.square().mean(-1, keepdim=True)
        normed = x_fp32 * torch.rsqrt(mean_square + eps)
        return weight_D * normed.to(x.dtype)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    def rotation(self, cos_TF: Tensor, sin_TF: Tensor, dtype: torch.dtype) -> Rotate:
        cos, sin = cos_TF[:, None].to(dtype), sin_TF[:, None].to(dtype)

        def turn(x_THD: Tensor) -> Tensor:
            first, second = x_THD.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

        return lambda q_THD, k_TKD: (turn(q_THD), turn(k_TKD))


class KernelElementwise:
    """`sps_kernel`'s: computed in fp32 and rounded once.

    Args:
        threads: threads of one call.
    """

    def __init__(self, kernels: ModuleType, threads: int = 1) -> None:
        self._kernels = kernels
        self._threads = threads

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)  # the package takes ten times as long to make one
        self._kernels.rms_norm(x, weight_D, eps, out=out, threads=self._threads)
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        out = gate.new_empty(gate.shape)
        self._kernels.silu_mul(gate, up, out=out, threads=self._threads)
        return out

    def rotation(self, cos_TF: Tensor, sin_TF: Tensor, dtype: torch.dtype) -> Rotate:
        table = torch.cat((cos_TF, sin_TF), dim=-1)
        rows_T = torch.arange(len(table), dtype=torch.int32)

        def turn(q_THD: Tensor, k_TKD: Tensor) -> tuple[Tensor, Tensor]:
            self._kernels.rope(q_THD, k_TKD, rows_T, table, threads=self._threads)
            return q_THD, k_TKD

        return turn
