"""When block-sparse prefill takes less time than exact prefill.

Sparse attention reads a part of the causal pairs (`expected_density`), and pays for choosing them:
every scored row of a query block meets every key once, means stand for what is not read, and new
pages are summarised. On short prompts the least number of pages is most of them, and attention is
a small part of the time anyhow, so there is a length below which exact is sooner.
"""

from __future__ import annotations

from sps_runtime.costmodel.prefill import PrefillCost
from sps_runtime.types.attention import SparseSettings

PREPARATION = 0.05
"""Summaries, audits and more calls, over the time of a token's linear layers: what kernels do not
explain of 4,096 tokens of the `0.5b` shape on two ranks."""

CHOOSING = 0.28
"""Scoring a row, over attending to all it may see: 7% where 16 of 64 rows are scored, measured with
the kernels (``sgl-kernel/docs/sparse.md``)."""

TAIL = 1 / 64
"""Means of dropped pages, over attending to these."""


def expected_density(settings: SparseSettings, tokens: int) -> float:
    """Pairs of (query block, page) that are read, over causal ones, in a prompt of `tokens`.

    A block reads its superblock up to itself, and what budget and least number of pages leave of
    those before it: what `tau` saves is not known beforehand. Stride
    attention over P ranks reads 1 / P + (1 - 1 / P) / s^2 of them, which is 1 / s here.
    """
    if settings.estimator == "stride":
        return 1 / settings.stride
    if settings.budget >= 1:
        return 1.0
    read = position = 0.0
    while position < tokens:
        size = min(settings.superblock_at(int(position)), tokens - position) / settings.block
        before = position / settings.block
        chosen = min(before, max(settings.minimum, settings.budget * before))
        read += size * (size + 1) / 2 + size * chosen
        position += settings.superblock_at(int(position))
    blocks = tokens / settings.block
    return min(1.0, read / (blocks * (blocks + 1) / 2))


def attention_share(settings: SparseSettings, tokens: int) -> float:
    """What reading and choosing pages, and the tail, cost over exact attention."""
    density = expected_density(settings, tokens)
    if settings.estimator == "stride":
        return density
    tail = TAIL * (1 - density) if settings.tail == "mean" else 0.0
    return density + CHOOSING * scored_share(settings, tokens) + tail


def scored_share(settings: SparseSettings, tokens: int) -> float:
    """Rows that are scored over all, in a whole superblock at a prompt's end."""
    size = settings.superblock_at(tokens - 1)
    first = settings.align(tokens - 1)
    blocks = range(first, first + size, settings.block)
    rows = [settings.scored_rows(at, size) or settings.block for at in blocks]
    return sum(min(each, settings.block) for each in rows) / (len(rows) * settings.block)


def imbalance(settings: SparseSettings, tokens: int, ranks: int) -> float:
    """Tokens of the busiest rank over the mean: superblocks are not divided, so that few of them
    leave ranks without work."""
    superblock = settings.superblock_at(tokens - 1)
    whole, rest = divmod(tokens, superblock)
    most = -(-whole // ranks) * superblock + (0 if whole % ranks else rest)
    return most * ranks / tokens


def sparse_seconds(
    cost: PrefillCost, settings: SparseSettings, tokens: int, ranks: int = 1
) -> float:
    """Seconds of a prefill of `tokens` under csa over `ranks` ranks, choosing included."""
    work = cost.seconds([(tokens, 0)], attention_share(settings, tokens)) - cost.a
    prepared = work + PREPARATION * cost.b * tokens
    return 2 * cost.a + prepared * imbalance(settings, tokens, ranks)


def pays(
    cost: PrefillCost, settings: SparseSettings, tokens: int, ranks: int = 1, hosts: int = 1
) -> bool:
    """Whether csa does not make a prompt's prefill slower than exact attention.

    Stride attention chooses nothing, so it costs nothing beforehand. Blocks of a short prompt
    choose each for itself, and together nearly all pages (98% of another host's at 8,192 tokens):
    between hosts they would send summaries and questions to save nothing.
    """
    if settings.estimator == "stride":
        return True
    if hosts > 1 and tokens < settings.short_to:
        return False
    return sparse_seconds(cost, settings, tokens, ranks) <= cost.seconds([(tokens, 0)])
