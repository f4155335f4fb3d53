"""What the scheduler counts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.types.messages import EngineState, RankState
from sps_runtime.types.plan import StepCounters


@dataclass
class Figures:
    """Totals since the start, under the names that `EngineState` gives them."""

    steps_total: int = 0
    prompt_tokens_total: int = 0
    cached_tokens_total: int = 0
    generated_tokens_total: int = 0
    retractions_total: int = 0
    aborts_total: int = 0
    prefix_waits_total: int = 0
    sent_bytes_total: int = 0
    physical_bytes_total: int = 0
    linear_bytes_total: int = 0
    exposed_seconds_total: float = 0.0
    compute_seconds_total: float = 0.0

    def add_counters(self, counters: StepCounters) -> None:
        """Sum up what a step cost on one rank."""
        self.sent_bytes_total += counters.sent_bytes
        self.physical_bytes_total += counters.physical_bytes
        self.linear_bytes_total += counters.linear_bytes
        self.exposed_seconds_total += counters.exposed_s
        self.compute_seconds_total += counters.compute_s

    def state(self, cache: PrefixCache, running: int, waiting: int) -> EngineState:
        """A snapshot. Pages that sequences hold or a fence keeps count as used."""
        ranks = tuple(_rank_state(cache, rank) for rank in range(cache.ranks))
        return EngineState(
            running=running,
            waiting=waiting,
            max_total_tokens=cache.allocator.total * cache.page_size,
            used_tokens=sum(rank.used_pages for rank in ranks) * cache.page_size,
            ranks=ranks,
            **asdict(self),
        )


def _rank_state(cache: PrefixCache, rank: int) -> RankState:
    free, cached = cache.allocator.free_count(rank), cache.tree.evictable[rank]
    total = cache.allocator.pages_per_rank
    return RankState(free, cached, total - free - cached, total)
