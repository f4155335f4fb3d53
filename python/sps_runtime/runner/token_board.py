"""The token board: how a sampled token reaches a plan that was sent before the token existed.

One aligned 64-bit word per board slot, ``epoch << 32 | token``, in memory that all ranks of a host
map. The rank that samples stores the word; a rank whose plan names the slot waits until the word's
epoch is the one it was told to wait for. A word is written and read by single 8-byte accesses, so
it is never seen half-written, and it carries all that the reader needs: no other memory has to be
ordered with it. Epochs are compared modulo 2^32.

Waiting: poll for `spin_s`, then sleep on a futex. One further word, the bell, serves all slots: a
writer stores its words, then a new value in the bell, then wakes; a sleeper reads the bell, then
its words, and sleeps only while the bell still has the value it read. x86 keeps stores in order
and loads in order (TSO), so a sleeper that saw the old bell and the old word is still compared
against the new bell by the kernel. On machines with weaker order a wake can be missed; sleeps are
bounded, so it costs a millisecond and not a hang.
"""

from __future__ import annotations

import mmap
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from sps_runtime.distributed.futex import Futex

SLEEP_S = 1e-3
_BELL_BYTES = 64


def board_bytes(slots: int) -> int:
    """Size of the memory of a board with `slots` slots: one cache line of bell, then the words."""
    return _BELL_BYTES + 8 * slots


class TokenBoard:
    """One process's (or one thread's) view of a host's board.

    Args:
        memory: the board's memory, writable, at least `board_bytes(1)` long and zero at first
            (epochs start at 1, so a zero word was never written).
        spin_s: how long a wait polls before it sleeps; 0 where ranks outnumber cores.

    Attributes:
        memory: all of it, for who writes and reads it natively (`sps_kernel.StepLoop`).
        spin_s: as given.
        waited_s: seconds spent waiting since the start.
    """

    def __init__(self, memory: mmap.mmap | bytearray, spin_s: float = 0.0) -> None:
        self.spin_s = spin_s
        self.memory = np.frombuffer(memory, dtype=np.uint8)
        self._bell = np.frombuffer(memory, dtype=np.uint32, count=1)
        self._words = np.frombuffer(memory, dtype=np.uint64, offset=_BELL_BYTES)
        self._futex = Futex()
        self._bell_address = int(self._bell.ctypes.data)
        self.waited_s = 0.0

    @property
    def slots(self) -> int:
        return len(self._words)

    def write(self, epoch: int, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """Store the tokens that the step `epoch` sampled and wake who waits for them."""
        if not slots:
            return
        head = (epoch & 0xFFFFFFFF) << 32
        for slot, token in zip(slots, tokens, strict=True):
            self._words[slot] = head | token
        self._bell[0] = time.monotonic_ns() & 0xFFFFFFFF  # new to every sleeper
        self._futex.wake(self._bell_address)

    def read(
        self,
        slots: npt.NDArray[np.int64],
        epochs: npt.NDArray[np.int64],
        timeout_s: float = 60.0,
    ) -> npt.NDArray[np.int64]:
        """Tokens of `slots` as sampled in `epochs`, int64 of the same length; waits for them.

        Raises:
            TimeoutError: when a token does not appear in time (its rank is gone, or plans
                reached ranks in different orders).
        """
        wanted = (epochs & 0xFFFFFFFF).astype(np.uint64)
        words = self._words[slots]
        if not np.array_equal(words >> np.uint64(32), wanted):
            words = self._wait(slots, wanted, timeout_s)
        return (words & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def _wait(
        self, slots: npt.NDArray[np.int64], wanted: npt.NDArray[np.uint64], timeout_s: float
    ) -> npt.NDArray[np.uint64]:
        begin = time.perf_counter()
        while True:
            bell = int(self._bell[0])
            words = self._words[slots]
            missing = words >> np.uint64(32) != wanted
            waited = time.perf_counter() - begin
            if not missing.any():
                self.waited_s += waited
                return words
            if waited > timeout_s:
                raise TimeoutError(f"no token in board slots {slots[missing].tolist()}")
            if waited > self.spin_s:
                self._futex.wait(self._bell_address, bell, SLEEP_S)
