"""Partials on the wire (fp32 lse, then o in the model's dtype, in one message), and their merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend, Partial
from sps_runtime.attention.page_reads import RowSet
from sps_runtime.ops.merge_state import merge_rows_


def packed_bytes(rows: int, heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of the partials of `rows` queries: ``rows * heads * (dim * b + 4)``."""
    return rows * heads * (dim * dtype.itemsize + 4)


def pack(o_THD: Tensor, lse_TH: Tensor, dtype: torch.dtype) -> Tensor:
    """A flat uint8 message. lse stays fp32 (bf16 lse drifts); o is rounded once, to `dtype`."""
    rows, heads, dim = o_THD.shape
    message = o_THD.new_empty(packed_bytes(rows, heads, dim, dtype), dtype=torch.uint8)
    packed = unpack(message, rows, heads, dim, dtype)
    packed.o.copy_(o_THD)
    packed.lse.copy_(lse_TH)
    return message


def unpack(message: Tensor, rows: int, heads: int, dim: int, dtype: torch.dtype) -> Partial:
    """(o, lse) as views of a message."""
    cut = rows * heads * 4
    lse = message[:cut].view(torch.float32).view(rows, heads)
    return Partial(message[cut:].view(dtype).view(rows, heads, dim), lse)


def merge_home(
    backend: AttentionBackend,
    own: Partial,
    others: Sequence[tuple[RowSet, Partial]],
    out_THD: Tensor,
) -> None:
    """Merge what came from others into this rank's own partial, and write o into `out_THD`.

    Args:
        own: of all rows; may be overwritten.
        others: the rows that each is of; no member twice.
    """
    for rows, part in others:
        index = rows.on(own.lse.device)
        if index is not None:
            merge_rows_(own.o, own.lse, index, part.o, part.lse)
    backend.merge([own, *(part for rows, part in others if rows.index is None)], out_THD)
