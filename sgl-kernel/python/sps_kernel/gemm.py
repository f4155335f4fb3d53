"""Matrix products with few rows: decoding reads every weight once a step."""

from __future__ import annotations

from sps_kernel import _core
from sps_kernel.arrays import Array, empty_like


def small_gemm(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """``x @ w.T + bias`` for a few rows of x, at the speed at which memory gives the weights.

    Parameters
    ----------
    x : [M, K], float32 or bfloat16
        Meant for M <= 16: any M works, but above that a GEMM library is faster.
    w : [N, K], x's dtype
        A linear layer's weight as it is stored. Rows are contiguous; the stride between them is
        free, so ``w[a:b]`` and ``w[:, a:b]`` (slices of tensor parallelism) need no copy.
    bias : [N], float32 or bfloat16, optional
    out : [M, N], float32 or bfloat16, optional
        Written in place; x's dtype when left out. K = 0 gives the bias.
    threads : int
        Threads that run the call; each takes blocks of w's rows.

    Products of bfloat16 are summed in float32. The result does not depend on ``threads``.

    Raises
    ------
    ValueError
        Wrong shapes, dtypes or strides.

    Example
    -------
    >>> y = small_gemm(x, w[rank * n : (rank + 1) * n])
    """
    if out is None:
        out = empty_like(x, (x.shape[0], w.shape[0]))
    _core.small_gemm(x, w, bias, out, threads)
    return out


def gemv(
    x: Array,
    w: Array,
    bias: Array | None = None,
    *,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """:func:`small_gemm` of one row: x [K], w [N, K], bias [N] -> [N]."""
    if out is None:
        out = empty_like(x, (w.shape[0],))
    _core.small_gemm(x[None], w, bias, out[None], threads)
    return out
