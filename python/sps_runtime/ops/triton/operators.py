"""What layers ask of a GPU: Triton's kernels, and torch's (cuBLAS) for products and moves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sps_runtime.ops.elementwise import Rotate
from sps_runtime.ops.moves import Moves, TorchMoves
from sps_runtime.ops.packing import Packing, Quantization
from sps_runtime.ops.triton.gate import silu_mul
from sps_runtime.ops.triton.kv_write import write_kv
from sps_runtime.ops.triton.norm import add_rms_norm, rms_norm
from sps_runtime.ops.triton.rope import rope_, rope_table
from sps_runtime.ops.weight import PlainWeight, Weight


class TritonOperators:
    """`ops.operators.Operators` on CUDA tensors; all that they are asked to do they do on the
    current stream, and nothing waits for the device."""

    def __init__(self) -> None:
        self.moves: Moves = TorchMoves()

    def rms_norm(self, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight_D, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return add_rms_norm(x, residual, weight_D, eps)

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        return silu_mul(gate, up)

    def rotation(
        self, positions_T: Tensor, frequencies_F: Tensor, scale: float, dtype: torch.dtype
    ) -> Rotate:
        table_TR = rope_table(positions_T, frequencies_F, scale)

        def turn(q_THD: Tensor, k_TKD: Tensor) -> tuple[Tensor, Tensor]:
            rope_(q_THD, k_TKD, table_TR)
            return q_THD, k_TKD

        return turn

    def linear(self, x_TD: Tensor, weight_ND: Weight, bias_N: Tensor | None = None) -> Tensor:
        assert isinstance(weight_ND, PlainWeight), "packed weights are for CPUs"
        return F.linear(x_TD, weight_ND.tensor_NK, bias_N)

    def packing(self, quantization: Quantization = "none") -> Packing | None:
        return None

    def write_kv(
        self,
        k_TKD: Tensor,
        v_TKD: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        slots_T: Tensor,
        offsets_T: Tensor,
    ) -> None:
        write_kv(k_TKD, v_TKD, k_pool, v_pool, slots_T, offsets_T)
