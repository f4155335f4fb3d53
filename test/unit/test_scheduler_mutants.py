"""Bugs that other servers had, put in on purpose: the checks must see every one of them.

A test suite that passes proves little until it has been seen to fail.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from test.kit.echo_server import EchoServer

from sps_runtime.kvcache.fence import Fence
from sps_runtime.kvcache.page_allocator import PageAllocator, PageState
from sps_runtime.kvcache.placement import zigzag
from sps_runtime.kvcache.radix_tree import RadixTree
from sps_runtime.scheduler import results
from sps_runtime.scheduler.history import History
from sps_runtime.scheduler.planner import Planner
from sps_runtime.scheduler.policies.view import View
from sps_runtime.scheduler.runs import Runs
from sps_runtime.scheduler.scheduler import Scheduler
from sps_runtime.scheduler.sequence import Sequence

Patch = Callable[[pytest.MonkeyPatch], None]
SEEDS = 60
MUTANTS: dict[str, Patch] = {}


def mutant(patch: Patch) -> Patch:
    MUTANTS[patch.__name__] = patch
    return patch


@mutant
def fence_skipped(monkeypatch):
    """Freed pages are free at once (sglang#23392)."""

    def free(self, pages, held, epoch):
        for page in pages:
            self._move(page, held, PageState.FREE)
            self._free[self.rank_of(page)].append(page)

    monkeypatch.setattr(PageAllocator, "free", free)


@mutant
def fence_opens_with_any_epoch(monkeypatch):
    """The watermark is the newest acknowledged epoch, not the oldest one under way."""
    right = Fence.acknowledge

    def acknowledge(self, epoch, rank):
        complete = right(self, epoch, rank)
        if complete:
            self.watermark = max(self.watermark, epoch)
        return complete

    monkeypatch.setattr(Fence, "acknowledge", acknowledge)


@mutant
def one_rank_speaks_for_all(monkeypatch):
    """An epoch counts as acknowledged when its first rank has answered."""

    def send(self, ranks, steps=1):
        epoch = self.sent + 1
        self.sent += steps
        self._pending[epoch] = {min(ranks)}
        return epoch

    monkeypatch.setattr(Fence, "send", send)


@mutant
def ended_runs_do_not_drain(monkeypatch):
    """Pages and slot of an ended run are given back under its plans, without a fence."""
    right = Runs.settle

    def end(self, run):
        del self.live[run.handle]
        run.live = False
        fence, sent = self._cache.fence, self._cache.fence.sent
        fence.sent = fence.watermark
        self._cache.close(run.handle)
        fence.sent = sent
        self._free_slots.append(run.slot)

    def settle(self, run):
        if run.live:
            right(self, run)

    monkeypatch.setattr(Runs, "end", end)
    monkeypatch.setattr(Runs, "settle", settle)


@mutant
def double_free(monkeypatch):
    right = PageAllocator.free

    def free(self, pages, held, epoch):
        right(self, pages, held, epoch)
        for page in pages:
            self._free[self.rank_of(page)].append(page)

    monkeypatch.setattr(PageAllocator, "free", free)


@mutant
def missed_unlock(monkeypatch):
    """sglang#23391: an ended sequence still holds its prefix."""
    monkeypatch.setattr(RadixTree, "unlock", lambda self, node, epoch: None)


@mutant
def unlock_too_much(monkeypatch):
    right = RadixTree.unlock

    def unlock(self, node, epoch):
        right(self, node, epoch)
        with suppress(ValueError):
            right(self, node, epoch)

    monkeypatch.setattr(RadixTree, "unlock", unlock)


@mutant
def split_forgets_locks(monkeypatch):
    right = RadixTree._split

    def split(self, node, pages):
        upper = right(self, node, pages)
        upper.lock_ref = 0
        return upper

    monkeypatch.setattr(RadixTree, "_split", split)


@mutant
def held_pages_are_evicted(monkeypatch):
    """Eviction takes any leaf (sglang#38319's relative)."""

    def next_leaf(self, need):
        leaves = [node for _, node in self.nodes() if not node.children]
        return leaves[0] if leaves else None

    monkeypatch.setattr(RadixTree, "_next_leaf", next_leaf)


@mutant
def prefix_compared_by_first_token(monkeypatch):
    """A weak identity instead of the tokens themselves."""
    monkeypatch.setattr(RadixTree, "_common", lambda self, node, tokens, done: len(node.pages))


@mutant
def duplicates_leak(monkeypatch):
    right = RadixTree.extend

    def extend(self, node, tokens, pages):
        result = right(self, node, tokens, pages)
        result.duplicates.clear()
        return result

    monkeypatch.setattr(RadixTree, "extend", extend)


@mutant
def pages_cached_before_they_are_written(monkeypatch):
    """sglang#38319: a chunk's pages enter the tree when it is sent."""
    right = Runs._commit

    def commit(self, run, written):
        right(self, run, min(run.sent, len(run.sequence.tokens)) if run.live else written)

    monkeypatch.setattr(Runs, "_commit", commit)


@mutant
def a_whole_prompt_is_matched(monkeypatch):
    """Nothing is left to compute the last logits from."""
    monkeypatch.setattr(Sequence, "match_limit", property(lambda self: len(self.tokens)))


@mutant
def surplus_tokens_get_out(monkeypatch):
    """Tokens that the overlap computed beyond a stop reach the client."""
    right = Scheduler._advance

    def advance(self, run):
        surplus = [] if run.live else results.collect(run)
        return surplus + right(self, run)

    monkeypatch.setattr(Scheduler, "_advance", advance)


@mutant
def tokens_are_taken_as_they_come(monkeypatch):
    """A later plan's token is given out before an earlier one's that another rank has."""

    def collect(run):
        news = []
        for flight in run.flights:
            for sampled in flight.tokens[flight.taken :]:
                news.append(results._take(run, flight, sampled))
                if news[-1].finish is not None:
                    return news
        return news

    monkeypatch.setattr("sps_runtime.scheduler.scheduler.collect", collect)


@mutant
def retraction_forgets_output(monkeypatch):
    """A retracted request starts from its prompt but counts its output."""
    right = Scheduler._retract

    def retract(self, run):
        right(self, run)
        del run.sequence.tokens[run.sequence.prompt_len :]

    monkeypatch.setattr(Scheduler, "_retract", retract)


@mutant
def retracted_for_ever(monkeypatch):
    """A retracted request is not queued again."""

    def retract(self, run):
        run.sequence.retractions += 1
        del self._run_of[run.sequence.rid]
        self._runs.end(run)

    monkeypatch.setattr(Scheduler, "_retract", retract)


@mutant
def stale_board_token(monkeypatch):
    """A plan reads the token of the sequence's first plan under way instead of its last."""
    right = Planner._sequence_plan

    def sequence_plan(self, run, count, mask, steps=1):
        run.flights.reverse()
        plan = right(self, run, count, mask, steps)
        run.flights.reverse()
        return plan

    monkeypatch.setattr(Planner, "_sequence_plan", sequence_plan)


@mutant
def group_without_an_owner(monkeypatch):
    """A step runs without a rank whose pages are still being written."""
    monkeypatch.setattr(View, "required", lambda self, run: 0)


@mutant
def decode_without_an_owner(monkeypatch):
    right = View.decode_mask
    monkeypatch.setattr(View, "decode_mask", lambda self, run: right(self, run) & -right(self, run))


@mutant
def pages_placed_elsewhere(monkeypatch):
    """A chunk's pages go to rank 0 whatever the group."""

    def place(quotas):
        return [0] * len(zigzag(quotas))

    monkeypatch.setattr(
        "sps_runtime.scheduler.planner.make_placement", lambda name: place, raising=True
    )


@mutant
def penalties_count_the_board_token(monkeypatch):
    """The history misses what was generated."""
    monkeypatch.setattr(History, "generated", lambda self, token: None)


@mutant
def two_final_messages(monkeypatch):
    right = Scheduler.abort

    def abort(self, rid, message="aborted"):
        sequence = self._sequences.get(rid)
        news = right(self, rid, message)
        if sequence is not None:
            news = news + news
        return news

    monkeypatch.setattr(Scheduler, "abort", abort)


@mutant
def slots_reused_at_once(monkeypatch):
    """An ended run's board slot is given away under its plans."""
    right = Runs.end

    def end(self, run):
        slot = run.slot
        right(self, run)
        if run.handle in self.draining:
            self._free_slots.append(slot)

    monkeypatch.setattr(Runs, "end", end)


@mutant
def leaves_are_never_offered(monkeypatch):
    """Cached pages that nobody holds can not be evicted."""
    monkeypatch.setattr(RadixTree, "_offer", lambda self, node: None)


def busy_server(seed: int) -> None:
    """Traffic that meets every mechanism: few pages, short chunks, sharing, aborts, overlap."""
    chance = random.Random(seed)
    server = EchoServer(
        seed=seed,
        sp=chance.choice([2, 2, 3]),
        pages=chance.choice([6, 8, 12]),
        page_size=2,
        vocab=chance.choice([8, 50]),
        chunked_prefill_size=4,
        max_running_requests=5,
        conservativeness=0.0,
        max_steps_in_flight=3,
        parallel={"strategy": chance.choice(["auto", "pass_q"])},
    )
    bases = [[chance.randrange(server.vocab) for _ in range(16)] for _ in range(2)]
    for _ in range(16):
        shared = chance.choice(bases)[: chance.randrange(10)]
        own = [chance.randrange(4, server.vocab) for _ in range(chance.randrange(1, 6))]
        server.add(
            shared + own, chance.randrange(1, 12), presence_penalty=chance.choice([0.0, 0.5])
        )
        for _ in range(chance.randrange(8)):
            server.turn()
            server.scheduler.check()
        if chance.random() < 0.25:
            server.abort(chance.choice(list(server.requests)))
    server.run(limit=5_000)


def test_the_traffic_itself_is_served() -> None:
    for seed in range(10):
        busy_server(seed)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[name](monkeypatch)
    for seed in range(SEEDS):
        try:
            busy_server(seed)
        except Exception:
            return
    pytest.fail(f"{name} went unseen through {SEEDS} servers")
