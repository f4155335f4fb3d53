"""Links of GPUs, on CPU tensors: boxes with marks that are checked, staging through a host's links,
and tensors told apart by where they lie."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test.dist.rank_program import check_collectives, check_exchanges, check_started

from sps_runtime.distributed.boxes import BOXES, Boxes, BoxMailroom, counter_bytes
from sps_runtime.distributed.by_device import DeviceMailroom, StagedMailroom
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.cuda_ipc import Exported, box_events, event_name, tell_all
from sps_runtime.distributed.threads import ThreadWorld

BOX_BYTES = 1000


class Marks:
    """Marks of all ranks, which count: a box that is filled before it was emptied, emptied before
    it was filled, or marked again before the last mark was waited for, is an error."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int, int, int], int] = {}
        self.seen: dict[tuple[str, int, int, int], int] = {}

    def make(self, kind: str, who: int, peer: int, box: int) -> None:
        key = (kind, who, peer, box)
        assert self.made.get(key, 0) - self.seen.get(key, 0) <= (kind == "emptied"), key
        self.made[key] = self.made.get(key, 0) + 1

    def wait(self, kind: str, who: int, peer: int, box: int) -> None:
        key = (kind, who, peer, box)
        self.seen[key] = self.seen.get(key, 0) + 1
        assert self.seen[key] <= self.made.get(key, 0), key


class Moments:
    def __init__(self, marks: Marks, rank: int) -> None:
        self._marks, self._rank = marks, rank

    def filled(self, peer: int, box: int) -> None:
        self._marks.make("filled", self._rank, peer, box)

    def emptied(self, peer: int, box: int) -> None:
        self._marks.make("emptied", self._rank, peer, box)

    def await_filled(self, peer: int, box: int) -> None:
        self._marks.wait("filled", peer, self._rank, box)

    def await_emptied(self, peer: int, box: int) -> None:
        self._marks.wait("emptied", peer, self._rank, box)


class Side:
    def __init__(self) -> None:
        self.joined = 0

    @contextmanager
    def behind(self) -> Iterator[None]:
        yield

    def join(self) -> None:
        self.joined += 1


def box_mailrooms(size: int, traffic: list[Traffic], timeout_s: float = 30.0) -> list[BoxMailroom]:
    memory, marks = mmap.mmap(-1, counter_bytes(size)), Marks()
    boxes = torch.zeros(size, size, BOXES, BOX_BYTES, dtype=torch.uint8)
    return [
        BoxMailroom(
            Boxes(boxes[rank], [None if r == rank else boxes[r] for r in range(size)]),
            Moments(marks, rank), Side(), memory, rank, size, traffic[rank], timeout_s=timeout_s,
        )
        for rank in range(size)
    ]  # fmt: skip


def check_all(world: ThreadWorld, mailrooms: list[Mailroom]) -> None:
    size = world.world_size

    def work(rank: int) -> None:
        everyone = tuple(range(size))
        check_exchanges(mailrooms[rank], rank, everyone, 12)
        check_started(mailrooms[rank], rank, everyone)
        check_collectives(mailrooms[rank], rank, size)
        if rank < 2:
            check_exchanges(mailrooms[rank], rank, (0, 1), 4)

    world.run(work)


@pytest.mark.parametrize("size", [2, 3])
def test_boxes_carry_messages_of_any_length(size: int) -> None:
    world = ThreadWorld(size, timeout_s=30)
    mailrooms = box_mailrooms(size, [Traffic() for _ in range(size)])
    check_all(world, list(mailrooms))


def test_a_peer_that_does_not_come() -> None:
    mailroom = box_mailrooms(2, [Traffic(), Traffic()], timeout_s=0.05)[0]
    x = torch.zeros(4)
    with pytest.raises(ConnectionError, match="rank 1 did not answer"):
        mailroom.group((0, 1)).exchange([x, x], [x, x.clone()], "control")


@pytest.mark.parametrize("size", [2, 3])
def test_staging_through_a_host(size: int) -> None:
    world = ThreadWorld(size, timeout_s=30)
    check_all(world, [StagedMailroom(world.mailroom(rank)) for rank in range(size)])


def test_tensors_are_told_apart() -> None:
    world = ThreadWorld(2, timeout_s=30)
    boxes = box_mailrooms(2, [Traffic(), Traffic()])
    check_all(world, [DeviceMailroom(world.mailroom(rank), boxes[rank]) for rank in range(2)])
    pair = DeviceMailroom(world.mailroom(0), boxes[0]).group((0, 1))
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    with pytest.raises(ValueError, match="tensors on"):
        pair.exchange([here, there], [here, here], "control")


def test_everybody_knows_what_everybody_exports() -> None:
    """As bytes of our own: handles are 64 bytes, names are ours."""
    world = ThreadWorld(3, timeout_s=30)

    def exported(rank: int) -> Exported:
        events = {name: bytes([rank]) * 64 for name in box_events(3, rank)}
        return Exported({"kv": bytes([rank]) * 64}, events, "" if rank else "no driver")

    def work(rank: int) -> list[Exported]:
        return tell_all(world.mailroom(rank).group((0, 1, 2)), exported(rank))

    for told in world.run(work):
        assert told == [exported(rank) for rank in range(3)]
    assert event_name("filled", 1, 0) in exported(0).events
    assert len(exported(2).events) == 2 * 2 * BOXES
