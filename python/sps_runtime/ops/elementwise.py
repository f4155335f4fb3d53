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


MANY_ROWS = 8192
"""More tokens than steps that are recorded have."""


class Elementwise(Protocol):
    """What layers do between their products."""

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """x / rms(x) * weight over the last dim (Zhang and Sennrich 2019), in x's dtype."""
        ...

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) * up (Shazeer 2020); may overwrite `gate`."""
        ...

    def rotation(
        self, positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
    ) -> Rotate:
        """The rotation of one step's tokens (Su et al. 2021); dims i and i + head_dim / 2 form a
        pair, turned by the fp32 angle position * frequency.

        Args:
            positions_T: int64.
            frequencies_F: fp32 ``[head_dim / 2]`` radians per position.
            scale: a factor on cosines and sines.
            dtype: of q and k.
        """
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

    def rotation(
        self, positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
    ) -> Rotate:
        angles_T1F = (positions_T.float()[:, None] * frequencies_F)[:, None]
        cos, sin = (angles_T1F.cos() * scale).to(dtype), (angles_T1F.sin() * scale).to(dtype)

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
        self._numbers = torch.arange(MANY_ROWS, dtype=torch.int32)

    def _row_numbers(self, rows: int) -> Tensor:
        """0, 1, 2, ... as int32."""
        if rows > len(self._numbers):
            self._numbers = torch.arange(2 * rows, dtype=torch.int32)
        return self._numbers[:rows]

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out = x.new_empty(x.shape)  # the package takes ten times as long to make one
        self._kernels.rms_norm(x, weight_D, eps, out=out, threads=self._threads)
        return out

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        out = gate.new_empty(gate.shape)
        self._kernels.silu_mul(gate, up, out=out, threads=self._threads)
        return out

    def rotation(
        self, positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
    ) -> Rotate:
        table = frequencies_F.new_empty(len(positions_T), 2 * len(frequencies_F))
        self._kernels.rope_angles(positions_T, frequencies_F, scale, out=table)
        rows_T = self._row_numbers(len(table))

        def turn(q_THD: Tensor, k_TKD: Tensor) -> tuple[Tensor, Tensor]:
            self._kernels.rope(q_THD, k_TKD, rows_T, table, threads=self._threads)
            return q_THD, k_TKD

        return turn
