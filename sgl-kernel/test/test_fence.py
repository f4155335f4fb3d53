"""Fence words, in one process and between two."""

from __future__ import annotations

import mmap
import multiprocessing as mp
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch

import sps_kernel as sps

WORDS = pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])


@WORDS
def test_store_and_load(dtype):
    buf = np.zeros(4, dtype)
    sps.store_release(buf, 2, 7)
    assert sps.load_acquire(buf, 2) == 7 and buf.tolist() == [0, 0, 7, 0]
    assert sps.fetch_max(buf, 2, 5) == 7 and sps.fetch_max(buf, 2, 9) == 7
    assert sps.fetch_add(buf, 2, 3) == 9 and sps.load_acquire(buf, 2) == 12


def test_other_buffers():
    tensor = torch.zeros(3, dtype=torch.int64)
    sps.publish(tensor, 1, 2**40)
    assert tensor.tolist() == [0, 2**40, 0]
    view = memoryview(bytearray(16)).cast("I")
    sps.publish(view, 3, 2**32 - 1)
    assert sps.load_acquire(view, 3) == 2**32 - 1


@WORDS
@pytest.mark.parametrize("spin_us", [0, 200])
def test_wait_times_out(dtype, spin_us):
    buf = np.zeros(1, dtype)
    start = time.monotonic()
    assert not sps.wait_at_least(buf, 0, 1, spin_us, 0.02)
    assert 0.02 <= time.monotonic() - start < 1.0
    assert sps.wait_at_least(buf, 0, 0, spin_us, 0.0)


@pytest.mark.parametrize("spin_us", [0, 1e6])
def test_wait_releases_the_gil(spin_us):
    """A thread of the same process publishes while this one waits."""
    buf = np.zeros(1, np.uint32)
    thread = threading.Thread(target=lambda: (time.sleep(0.02), sps.publish(buf, 0, 3)))
    thread.start()
    assert sps.wait_at_least(buf, 0, 3, spin_us, 10.0)
    thread.join()


def test_publish_wakes_at_once():
    """A sleeper does not wait for its 50 ms look."""
    buf = np.zeros(1, np.uint64)
    delays = []
    for i in range(1, 6):
        at = []
        thread = threading.Thread(
            target=lambda i=i, at=at: (
                time.sleep(0.005),
                at.append(time.monotonic()),
                sps.publish(buf, 0, i),
            )
        )
        thread.start()
        assert sps.wait_at_least(buf, 0, i, 0, 10.0)
        delays.append(time.monotonic() - at[0] if at else 0.0)
        thread.join()
    assert min(delays) < 0.03


def ping_pong(fd: int, me: int, rounds: int, data_words: int) -> None:
    """Two of these take turns; each checks what the other wrote before its fence."""
    memory = mmap.mmap(fd, 4096)
    fences = np.frombuffer(memory, np.uint32, 2)
    data = np.frombuffer(memory, np.int64, data_words, 64)
    for i in range(1, rounds + 1):
        if me == 0:
            data[:] = i
            sps.publish(fences, 0, i)
            assert sps.wait_at_least(fences, 1, i, 0, 20.0)
            assert (data == -i).all()
        else:
            assert sps.wait_at_least(fences, 0, i, 0, 20.0)
            assert (data == i).all()
            data[:] = -i
            sps.publish(fences, 1, i)


def test_between_processes():
    fd = os.memfd_create("fence")
    os.ftruncate(fd, 4096)
    other = mp.get_context("fork").Process(target=ping_pong, args=(fd, 1, 300, 400))
    other.start()
    ping_pong(fd, 0, 300, 400)
    other.join(20)
    assert other.exitcode == 0
    os.close(fd)


def test_a_signal_ends_the_wait():
    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    try:
        with pytest.raises(KeyboardInterrupt):
            sps.wait_at_least(np.zeros(1, np.uint32), 0, 1, 0, 10.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("buf", "index", "value"),
    [
        (np.zeros(2, np.uint32), 2, 1),
        (np.zeros(2, np.uint32), -1, 1),
        (np.zeros(2, np.uint32), 0, -1),
        (np.zeros(2, np.uint32), 0, 2**32),
        (np.zeros(2, np.int32), 0, 2**31),
        (np.zeros(2, np.float32), 0, 1),
        (np.zeros(2, np.uint8), 0, 1),
        (np.zeros((2, 2), np.uint32), 0, 1),
        (np.zeros(4, np.uint32)[::2], 0, 1),
        (np.frombuffer(bytearray(10), np.uint32, 2, 1), 0, 1),
        ("nothing", 0, 1),
    ],
    ids=range(11),
)
def test_bad_arguments(buf, index, value):
    for call in (sps.store_release, sps.publish, sps.wait_at_least, sps.fetch_max):
        with pytest.raises(ValueError):
            call(buf, index, value)


def test_read_only_words_cannot_be_stored():
    view = np.frombuffer(bytes(8), np.uint32)
    assert sps.load_acquire(view, 0) == 0
    with pytest.raises(ValueError):
        sps.store_release(view, 0, 1)
