"""Looking up, adding and laying rows side by side: what moves values rather than computes them.

With the kernels all of it can be recorded (`ops.recording`); the bits are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sps_runtime.ops.weight import PackedWeight, PlainWeight, Weight


class Moves(Protocol):
    """Tensors are float32 or bfloat16; their last dim is contiguous, other strides are free."""

    def look_up(self, index_T: Tensor, table_VD: Weight) -> Tensor:
        """Rows of a table, int64 or int32 index -> ``[len(index), D]`` in its dtype. A packed
        table is whole and not rounded."""
        ...

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        """x += y ``[n, d]``, in fp32 and rounded once; returns x."""
        ...

    def copy_(self, out: Tensor, source: Tensor) -> Tensor:
        """``[n, d]`` or ``[n, m, d]``, rounded to out's dtype; returns `out`."""
        ...

    def contiguous(self, x: Tensor) -> Tensor:
        """x, or a contiguous copy of it."""
        ...

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts ``[n, d_i]`` side by side, contiguous; a single one may be returned as it is."""
        ...


class TorchMoves:
    """torch's own."""

    def look_up(self, index_T: Tensor, table_VD: Weight) -> Tensor:
        assert isinstance(table_VD, PlainWeight), "other forms are loaded for other operators"
        return F.embedding(index_T, table_VD.tensor_NK)

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        return x.add_(y)

    def copy_(self, out: Tensor, source: Tensor) -> Tensor:
        return out.copy_(source)

    def contiguous(self, x: Tensor) -> Tensor:
        return x.contiguous()

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts), dim=1)


class KernelMoves:
    """`sps_kernel`'s."""

    def __init__(self, kernels: ModuleType) -> None:
        self._kernels = kernels

    def look_up(self, index_T: Tensor, table_VD: Weight) -> Tensor:
        shape = (len(index_T), table_VD.shape[1])
        if isinstance(table_VD, PlainWeight):
            out = table_VD.tensor_NK.new_empty(shape)
            self._kernels.look_up(index_T, table_VD.tensor_NK, out=out)
            return out
        assert isinstance(table_VD, PackedWeight)
        packed, n, k, kind = table_VD.packed, table_VD.n, table_VD.k, table_VD.kind
        out = packed.new_empty(shape, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
        self._kernels.packed_rows(index_T, packed, n, k, kind, out=out)
        return out

    def add_(self, x: Tensor, y: Tensor) -> Tensor:
        self._kernels.add(y, x)
        return x

    def copy_(self, out: Tensor, source: Tensor) -> Tensor:
        self._kernels.copy(source, out)
        return out

    def contiguous(self, x: Tensor) -> Tensor:
        return x if x.is_contiguous() else self.copy_(x.new_empty(x.shape), x)

    def beside(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return self.contiguous(parts[0])
        widths = [part.shape[1] for part in parts]
        out = parts[0].new_empty(len(parts[0]), sum(widths))
        for part, target in zip(parts, out.split(widths, dim=1), strict=True):
            self._kernels.copy(part, target)
        return out
