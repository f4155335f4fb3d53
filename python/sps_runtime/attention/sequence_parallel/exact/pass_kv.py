"""Pass-KV: every rank computes its own queries, and K and V come to it.

Ring attention's data flow (Liu et al. 2023; Meta's context parallelism, Yang et al. 2024) without
the ring: in one host's shared memory a remote page is read where it lies, behind its owner's fence;
between hosts each owner sends each reader what a causal mask lets it see, in one exchange. Bytes
received per layer and rank: ``2 n Hkv d b`` for n remote tokens seen.
"""

from __future__ import annotations

from torch import Tensor

from sps_runtime.attention.sequence_parallel.exact.kv_reads import HeadShare, KVReads
from sps_runtime.attention.sequence_parallel.step import StepState


class PassKV:
    """`layers.step.SequenceAttention` of one step; also what a group of one runs."""

    def __init__(self, step: StepState) -> None:
        self._step = step
        self._reads: dict[int | None, KVReads] = {}

    def __call__(
        self,
        layer: int,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        window: int | None = None,
    ) -> Tensor:
        step = self._step
        step.write(layer, k_TKD, v_TKD)
        if step.size > 1:
            step.publish(layer)
        reads = self._reads.get(window)
        if reads is None:
            readers = [step.layout.runs(member) for member in range(step.size)]
            reads = self._reads[window] = KVReads(step, readers, window)
        heads, kv_heads = q_THD.shape[1], k_TKD.shape[1]
        shares = [HeadShare.of(0, heads, heads // kv_heads)] * step.size
        partial = reads.attend(layer, q_THD, shares, scale=scale, window=window)
        return partial.o.to(q_THD.dtype)
