"""Packed weights: cut into panels once, read at memory speed for a few rows, blocked for many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from sps_kernel import _core
from sps_kernel.arrays import Array, is_torch

Kind = Literal["bf16", "fp32", "int8", "int4"]


def packed_nbytes(n: int, k: int, kind: Kind, group: int = 64, cuts: Sequence[int] = ()) -> int:
    """Bytes that a weight [n, k] takes when packed; see :func:`pack_weight`.

    Raises
    ------
    ValueError
        ``kind`` is unknown, n or k negative, or ``cuts`` are none.
    """
    return _core.packed_nbytes(n, k, kind, group, cuts)


def pack_weight(
    weight: Array,
    kind: Kind,
    out: Array,
    group: int = 64,
    threads: int = 1,
    cuts: Sequence[int] = (),
) -> None:
    """Write a linear layer's weight as :func:`packed_linear` reads it.

    A panel holds 16 outputs (rows of the weight; the last panel is padded with zeros), panels lie
    one after another. ``bf16``: [ceil(k / 2)][16][2], pairs along k, the last one padded with zero
    when k is odd. ``fp32``: [k][16]. ``int8`` and ``int4``: codes, and a bfloat16 scale for each
    group of columns of each output (docs/quant.md). The layout is the same for every instruction
    set and any number of rows of x, so it can be kept on disk.

    Parameters
    ----------
    weight : [N, K], float32 or bfloat16
        Rows are contiguous, their stride is free. Converted where ``kind`` asks for it (float32 to
        bfloat16 rounds to nearest even). For codes they must be finite: a group with one that is
        not gets the scale NaN.
    kind : "bf16", "fp32", "int8" or "int4"
    out : uint8 [packed_nbytes(N, K, kind, group, cuts)]
        Written in full. Best aligned to 64 bytes; any alignment is correct.
    group : int
        Columns that share a scale: a multiple of 32 up to 256; for kinds without scales it has no
        meaning.
    threads : int
    cuts : columns at which the weight is cut
        Columns between two cuts are packed by themselves, one slice after another, so that who
        multiplies by one slice reads memory in order. They ascend; even numbers for "bf16",
        multiples of ``group`` for "int8" and "int4".

    Raises
    ------
    ValueError
        Wrong shapes, dtypes, strides or cuts.
    """
    _core.pack_weight(weight, kind, out, group, threads, cuts)


def unpack_weight(
    packed: Array,
    n: int,
    k: int,
    kind: Kind,
    dtype: Any = None,
    group: int = 64,
    cuts: Sequence[int] = (),
) -> Array:
    """The weight [n, k] that ``packed`` stands for, as float32 or bfloat16 (``dtype``).

    ``dtype`` is one of ``packed``'s library (``torch.bfloat16``, ``np.float32``); float32 when left
    out. Raises ``ValueError``.
    """
    if is_torch(packed):
        import torch

        out = packed.new_empty((n, k), dtype=dtype or torch.float32)
    else:
        out = np.empty((n, k), dtype=dtype or np.float32)
    _core.unpack_weight(packed, kind, group, out, cuts)
    return out


def packed_linear(
    x: Array,
    packed: Array,
    n: int,
    k: int,
    kind: Kind,
    bias: Array | None = None,
    *,
    out: Array,
    rows: tuple[int, int] | None = None,
    columns: tuple[int, int] | None = None,
    group: int = 64,
    threads: int = 1,
    cuts: Sequence[int] = (),
) -> Array:
    """``out = x @ W[rows, columns].T + bias`` for a packed weight W [n, k].

    Parameters
    ----------
    x : [M, columns], bfloat16 for "bf16", float32 for "fp32", either for "int8" and "int4"
        Any M: a few rows run at memory speed, many at the speed of arithmetic. The row stride is
        free, pointers need no alignment.
    packed : uint8 [packed_nbytes(n, k, kind, group, cuts)]
        What :func:`pack_weight` wrote.
    bias : [outputs], float32 or bfloat16, optional
        Of the chosen rows of W.
    out : [M, outputs], float32 or bfloat16
        Written in place and returned; the row stride is free.
    rows : (begin, end), optional
        Outputs to compute: multiples of 16, or n. All when left out.
    columns : (begin, end), optional
        Columns of W that x holds: even numbers for "bf16", multiples of ``group`` for "int8" and
        "int4", or k. All when left out.
    group, cuts
        As it was packed.
    threads : int

    Sums are taken in float32 along k in order: a row's result depends neither on the other rows of
    x, nor on ``threads``, nor on ``rows`` or ``cuts``. "int8" and "int4" sum each group first and
    scale its sum; in how many parts, and how finely x is taken, depends on M (docs/quant.md), and
    from 48 rows of bfloat16 on scaled weights are rounded to bfloat16.

    Raises
    ------
    ValueError
        Wrong shapes, dtypes, strides or slices.

    Example
    -------
    >>> packed = torch.empty(packed_nbytes(n, k, "bf16"), dtype=torch.uint8)
    >>> pack_weight(weight, "bf16", packed)
    >>> packed_linear(x, packed, n, k, "bf16", out=y[:, :512], rows=(0, 512))
    """
    _core.packed_linear(x, packed, n, k, kind, bias, out, rows, columns, group, threads, cuts)
    return out


def packed_rows(ids: Array, packed: Array, n: int, k: int, kind: Kind, *, out: Array) -> Array:
    """Rows of a packed weight [n, k], as they were before: an embedding whose table is the head.

    Each row's elements lie in 64 bytes of memory a pair (or one), so a row is read 16 times as slowly
    as from a table: some microseconds.

    Parameters
    ----------
    ids : [T], int32 or int64
    packed : uint8 [packed_nbytes(n, k, kind)]
        Without cuts.
    kind : "bf16" or "fp32"
    out : [T, k], bfloat16 or float32 as ``kind`` is
        Written in place and returned; the row stride is free.

    Raises
    ------
    ValueError
        Wrong shapes or dtypes, or an id outside of [0, n), in every run of a recorded call.
    """
    _core.packed_rows(ids, packed, n, k, kind, out)
    return out


def crc32c(buffer: Array, threads: int = 1) -> int:
    """CRC-32C (Castagnoli, as iSCSI and ext4 compute it) of a contiguous uint8 array [n].

    Does not depend on ``threads``. Raises ``ValueError``.
    """
    return _core.crc32c(buffer, threads)
