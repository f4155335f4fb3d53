"""The operators that layers are made of: plain torch's, or the kernels of `sps_kernel`."""

from __future__ import annotations

from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sps_runtime.ops.elementwise import Elementwise, KernelElementwise, TorchElementwise
from sps_runtime.ops.kv_rows import encode, row_format
from sps_runtime.ops.linear import kernel_linear
from sps_runtime.ops.moves import KernelMoves, Moves, TorchMoves
from sps_runtime.ops.packing import Packing, Quantization
from sps_runtime.ops.weight import PlainWeight, Weight


class Operators(Elementwise, Protocol):
    """What a layer asks of the machine. Values are float32 or bfloat16, sums are float32; results
    are fresh tensors unless a docstring says otherwise. Zero rows are fine everywhere.

    Attributes:
        moves: what changes no value but for its place and dtype.
    """

    moves: Moves

    def linear(self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None) -> Tensor:
        """``x @ weight.T + bias``: ``[tokens, N]``. Rows of `x` may lie apart; within a row
        elements are adjacent."""
        ...

    def packing(self, quantization: Quantization = "none") -> Packing | None:
        """How weights are packed for `linear`; None: they stay plain, and are not quantized."""
        ...

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Add `x` to `residual` in place, and return the norm of the sum; `x` may be overwritten,
        and may be what is returned."""
        ...

    def write_kv(
        self,
        k_TKD: Tensor,
        v_TKD: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots_T: Tensor,
        offsets_T: Tensor,
    ) -> None:
        """Put token t's K and V at (slots_T[t], offsets_T[t]), int32 both, all pairs distinct, of
        one layer's pools ``[slots, kv_heads, page_size, row]``; rows as `ops.kv_rows` has them.
        Slot -1: nowhere."""
        ...


class TorchOperators(TorchElementwise):
    """The reference, and what runs without kernels."""

    def __init__(self) -> None:
        self.moves: Moves = TorchMoves()

    def linear(self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None) -> Tensor:
        assert isinstance(weight_ND, PlainWeight), "other forms are loaded for other operators"
        return F.linear(x_TD, weight_ND.tensor_NK, bias_N)

    def packing(self, quantization: Quantization = "none") -> Packing | None:
        return None

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self.rms_norm(residual.add_(x), weight_D, eps)

    def write_kv(
        self,
        k_TKD: Tensor,
        v_TKD: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots_T: Tensor,
        offsets_T: Tensor,
    ) -> None:
        here = slots_T >= 0
        if not here.all():
            k_TKD, v_TKD, slots_T, offsets_T = (
                k_TKD[here],
                v_TKD[here],
                slots_T[here],
                offsets_T[here],
            )
        kv_format = row_format(k_pool, k_TKD.shape[-1])
        k_pool[slots_T, :, offsets_T] = encode(k_TKD, kv_format)
        v_pool[slots_T, :, offsets_T] = encode(v_TKD, kv_format)


TORCH = TorchOperators()


class KernelOperators(KernelElementwise):
    """`sps_kernel`'s, and torch's (oneDNN) for products of many rows with plain weights.

    A decode step calls a dozen operators a layer on a few rows each, so what a call costs before it
    computes counts.

    Args:
        threads: threads of one call.
    """

    def __init__(self, kernels: ModuleType, threads: int = 1) -> None:
        super().__init__(kernels, threads)
        self.linear = kernel_linear(kernels, threads)
        self.moves: Moves = KernelMoves(kernels)
        self._no_angles = torch.empty((2**31 - 1, 0), dtype=torch.float32)  # of every position

    def packing(self, quantization: Quantization = "none") -> Packing | None:
        return Packing(self._kernels.packed, quantization, self._threads)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        self._kernels.rms_norm(x, weight_D, eps, residual=residual, out=x, threads=self._threads)
        return x

    def write_kv(
        self,
        k_TKD: Tensor,
        v_TKD: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots_T: Tensor,
        offsets_T: Tensor,
    ) -> None:
        """The kernel rotates and writes; over zero dims and no query heads it only writes."""
        self._kernels.rope_kv_write(
            k_TKD[:, :0], k_TKD, v_TKD, self._row_numbers(len(slots_T)), self._no_angles,
            k_pool, v_pool, slots_T, offsets_T,
            kv_format=row_format(k_pool, k_TKD.shape[-1]), threads=self._threads,
        )  # fmt: skip
