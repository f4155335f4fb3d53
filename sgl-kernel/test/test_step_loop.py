"""Loops of steps against the same steps one by one; who leads and who follows agree."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import sps_kernel as sk
from sps_kernel import Program, StepLoop

ROWS, VOCAB, STEPS, EPOCH = 3, 50, 12, 2**32 - 4  # epochs wrap on the way
SLOTS = np.array([4, 0, 2])
VERDICTS = 7


def board() -> np.ndarray:
    return np.zeros(64 + 8 * 8, np.uint8)


def words(memory: np.ndarray) -> np.ndarray:
    return memory[64:].view(np.uint64)


class Chain:
    """A rank whose logits are a row of a table for the newest token, and what its step is fed."""

    def __init__(
        self, seed: int, memory: np.ndarray, verdict: int = -1, links: sk.Links | None = None
    ) -> None:
        draw = np.random.default_rng(seed)
        self.table = draw.standard_normal((VOCAB, VOCAB)).astype(np.float32)
        self.noise = draw.standard_normal((STEPS, ROWS, VOCAB)).astype(np.float32)
        self.first = draw.integers(VOCAB, size=ROWS)
        self.memory = memory
        tokens, fed = np.zeros(ROWS, np.int64), np.zeros((ROWS, VOCAB), np.float32)
        self.logits = np.zeros((ROWS, VOCAB), np.float32)
        program = Program()
        with program.recording():
            sk.look_up(tokens, self.table, out=self.logits)
            sk.add(fed, self.logits)
            if links is not None:
                words = [np.zeros(1, np.uint64) for _ in range(6)]
                links.exchange(range(3), words[:3], words[3:])
        self.arguments = (program, self.logits, tokens, [(fed, self.noise)])
        self.options = {"board": memory, "slots": SLOTS, "epoch": EPOCH, "verdict": verdict}
        self.loop = StepLoop(*self.arguments, **self.options)
        self.sampled = np.full((STEPS, ROWS), -1, np.int64)

    def put(self, step: int, tokens: np.ndarray) -> None:
        """As whoever samples by other means does."""
        epoch = (EPOCH + step) % 2**32
        words(self.memory)[SLOTS] = (epoch << 32) | tokens.astype(np.uint64)

    def expected(self) -> np.ndarray:
        tokens, found = self.first, [self.first]
        for step in range(1, STEPS):
            tokens = (self.table[tokens] + self.noise[step]).argmax(-1)
            found.append(tokens)
        return np.array(found)

    def lead(self, first: int, last: int, **more: object) -> int:
        stops = more.pop("stops", np.zeros((0, 2), np.int64))
        settings = {"sampled": self.sampled, "stops": stops, "seconds": 5.0} | more
        return self.loop.lead(first, last, **settings)


def test_steps_follow_one_another(isa: str, seed: int) -> None:
    chain = Chain(seed, board())
    chain.put(0, chain.first)
    assert chain.lead(1, 4) == 4 and chain.lead(5, STEPS - 1) == STEPS - 5
    assert np.array_equal(chain.sampled[1:], chain.expected()[1:])
    last = words(chain.memory)[SLOTS]
    assert (last & 0xFFFFFFFF).tolist() == chain.expected()[-1].tolist()
    assert set((last >> 32).tolist()) == {(EPOCH + STEPS - 1) % 2**32}
    assert words(chain.memory)[VERDICTS] == 0


def test_a_stop_ends_it_in_its_own_row_alone(seed: int) -> None:
    chain = Chain(seed, board())
    expected = chain.expected()
    row, step = 1, 6
    token = expected[step, row]
    ends = next(s for s in range(1, STEPS) if expected[s, row] == token)
    chain.put(0, chain.first)
    stops = np.array([[row, token], [0, VOCAB], [ROWS, token], [-1, token]])
    assert chain.lead(1, STEPS - 1, stops=stops) == ends
    assert np.array_equal(chain.sampled[1 : ends + 1], expected[1 : ends + 1])
    assert (chain.sampled[ends + 1 :] == -1).all()


def test_time_and_messages_end_it_after_a_step(seed: int) -> None:
    chain = Chain(seed, board())
    chain.put(0, chain.first)
    assert chain.lead(1, STEPS - 1, seconds=0.0) == 1
    bell = os.eventfd(0)
    try:
        os.eventfd_write(bell, 1)
        assert chain.lead(2, STEPS - 1, descriptor=bell) == 1
        os.eventfd_read(bell)
        assert chain.lead(3, STEPS - 1, descriptor=bell) == STEPS - 3
    finally:
        os.close(bell)
    assert np.array_equal(chain.sampled[1:], chain.expected()[1:])


def test_each_step_may_be_looked_at(seed: int) -> None:
    chain = Chain(seed, board())
    expected = chain.expected()
    ends = next(s for s in range(1, STEPS) if expected[s, 2] == expected[7, 2])
    chain.put(0, chain.first)
    for step in range(1, ends + 1):
        assert chain.lead(step, STEPS - 1, each=True, stops=np.array([[2, expected[7, 2]]])) == 1
        assert np.array_equal(chain.sampled[step], expected[step])
        assert chain.loop.goes_on == (step < ends)
    assert chain.lead(ends + 1, STEPS - 1, each=True, seconds=0.0) == 1 and not chain.loop.goes_on
    for step in range(ends + 2, STEPS):
        assert chain.lead(step, STEPS - 1, each=True) == 1
        assert chain.loop.goes_on == (step < STEPS - 1)


def test_the_caller_may_sample(seed: int) -> None:
    chain = Chain(seed, board())
    chain.put(0, chain.first)
    tokens = chain.first
    for step in range(1, STEPS):
        assert chain.loop.lead(step, STEPS - 1) == 1 and not chain.loop.goes_on
        wanted = chain.table[tokens] + chain.noise[step]
        assert np.array_equal(chain.logits, wanted)
        tokens = wanted.argmin(-1)
        chain.put(step, tokens)


@pytest.mark.parametrize("spin_us", [0.0, 50.0])
def test_others_follow_until_they_are_told_to_end(seed: int, spin_us: float) -> None:
    """Ranks meet in every step, so that a leader cannot finish one that others have not begun."""
    memory, rings = board(), np.zeros(sk.links_region_bytes(3, 64), np.uint8)

    def make(rank: int) -> Chain:
        links = sk.Links(rings, rank, 3, ring_bytes=64, timeout_s=10.0)
        return Chain(seed, memory, VERDICTS, links)

    with ThreadPoolExecutor(3) as pool:  # they meet while they record, too
        leader, *others = pool.map(make, range(3))
    ran: list[int] = []

    def follow(chain: Chain) -> None:
        loop = StepLoop(*chain.arguments, **(chain.options | {"spin_us": spin_us}))
        ran.append(loop.follow(1, STEPS - 1, 10.0))

    leader.put(0, leader.first)
    threads = [threading.Thread(target=follow, args=(chain,)) for chain in others]
    for thread in threads:
        thread.start()
    assert leader.lead(1, 2) == 2 and not leader.loop.goes_on
    assert leader.lead(3, STEPS - 1, each=True) == 1 and leader.loop.goes_on
    assert leader.lead(4, 5) == 2 and not leader.loop.goes_on
    words(memory)[VERDICTS] = ((EPOCH + 5) % 2**32) << 32
    for thread in threads:
        thread.join(10.0)
    assert ran == [5, 5]
    assert np.array_equal(leader.sampled[1:6], leader.expected()[1:6])
    for chain in others:
        assert np.array_equal(chain.logits, leader.logits)


def test_a_verdict_that_does_not_come_is_missed(seed: int) -> None:
    chain = Chain(seed, board(), VERDICTS)
    chain.put(0, chain.first)
    with pytest.raises(TimeoutError, match="slot 7"):
        chain.loop.follow(1, 2, 0.02)
    assert chain.loop.waited_s >= 0.02


def test_a_token_that_is_not_there_is_an_error(seed: int) -> None:
    chain = Chain(seed, board())
    with pytest.raises(RuntimeError, match="slot 4"):
        chain.lead(1, 2)
    chain.put(0, chain.first)
    assert chain.lead(1, 2) == 2, "the program can be run again"


def test_a_step_that_raises_ends_it(seed: int) -> None:
    chain = Chain(seed, board())
    chain.put(0, np.array([0, VOCAB, 1]))
    with pytest.raises(ValueError, match="ids"):
        chain.lead(1, 2)


def test_bad_arguments(seed: int) -> None:
    chain = Chain(seed, board())
    program, logits, tokens, feeds = chain.arguments
    fed, noise = feeds[0]
    bad = [
        ({}, (program, logits[:2], tokens, feeds)),
        ({}, (program, logits.astype(np.float64), tokens, feeds)),
        ({}, (program, logits, tokens.astype(np.int32), feeds)),
        ({}, (program, logits, tokens, [(fed, noise[:, :2])])),
        ({}, (program, logits, tokens, [(fed, noise.astype(np.float64))])),
        ({"slots": np.array([0, 1, 8])}, chain.arguments),
        ({"slots": np.array([0, 1])}, chain.arguments),
        ({"verdict": 8}, chain.arguments),
        ({"board": board()[4:]}, chain.arguments),
    ]
    for options, arguments in bad:
        with pytest.raises(ValueError):
            StepLoop(*arguments, **(chain.options | options))
    for first, last in ((0, 1), (2, 1), (1, STEPS)):
        with pytest.raises(ValueError):
            chain.lead(first, last)
    with pytest.raises(ValueError):
        chain.loop.follow(1, 2, 1.0)
    with pytest.raises(ValueError):
        chain.lead(1, 2, seconds=float("nan"))
    with pytest.raises(ValueError):
        chain.lead(1, 2, sampled=np.zeros((2, ROWS), np.int64))
    with pytest.raises(RuntimeError, match="not recorded"):
        chain.put(0, chain.first)
        StepLoop(Program(), logits, tokens, feeds, **chain.options).lead(1, 1)
    with pytest.raises(RuntimeError, match="cannot be recorded"), Program().recording():
        StepLoop(*chain.arguments, **chain.options)
