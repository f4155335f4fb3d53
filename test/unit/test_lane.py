"""In which order steps are launched and answered for, with a device that ends them when told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from sps_runtime.runner.launched import AHEAD, Lane
from sps_runtime.types.plan import StepPlan, StepResult


@dataclass
class Started:
    """A step on a device that ends it when `over` says so, or when it is waited for."""

    device: Device
    epoch: int

    @property
    def done(self) -> bool:
        return self.epoch in self.device.over

    def result(self, since: float) -> StepResult:
        assert since >= 0.0
        self.device.log.append(("ended" if self.done else "waited", self.epoch))
        if self.epoch == self.device.fails:
            raise ConnectionError("lost")
        return StepResult(self.epoch, 3)


class Device:
    """Plans of a group of one run late."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.over: set[int] = set()
        self.fails = -1
        self.answers: list[StepResult] = []
        self.lane = Lane(self, 3, self.answers.append)

    def runs_late(self, plan: StepPlan) -> bool:
        return len(plan.group) == 1

    def launch(self, plan: StepPlan, late: bool) -> Started:
        assert late == self.runs_late(plan)
        if plan.epoch == -7:
            raise ValueError("a bad plan")
        self.log.append(("launched", plan.epoch))
        return Started(self, plan.epoch)

    def take(self, epoch: int, *group: int) -> None:
        self.lane.take(StepPlan(epoch, group or (0,), ()))

    @property
    def told(self) -> list[int]:
        return [result.epoch for result in self.answers]


def test_the_next_step_is_launched_before_the_last_is_over() -> None:
    device = Device()
    device.take(1)
    assert device.lane.busy and not device.lane.poll() and device.told == []
    device.take(2)
    assert device.log == [("launched", 1), ("launched", 2)]
    device.over.add(1)
    assert device.lane.poll() and not device.lane.poll()
    assert device.told == [1] and device.lane.busy
    device.over.add(2)
    assert device.lane.poll() and not device.lane.busy and device.told == [1, 2]


def test_no_more_than_a_few_are_ahead() -> None:
    device = Device()
    for epoch in range(1, 7):
        device.take(epoch)
        under_way = sum(1 if what == "launched" else -1 for what, _ in device.log)
        assert under_way <= AHEAD
    device.lane.drain()
    assert device.told == [1, 2, 3, 4, 5, 6] and not device.lane.busy


def test_a_step_that_needs_the_host_finds_all_before_it_answered() -> None:
    """Peers may wait for tokens of this rank while it waits for them."""
    device = Device()
    device.take(1)
    device.take(2)
    device.take(3, 0, 1)
    order = [("launched", 1), ("launched", 2), ("waited", 1), ("waited", 2)]
    assert device.log == [*order, ("launched", 3), ("waited", 3)]
    assert device.told == [1, 2, 3] and not device.lane.busy


@pytest.mark.parametrize("fails", [1, 2])
def test_errors_are_told_with_their_own_epoch(fails: int) -> None:
    device = Device()
    device.fails = fails
    device.take(1)
    device.take(2)
    with pytest.raises(ConnectionError):
        device.lane.drain()
    last = device.answers[-1]
    assert (last.epoch, last.rank, last.error) == (fails, 3, "ConnectionError: lost")
    assert device.told == list(range(1, fails + 1))


def test_a_plan_that_cannot_be_launched() -> None:
    device = Device()
    with pytest.raises(ValueError):
        device.take(-7)
    assert device.answers[-1].error == "ValueError: a bad plan" and not device.lane.busy


def test_a_burst_begins_when_all_before_it_is_answered() -> None:
    device = Device()
    device.take(1)
    device.take(2)

    def execute(plan: StepPlan) -> StepResult:
        assert device.told == [1, 2] and not device.lane.busy
        return StepResult(plan.epoch, 3, steps=4)

    device.lane.run(StepPlan(3, (0,), ()), execute)
    assert device.told == [1, 2, 3] and device.answers[-1].steps == 4

    def fails(plan: StepPlan) -> StepResult:
        raise TimeoutError("nobody said anything")

    with pytest.raises(TimeoutError):
        device.lane.run(StepPlan(7, (0,), ()), fails)
    assert (device.answers[-1].epoch, device.answers[-1].error) == (
        7,
        "TimeoutError: nobody said anything",
    )
