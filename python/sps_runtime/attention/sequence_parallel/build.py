"""From a plan's strategy to the attention of its step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.sequence_parallel.mixed import divided, special_parts
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.registry import resolve
from sps_runtime.types.attention import SparseCounters
from sps_runtime.types.plan import StepPlan

_HERE = "sps_runtime.attention.sequence_parallel"

STRATEGIES = {
    "pass_kv": f"{_HERE}.exact.pass_kv:PassKV",
    "pass_q": f"{_HERE}.exact.pass_q:PassQ",
    "ulysses": f"{_HERE}.exact.ulysses:Ulysses",
    "replicated": f"{_HERE}.exact.replicated:Replicated",
    "csa": f"{_HERE}.csa.prefill:SparsePassKV",
}
"""Name -> ``module:class``; each class takes a `StepState` and is a `SequenceAttention`."""


def strategy_name(plan: StepPlan, layout: ShardLayout) -> str:
    """Which of `STRATEGIES` a plan runs. In a group of one nothing crosses whatever the strategy,
    and reading pages (`pass_kv`, or `csa` where some are chosen) is all there is."""
    if any(layout.sparse):
        return "csa"
    if len(plan.group) == 1:
        return "pass_kv"
    return "replicated" if plan.placement == "replicated" else plan.strategy


@runtime_checkable
class Counted(Protocol):
    """Attention that counts what it chose."""

    def counters(self) -> tuple[SparseCounters, ...]: ...


def sparse_counters(attention: object) -> tuple[SparseCounters, ...]:
    """What a step's attention has to say of its sparse sequences, once all layers have run; every
    rank of the group asks, because a sample is measured by the owners of its pages."""
    return attention.counters() if isinstance(attention, Counted) else ()


def sequence_attention(
    plan: StepPlan, layout: ShardLayout, context: AttentionContext
) -> Callable[..., Tensor]:
    """The `layers.step.SequenceAttention` of one step on this rank.

    Args:
        plan: the step; this rank's SP rank is in its group.
        layout: `ShardLayout(plan, ...)`, shared with whoever gathers the inputs.
        context: the rank's means.

    The result is called once per layer by every rank of the group, in the order of layers, also by
    ranks that compute no token (with 0 rows).

    Raises:
        ConnectionError: from a call, when a peer is gone or late.
        ValueError: from a call, when the plan reads a page that can neither be read nor be sent.
    """

    def rest(plan: StepPlan, layout: ShardLayout) -> Callable[..., Tensor]:
        factory = resolve("strategy", STRATEGIES, strategy_name(plan, layout))
        attention: Callable[..., Tensor] = factory(StepState(layout, context))
        return attention

    special = special_parts(layout)
    return divided(plan, layout, context, special, rest) if special else rest(plan, layout)
