"""Bytes that attention sends per layer and rank, and the seconds they take (docs/design.md).

l tokens are new and c cached, spread over P ranks; pass-KV sends KV to queries, pass-Q sends
queries to KV and partial outputs with their lse back (Meta's context parallelism), Ulysses
(DeepSpeed) changes from tokens over ranks to heads over ranks and back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from sps_runtime.costmodel.prefill import features
from sps_runtime.types.messages import LinkCost
from sps_runtime.types.plan import Strategy

STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
LSE_BYTES = 4


@dataclass(frozen=True)
class ModelShape:
    """What costs need to know of a model.

    Attributes:
        linear_params: parameters of all linear layers of the blocks (a token multiplies each once).
        element_bytes: bytes of an activation, weight or KV element.
    """

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    head_dim: int
    linear_params: int
    element_bytes: int = 2


@dataclass(frozen=True)
class AttentionWork:
    """What one step's attention over `degree` ranks has to do.

    Attributes:
        works: (new, cached) tokens of each sequence.
        kv_share: the largest part of the attended KV that one rank holds, in [1 / degree, 1].
    """

    degree: int
    works: tuple[tuple[int, int], ...]
    kv_share: float


def sent_bytes(strategy: Strategy, shape: ModelShape, work: AttentionWork) -> float:
    """Bytes that one rank sends in one layer."""
    ranks, width = work.degree, shape.head_dim * shape.element_bytes
    new, _ = features(work.works)
    cached = sum(tokens for _, tokens in work.works)
    if strategy == "pass_kv":
        return 2 * (new + cached) / ranks * (ranks - 1) * shape.kv_heads * width
    if strategy == "pass_q":
        return new / ranks * (ranks - 1) * shape.q_heads * (2 * width + LSE_BYTES)
    kv_heads = max(shape.kv_heads, ranks)
    heads = new * (2 * shape.q_heads + 2 * kv_heads) + cached * 2 * kv_heads
    return heads / ranks * width * (ranks - 1) / ranks


def seconds(
    strategy: Strategy, shape: ModelShape, work: AttentionWork, link: LinkCost, flops_per_s: float
) -> float:
    """Seconds of one layer's attention: the slowest rank's computation, and what crosses.

    Not overlapped: what a pipeline hides is its own to claim. Without measured rates only bytes
    and messages count.
    """
    ranks = work.degree
    _, pairs = features(work.works)
    compute = 2.0 * pairs * shape.q_heads * shape.head_dim / flops_per_s if flops_per_s else 0.0
    share, messages = 1.0 / ranks, ranks - 1
    if strategy == "pass_q":
        share, messages = work.kv_share, 2 * (ranks - 1)
    elif strategy == "ulysses":
        share, messages = -(-shape.q_heads // ranks) / shape.q_heads, 2 * (ranks - 1)
    crossing = sent_bytes(strategy, shape, work)
    if strategy == "pass_kv" and link.zero_copy:
        crossing = 0.0
    wire = crossing / link.bytes_per_s if link.bytes_per_s else crossing * 1e-10
    return compute * share + link.latency_s * messages + wire


def cheapest(
    shape: ModelShape, work: AttentionWork, link: LinkCost, flops_per_s: float
) -> Strategy:
    """The strategy with the least `seconds`; pass_kv where they are equal."""
    return min(STRATEGIES, key=lambda name: seconds(name, shape, work, link, flops_per_s))
