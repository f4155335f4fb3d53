"""Triton's interpreter, mended where it does not do what GPUs do.

It truncates float32 to bfloat16 where devices round to nearest even, and multiplies the bits of
bfloat16 matrices as if they were integers (triton 3.7.1).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16, which the interpreter keeps as uint16, as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """float32 as the bits of bfloat16, rounded to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def mend() -> None:
    """Patch the interpreter of this process."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        kinds = source.dtype.scalar, target.scalar
        if kinds == (tl.float32, tl.bfloat16):
            return handle(narrow(source.data), target.scalar)
        if kinds == (tl.bfloat16, tl.float32):
            return handle(widen(source.data), target.scalar)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        sides = [
            handle(widen(side.data), tl.float32) if side.dtype.scalar == tl.bfloat16 else side
            for side in (a, b)
        ]
        return dot(self, *sides, d, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
