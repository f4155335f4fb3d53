"""Links of GPUs, on CPU tensors: boxes with marks that are checked, staging through a host's links,
and tensors told apart by where they lie."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from test.dist.rank_program import check_collectives, check_exchanges, check_started

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.process import RankConfig, local_endpoints
from sps_runtime.distributed.boxes import BOXES, Boxes, BoxMailroom, counter_bytes
from sps_runtime.distributed.by_device import DeviceMailroom, StagedMailroom
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.cuda_ipc import Driver, Exported, box_events, event_name, tell_all
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.distributed.torch_dist import TorchDistMailroom
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.runner.gpu import share_gpu, with_domains
from sps_runtime.runner.place import Place

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


def config_of(rank: int, gpus: tuple[int, ...], links: str, sp: int = 2, tp: int = 1) -> RankConfig:
    parallel = ParallelConfig(sp_size=sp, tp_size=tp)
    engine = EngineConfig(
        model_path="", device="cuda", gpus=gpus, device_links=links, parallel=parallel
    )
    return RankConfig(rank=rank, engine=engine, endpoints=local_endpoints(Path("/x"), sp * tp))


def test_without_interprocess_memory_all_go_through_the_host() -> None:
    """One rank that can share nothing is enough; here no rank has a driver."""
    world = ThreadWorld(2, timeout_s=30)
    shape = KVShape(1, 2, 1, 16, 16, 2)

    def work(rank: int) -> str:
        config, host = config_of(rank, (0, 0), "ipc"), world.mailroom(rank).group((0, 1))
        place = Place.of(rank, config.engine.parallel)
        sharing = share_gpu(config, place, torch.device("cpu"), shape, None, host)
        assert sharing.gpu is None and sharing.everyone == (None, None)
        apart = with_domains(place, config.engine, False)
        assert apart.hosts == (0, 1) and apart.sp_peers_here() == {rank: rank}
        return sharing.why

    if torch.cuda.is_available():
        pytest.skip("a GPU may share its memory")
    assert all("host memory" in why for why in world.run(work))


@pytest.mark.parametrize(
    ("gpus", "tp", "hosts"),
    [((0, 0), 1, (0, 0)), ((0, 1), 1, (0, 1)), ((0, 1, 0, 1), 1, (0, 1, 0, 1)),
     ((0, 1, 0, 1), 2, (0, 0)), ((0, 1, 2, 3), 2, (0, 1))],
)  # fmt: skip
def test_ranks_of_one_gpu_read_in_place(
    gpus: tuple[int, ...], tp: int, hosts: tuple[int, ...]
) -> None:
    sp = len(gpus) // tp
    engine = config_of(0, gpus, "auto", sp, tp).engine
    for rank in range(len(gpus)):
        place = with_domains(Place.of(rank, engine.parallel), engine, True)
        assert place.hosts == hosts


class FakeCuda:
    """The driver's calls over addresses of our own."""

    def __init__(self) -> None:
        self.given: dict[bytes, int] = {}

    def cuMemAlloc_v2(self, address: Any, nbytes: Any) -> int:  # noqa: N802
        if nbytes.value > 1000:
            return 2
        address._obj.value = 4096 * (1 + len(self.given))
        return 0

    def cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:  # noqa: N802
        content = address.value.to_bytes(8, "little") + b"\xff" * 56
        ctypes.memmove(handle._obj.reserved, content, 64)
        self.given[content] = address.value
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:  # noqa: N802
        address._obj.value = self.given[bytes(handle.reserved)] + 1
        return 0 if flags.value == 1 else 1


def test_the_driver_is_called_as_it_is_declared() -> None:
    driver = Driver(FakeCuda())  # type: ignore[arg-type]
    address = driver.allocate(64)
    handle = driver.export(address)
    assert len(handle) == 64 and driver.open(handle) == address + 1
    with pytest.raises(RuntimeError, match="cuMemAlloc_v2 fails with CUDA error 2"):
        driver.allocate(4096)
    with pytest.raises(ValueError, match="a handle of 3 bytes"):
        driver.open(b"abc")


def test_graphs_hold_what_nccl_carries() -> None:
    """A device carries NCCL's messages by itself; boxes, staging and gloo need the host."""

    class Group:
        def rank(self) -> int:
            return 0

    world, traffic = ThreadWorld(2).mailroom(0), Traffic()
    nccl = TorchDistMailroom(Group(), traffic, coalesce=True)
    gloo = TorchDistMailroom(Group(), traffic)
    carried = [nccl, gloo, StagedMailroom(world)]
    group = (0, 1)
    found = [DeviceMailroom(world, links).group(group).recordable for links in carried]
    assert found == [True, False, False] and not BoxMailroom.recordable
