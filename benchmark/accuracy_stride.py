"""Stride attention (CSPS) of one rank's tokens, computed in one place: what answers it gives.

Level 0 is dense among the tokens of a rank; above it a KV head h keeps the tokens t with
``t = h (mod s)`` of earlier ranks, for the queries that it keeps alike (`sequence_parallel.stride`
is the engine's, among ranks).
"""

from __future__ import annotations

import torch
from torch import Tensor

from accuracy_choose import PAGE, LayerPages, Setup
from sps_runtime.attention.backend import AttentionBackend, PagePool, QueryRun
from sps_runtime.ops.merge_state import merge_state

KV_BYTES = 2


def shard_of(tokens: int, setup: Setup) -> int:
    """Tokens of each rank but the last, whole pages."""
    return -(-tokens // (setup.ranks * PAGE)) * PAGE


def attend(
    q_THD: Tensor,
    start: int,
    pages: LayerPages,
    setup: Setup,
    backend: AttentionBackend,
    scale: float,
) -> Tensor:
    """o ``[tokens, heads, head_dim]`` in bf16 of rows that lie in one shard."""
    first = start // setup.shard * setup.shard
    end, heads = start + len(q_THD), pages.k.shape[1]
    ids = torch.arange(first // PAGE, -(-end // PAGE), dtype=torch.int32)
    run = QueryRun(0, len(q_THD), start, ids, ids * PAGE, end)
    pool = PagePool([pages.k], [pages.v], len(pages.k))
    local = backend.partial(q_THD, [run], pool, scale=scale)
    group = q_THD.shape[1] // heads
    for head in range(heads if first else 0):
        rows = torch.arange((head - start) % setup.stride, len(q_THD), setup.stride)
        mine = slice(head * group, (head + 1) * group)
        kept = [x[: first // PAGE, head].flatten(0, 1)[head :: setup.stride] for x in pages.kv]
        score = q_THD[rows, mine].float() * scale @ kept[0].float().T
        o, lse = score.softmax(-1) @ kept[1].float(), score.logsumexp(-1)
        merged, _ = merge_state(local.o[rows, mine], local.lse[rows, mine], o, lse)
        local.o[rows, mine] = merged
    return local.o.bfloat16()


def density(tokens: int, setup: Setup) -> float:
    """(query, key) pairs that are computed over causal ones, at this many tokens."""
    at = torch.arange(tokens)
    first = at // setup.shard * setup.shard
    far = first.double() / setup.stride**2
    return float(((at - first + 1) + far).sum() / (at + 1).double().sum())


def bytes_per_token(setup: Setup, heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> float:
    """Logical bytes of a token and layer: 1/s of Ulysses' q, k, v and o, and 4 of each lse."""
    p = setup.ranks
    vectors = (2 * heads + 2 * max(kv_heads, p)) * head_dim * KV_BYTES
    return (vectors + 4 * heads) * (p - 1) / (p * setup.stride)
