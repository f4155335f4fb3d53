"""The radix tree behind its facade, against a dict of prefixes."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps_runtime.kvcache.eviction import Lru
from sps_runtime.kvcache.prefix_cache import PrefixCache
from sps_runtime.kvcache.radix_tree import RadixTree
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.tokens import pack_ids

PAGE, RANKS, PAGES = 2, 2, 12
NAMESPACES = [("", "auto", "exact"), ("tenant", "auto", "exact")]
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14)


class CacheMachine(RuleBasedStateMachine):
    """Sequences open, grow, commit, end and evict one another's prefixes.

    The oracle: `written[page]` is the (namespace, tokens up to the page's end) that the page was
    filled with; every page that a match or a table names must have been filled with just that.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cache = PrefixCache(PAGE, RANKS, PAGES)
        self.live: dict[int, tuple[tuple[str, str, str], list[int]]] = {}
        self.written: dict[int, tuple[tuple[str, str, str], tuple[int, ...]]] = {}
        self.handles = 0

    @rule(namespace=st.sampled_from(NAMESPACES), tokens=prompts)
    def open(self, namespace: tuple[str, str, str], tokens: list[int]) -> None:
        cached = self.oracle(namespace, tokens[:-1])
        pages = self.cache.match(namespace, pack_ids(tokens), len(tokens) - 1).pages
        assert len(pages) == cached
        self.handles += 1
        table = self.cache.open(self.handles, namespace, pack_ids(tokens), len(tokens) - 1)
        assert list(table.pages) == pages
        self.live[self.handles] = (namespace, tokens)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), ranks=st.lists(st.integers(0, RANKS - 1), min_size=1, max_size=4))
    def grow(self, data: st.DataObject, ranks: list[int]) -> None:
        handle = data.draw(st.sampled_from(sorted(self.live)))
        namespace, tokens = self.live[handle]
        table = self.cache.directory[handle]
        ranks = ranks[: max(0, -(-len(tokens) // PAGE) - len(table.pages))]
        before, room = list(table.pages), self.cache.room()
        fits = all(ranks.count(rank) <= room[rank] for rank in range(RANKS))
        done = self.cache.allocate(handle, ranks)
        assert done == fits or (not done and self.cache.quarantined())
        if done:
            assert [p // PAGES for p in table.pages[len(before) :]] == ranks
            for index in range(len(before), len(table.pages)):
                self.written[table.pages[index]] = (namespace, tuple(tokens[: (index + 1) * PAGE]))
        else:
            assert list(table.pages) == before

    @precondition(lambda self: self.live)
    @rule(data=st.data(), epochs=st.integers(0, 1))
    def commit(self, data: st.DataObject, epochs: int) -> None:
        handle = data.draw(st.sampled_from(sorted(self.live)))
        tokens = self.live[handle][1]
        table = self.cache.directory[handle]
        written = min(len(table.pages) * PAGE, len(tokens))
        self.cache.commit(handle, pack_ids(tokens[self.cache.shared(handle) * PAGE :]), written)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.live)))
        self.cache.close(handle)
        del self.live[handle]

    @rule()
    def send(self) -> None:
        self.cache.fence.send([0])

    @rule()
    def acknowledge(self) -> None:
        if not self.cache.fence.idle:
            self.cache.acknowledge(self.cache.fence.watermark + 1, 0)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        held = {node for lease in self.cache._leases.values() for node in path(lease.node)}
        assert {node for _, node in self.cache.tree.nodes()} <= held

    @invariant()
    def sound(self) -> None:
        self.cache.check()
        for handle, (namespace, tokens) in self.live.items():
            for index, page in enumerate(self.cache.directory[handle].pages):
                assert self.written[page] == (namespace, tuple(tokens[: (index + 1) * PAGE]))

    def teardown(self) -> None:
        for handle in self.live:
            self.cache.close(handle)
        while not self.cache.fence.idle:
            self.cache.acknowledge(self.cache.fence.watermark + 1, 0)
        self.cache.flush()
        self.cache.check()
        assert self.cache.room() == [PAGES] * RANKS
        assert not self.cache.tree.roots()

    def oracle(self, namespace: tuple[str, str, str], tokens: list[int]) -> int:
        """Pages of the longest cached prefix, from the tree's pages and what fills them."""
        filled = {
            self.written[page]
            for found, node in self.cache.tree.nodes()
            for page in node.pages
            if found == namespace
        }
        count = 0
        while (count + 1) * PAGE <= len(tokens) and (
            (namespace, tuple(tokens[: (count + 1) * PAGE])) in filled
        ):
            count += 1
        return count


def path(node):
    while node is not None:
        yield node
        node = node.parent


TestCache = CacheMachine.TestCase
TestCache.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def cache_with(tokens: list[int], ranks: list[int], handle: int = 1, **options) -> PrefixCache:
    cache = PrefixCache(PAGE, RANKS, PAGES, **options)
    fill(cache, tokens, ranks, handle)
    return cache


def fill(cache: PrefixCache, tokens: list[int], ranks: list[int], handle: int) -> list[int]:
    table = cache.open(handle, NAMESPACES[0], pack_ids(tokens), 0)
    assert cache.allocate(handle, ranks)
    cache.commit(handle, pack_ids(tokens), len(tokens))
    pages = list(table.pages)
    cache.close(handle)
    return pages


def test_a_match_is_whole_pages_and_leaves_the_last_token() -> None:
    cache = cache_with([1, 2, 3, 4], [0, 1])
    assert len(cache.match(NAMESPACES[0], pack_ids([1, 2, 3, 4]), 3).pages) == 1
    assert len(cache.match(NAMESPACES[0], pack_ids([1, 2, 3, 4, 5]), 4).pages) == 2
    assert cache.match(NAMESPACES[1], pack_ids([1, 2, 3, 4, 5]), 4).pages == []


def test_a_duplicate_keeps_the_trees_page() -> None:
    cache = cache_with([1, 2, 3, 4], [0, 1])
    kept = cache.match(NAMESPACES[0], pack_ids([1, 2, 3, 4]), 4).pages
    assert fill(cache, [1, 2, 3, 4], [1, 1], handle=2) == kept
    assert sum(cache.tree.evictable) == 2


def test_the_least_recently_used_leaf_goes_first() -> None:
    cache = PrefixCache(PAGE, 1, 3)
    fill(cache, [1, 1], [0], 1)
    fill(cache, [2, 2], [0], 2)
    fill(cache, [3, 3], [0], 3)
    cache.open(4, NAMESPACES[0], pack_ids([1, 1, 9]), 2)
    cache.close(4)
    cache.open(5, NAMESPACES[0], pack_ids([7, 7]), 0)
    assert cache.allocate(5, [0])
    held = [bool(cache.match(NAMESPACES[0], pack_ids([t, t]), 2).pages) for t in (1, 2, 3)]
    assert held == [True, False, True]


def test_eviction_frees_the_rank_that_is_short() -> None:
    cache = PrefixCache(PAGE, 2, 2)
    fill(cache, [1, 1, 2, 2], [0, 1], 1)
    fill(cache, [3, 3], [1], 2)
    cache.open(3, NAMESPACES[0], pack_ids([7]), 0)
    assert cache.allocate(3, [1])
    assert len(cache.match(NAMESPACES[0], pack_ids([1, 1, 2, 2]), 4).pages) == 1
    assert len(cache.match(NAMESPACES[0], pack_ids([3, 3]), 2).pages) == 1


def test_held_pages_are_never_evicted() -> None:
    cache = PrefixCache(PAGE, 1, 2)
    fill(cache, [1, 1, 2, 2], [0, 0], 1)
    cache.open(2, NAMESPACES[0], pack_ids([1, 1, 2, 2, 3]), 4)
    cache.open(3, NAMESPACES[0], pack_ids([7]), 0)
    assert not cache.allocate(3, [0])
    cache.close(2)
    assert cache.allocate(3, [0])


def test_pages_evicted_under_a_running_plan_wait_for_it() -> None:
    cache = PrefixCache(PAGE, 1, 2)
    fill(cache, [1, 1, 2, 2], [0, 0], 1)
    cache.open(2, NAMESPACES[0], pack_ids([1, 1, 2, 2, 3]), 4)
    epoch = cache.fence.send([0])
    cache.close(2)
    cache.open(3, NAMESPACES[0], pack_ids([7]), 0)
    assert not cache.allocate(3, [0])
    assert cache.quarantined() == 1, "asking again evicts no more"
    assert not cache.allocate(3, [0])
    assert cache.quarantined() == 1
    cache.acknowledge(epoch, 0)
    assert cache.allocate(3, [0])


def test_a_cache_switched_off_shares_nothing() -> None:
    cache = cache_with([1, 2, 3, 4], [0, 1], enabled=False)
    assert cache.match(NAMESPACES[0], pack_ids([1, 2, 3, 4]), 4).pages == []
    assert cache.room() == [PAGES] * RANKS


def test_unlocking_twice_is_an_error() -> None:
    tree = RadixTree(PAGE, 1, 4, Lru())
    node = tree.lock(NAMESPACES[0], b"", 0)
    keep = tree.lock(NAMESPACES[0], b"", 0)
    tree.unlock(node, 0)
    tree.unlock(keep, 0)
    with pytest.raises(ValueError):
        tree.unlock(node, 0)


def test_growing_one_sequence_makes_one_node() -> None:
    cache = PrefixCache(PAGE, 1, 12)
    cache.open(1, NAMESPACES[0], pack_ids([0]), 0)
    for page in range(10):
        assert cache.allocate(1, [0])
        cache.commit(1, pack_ids([page, page]), (page + 1) * PAGE)
        cache.check()
    assert Counter(len(node.pages) for _, node in cache.tree.nodes()) == {10: 1}


def test_an_unknown_eviction_is_refused() -> None:
    with pytest.raises(ConfigError, match="lru"):
        PrefixCache(PAGE, 1, 4, eviction="magic")
