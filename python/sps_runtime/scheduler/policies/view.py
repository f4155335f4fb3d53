"""What a policy sees, and what it proposes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from sps_runtime.config.cache import CacheConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.scheduler import SchedulerConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.scheduler.sequence import Run
from sps_runtime.types.plan import Placement, Strategy

Phase = Literal["prefill", "decode", "mixed"]


@dataclass
class Step:
    """A proposed step.

    Attributes:
        mask: bit r is set for SP rank r of the group.
        items: (run, tokens to compute); fewer are computed where pages are short.
        strategy: None leaves it to the cost model, or to what the operator forced.
        spread: pages of decoded tokens go to any rank of the group, not to owners alone.
        steps: more than one for a burst.
    """

    mask: int
    items: list[tuple[Run, int]]
    phase: Phase
    placement: Placement = "sharded"
    strategy: Strategy | None = None
    spread: bool = False
    steps: int = 1

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.items)


@dataclass
class View:
    """The scheduler's state as policies may read it.

    Attributes:
        runs: live runs by handle, in order of admission.
        waiting: how many requests wait for admission.
        awaiting: how many of those wait for a prefix that a run computes.
        burst: most steps of a burst; 1 where there are none.
    """

    config: SchedulerConfig
    cache_config: CacheConfig
    parallel: ParallelConfig
    costs: StepCosts
    cache: PrefixCache
    runs: dict[int, Run] = field(default_factory=dict)
    waiting: int = 0
    awaiting: int = 0
    burst: int = 1

    @property
    def all_ranks(self) -> int:
        return (1 << self.parallel.sp_size) - 1

    @property
    def prefilling(self) -> bool:
        """Whether a prompt is being computed."""
        return any(run.prefilling for run in self.runs.values())

    @property
    def reads_in_place(self) -> bool:
        """Whether a group may read committed pages of ranks outside it."""
        one_host = self.parallel.nnodes == 1
        return one_host and self.costs.in_place and self.parallel.strategy in ("auto", "pass_kv")

    @property
    def sparse_mixes(self) -> bool:
        """Whether exact sequences may share a step with csa, which runs as pass-KV does."""
        return self.parallel.strategy in ("auto", "pass_kv")

    def required(self, run: Run) -> int:
        """Ranks that a prefill step of `run` must have: those with pages it cannot read from
        outside, because plans under way still write them or because memory is not shared."""
        if self.parallel.arch == "tp":
            return self.all_ranks
        if self.reads_in_place:
            return run.table.owners_from(run.acked // self.cache_config.page_size)
        return run.table.owner_mask

    def decode_mask(self, run: Run) -> int:
        """Ranks that a decode step of `run` must have: every owner of its pages."""
        return self.all_ranks if self.parallel.arch == "tp" else run.table.owner_mask

    def may_prefill(self, run: Run) -> bool:
        """Whether a run's next chunk may be sent now."""
        return run.prefilling and (self.config.overlap or not run.flights)

    def may_decode(self, run: Run, mask: int) -> bool:
        """Whether a run's next token may be computed by the group `mask` now.

        Its input is known, or lies on the board of the group that is sampling it: then the next
        group must be that one, or a part of it on the same host. Penalties and grammars are told
        every token but the one on the board, so at most that one may be unknown.
        """
        if run.flights and run.flights[-1].burst:
            return False  # It ends when all its ranks have seen, on the board, how far it came.
        if run.unknown == 0:
            return True
        if not self.config.overlap or (run.unknown > 1 and run.sequence.needs_history):
            return False
        return mask == run.mask or (self.parallel.nnodes == 1 and not mask & ~run.mask)


def mask_ranks(mask: int) -> tuple[int, ...]:
    """The ranks of a mask, ascending."""
    return tuple(rank for rank in range(mask.bit_length()) if mask >> rank & 1)


def ranks_mask(ranks: Iterable[int]) -> int:
    """The mask of some ranks."""
    mask = 0
    for rank in ranks:
        mask |= 1 << rank
    return mask
