"""A radix tree over pages: which committed prefixes lie in which pages.

RadixAttention (SGLang, 2024), page-granular: an edge is a run of whole pages, children are told
apart by the tokens of their first page, and the tokens themselves are compared - never a hash - so
no collision can serve one prompt the KV of another.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sps_runtime.kvcache.eviction import Eviction

Namespace = tuple[str, str, str]
"""(tenant, kv dtype, fidelity): prefixes are shared only inside one."""


class Node:
    """An edge of the tree and its lower end.

    Attributes:
        key: packed int32 tokens of `pages`, page_size of them each.
        lock_ref: how many live paths (locks) go through this node.
        used: tick of the last unlock.
        fence: plans up to this epoch may still read the pages; set when the last lock goes.
    """

    __slots__ = ("children", "fence", "key", "lock_ref", "pages", "parent", "stamp", "used")

    def __init__(self, parent: Node | None, key: bytes | bytearray, pages: Sequence[int]) -> None:
        self.parent = parent
        self.key = bytearray(key)
        self.pages = array("i", pages)
        self.children: dict[bytes, Node] = {}
        self.lock_ref = 0
        self.used = 0
        self.fence = 0
        self.stamp = 0


class Match(NamedTuple):
    """Cached pages of a prefix, in order; live sequences hold the first `held` of them."""

    pages: list[int]
    held: int


@dataclass
class Inserted:
    """What `RadixTree.extend` did.

    Attributes:
        node: the lock's new end.
        pages: the tree's page for each page handed in.
        duplicates: pages handed in that the tree did not take, having its own.
    """

    node: Node
    pages: list[int] = field(default_factory=list)
    duplicates: list[int] = field(default_factory=list)


class RadixTree:
    """Prefix -> pages, per namespace. A lock keeps a path from root to node from being evicted."""

    def __init__(self, page_size: int, ranks: int, pages_per_rank: int, eviction: Eviction) -> None:
        self.page_bytes = page_size * 4
        self.evictable = [0] * ranks
        self._pages_per_rank = pages_per_rank
        self._eviction = eviction
        self._roots: dict[Namespace, Node] = {}
        self._names: dict[Node, Namespace] = {}
        self._leaves: list[tuple[float, int, Node]] = []
        self._stamp = 0
        self._tick = 0

    def match(self, namespace: Namespace, tokens: bytes) -> Match:
        """The longest cached prefix of `tokens`, whole pages only. Changes nothing."""
        pages: list[int] = []
        held = 0
        node = self._roots.get(namespace)
        while node is not None:
            node = node.children.get(self._first(tokens, len(pages)))
            if node is not None:
                common = self._common(node, tokens, len(pages))
                pages.extend(node.pages[:common])
                held += common if node.lock_ref else 0
                if common < len(node.pages):
                    break
        return Match(pages, held)

    def lock(self, namespace: Namespace, tokens: bytes, pages: int) -> Node:
        """Hold the path of the first `pages` pages of `tokens`, which must be cached."""
        node = self._root(namespace)
        done = 0
        self._hold(node)
        while done < pages:
            child = node.children[self._first(tokens, done)]
            common = min(self._common(child, tokens, done), pages - done)
            if common < len(child.pages):
                child = self._split(child, common)
            self._hold(child)
            node, done = child, done + common
        return node

    def extend(self, node: Node, tokens: bytes, pages: Sequence[int]) -> Inserted:
        """Insert `pages` with their `tokens` below the locked `node`, and move its lock down.

        Costs no more than the new pages, however long the path above is.
        """
        result = Inserted(node)
        done = 0
        while done < len(pages):
            child = result.node.children.get(self._first(tokens, done))
            if child is None:
                self._append(result, tokens[done * self.page_bytes :], pages[done:])
                return result
            common = self._common(child, tokens, done)
            if common < len(child.pages):
                child = self._split(child, common)
            self._hold(child)
            result.node = child
            result.pages.extend(child.pages)
            result.duplicates.extend(pages[done : done + common])
            done += common
        return result

    def unlock(self, node: Node, epoch: int) -> None:
        """Release one lock; plans up to `epoch` may still read the path's pages."""
        self._tick += 1
        here: Node | None = node
        while here is not None:
            parent = here.parent
            if here.lock_ref < 1:
                raise ValueError("a path is unlocked more often than it was locked")
            here.lock_ref -= 1
            here.used = self._tick
            if here.lock_ref == 0:
                here.fence = epoch
                self._count(here.pages, 1)
                self._offer(here)
            here = parent

    def evict(self, need: dict[int, int]) -> list[tuple[int, int]]:
        """Drop unheld pages from the leaves up, until `need[rank]` pages of each rank are dropped.

        Leaves that hold a page of a rank in need go first, in the eviction policy's order; when
        none does, the first leaf goes whole, since what is needed may lie above it.

        Returns:
            (page, fence epoch) of every dropped page; fewer than needed when no more are unheld.
        """
        need = {rank: count for rank, count in need.items() if count > 0}
        dropped: list[tuple[int, int]] = []
        while need and (leaf := self._next_leaf(need)) is not None:
            self._trim(leaf, need, dropped)
        return dropped

    def clear(self) -> list[tuple[int, int]]:
        """Drop every page that no lock holds; as `evict`."""
        return self.evict(dict(enumerate(self.evictable)))

    def nodes(self) -> Iterator[tuple[Namespace, Node]]:
        """Every node but the roots, with its namespace; parents before children."""
        for namespace, root in self._roots.items():
            stack = list(root.children.values())
            while stack:
                node = stack.pop()
                yield namespace, node
                stack.extend(node.children.values())

    def roots(self) -> dict[Namespace, Node]:
        """A snapshot of the namespaces' roots, for checks."""
        return dict(self._roots)

    def rank_of(self, page: int) -> int:
        return page // self._pages_per_rank

    def check(self, held: Iterable[Node]) -> None:
        """Raise AssertionError unless the tree is sound and `held` ends all its locks."""
        refs: dict[Node, int] = {}
        for end in held:
            here: Node | None = end
            while here is not None:
                refs[here] = refs.get(here, 0) + 1
                here = here.parent
        evictable = [0] * len(self.evictable)
        offered = {entry[2] for entry in self._leaves if self._current(entry)}
        for root in self._roots.values():
            assert root.lock_ref == refs.pop(root, 0), "a root's lock_ref is not its live paths"
            assert root.children or root.lock_ref, "an empty namespace stays"
        for _, node in self.nodes():
            self._check_node(node, refs.pop(node, 0))
            if node.lock_ref == 0:
                assert bool(node.children) != (node in offered), (
                    "a leaf is not offered, or a parent is"
                )
                for page in node.pages:
                    evictable[self.rank_of(page)] += 1
        assert not refs, "a lock ends in a node that is not in the tree"
        assert evictable == self.evictable, "evictable pages are miscounted"

    def _check_node(self, node: Node, refs: int) -> None:
        assert node.lock_ref == refs, "lock_ref is not the number of live paths"
        assert node.pages and len(node.key) == len(node.pages) * self.page_bytes, "ragged node"
        assert node.parent is not None and node.parent.lock_ref >= node.lock_ref, (
            "lock below parent"
        )
        assert node.parent.children.get(self._first(node.key, 0)) is node, "a child is misfiled"

    def _root(self, namespace: Namespace) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Node(None, b"", ())
            self._names[root] = namespace
        return root

    def _first(self, tokens: bytes | bytearray, page: int) -> bytes:
        return bytes(tokens[page * self.page_bytes : (page + 1) * self.page_bytes])

    def _common(self, node: Node, tokens: bytes, done: int) -> int:
        """How many of the node's pages continue `tokens` after its first `done` pages."""
        begin, width = done * self.page_bytes, self.page_bytes
        if tokens[begin : begin + len(node.key)] == node.key:
            return len(node.pages)
        count = 0
        while (
            node.key[count * width : (count + 1) * width]
            == (tokens[begin + count * width : begin + (count + 1) * width])
        ):
            count += 1
        return count

    def _hold(self, node: Node) -> None:
        if node.lock_ref == 0:
            self._count(node.pages, -1)
        node.lock_ref += 1

    def _count(self, pages: Sequence[int], sign: int) -> None:
        for page in pages:
            self.evictable[page // self._pages_per_rank] += sign

    def _split(self, node: Node, pages: int) -> Node:
        """Cut a node after its first `pages` pages; return the new upper one.

        The lower part stays the same object: locks that end in it go on ending in it.
        """
        parent = node.parent
        assert parent is not None and 0 < pages < len(node.pages)
        cut = pages * self.page_bytes
        upper = Node(parent, node.key[:cut], node.pages[:pages])
        upper.lock_ref, upper.used, upper.fence = node.lock_ref, node.used, node.fence
        parent.children[self._first(upper.key, 0)] = upper
        node.key, node.pages, node.parent = node.key[cut:], node.pages[pages:], upper
        upper.children[self._first(node.key, 0)] = node
        return upper

    def _append(self, result: Inserted, tokens: bytes, pages: Sequence[int]) -> None:
        """Add what is new below the lock's end; a leaf that only we hold just grows."""
        node = result.node
        tokens = tokens[: len(pages) * self.page_bytes]
        if node.parent is not None and node.lock_ref == 1 and not node.children:
            node.key += tokens
            node.pages.extend(pages)
        else:
            child = Node(node, tokens, pages)
            child.lock_ref = 1
            node.children[self._first(child.key, 0)] = child
            result.node = child
        result.pages.extend(pages)

    def _offer(self, node: Node) -> None:
        """Queue a node for eviction if it is a leaf that nobody holds; drop an empty root."""
        if node.lock_ref or node.children:
            return
        if node.parent is None:
            del self._roots[self._names.pop(node)]
            return
        self._stamp += 1
        node.stamp = self._stamp
        heapq.heappush(self._leaves, (self._eviction.key(node), node.stamp, node))
        if len(self._leaves) > 1024 and len(self._leaves) > 4 * sum(self.evictable):
            self._leaves = [entry for entry in self._leaves if self._current(entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _current(entry: tuple[float, int, Node]) -> bool:
        node = entry[2]
        fresh = node.stamp == entry[1] and node.parent is not None
        return fresh and not node.lock_ref and not node.children

    def _next_leaf(self, need: dict[int, int]) -> Node | None:
        """Take the first leaf with a page of a rank in need out of the queue, else the first."""
        aside: list[tuple[float, int, Node]] = []
        found: Node | None = None
        while self._leaves and found is None:
            entry = heapq.heappop(self._leaves)
            if not self._current(entry):
                continue
            if any(self.rank_of(page) in need for page in entry[2].pages):
                found = entry[2]
            else:
                aside.append(entry)
        if found is None and aside:
            found = aside.pop(0)[2]
        for entry in aside:
            heapq.heappush(self._leaves, entry)
        return found

    def _trim(self, leaf: Node, need: dict[int, int], dropped: list[tuple[int, int]]) -> None:
        """Drop a leaf's last pages until its help is over, or all of a leaf that cannot help."""
        helpful = sum(self.rank_of(page) in need for page in leaf.pages)
        whole = helpful == 0
        first = self._first(leaf.key, 0)
        while leaf.pages and (whole or (helpful and need)):
            page = leaf.pages.pop()
            rank = self.rank_of(page)
            self.evictable[rank] -= 1
            dropped.append((page, leaf.fence))
            if rank in need:
                helpful -= 1
                need[rank] -= 1
                if need[rank] == 0:
                    del need[rank]
                    helpful = sum(self.rank_of(page) in need for page in leaf.pages)
        del leaf.key[len(leaf.pages) * self.page_bytes :]
        if leaf.pages:
            self._offer(leaf)
            return
        parent = leaf.parent
        assert parent is not None
        del parent.children[first]
        leaf.parent = None
        self._offer(parent)
