"""How a token's key or value of one head lies in a page: as it is, or quantised to a byte a number.

`int8`: head_dim signed bytes, then the float32 that they are multiplied by, a 127th of the row's
largest size, so that a row's own outlier costs no other row anything. `fp8_e4m3`: as OCP's format
(and torch's ``float8_e4m3fn``) has it, what lies beyond 448 becomes 448. Rows are quantised once,
when they are written, and attention reads only pages; so what a token sees does not depend on how a
prompt was cut into chunks, nor on who computed it.

A pool of quantised rows is uint8, and its last dim tells the two apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8_MAX = 448.0
SCALE_BYTES = 4
_LEAST = 1e-30
"""Rows that are nowhere larger become zeros: a step's inverse would overflow."""


def row_format(pool: Tensor, head_dim: int) -> str:
    """``native``, ``int8`` or ``fp8_e4m3``.

    Raises:
        ValueError: heads of `head_dim` cannot lie in this pool.
    """
    row = pool.shape[-1]
    if pool.dtype != torch.uint8:
        if row == head_dim:
            return "native"
    elif row == head_dim + SCALE_BYTES:
        return "int8"
    elif row == head_dim:
        return "fp8_e4m3"
    raise ValueError(f"rows of {row} x {pool.dtype} hold no heads of {head_dim}")


def storage_dtype(kv_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a pool of `kv_dtype` (`config.cache`) in a model of `dtype`."""
    return torch.uint8 if kv_dtype in ("int8", "fp8_e4m3") else dtype


def encode(x: Tensor, kv_format: str) -> Tensor:
    """Rows of ``x [..., head_dim]`` as they lie in a page."""
    if kv_format == "native":
        return x
    if kv_format == "fp8_e4m3":
        return x.float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)
    some = largest > _LEAST
    scale = torch.where(some, largest / 127, 0.0)
    inverse = torch.where(some, torch.tensor(127.0) / largest, 0.0)  # 127 / x: 127 * (1 / x)
    steps = (x * inverse).round().to(torch.int8)
    return torch.cat((steps.view(torch.uint8), scale.view(torch.uint8)), -1)


def decode(rows: Tensor, kv_format: str, dtype: torch.dtype) -> Tensor:
    """``[..., head_dim]`` of `dtype`, rounded once: what attention reads."""
    if kv_format == "native":
        return rows
    if kv_format == "fp8_e4m3":
        return rows.view(torch.float8_e4m3fn).float().to(dtype)
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (rows[..., :-SCALE_BYTES].view(torch.int8).float() * scale).to(dtype)
