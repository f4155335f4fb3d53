"""The bytes that stand for a full page of one KV head, as `torch_operators` lays them.

Mean key, mean value, low and step of each channel in the pool's dtype, then 2 bits for each channel
of each key, four channels a byte, the first in the lowest bits (KIVI's per-channel form).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sps_runtime.sparse.summaries import PageSummaries

LEVELS = 3
_LEAST_STEP = 1e-9


@dataclass(frozen=True)
class BlobShape:
    """Attributes:
    page_size, head_dim: of the page; head_dim a multiple of 4.
    dtype: of the pool.
    """

    page_size: int
    head_dim: int
    dtype: torch.dtype

    @property
    def vector(self) -> int:
        """Bytes of one vector."""
        return self.head_dim * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        return 4 * self.vector + self.page_size * self.head_dim // 4


def encode(k_NKBD: Tensor, v_NKBD: Tensor) -> Tensor:
    """uint8 ``[pages, kv_heads, nbytes]`` of full pages."""
    dtype, k = k_NKBD.dtype, k_NKBD.float()
    low = k.amin(2)
    step = ((k.amax(2) - low) / LEVELS).clamp_min(_LEAST_STEP)
    vectors = torch.stack((k.mean(2), v_NKBD.float().mean(2), low, step), 2).to(dtype)
    low, step = vectors[:, :, 2:].float().unbind(2)
    codes = ((k - low[:, :, None]) / step[:, :, None]).round().clamp(0, LEVELS).to(torch.uint8)
    quads = codes.unflatten(-1, (-1, 4))
    packed = quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6
    return torch.cat((vectors.flatten(2).view(torch.uint8), packed.flatten(2)), -1)


def decode(blob_NKX: Tensor, shape: BlobShape) -> PageSummaries:
    """Everything that the bytes say, in fp32."""
    mean_k, mean_v, low, step = _vectors(blob_NKX, shape, 4)
    packed = blob_NKX[:, :, 4 * shape.vector :].unflatten(-1, (shape.page_size, -1))
    codes = torch.stack([packed >> bits & LEVELS for bits in (0, 2, 4, 6)], -1).flatten(-2)
    return PageSummaries(
        torch.full((len(blob_NKX),), shape.page_size),
        mean_k_NKD=mean_k,
        mean_v_NKD=mean_v,
        low_NKD=low,
        high_NKD=low + LEVELS * step,
        sketch_NKBR=low[:, :, None] + codes.float() * step[:, :, None],
    )


def means(blob_NKX: Tensor, shape: BlobShape) -> tuple[Tensor, Tensor]:
    """Mean key and mean value ``[pages, kv_heads, head_dim]``, fp32."""
    mean_k, mean_v = _vectors(blob_NKX, shape, 2)
    return mean_k, mean_v


def _vectors(blob_NKX: Tensor, shape: BlobShape, count: int) -> tuple[Tensor, ...]:
    flat = blob_NKX[:, :, : count * shape.vector].contiguous().view(shape.dtype)
    vectors: tuple[Tensor, ...] = flat.float().unflatten(-1, (count, -1)).unbind(2)
    return vectors
