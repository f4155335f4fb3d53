"""Messages and fences between real processes, and between threads."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test.dist.rank_program import check_collectives, check_exchanges, check_started

from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import SharedLayerFence, ThreadFences
from sps_runtime.distributed.regions import create_region, fence_bytes, link_bytes, map_region
from sps_runtime.distributed.routed import RoutedMailroom
from sps_runtime.distributed.shared_memory import SharedMemoryMailroom
from sps_runtime.distributed.threads import ThreadWorld

PROGRAM = Path(__file__).with_name("rank_program.py")


def run_ranks(kind: str, size: int, argument: str, descriptors: tuple[int, ...] = ()) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), kind, str(rank), str(size), argument],
            pass_fds=descriptors,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        outputs = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output


@pytest.mark.parametrize("size", [4])
def test_shared_memory_between_processes(size: int) -> None:
    descriptors = tuple(create_region(name) for name in ("links", "fences", "values"))
    try:
        run_ranks("shared", size, ",".join(map(str, descriptors)), descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


@pytest.mark.parametrize("size", [3])
def test_steps_of_every_strategy_between_processes(size: int) -> None:
    descriptors = tuple(create_region(str(index)) for index in range(2 + size))
    try:
        run_ranks("steps", size, ",".join(map(str, descriptors)), descriptors)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def test_gloo_between_processes(tmp_path: Path) -> None:
    run_ranks("file", 3, str(tmp_path / "rendezvous"))


def test_gloo_meets_at_an_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    run_ranks("tcp", 2, str(port))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_threads(size: int) -> None:
    world = ThreadWorld(size, timeout_s=20)

    def work(rank: int) -> None:
        mailroom = world.mailroom(rank)
        check_exchanges(mailroom, rank, tuple(range(size)), 10)
        check_started(mailroom, rank, tuple(range(size)))
        check_collectives(mailroom, rank, size)

    world.run(work)


def test_more_peers_than_one_futex_word_holds() -> None:
    size = 6
    memory = map_region_of(link_bytes(size, 4096))
    world = ThreadWorld(size)

    def work(rank: int) -> None:
        mailroom = SharedMemoryMailroom(
            memory, rank, size, Traffic(), ring_bytes=4096, timeout_s=20
        )
        check_exchanges(mailroom, rank, tuple(range(size)), 10)
        check_started(mailroom, rank, tuple(range(size)))

    world.run(work)


def test_a_peer_that_never_answers_is_a_connection_error() -> None:
    memory = map_region_of(link_bytes(2, 4096))
    alone = SharedMemoryMailroom(memory, 0, 2, Traffic(), ring_bytes=4096, timeout_s=0.05)
    began = time.monotonic()
    with pytest.raises(ConnectionError):
        alone.group((0, 1)).exchange([torch.ones(1)] * 2, [torch.ones(1)] * 2, "control")
    world = ThreadWorld(2, timeout_s=0.05)
    with pytest.raises(ConnectionError):
        world.mailroom(0).group((0, 1)).exchange(
            [torch.ones(1)] * 2, [torch.ones(1)] * 2, "control"
        )
    shared = SharedLayerFence(map_region_of(fence_bytes(2)), 0, 2, 4, timeout_s=0.05)
    for fence in (shared, ThreadFences(2, 4, timeout_s=0.05).of(0)):
        with pytest.raises(ConnectionError):
            fence.wait(1, epoch=1, layer=0)
    assert time.monotonic() - began < 5


def test_a_rank_that_fails_wakes_the_others() -> None:
    def work(rank: int) -> None:
        if rank == 1:
            raise RuntimeError("broken")
        world.mailroom(0).group((0, 1)).exchange([torch.ones(1)] * 2, [torch.ones(1)] * 2, "linear")

    world = ThreadWorld(2)
    with pytest.raises(RuntimeError, match="broken"):
        world.run(work)


def test_ranks_that_disagree_on_a_shape_are_told() -> None:
    def work(rank: int) -> None:
        length = rank + 1
        tensors = [torch.ones(length)] * 2
        world.mailroom(rank).group((0, 1)).exchange(tensors, [t.clone() for t in tensors], "linear")

    world = ThreadWorld(2)
    with pytest.raises(ConnectionError, match="diverged"):
        world.run(work)


def test_fence_values_only_grow_and_later_ones_include_earlier_ones() -> None:
    memory = map_region_of(fence_bytes(2))
    writer, reader = (SharedLayerFence(memory, rank, 2, 3, timeout_s=0.01) for rank in (0, 1))
    writer.publish(5, 2)
    assert reader.wait(0, 5, 2) == reader.wait(0, 5, 0) == reader.wait(0, 4, 2) == 0.0
    for epoch, layer in ((6, 0), (5, 3)):
        with pytest.raises(ConnectionError):
            reader.wait(0, epoch, layer)


def map_region_of(nbytes: int):
    descriptor = create_region("test")
    try:
        return map_region(descriptor, nbytes)
    finally:
        os.close(descriptor)


def test_groups_take_the_network_only_across_hosts() -> None:
    local, remote = ThreadWorld(4).mailroom(2), ThreadWorld(4).mailroom(2)
    mailroom = RoutedMailroom(local, remote, hosts=(0, 0, 1, 1))
    assert mailroom.group((2, 3)) is local.group((2, 3))
    assert mailroom.group((2,)) is local.group((2,))
    assert mailroom.group((0, 2, 3)) is remote.group((0, 2, 3))


def test_long_messages_do_not_wait_for_naps() -> None:
    """A hundred rings' worth: who sleeps for room is woken by the reader, not by its own clock."""
    memory = map_region_of(link_bytes(2, 4096))
    world = ThreadWorld(2)
    long = [torch.arange(100_000, dtype=torch.int32) + rank for rank in (0, 1)]

    def work(rank: int) -> None:
        mailroom = SharedMemoryMailroom(memory, rank, 2, Traffic(), ring_bytes=4096, timeout_s=20)
        recv = [torch.empty_like(part) for part in long]
        mailroom.group((0, 1)).exchange([long[rank]] * 2, recv, "linear")
        assert torch.equal(recv[1 - rank], long[1 - rank])

    began = time.monotonic()
    world.run(work)
    assert time.monotonic() - began < 15
