"""The door to the KV cache: what a scheduler asks of pages, prefixes and fences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sps_runtime.kvcache.directory import Directory, PageTable
from sps_runtime.kvcache.eviction import make_eviction
from sps_runtime.kvcache.fence import Fence
from sps_runtime.kvcache.page_allocator import PageAllocator, PageState
from sps_runtime.kvcache.radix_tree import Match, Namespace, Node, RadixTree


@dataclass
class Lease:
    """What a live sequence holds: a page table whose first `shared` pages are the tree's.

    Attributes:
        node: the end of the locked path that the shared pages lie on.
    """

    namespace: Namespace
    table: PageTable
    node: Node
    shared: int


class PrefixCache:
    """Pages of all sequences, shared prefixes among them.

    A page belongs to one sequence until every rank has acknowledged the step that filled it; then
    `commit` gives it to the tree, where any sequence of the same namespace may hold it. Freed pages
    wait for the fence. `enabled` false keeps pages private: nothing is matched or inserted.
    """

    def __init__(
        self,
        page_size: int,
        ranks: int,
        pages_per_rank: int,
        *,
        enabled: bool = True,
        eviction: str = "lru",
    ) -> None:
        self.page_size = page_size
        self.ranks = ranks
        self.enabled = enabled
        self.fence = Fence()
        self.directory = Directory(ranks, pages_per_rank)
        self.allocator = PageAllocator(ranks, pages_per_rank, self.fence)
        self.tree = RadixTree(page_size, ranks, pages_per_rank, make_eviction(eviction))
        self._leases: dict[int, Lease] = {}

    def available(self, rank: int) -> int:
        """Pages of `rank` that a sequence may get: free, or cached and held by nobody."""
        return self.allocator.free_count(rank) + self.tree.evictable[rank]

    def room(self) -> list[int]:
        """`available` of every rank."""
        return [self.available(rank) for rank in range(self.ranks)]

    def quarantined(self) -> int:
        """Pages that will be free once plans under way are acknowledged."""
        return sum(self.allocator.quarantined_count(rank) for rank in range(self.ranks))

    def match(self, namespace: Namespace, tokens: bytes, limit: int) -> Match:
        """The longest cached prefix of packed `tokens`, within its first `limit` tokens.

        Callers pass at most len - 1 tokens: the last one is always computed, for its logits.
        """
        if not self.enabled or limit < self.page_size:
            return Match([], 0)
        whole = limit - limit % self.page_size
        return self.tree.match(namespace, tokens[: whole * 4])

    def open(self, handle: int, namespace: Namespace, tokens: bytes, limit: int) -> PageTable:
        """Start a sequence holding the cached prefix that `match` finds; return its page table."""
        pages = self.match(namespace, tokens, limit).pages
        table = self.directory.open(handle)
        node = self.tree.lock(namespace, tokens, len(pages))
        table.extend(pages)
        self._leases[handle] = Lease(namespace, table, node, len(pages))
        return table

    def allocate(self, handle: int, ranks: Sequence[int]) -> bool:
        """Append a page of each rank in `ranks` to a sequence, evicting where needed.

        Returns:
            False, and the sequence is unchanged, when a rank cannot give so many now. If there are
            quarantined pages it is worth asking again once plans are acknowledged.
        """
        allocator = self.allocator
        need = {rank: ranks.count(rank) for rank in set(ranks)}
        if any(count > self.available(rank) for rank, count in need.items()):
            return False
        short = {
            rank: count - allocator.free_count(rank) - allocator.quarantined_count(rank)
            for rank, count in need.items()
        }
        self._drop(self.tree.evict(short))
        if any(count > self.allocator.free_count(rank) for rank, count in need.items()):
            return False
        self.directory[handle].extend(self.allocator.allocate(ranks))
        return True

    def commit(self, handle: int, tokens: bytes, written: int) -> int | None:
        """Give the pages below position `written` to the tree: all its ranks acknowledged them.

        Args:
            tokens: packed ids of positions [shared * page_size, written) at least, that is from
                the first page that is not shared yet.

        Returns:
            The first logical page that lies elsewhere now, because the tree had its own; or None.
        """
        lease = self._leases[handle]
        whole = written // self.page_size
        if not self.enabled or whole <= lease.shared:
            return None
        own = list(lease.table.pages[lease.shared : whole])
        result = self.tree.extend(lease.node, tokens, own)
        duplicates = set(result.duplicates)
        self.allocator.cache(page for page in own if page not in duplicates)
        replaced: int | None = None
        for index, page in enumerate(result.pages, lease.shared):
            if lease.table.pages[index] != page:
                lease.table.replace(index, page)
                replaced = index if replaced is None else replaced
        self.allocator.free(result.duplicates, PageState.IN_USE, self.fence.sent)
        lease.node, lease.shared = result.node, whole
        return replaced

    def shared(self, handle: int) -> int:
        """How many of a sequence's first pages are the tree's."""
        return self._leases[handle].shared

    def close(self, handle: int) -> None:
        """End a sequence: unlock its prefix, free what is its own once the fence passes."""
        lease = self._leases.pop(handle)
        table = self.directory.close(handle)
        self.allocator.free(table.pages[lease.shared :], PageState.IN_USE, self.fence.sent)
        self.tree.unlock(lease.node, self.fence.sent)

    def acknowledge(self, epoch: int, rank: int) -> bool:
        """Pass on an acknowledgement; pages whose fence it opens come free."""
        complete = self.fence.acknowledge(epoch, rank)
        if complete:
            self.allocator.reclaim()
        return complete

    def flush(self) -> None:
        """Drop every cached page that no sequence holds."""
        self._drop(self.tree.clear())

    def check(self) -> None:
        """Raise AssertionError unless every page has exactly one owner and every lock its holder.

        The page sets of sequences, tree, free lists and quarantine are disjoint and cover the pool.
        """
        self.allocator.check()
        self.directory.check()
        self.tree.check(lease.node for lease in self._leases.values())
        assert self.directory.tables().keys() == self._leases.keys(), "a table without a lease"
        tree = [page for _, node in self.tree.nodes() for page in node.pages]
        own = [
            page for lease in self._leases.values() for page in lease.table.pages[lease.shared :]
        ]
        assert len(set(tree)) == len(tree), "the tree holds a page twice"
        assert len(set(own)) == len(own), "two sequences own one page"
        assert set(tree) == self.allocator.pages_in(PageState.CACHED), "tree and states differ"
        assert set(own) == self.allocator.pages_in(PageState.IN_USE), "directory and states differ"
        for handle, lease in self._leases.items():
            assert self._path(lease.node) == list(lease.table.pages[: lease.shared]), (
                f"sequence {handle} does not hold the path its table names"
            )

    @staticmethod
    def _path(node: Node | None) -> list[int]:
        runs = []
        while node is not None:
            runs.append(node.pages)
            node = node.parent
        return [page for run in reversed(runs) for page in run]

    def _drop(self, dropped: list[tuple[int, int]]) -> None:
        for page, epoch in dropped:
            self.allocator.free((page,), PageState.CACHED, epoch)
