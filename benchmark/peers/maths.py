"""From times to figures: rates, shares of the floors, paired ratios and what counts as a tie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY, KV_WIDTH = 24, 896, 4864, 32000, 128
"""The 0.5b shape; KV_WIDTH is KV heads x head dim."""
LINEAR = LAYERS * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV_WIDTH + 3 * HIDDEN * INTERMEDIATE)
WEIGHT_BITS = {"bf16": 16.0, "q8_0": 8.5, "int8": 8.5, "q4_0": 4.5, "int4": 4.5}
"""Bits of a weight with its scale: blocks of 32 with an fp16 scale, ours taken alike."""


@dataclass(frozen=True)
class Floor:
    """What the machine can do with some threads."""

    gemm_flops_per_s: float
    read_bytes_per_s: float

    def best(self, other: Floor) -> Floor:
        """The better of two probes, kind by kind."""
        return Floor(
            max(self.gemm_flops_per_s, other.gemm_flops_per_s),
            max(self.read_bytes_per_s, other.read_bytes_per_s),
        )


def prefill_flops(tokens: int) -> float:
    """FLOPs of a causal prefill: linear layers (716 M a token) and attention (43,008 n^2)."""
    return 2.0 * LINEAR * tokens + 2.0 * LAYERS * HIDDEN * tokens**2


def step_bytes(batch: int, context: float, weights: str = "bf16") -> float:
    """Bytes that one decode step must read: all weights once, and bf16 KV of every context."""
    parameters = LINEAR + VOCABULARY * HIDDEN
    kv = 2 * 2 * LAYERS * KV_WIDTH * context
    return parameters * WEIGHT_BITS[weights] / 8 + batch * kv


def decode_rate(times: Sequence[Sequence[float]]) -> float:
    """Tokens/s over all streams while all of them decode; 0.0 when they never do together.

    `times` holds the arrival times of each stream's tokens. The window begins with the last
    stream's first token and ends with the first stream's last token.
    """
    begin = max(row[0] for row in times)
    end = min(row[-1] for row in times)
    tokens = sum(begin < moment <= end for row in times for moment in row)
    return tokens / (end - begin) if end > begin else 0.0


def prefill_share(tokens: int, ttft_s: float, floor: Floor) -> float:
    return prefill_flops(tokens) / ttft_s / floor.gemm_flops_per_s


def decode_share(
    batch: int, context: float, tokens_per_s: float, floor: Floor, weights: str = "bf16"
) -> float:
    steps_per_s = tokens_per_s / batch
    return step_bytes(batch, context, weights) * steps_per_s / floor.read_bytes_per_s


@dataclass(frozen=True)
class Comparison:
    """Ours against the other on one quantity where more is better."""

    ours: float
    other: float
    ratio: float
    """Geometric mean of ours / other over the pairs run next to one another."""
    spread: float
    """The larger of ours' best / worst and the other's best / worst."""

    @property
    def verdict(self) -> str:
        if abs(math.log(self.ratio)) <= math.log(self.spread):
            return "tie"
        return "ahead" if self.ratio > 1 else "behind"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def compare(ours: Sequence[float], other: Sequence[float]) -> Comparison:
    """Pair the i-th run of ours with the i-th of the other.

    Raises ValueError for runs that do not pair up or are not positive.
    """
    if len(ours) != len(other) or not ours or min(*ours, *other) <= 0:
        raise ValueError(f"cannot pair {list(ours)} with {list(other)}")
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    spread = max(max(ours) / min(ours), max(other) / min(other))
    return Comparison(geometric_mean(ours), geometric_mean(other), geometric_mean(ratios), spread)
