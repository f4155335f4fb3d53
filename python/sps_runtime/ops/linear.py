"""x @ W.T + b: by kernels over packed weights; over plain ones by a kernel where rows are few, else
by torch.

A decode step multiplies every weight by a few rows, so it is as fast as memory gives the weights;
torch's bf16 product of one row reaches half of that on one core.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from sps_runtime.ops.weight import PackedWeight, PlainWeight, Weight

Linear = Callable[..., Tensor]
"""(x ``[rows, in]``, weight ``[out, in]``, bias ``[out]`` or None) -> ``[rows, out]``."""

SMALL_ROWS = 16
"""Up to here the kernel for plain weights is faster on one core (bf16 and fp32, 896 x 9,728)."""


def kernel_linear(kernels: ModuleType, threads: int = 1) -> Linear:
    """The product of a rank that has the kernels.

    Args:
        threads: threads of one call of the kernel; torch's own are set elsewhere.
    """
    packed = partial(_packed_linear, kernels.packed_linear, threads)
    plain = partial(_plain_linear, kernels.small_gemm, threads)

    def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
        form = packed if isinstance(weight, PackedWeight) else plain
        return form(x, weight, bias)

    return linear


def _packed_linear(
    kernel: Callable[..., Any], threads: int, x: Tensor, weight: PackedWeight, bias: Tensor | None
) -> Tensor:
    begin, end = weight.row_range
    out = x.new_empty(x.shape[0], end - begin)
    kernel(
        x, weight.packed, weight.n, weight.k, weight.kind, bias, out=out,
        rows=weight.row_range, columns=weight.column_range, group=weight.group, threads=threads,
        cuts=weight.cuts,
    )  # fmt: skip
    return out


def _plain_linear(
    kernel: Callable[..., Any], threads: int, x: Tensor, weight: PlainWeight, bias: Tensor | None
) -> Tensor:
    weight_NK = weight.tensor_NK
    if 0 < x.shape[0] <= SMALL_ROWS and weight_NK.numel():
        out = x.new_empty(x.shape[0], weight_NK.shape[0])
        kernel(x, weight_NK, bias, out=out, threads=threads)
        return out
    return F.linear(x, weight_NK, bias)
