"""Plans under way on every rank, and whose turn it is."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.scheduler.policies.view import Step, mask_ranks
from sps_runtime.scheduler.sequence import Flight, Run


@dataclass
class SentStep:
    """A plan under way: its sequences by board slot.

    Attributes:
        steps: how many it has; of a burst, once a rank has answered, how many were run.
        answered: a rank has.
    """

    mask: int
    flights: dict[int, tuple[Run, Flight]]
    steps: int = 1
    answered: bool = False
    hurried: bool = False


class Pipeline:
    """Keeps at most `depth` plans under way per rank, and is fair.

    Phases alternate on every rank, so neither decode nor prefill starves; within a phase the group
    that was served longest ago goes first. A step whose turn it is but whose ranks are busy keeps
    them reserved: younger steps cannot slip in for ever before a large group.
    """

    def __init__(self, cache: PrefixCache, tp_size: int, depth: int) -> None:
        self.sent: dict[int, SentStep] = {}
        self._fence = cache.fence
        self._cache = cache
        self._tp_size = tp_size
        self._depth = max(1, depth)
        self._under_way = [0] * (cache.ranks * tp_size)
        self._phase_turns: dict[tuple[str, int], int] = {}
        self._group_turns: dict[tuple[str, int], int] = {}

    @property
    def idle(self) -> bool:
        return self._fence.idle

    def has_room(self, mask: int) -> bool:
        """Whether every rank of a group can take one more plan."""
        return all(self._under_way[rank] < self._depth for rank in self._global_ranks(mask))

    def any_room(self) -> bool:
        """Whether some rank can take one more plan."""
        return min(self._under_way) < self._depth

    def turns(self, steps: list[Step]) -> list[Step]:
        """Steps that can be sent now, in order of their turns."""
        ready, reserved = [], 0
        for step in sorted(steps, key=self._turn):
            if step.mask & reserved or not self.has_room(step.mask):
                reserved |= step.mask
            else:
                ready.append(step)
        return ready

    def send(self, step: Step) -> int:
        """Open an epoch for a step; return it."""
        ranks = self._global_ranks(step.mask)
        epoch = self._fence.send(ranks, step.steps)
        for rank in ranks:
            self._under_way[rank] += 1
        self._group_turns[step.phase, step.mask] = epoch
        for rank in mask_ranks(step.mask):
            self._phase_turns[step.phase, rank] = epoch
        self.sent[epoch] = SentStep(step.mask, {}, step.steps)
        return epoch

    def hurry(self) -> list[int]:
        """The global ranks that lead bursts under way, each burst's once."""
        bursts = [step for step in self.sent.values() if step.steps > 1 and not step.hurried]
        for step in bursts:
            step.hurried = True
        return [self._global_ranks(step.mask)[0] for step in bursts if not step.answered]

    def expects(self, epoch: int, rank: int) -> bool:
        """Whether a rank owes an answer to this epoch."""
        return self._fence.expects(epoch, rank)

    def acknowledge(self, epoch: int, rank: int) -> bool:
        """Take one global rank's answer; whether it was the epoch's last."""
        complete = self._cache.acknowledge(epoch, rank)
        self._under_way[rank] -= 1
        if complete:
            for _, flight in self.sent.pop(epoch).flights.values():
                flight.complete = True
        return complete

    def check(self) -> None:
        """Raise AssertionError unless counts and epochs agree."""
        pending = [
            (epoch, rank)
            for epoch, step in self.sent.items()
            for rank in self._global_ranks(step.mask)
            if self._fence.expects(epoch, rank)
        ]
        for rank, count in enumerate(self._under_way):
            assert count == sum(r == rank for _, r in pending), "plans under way are miscounted"
            assert 0 <= count <= self._depth, "too many plans under way"
        assert self._fence.idle == (not self.sent), "an epoch is forgotten"

    def _turn(self, step: Step) -> tuple[int, int]:
        ranks = mask_ranks(step.mask)
        phase = min(self._phase_turns.get((step.phase, rank), 0) for rank in ranks)
        return phase, self._group_turns.get((step.phase, step.mask), 0)

    def _global_ranks(self, mask: int) -> list[int]:
        tp = self._tp_size
        return [rank * tp + peer for rank in mask_ranks(mask) for peer in range(tp)]
