"""SiLU and multiply: the middle of a SwiGLU layer (Shazeer 2020). Bytes: two in, one out."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def silu_mul_kernel(gate, up, out, columns, gate_row, up_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < columns
    x = tl.load(gate + row * gate_row + column, mask=there, other=0.0).to(tl.float32)
    y = tl.load(up + row * up_row + column, mask=there, other=0.0).to(tl.float32)
    # Only exp of what is not positive, so that nothing overflows on the way.
    small = tl.exp(-tl.abs(x))
    sigmoid = tl.where(x >= 0, 1.0, small) / (1.0 + small)
    tl.store(out + row * columns + column, (x * sigmoid * y).to(out.dtype.element_ty), mask=there)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of ``[tokens, dim]`` each, the last dim contiguous: the halves of a fused
    output need no copy. Computed in fp32 and rounded once."""
    rows, columns = gate.shape
    out = torch.empty((rows, columns), dtype=gate.dtype, device=gate.device)
    if out.numel():
        silu_mul_kernel[(rows, triton.cdiv(columns, BLOCK))](
            gate, up, out, columns, gate.stride(0), up.stride(0), BLOCK=BLOCK
        )
    return out
