"""Quantised rows of keys and values in torch: what the kernels must write, and how they are read."""

from __future__ import annotations

import torch

FORMATS = ("int8", "fp8_e4m3")


def encode(x, kv_format):
    """uint8 rows of x [..., d]."""
    if kv_format == "fp8_e4m3":
        return x.float().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    largest = x.float().abs().amax(-1, keepdim=True)
    some = largest > 1e-30
    scale = torch.where(some, largest / 127, 0.0)
    inverse = torch.where(some, torch.tensor(127.0) / largest, 0.0)  # 127 / x is 127 * (1 / x)
    steps = (x.float() * inverse).round().to(torch.int8)
    return torch.cat((steps.view(torch.uint8), scale.view(torch.uint8)), -1)


def decode(rows, kv_format, dtype):
    """What attention reads from rows, rounded to `dtype`."""
    if kv_format == "fp8_e4m3":
        return rows.view(torch.float8_e4m3fn).float().to(dtype)
    scale = rows[..., -4:].clone().view(torch.float32)
    return (rows[..., :-4].view(torch.int8).float() * scale).to(dtype)


def width(d, kv_format):
    """Bytes of a row."""
    return d + 4 if kv_format == "int8" else d
