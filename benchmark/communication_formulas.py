"""Bytes per token and layer, all ranks together: what docs/design.md says, and what is
left of it where nothing is sent that a causal mask discards."""

from __future__ import annotations

from communication_ranks import DTYPE, Shape

TRIMMED = {"contiguous": 1 / 2, "zigzag": 3 / 4}
"""Pairs of (query's rank, key's rank) that causality leaves, over all. Contiguous: rank r sees the
r before it, of P - 1. Zigzag: its early block sees those of r ranks, its late one those of all."""

LSE = 4
B = DTYPE.itemsize


def pass_kv(shape: Shape, ranks: int) -> float:
    return 2 * (ranks - 1) * shape.kv_heads * shape.head_dim * B


def pass_q(shape: Shape, ranks: int) -> float:
    return (ranks - 1) * shape.heads * (2 * shape.head_dim * B + LSE)


def ulysses(shape: Shape, ranks: int) -> float:
    heads = 2 * shape.heads + 2 * max(shape.kv_heads, ranks)
    return heads * shape.head_dim * B * (ranks - 1) / ranks


def tensor_parallel(shape: Shape, ranks: int) -> float:
    return 4 * shape.hidden * B * (ranks - 1)


def stride(shape: Shape, ranks: int, s: int) -> float:
    """1/s of Ulysses, and of a log-sum-exp beside each output."""
    lse = shape.heads * LSE * (ranks - 1) / ranks
    return (ulysses(shape, ranks) + lse) / s


def block(shape: Shape, remote: float, share: float, summaries: float) -> float:
    """`share` of the tokens that pass-KV reads and `summaries` of the bytes of all of them, where a
    token's rank reads `remote` tokens of others for it; audits come beside it."""
    return 2 * remote * shape.kv_heads * shape.head_dim * B * (share + summaries)


def indivisible(shape: Shape, strategy: str, ranks: int) -> str:
    """Why a strategy is not measured at a degree; empty where it is."""
    if strategy in ("ulysses", "stride", "tp") and shape.heads % ranks:
        return f"{shape.heads} query heads do not divide by {ranks}"
    return ""
