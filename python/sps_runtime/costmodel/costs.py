"""The cost model as policies see it: degrees, strategies and decode placements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sps_runtime.costmodel import decode as decode_table
from sps_runtime.costmodel import strategy as attention
from sps_runtime.costmodel.prefill import PrefillCost, Work
from sps_runtime.costmodel.strategy import AttentionWork, ModelShape
from sps_runtime.types.messages import DecodeCost, LinkCost
from sps_runtime.types.plan import Placement, Strategy

STEP_OVERHEAD_S = 1e-3
"""What a step costs before it computes anything, where nothing was measured: Python, queues."""

UNMEASURED_BYTES_PER_S = 1e10
UNMEASURED_FLOPS_PER_S = 5e10


@dataclass(frozen=True)
class StepCosts:
    """Costs of one engine, from its model's shape and what its ranks measured at start.

    Attributes:
        prefill: fitted coefficients per degree; degrees without an entry are computed from
            `shape`, `link` and `flops_per_s`.
        memory_bytes_per_s: how fast a rank reads weights; the link's rate unless told.
        decode: measured seconds of decode's linear layers; where it is empty they are computed
            from `shape`, `link` and rates.
    """

    shape: ModelShape
    link: LinkCost = field(default_factory=LinkCost)
    flops_per_s: float = UNMEASURED_FLOPS_PER_S
    memory_bytes_per_s: float = 0.0
    prefill: Mapping[int, PrefillCost] = field(default_factory=dict)
    decode: DecodeCost = field(default_factory=DecodeCost)

    @property
    def in_place(self) -> bool:
        """Whether a rank reads committed pages of peers on its host where they lie."""
        return self.link.zero_copy

    def prefill_seconds(self, degree: int, works: Sequence[Work], density: float = 1.0) -> float:
        """Seconds of a prefill step over `degree` ranks."""
        return self.prefill_cost(degree).seconds(works, density)

    def prefill_cost(self, degree: int) -> PrefillCost:
        """The fitted coefficients of `degree`, or those that shape and rates imply."""
        return self.prefill.get(degree) or self._computed(degree)

    def strategy(self, work: AttentionWork) -> Strategy:
        """The strategy that takes least time for a prefill step."""
        return attention.cheapest(self.shape, work, self.link, self.flops_per_s)

    def decode_placement(self, tokens: Sequence[int]) -> Placement:
        """How linear layers of a decode step lie best; `tokens` per rank of the group.

        Sharded: each rank reads all its weights for its own tokens. Replicated: each reads a slice
        for all tokens, and two sums per layer cross the ranks. Attention costs both the same.
        """
        if len(tokens) == 1:
            return "sharded"
        if self.decode.rows:
            return decode_table.cheapest(self.decode, tokens)
        shape, total, ranks = self.shape, sum(tokens), len(tokens)
        sharded = self._linear_seconds(max(tokens), 1.0)
        crossing = 2 * total * shape.hidden * LINEAR_SUM_BYTES * (ranks - 1) / ranks
        sums = 2 * shape.layers * (2 * self.link.latency_s + crossing / self._bytes_per_s)
        replicated = self._linear_seconds(total, 1.0 / ranks) + sums
        return "replicated" if replicated < sharded else "sharded"

    @property
    def _bytes_per_s(self) -> float:
        return self.link.bytes_per_s or UNMEASURED_BYTES_PER_S

    @property
    def _flops_per_s(self) -> float:
        return self.flops_per_s or UNMEASURED_FLOPS_PER_S

    def _linear_seconds(self, tokens: int, part: float) -> float:
        """Linear layers of `tokens` tokens on a `part` of the weights: compute or memory bound."""
        params = self.shape.linear_params * part
        reading = params * self.shape.element_bytes / (self.memory_bytes_per_s or self._bytes_per_s)
        return max(2.0 * params * tokens / self._flops_per_s, reading)

    def _computed(self, degree: int) -> PrefillCost:
        shape = self.shape
        pairs = 2.0 * shape.q_heads * shape.head_dim * shape.layers / self._flops_per_s
        linear = 2.0 * shape.linear_params / self._flops_per_s
        crossing = 0.0
        if degree > 1 and not self.link.zero_copy:
            one = AttentionWork(degree, ((1, 0),), 1.0 / degree)
            least = min(attention.sent_bytes(s, shape, one) for s in attention.STRATEGIES)
            crossing = least * shape.layers / self._bytes_per_s
        fixed = STEP_OVERHEAD_S * degree + 2 * shape.layers * (degree - 1) * self.link.latency_s
        return PrefillCost(fixed, linear / degree + crossing, pairs / degree)


LINEAR_SUM_BYTES = 4
"""Sums of linear layers cross in fp32."""
