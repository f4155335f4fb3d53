"""The token board: words, epochs, waiting, waking."""

from __future__ import annotations

import mmap
import threading
import time

import numpy as np
import pytest

from sps_runtime.runner.token_board import TokenBoard, board_bytes


def make_board(slots: int = 8) -> mmap.mmap:
    return mmap.mmap(-1, board_bytes(slots))


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_reads_what_was_written_in_that_epoch() -> None:
    memory = make_board()
    writer, reader = TokenBoard(memory), TokenBoard(memory)
    assert writer.slots == 8
    writer.write(3, [5, 1], [151_935, 0])
    assert reader.read(ints(1, 5), ints(3, 3)).tolist() == [0, 151_935]
    assert reader.waited_s == 0.0


def test_another_epoch_is_not_taken_for_the_wanted_one() -> None:
    board = TokenBoard(make_board())
    board.write(3, [5], [7])
    with pytest.raises(TimeoutError, match=r"\[5\]"):
        board.read(ints(5), ints(4), timeout_s=0.02)


def test_epochs_wrap_at_32_bits() -> None:
    board = TokenBoard(make_board())
    board.write(2**32 + 9, [2], [2**31 - 1])
    assert board.read(ints(2), ints(2**32 + 9)).tolist() == [2**31 - 1]


@pytest.mark.parametrize("spin_s", [0.0, 1e-4])
def test_a_waiter_wakes_soon_after_the_write(spin_s: float) -> None:
    memory = make_board()
    reader, writer = TokenBoard(memory, spin_s), TokenBoard(memory)
    got: list[int] = []
    rounds = 50

    def read_all() -> None:
        for epoch in range(1, rounds + 1):
            got.extend(reader.read(ints(0, 3), ints(epoch, epoch), timeout_s=10.0).tolist())

    thread = threading.Thread(target=read_all)
    thread.start()
    for epoch in range(1, rounds + 1):
        while len(got) < 2 * epoch - 2:  # a slot is written again only after it was read
            time.sleep(1e-4)
        time.sleep(1e-3)
        writer.write(epoch, [0], [epoch])
        writer.write(epoch, [3], [-epoch & 0x7FFFFFFF])
    thread.join(10.0)
    assert got == [x for e in range(1, rounds + 1) for x in (e, -e & 0x7FFFFFFF)]
    assert reader.waited_s > 0.0
