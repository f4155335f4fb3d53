"""RMSNorm, rotary embedding with KV write, SiLU-and-multiply: one pass over memory each."""

from __future__ import annotations

from sps_kernel import _core
from sps_kernel.arrays import Array, empty_like


def rms_norm(
    x: Array,
    weight: Array,
    eps: float,
    *,
    residual: Array | None = None,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim (Zhang & Sennrich, 2019).

    Parameters
    ----------
    x : [T, D] or [T, H, D], float32 or bfloat16
        The last dim contiguous, other strides free: the heads of q and k inside a fused qkv can be
        normed in place.
    weight : [D], float32 or bfloat16
    eps : float
    residual : x's shape and dtype, optional
        Updated in place to ``residual + x`` (rounded to its dtype); what is normed is that sum.
    out : x's shape and dtype, optional
        May be ``x``.
    threads : int

    Computed in float32 and rounded once. Raises ``ValueError`` for what does not fit.
    """
    if out is None:
        out = empty_like(x, x.shape)
    _core.rms_norm(x, weight, eps, residual, out, threads)
    return out


def silu_mul(gate: Array, up: Array, *, out: Array | None = None, threads: int = 1) -> Array:
    """``gate * sigmoid(gate) * up``: the middle of a SwiGLU layer (Shazeer, 2020).

    ``gate`` and ``up`` are [T, I], float32 or bfloat16, the last dim contiguous: the halves of a
    fused gate-and-up output need no copy. ``out`` [T, I] may be either. Computed in float32 and
    rounded once. Raises ``ValueError`` for what does not fit.
    """
    if out is None:
        out = empty_like(gate, gate.shape)
    _core.silu_mul(gate, up, out, threads)
    return out


def rope(q: Array, k: Array, positions: Array, cos_sin: Array, *, threads: int = 1) -> None:
    """Rotate q and k in place (Su et al., 2021; pairs (i, i + r/2) as Hugging Face has them).

    Parameters
    ----------
    q, k : [T, Hq, d] and [T, Hkv, d], float32 or bfloat16, the last dim contiguous
    positions : [T], int32
        Rows of ``cos_sin``.
    cos_sin : [P, r], float32, r even and at most d
        Cosines of the r / 2 angles of a position, then their sines. Dims beyond r stay as they are.
    threads : int

    Computed in float32. Raises ``ValueError`` for what does not fit; nothing is written then.
    """
    _core.rope(q, k, positions, cos_sin, threads)


def rope_kv_write(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    cos_sin: Array,
    k_pool: Array,
    v_pool: Array,
    slots: Array,
    offsets: Array,
    *,
    kv_format: str = "native",
    threads: int = 1,
) -> None:
    """:func:`rope`, then write the rotated k and v of each token into its page.

    Parameters
    ----------
    q, k, positions, cos_sin
        As in :func:`rope`.
    v : [T, Hkv, d], q's dtype
    k_pool, v_pool : [slots, Hkv, page, d], q's dtype
        This rank's pools of one layer; bytes where rows are quantised.
    slots, offsets : [T], int32
        Where each token goes: page slot, and token within the page. slot < 0: nowhere (padding, or
        a token whose page another rank owns); its q and k are rotated all the same.
    kv_format : str
        How rows lie in the pools, as :class:`KVPools` has it. ``int8``: d signed bytes, then the
        float32 that they are multiplied by, a 127th of the row's largest size; ``fp8_e4m3``: what
        is beyond 448 becomes 448. Both round to nearest even.
    threads : int

    Two tokens must not go to the same place. Raises ``ValueError`` for what does not fit; nothing
    is written then.
    """
    _core.rope_kv_write(
        q, k, v, positions, cos_sin, k_pool, v_pool, slots, offsets, kv_format, threads
    )
