"""Partials on the wire: fp32 lse, then o in the model's dtype, packed in one message."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_bytes(rows: int, heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the partials of `rows` queries: ``rows * heads * (dim * b + 4)``."""
    return rows * heads * (dim * dtype.itemsize + 4)


def pack(o_THD: Tensor, lse_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat uint8 message. lse stays fp32 (bf16 lse drifts); o is rounded once, to `dtype`."""
    rows, heads, dim = o_THD.shape
    message = torch.empty(packed_bytes(rows, heads, dim, dtype), dtype=torch.uint8)
    o, lse = unpack(message, rows, heads, dim, dtype)
    o.copy_(o_THD)
    lse.copy_(lse_TH)
    return message


def unpack(
    message: Tensor, rows: int, heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(o, lse) as views of a message."""
    cut = rows * heads * 4
    lse = message[:cut].view(torch.float32).view(rows, heads)
    return message[cut:].view(dtype).view(rows, heads, dim), lse
