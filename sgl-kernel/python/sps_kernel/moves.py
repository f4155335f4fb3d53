"""What a decode step does between its kernels, so that all of it can be recorded."""

from __future__ import annotations

from sps_kernel import _core
from sps_kernel.arrays import Array, empty_float32, empty_like


def copy(src: Array, out: Array) -> Array:
    """``out[...] = src``, rounded to out's dtype: columns laid side by side, a tensor made
    contiguous, partials packed for the wire.

    Parameters
    ----------
    src, out : [n, d] or [n, m, d], float32 or bfloat16
        The last dim contiguous, other strides free; they do not overlap.

    Raises ``ValueError`` for what does not fit.
    """
    _core.copy(src, out)
    return out


def add(src: Array, out: Array) -> Array:
    """``out[...] += src`` in float32, rounded once; shapes as in :func:`copy`, one dtype."""
    _core.add(src, out)
    return out


def look_up(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    """Rows of a table: token embedding, or some rows of an activation.

    Parameters
    ----------
    ids : [n], int32 or int64
    table : [V, D], float32 or bfloat16, the last dim contiguous
    out : [n, D], table's dtype, optional

    Raises ``ValueError`` for an id outside of [0, V), in every run of a recorded call.
    """
    if out is None:
        out = empty_like(table, (ids.shape[0], table.shape[1]))
    _core.look_up(ids, table, out)
    return out


def sum_parts(parts: Array, *, out: Array | None = None) -> Array:
    """The sum over the first dim, one part after another in float32, rounded once at the end.

    Parameters
    ----------
    parts : [n, ...], float32 or bfloat16, contiguous
    out : [...], parts' dtype, contiguous, optional
    """
    if out is None:
        out = empty_like(parts, tuple(parts.shape)[1:])
    _core.sum_parts(parts, out)
    return out


def rope_angles(
    positions: Array, frequencies: Array, scale: float = 1.0, *, out: Array | None = None
) -> Array:
    """The table that :func:`sps_kernel.rope` takes, for some positions (Su et al., 2021).

    Parameters
    ----------
    positions : [T], int32 or int64
    frequencies : [F], float32
        Radians per position; their products are rounded to float32, as in transformers.
    scale : float
        A factor on cosines and sines (YaRN's attention temperature).
    out : [T, 2 F], float32, optional
        Cosines, then sines.
    """
    if out is None:
        out = empty_float32(frequencies, (positions.shape[0], 2 * frequencies.shape[0]))
    _core.rope_angles(positions, frequencies, scale, out)
    return out
