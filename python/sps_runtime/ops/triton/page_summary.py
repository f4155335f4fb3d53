"""What stands for a full page of a KV head: the bytes of `sparse.blob`.

Mean key, mean value, low and step of each channel in the pool's dtype, then 2 bits for each channel
of each key. One program a page and KV head; bytes: K and V in once, 9.4% of them out (64 tokens of
64 dims in bf16). Quotients are rounded as IEEE has it, so that codes are the CPU's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def summary_kernel(
    k, v, slots, out, slot_stride, head_stride, out_slot, out_head,
    PAGE: tl.constexpr, D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
    ITEMSIZE: tl.constexpr,
):  # fmt: skip
    """Program (i, h): KV head h of page slots[i]."""
    slot, head = tl.load(slots + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    token, column = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    page = slot * slot_stride + head * head_stride
    at = page + token[:, None] * D + column[None, :]
    there = (token < PAGE)[:, None] & (column < D)[None, :]
    keys = tl.load(k + at, mask=there, other=0.0).to(tl.float32)
    low = tl.min(tl.where(there, keys, float("inf")), axis=0)
    high = tl.max(tl.where(there, keys, float("-inf")), axis=0)
    step = tl.maximum(tl.div_rn(high - low, 3.0), 1e-9)
    mean_k = tl.sum(keys, axis=0) / PAGE
    mean_v = tl.sum(tl.load(v + at, mask=there, other=0.0).to(tl.float32), axis=0) / PAGE

    kept = column < D
    blob = out + slot * out_slot + head * out_head
    vectors = blob.to(tl.pointer_type(k.dtype.element_ty)) + column
    low, step = low.to(k.dtype.element_ty), step.to(k.dtype.element_ty)
    tl.store(vectors, mean_k.to(k.dtype.element_ty), mask=kept)
    tl.store(vectors + D, mean_v.to(k.dtype.element_ty), mask=kept)
    tl.store(vectors + 2 * D, low, mask=kept)
    tl.store(vectors + 3 * D, step, mask=kept)

    # Codes are of low and step as they can be read back.
    low = tl.where(kept, low.to(tl.float32), 0.0)
    step = tl.where(kept, step.to(tl.float32), 1.0)
    steps = tl.div_rn(keys - low[None, :], tl.broadcast_to(step[None, :], BLOCK_P, BLOCK_D))
    whole = (tl.minimum(tl.maximum(steps, 0.0), 3.0) + 12582912.0) - 12582912.0  # ties to even
    codes = whole.to(tl.int32) << (column % 4 * 2)[None, :]
    packed = tl.sum(tl.reshape(codes, [BLOCK_P, BLOCK_D // 4, 4]), axis=2)
    quad = tl.arange(0, BLOCK_D // 4)
    byte = 4 * D * ITEMSIZE + token[:, None] * (D // 4) + quad[None, :]
    some = (token < PAGE)[:, None] & (quad < D // 4)[None, :]
    tl.store(blob + byte, packed.to(tl.uint8), mask=some)


def summarise_pages(k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
    """Summaries of full pages `slots` (int32) of one layer's pool, into the same slots.

    Args:
        k_SKBD, v_SKBD: ``[slots, kv_heads, page_size, head_dim]``, float32 or bfloat16, equal
            strides, pages contiguous; head_dim a multiple of 4.
        out_SKX: uint8 ``[slots, kv_heads, nbytes]`` (`sparse.blob.BlobShape.nbytes`).
    """
    _, kv_heads, page, dim = k_SKBD.shape
    if len(slots) == 0:
        return
    block_p, block_d = triton.next_power_of_2(page), max(16, triton.next_power_of_2(dim))
    summary_kernel[(len(slots), kv_heads)](
        k_SKBD, v_SKBD, slots, out_SKX,
        k_SKBD.stride(0), k_SKBD.stride(1), out_SKX.stride(0), out_SKX.stride(1),
        PAGE=page, D=dim, BLOCK_P=block_p, BLOCK_D=block_d, ITEMSIZE=k_SKBD.element_size(),
        num_warps=8 if block_p * block_d > 8192 else 4,
    )  # fmt: skip
