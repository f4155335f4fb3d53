"""A counter-based random generator: the number for (seed, position) needs no state.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), computed on the
host in integers, so the same on every device, rank and batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
ROUNDS = 10


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> list[Words]:
    """Four 32-bit words for each counter and key, all given and returned as uint64 ``[n]``."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW, (k1 + KEY_STEPS[1]) & LOW
    return [c0, c1, c2, c3]


def uniform(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """One number in [0, 1) with 52 random bits for each (seed, position).

    Args:
        seeds: any integers; their low 64 bits are the key.
        positions: >= 0; the counter.
    """
    key = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    count = np.array(positions, dtype=np.uint64)
    zero = np.zeros_like(count)
    words = philox((count & LOW, count >> HALF, zero, zero), (key & LOW, key >> HALF))
    bits = ((words[0] << HALF) | words[1]) >> np.uint64(12)
    return bits.astype(np.float64) * 2.0**-52
