"""Root-mean-square norm, with the residual's addition in the same pass (Zhang and Sennrich 2019).

Bytes: x once in, once out; with a residual that too in and out. Nothing else counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096
"""Of one program: several short rows, or one long one."""


@triton.jit
def rms_norm_kernel(
    x, residual, weight, out, rows, inner, x_outer, x_inner, r_outer, r_inner, eps,
    DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Row r lies at ``(r // inner) * outer + (r % inner) * inner`` stride; `out` is contiguous or,
    with ADD, has x's strides."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = (row < rows)[:, None] & (column < DIM)[None, :]
    x_at = (row // inner * x_outer + row % inner * x_inner)[:, None] + column[None, :]
    value = tl.load(x + x_at, mask=there, other=0.0)
    if ADD:
        r_at = (row // inner * r_outer + row % inner * r_inner)[:, None] + column[None, :]
        total = tl.load(residual + r_at, mask=there, other=0.0).to(tl.float32)
        value = (total + value.to(tl.float32)).to(value.dtype)  # what is normed is what is kept
        tl.store(residual + r_at, value, mask=there)
    value = value.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, axis=1) / DIM + eps)
    weights = tl.load(weight + column, mask=column < DIM, other=0.0).to(tl.float32)
    normed = value * scale[:, None] * weights[None, :]
    out_at = x_at if ADD else row[:, None] * DIM + column[None, :]
    tl.store(out + out_at, normed.to(out.dtype.element_ty), mask=there)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, computed in fp32 and rounded once.

    Args:
        x: ``[tokens, dim]`` or ``[tokens, heads, dim]``, the last dim contiguous.
        weight_D: ``[dim]``.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, None, weight_D, out, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual` in place (rounded to its dtype) and overwrite `x` with the norm of the
    sum; returns `x`. Shapes and strides as in `rms_norm`, each tensor with its own."""
    _launch(x, residual, weight_D, x, eps)
    return x


def _launch(x: Tensor, residual: Tensor | None, weight_D: Tensor, out: Tensor, eps: float) -> None:
    dim = x.shape[-1]
    rows = x.numel() // max(dim, 1)
    if rows == 0:
        return
    other = x if residual is None else residual
    block = triton.next_power_of_2(dim)
    each = max(1, min(16, ELEMENTS // block))
    rms_norm_kernel[(triton.cdiv(rows, each),)](
        x, other, weight_D, out, rows, x.shape[1] if x.dim() == 3 else 1,
        x.stride(0), x.stride(1) if x.dim() == 3 else 0,
        other.stride(0), other.stride(1) if other.dim() == 3 else 0, eps,
        DIM=dim, BLOCK=block, ROWS=each, ADD=residual is not None,
        num_warps=4 if block <= 2048 else 8,
    )  # fmt: skip
