"""Page allocator, fence and directory against plain sets, by a state machine."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sps_runtime.kvcache.directory import Directory
from sps_runtime.kvcache.fence import Fence
from sps_runtime.kvcache.page_allocator import OutOfPages, PageAllocator, PageState

RANKS, PAGES = 3, 5
ranks = st.lists(st.integers(0, RANKS - 1), max_size=6)


class AllocatorMachine(RuleBasedStateMachine):
    """Sequences take, cache and free pages while plans start and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.fence = Fence()
        self.allocator = PageAllocator(RANKS, PAGES, self.fence)
        self.in_use: set[int] = set()
        self.cached: set[int] = set()
        self.freed_at: dict[int, int] = {}
        self.pending: dict[int, set[int]] = {}

    @rule(ranks=ranks)
    def allocate(self, ranks: list[int]) -> None:
        free = [self.allocator.free_count(rank) for rank in range(RANKS)]
        if any(ranks.count(rank) > free[rank] for rank in range(RANKS)):
            with pytest.raises(OutOfPages):
                self.allocator.allocate(ranks)
            return
        pages = self.allocator.allocate(ranks)
        assert [self.allocator.rank_of(page) for page in pages] == ranks
        for page in pages:
            assert page not in self.in_use | self.cached
            freed_at = self.freed_at.pop(page, 0)
            assert all(epoch > freed_at for epoch in self.pending)
        self.in_use.update(pages)

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def cache(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.in_use)))
        self.allocator.cache([page])
        self.in_use.remove(page)
        self.cached.add(page)

    @precondition(lambda self: self.in_use or self.cached)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.in_use | self.cached)))
        held = PageState.IN_USE if page in self.in_use else PageState.CACHED
        self.allocator.free([page], held, self.fence.sent)
        self.in_use.discard(page)
        self.cached.discard(page)
        self.freed_at[page] = self.fence.sent
        with pytest.raises(ValueError):
            self.allocator.free([page], held, self.fence.sent)

    @rule(group=st.sets(st.integers(0, RANKS - 1), min_size=1))
    def send(self, group: set[int]) -> None:
        self.pending[self.fence.send(group)] = set(group)

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        epoch = data.draw(st.sampled_from(sorted(self.pending)))
        rank = data.draw(st.sampled_from(sorted(self.pending[epoch])))
        self.pending[epoch].remove(rank)
        if not self.pending[epoch]:
            del self.pending[epoch]
        assert self.fence.acknowledge(epoch, rank) == (epoch not in self.pending)
        self.allocator.reclaim()

    @invariant()
    def sets_cover_the_pool(self) -> None:
        self.allocator.check()
        assert self.allocator.pages_in(PageState.IN_USE) == self.in_use
        assert self.allocator.pages_in(PageState.CACHED) == self.cached
        oldest = min(self.pending, default=self.fence.sent + 1)
        assert self.fence.watermark == oldest - 1
        waiting = {page for page, epoch in self.freed_at.items() if epoch >= oldest}
        assert self.allocator.pages_in(PageState.QUARANTINED) == waiting


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


def test_acknowledging_what_is_not_owed_is_an_error() -> None:
    fence = Fence()
    epoch = fence.send([0, 1])
    with pytest.raises(ValueError):
        fence.acknowledge(epoch, 2)
    assert not fence.acknowledge(epoch, 0)
    with pytest.raises(ValueError):
        fence.acknowledge(epoch, 0)
    assert fence.acknowledge(epoch, 1)
    with pytest.raises(ValueError):
        fence.acknowledge(epoch, 1)


def test_a_page_may_not_skip_a_state() -> None:
    allocator = PageAllocator(1, 2, Fence())
    with pytest.raises(ValueError):
        allocator.cache([0])
    with pytest.raises(ValueError):
        allocator.free([0], PageState.IN_USE, 0)


class DirectoryMachine(RuleBasedStateMachine):
    """Tables against lists."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Directory(RANKS, PAGES)
        self.model: dict[int, list[int]] = {}
        self.unused = set(range(RANKS * PAGES))

    @rule(handle=st.integers(0, 3))
    def open_or_close(self, handle: int) -> None:
        if handle in self.model:
            with pytest.raises(ValueError):
                self.directory.open(handle)
            pages = self.model.pop(handle)
            assert list(self.directory.close(handle).pages) == pages
            self.unused.update(pages)
        else:
            self.directory.open(handle)
            self.model[handle] = []

    @precondition(lambda self: self.model and self.unused)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(sorted(self.model)))
        pages = data.draw(st.lists(st.sampled_from(sorted(self.unused)), unique=True))
        self.directory[handle].extend(pages)
        self.model[handle] += pages
        self.unused -= set(pages)

    @precondition(lambda self: self.unused and any(self.model.values()))
    @rule(data=st.data())
    def replace(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from([h for h, pages in self.model.items() if pages]))
        index = data.draw(st.integers(0, len(self.model[handle]) - 1))
        page = data.draw(st.sampled_from(sorted(self.unused)))
        old = self.directory[handle].replace(index, page)
        assert old == self.model[handle][index]
        self.model[handle][index] = page
        self.unused = (self.unused - {page}) | {old}

    @invariant()
    def tables_are_the_lists(self) -> None:
        self.directory.check()
        assert {h: list(t.pages) for h, t in self.directory.tables().items()} == self.model
        for handle, pages in self.model.items():
            table = self.directory[handle]
            for index in range(len(pages) + 1):
                owners = {page // PAGES for page in pages[index:]}
                assert table.owners_from(index) == sum(1 << rank for rank in owners)


TestDirectory = DirectoryMachine.TestCase
TestDirectory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
