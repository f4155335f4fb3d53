"""How weights of linear layers are packed: as what, and by which kernels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from sps_runtime.ops.weight import PANEL_ROWS, PackedWeight

Quantization = Literal["none", "int8", "int4"]
GROUP = 64
"""Columns of a quantized weight that share a scale."""


@dataclass(frozen=True)
class Packing:
    """Attributes:
    kernels: `sps_kernel.packed`.
    quantization: ``none`` packs in the model's own dtype.
    threads: of one call.
    """

    kernels: ModuleType
    quantization: Quantization = "none"
    threads: int = 1

    @property
    def unit(self) -> int:
        """Columns of a hidden activation that ranks must not share between them, so that the
        weights before and behind it can be cut there."""
        return PANEL_ROWS if self.quantization == "none" else GROUP

    def kind(self, dtype: torch.dtype, name: str) -> str:
        """What the weight `name` of a model in `dtype` is packed as.

        With int4 the head is int8: each of its rows is one token's logit, and there is no later
        layer to even its errors out (llama.cpp's Q4_0 files keep theirs in 6 bits).
        """
        if self.quantization == "none":
            return "bf16" if dtype == torch.bfloat16 else "fp32"
        return "int8" if name == "head" else self.quantization

    def nbytes(self, n: int, k: int, kind: str, cuts: tuple[int, ...] = ()) -> int:
        return int(self.kernels.packed_nbytes(n, k, kind, GROUP, cuts))

    def pack(self, weight_NK: Tensor, kind: str, out: Tensor, cuts: tuple[int, ...] = ()) -> None:
        """Write a bf16 or fp32 matrix (rows may lie apart) to `out`, uint8 of `nbytes`.

        Args:
            cuts: columns between which the weight lies in memory of its own.
        """
        self.kernels.pack_weight(weight_NK, kind, out, GROUP, self.threads, cuts)

    def weight(
        self, packed: Tensor, n: int, k: int, kind: str, cuts: tuple[int, ...] = ()
    ) -> PackedWeight:
        """The weight that `pack` wrote."""
        return PackedWeight.whole(packed, n, k, kind, GROUP, cuts)

    def checksum(self, memory: Tensor) -> int:
        """CRC-32C of uint8 memory."""
        return int(self.kernels.crc32c(memory, self.threads))

    def fingerprint(self, dtype: torch.dtype) -> bytes:
        """32 bytes that differ where kernels pack differently: how a small matrix is packed."""
        rows, columns = 19, 70
        probe = torch.linspace(-1.0, 1.0, rows * columns).view(rows, columns)
        digest = hashlib.sha256()
        for kind in (self.kind(dtype, ""), self.kind(dtype, "head")):
            out = torch.zeros(self.nbytes(rows, columns, kind), dtype=torch.uint8)
            self.pack(probe, kind, out)
            digest.update(out.numpy().tobytes())
        return digest.digest()
