"""Messages between ranks of one host: order, sizes, timeouts, and recorded exchanges."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from sps_kernel import Links, Program, links_region_bytes, small_gemm, sum_parts

RING = 4096


def region(world: int) -> mmap.mmap:
    return mmap.mmap(-1, links_region_bytes(world, RING))


def each_rank(world: int, work: Callable[[int, Links], object], spin_us: float = 0.0) -> list:
    """Results of work(rank, links) on a thread per rank; raises the first error."""
    memory, results, errors = region(world), [None] * world, []

    def call(rank: int) -> None:
        links = Links(memory, rank, world, ring_bytes=RING, timeout_s=20, spin_us=spin_us)
        try:
            results[rank] = work(rank, links)
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    if errors:
        raise errors[0]
    return results


def message(source: int, target: int, turn: int, size: int) -> np.ndarray:
    generator = np.random.default_rng((source, target, turn))
    return generator.integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize("spin_us", [0.0, 50.0])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_everyone_gets_what_was_sent(world: int, spin_us: float) -> None:
    sizes = [0, 1, 63, RING - 1, RING, RING + 1, 10 * RING + 7]

    def work(rank: int, links: Links) -> None:
        everyone = tuple(range(world))
        for turn in range(3 * len(sizes)):

            def size(source: int, target: int, turn: int = turn) -> int:
                return sizes[(source * 3 + target + turn) % len(sizes)]

            send = [message(rank, peer, turn, size(rank, peer)) for peer in everyone]
            recv = [np.full(size(peer, rank), 7, np.uint8) for peer in everyone]
            links.exchange(everyone, send, recv)
            for peer in everyone:
                wanted = message(peer, rank, turn, size(peer, rank))
                np.testing.assert_array_equal(recv[peer], wanted)

    each_rank(world, work, spin_us)


def test_a_group_need_not_hold_every_rank() -> None:
    def work(rank: int, links: Links) -> None:
        if rank == 1:
            return
        got = torch.zeros(4, dtype=torch.bfloat16)
        own = torch.ones(4, dtype=torch.float64)
        mine = torch.full((4,), float(rank + 1)).bfloat16()
        send, recv = ([own, mine], [own, got]) if rank == 0 else ([mine, own], [got, own])
        links.exchange((0, 2), send, recv)
        assert torch.equal(got, torch.full((4,), 3.0 - rank).bfloat16())

    each_rank(3, work)


def test_a_message_to_oneself_is_copied() -> None:
    links = Links(region(1), 0, 1, ring_bytes=RING)
    a, b = np.arange(3.0), np.zeros(3)
    links.exchange((0,), [a], [b])
    np.testing.assert_array_equal(a, b)


def test_recorded_exchanges_send_what_the_arrays_hold_then() -> None:
    """Ten replayed layers of an all-reduce; one rank never records, and the bits are the same."""
    rows, width, layers = 2, 48, 10

    def work(rank: int, links: Links) -> list[torch.Tensor]:
        w = torch.randn(width, width, generator=torch.Generator().manual_seed(rank)) / 7
        x = torch.zeros(rows, width)

        def forward() -> torch.Tensor:
            h = x
            for _ in range(layers):
                y = small_gemm(h, w)
                parts = torch.empty(2, rows, width)
                links.exchange((0, 1), [y, y], list(parts.unbind(0)))
                h = sum_parts(parts)
            return h

        program = Program()
        outs = []
        for step in range(6):
            x.copy_(torch.randn(rows, width, generator=torch.Generator().manual_seed(step)))
            if rank == 0 and step == 1:
                with program.recording():
                    out = forward()
            elif rank == 0 and step > 1:
                program.run()
            else:
                out = forward()
            outs.append(out.clone())
        return outs

    first, second = each_rank(2, work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({float(out.sum()) for out in first}) == len(first)


def test_a_peer_that_does_not_answer_is_an_error_at_the_time_given() -> None:
    links = Links(region(2), 0, 2, ring_bytes=RING, timeout_s=0.1)
    x = np.zeros(8, np.uint8)
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="rank 1 did not answer rank 0"):
        links.exchange((0, 1), [x, x], [x, x.copy()])
    assert 0.1 <= time.monotonic() - began < 2


def test_a_replay_ends_by_the_timeout_too() -> None:
    memory = region(2)
    mine = Links(memory, 0, 2, ring_bytes=RING, timeout_s=0.2)
    peer = Links(memory, 1, 2, ring_bytes=RING, timeout_s=20)
    x, y = np.zeros(8, np.uint8), np.zeros(8, np.uint8)
    other = threading.Thread(target=peer.exchange, args=((0, 1), [x, x], [y, x]))
    program = Program()
    other.start()
    with program.recording():
        mine.exchange((0, 1), [x, x], [x, y.copy()])
    other.join()
    with pytest.raises(ConnectionError):
        program.run()
    assert program.recorded


def test_a_signal_handler_ends_the_wait() -> None:
    links = Links(region(2), 0, 2, ring_bytes=RING, timeout_s=20)
    x = np.zeros(8, np.uint8)

    def handler(number: int, frame: object) -> None:
        raise KeyError("asked to end")

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        began = time.monotonic()
        with pytest.raises(KeyError, match="asked to end"):
            links.exchange((0, 1), [x, x], [x, x.copy()])
        assert time.monotonic() - began < 5
    finally:
        signal.signal(signal.SIGALRM, previous)


def test_waiting_is_counted() -> None:
    def work(rank: int, links: Links) -> float:
        x = np.zeros(8, np.uint8)
        if rank == 1:
            time.sleep(0.2)
        links.exchange((0, 1), [x, x], [x, x.copy()] if rank == 0 else [x.copy(), x])
        return links.take_waited()

    early, late = each_rank(2, work)
    assert 0.1 < early < 1 and late < 0.1


def _child(fd: int, turns: int) -> None:
    links = Links(mmap.mmap(fd, 0), 1, 2, ring_bytes=RING, timeout_s=20)
    for turn in range(turns):
        got = np.empty(3 * RING, np.uint8)
        mine = message(1, 0, turn, 2 * RING)
        links.exchange((0, 1), [mine, got[:0]], [got, got[:0]])
        assert (got == message(0, 1, turn, 3 * RING)).all()


def test_between_processes() -> None:
    fd = os.memfd_create("links")
    os.ftruncate(fd, links_region_bytes(2, RING))
    child = multiprocessing.get_context("fork").Process(target=_child, args=(fd, 50))
    child.start()
    links = Links(mmap.mmap(fd, 0), 0, 2, ring_bytes=RING, timeout_s=20)
    for turn in range(50):
        got = np.empty(2 * RING, np.uint8)
        links.exchange((0, 1), [got[:0], message(0, 1, turn, 3 * RING)], [got[:0], got])
        assert (got == message(1, 0, turn, 2 * RING)).all()
    child.join(20)
    assert child.exitcode == 0
    os.close(fd)


def test_what_does_not_fit_is_refused() -> None:
    memory = region(2)
    links = Links(memory, 0, 2, ring_bytes=RING)
    x = np.zeros((4, 4), np.float32)
    for members, send, recv in (
        ((0, 1), [x], [x]),
        ((0, 2), [x, x], [x, x]),
        ((0, 1), [x, x.T[:2].T], [x, x]),
        ((0, 1), [x, x], [x[:2], x]),
    ):
        with pytest.raises(ValueError):
            links.exchange(members, send, recv)
    for world, rank, ring in ((2, 2, RING), (8, 0, RING), (2, 0, 100)):
        with pytest.raises(ValueError):
            Links(memory, rank, world, ring_bytes=ring)
