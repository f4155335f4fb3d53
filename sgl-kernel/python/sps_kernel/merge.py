"""Merge of attention states."""

from __future__ import annotations

from collections.abc import Sequence

from sps_kernel import _core
from sps_kernel.arrays import Array, empty_float32, empty_like


def merge_n_states(
    os: Sequence[Array],
    lses: Sequence[Array],
    *,
    out: Array | None = None,
    lse_out: Array | None = None,
    threads: int = 1,
) -> tuple[Array, Array]:
    """Merge attention states over disjoint sets of keys into the state over their union.

    With weights ``w_i = exp(lse_i - lse)`` and ``lse = log(sum_i exp(lse_i))``, the merged output
    is ``sum_i w_i o_i``.

    Parameters
    ----------
    os : n arrays [T, H, d], float32 or bfloat16, d <= 512, 1 <= n <= 256
        Partial outputs, each normalised over its own keys; the last dim contiguous.
    lses : n arrays [T, H], float32
        Natural-log sums of exponentials; -inf where a part saw no key (its output is then not
        read, and may be anything).
    out, lse_out : [T, H, d] and [T, H], optional
        Written in place; they may be one of the parts. ``out`` takes the first part's dtype when
        left out.
    threads : int
        Threads that run the call.

    Where every part is empty the result is ``out = 0``, ``lse = -inf``. Accumulation is in
    float32; the order of the parts is the order of summation.

    Raises
    ------
    ValueError
        Wrong shapes or dtypes.
    """
    if not os:
        raise ValueError("need at least one state")
    if out is None:
        out = empty_like(os[0], os[0].shape)
    if lse_out is None:
        lse_out = empty_float32(os[0], tuple(os[0].shape)[:2])
    _core.merge_states(list(os), list(lses), out, lse_out, threads)
    return out, lse_out


def merge_states(
    o_a: Array,
    lse_a: Array,
    o_b: Array,
    lse_b: Array,
    *,
    out: Array | None = None,
    lse_out: Array | None = None,
    threads: int = 1,
) -> tuple[Array, Array]:
    """:func:`merge_n_states` of two states.

    >>> out, lse = merge_states(o_a, lse_a, o_b, lse_b)
    """
    return merge_n_states((o_a, o_b), (lse_a, lse_b), out=out, lse_out=lse_out, threads=threads)
