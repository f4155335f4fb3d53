"""When block-sparse prefill takes less time than exact prefill.

Sparse attention reads a part of the causal pairs (`expected_density`), and pays for choosing them:
every scored row of a query block meets every key once, means stand for what is not read, and new
pages are summarised. On short prompts the least number of pages is most of them, and attention is
a small part of the time anyhow, so there is a length below which exact is sooner.
"""

from __future__ import annotations

from sps_runtime.costmodel.prefill import PrefillCost
from sps_runtime.types.attention import SparseSettings

PREPARATION = 0.02
"""Summarising new pages, over the time of a token's linear layers."""

CHOOSING = 0.28
"""Scoring a row, over attending to all it may see: 7% where 16 of 64 rows are scored, measured with
the kernels (``sgl-kernel/docs/sparse.md``)."""

TAIL = 1 / 64
"""Means of dropped pages, over attending to these."""

LONGEST = 1 << 24
"""Prompts of any length: where csa does not pay here it pays nowhere."""


def expected_density(settings: SparseSettings, tokens: int) -> float:
    """Pairs of (query block, page) that are read, over causal ones, in a prompt of `tokens`.

    By budget and least number of pages alone: what `tau` saves is not known beforehand. Stride
    attention over P ranks reads 1 / P + (1 - 1 / P) / s^2 of them, which is 1 / s here.
    """
    if settings.estimator == "stride":
        return 1 / settings.stride
    blocks = -(-tokens // settings.block)
    if settings.budget >= 1 or blocks <= settings.minimum:
        return 1.0
    least = settings.minimum
    turn = blocks if settings.budget <= 0 else min(blocks, max(least, int(least / settings.budget)))
    read = least * (least + 1) / 2 + (turn - least) * least
    read += settings.budget * (blocks * (blocks + 1) - turn * (turn + 1)) / 2
    return read / (blocks * (blocks + 1) / 2)


def attention_share(settings: SparseSettings, tokens: int) -> float:
    """What reading and choosing pages, and the tail, cost over exact attention."""
    density = expected_density(settings, tokens)
    if settings.estimator == "stride":
        return density
    rows = settings.rows or settings.block
    tail = TAIL * (1 - density) if settings.tail == "mean" else 0.0
    return density + CHOOSING * min(1.0, rows / settings.block) + tail


def sparse_seconds(cost: PrefillCost, settings: SparseSettings, tokens: int) -> float:
    """Seconds of a prefill of `tokens` under csa, choosing included."""
    once = cost.a + PREPARATION * cost.b * tokens
    return once + cost.seconds([(tokens, 0)], attention_share(settings, tokens))


def least_tokens(cost: PrefillCost, settings: SparseSettings) -> int:
    """The shortest prompt, in superblocks, whose prefill csa does not make slower.

    Density falls with length and attention's part grows, so it pays from there on. Stride attention
    chooses nothing, so it costs nothing beforehand.
    """
    if settings.estimator == "stride":
        return 0

    def pays(tokens: int) -> bool:
        return sparse_seconds(cost, settings, tokens) <= cost.seconds([(tokens, 0)])

    low, high = 0, max(1, LONGEST // settings.superblock)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle * settings.superblock) else (middle, high)
    return high * settings.superblock
