"""x @ W.T + b: by the kernel that streams weights where rows are few, else by torch.

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

from sps_runtime.ops.weight import PlainWeight, Weight

Linear = Callable[..., Tensor]
"""(x ``[rows, in]``, weight ``[out, in]``, bias ``[out]`` or None) -> ``[rows, out]``."""

SMALL_ROWS = 16
"""Up to here the kernel is faster on one core (measured in bf16 and fp32, 896 x 9,728)."""


def kernel_linear(kernels: ModuleType, threads: int = 1) -> Linear:
    """The product of a rank that has the kernels.

    Args:
        threads: threads of one call of the kernel; torch's own are set elsewhere.
    """
    return partial(_linear, kernels.small_gemm, threads)


def _linear(
    small_gemm: Callable[..., Any],
    threads: int,
    x: Tensor,
    weight: Weight,
    bias: Tensor | None = None,
) -> Tensor:
    assert isinstance(weight, PlainWeight)
    weight_NK = weight.tensor_NK
    if 0 < x.shape[0] <= SMALL_ROWS and weight_NK.numel():
        out = x.new_empty(x.shape[0], weight_NK.shape[0])
        small_gemm(x, weight_NK, bias, out=out, threads=threads)
        return out
    return F.linear(x, weight_NK, bias)
