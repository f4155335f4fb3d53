"""Pages and summaries that lie on other hosts, for rows that choose what they read.

Summaries of new pages go to every member that comes causally later, into its mirror of their
owner's. Then a reader asks for pages of single KV heads by a bit for each that it may ask for, and
gets their keys, then their values, into a mirror of their owner's pool in this layer: page ids are
the same here and there, and whoever attends need not know where a page came from. A mirror's memory
is touched where pages arrive.

Both sides know every size: those of summaries and questions from the plan, those of pages from the
question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sps_runtime.attention.backend import PagePool
from sps_runtime.attention.page_reads import Mask
from sps_runtime.attention.sequence_parallel.step import StepState
from sps_runtime.attention.shard_layout import Ints
from sps_runtime.attention.sparse_blocks import summaries_due

Bits = npt.NDArray[np.uint8]


class Mirror:
    """One layer's pools with room for pages of other hosts.

    Attributes:
        pool: the store's pools, and for each rank of another host one of this layer alone.
    """

    def __init__(self, step: StepState, layer: int) -> None:
        store = step.context.store
        room = store.own.k[layer].shape

        def with_room(side: Sequence[Tensor]) -> list[Tensor]:
            return [
                known if near else known.new_empty(room)
                for known, near in zip(side, store.readable, strict=True)
            ]

        k, v = store.layer(layer)
        self.pool = PagePool(with_room(k), with_room(v), store.shape.slots)


class Units:
    """Pages of single KV heads that one owner gives one reader, in an order that both know.

    Args:
        step: of either.
        wanted: ``[pages of the layout's table, kv_heads]``.
        index: the owner's pages that the reader may ask for, as places in the table.
    """

    def __init__(self, step: StepState, wanted: Mask, index: Ints) -> None:
        page, head = np.nonzero(wanted[index])
        slots = step.layout.pages.ids[index].astype(np.int64) % step.context.store.shape.slots
        self._slots, self._heads = torch.from_numpy(slots[page]), torch.from_numpy(head)
        self.count = len(page)

    def take(self, pool: Tensor) -> Tensor | None:
        """Copies out of the owner's pool ``[slots, kv_heads, page_size, row]``; None for none."""
        return pool[self._slots, self._heads] if self.count else None

    def room(self, pool: Tensor) -> Tensor | None:
        """Where they arrive."""
        return pool.new_empty(self.count, *pool.shape[2:]) if self.count else None

    def put(self, came: Tensor | None, pool: Tensor) -> None:
        """Into the reader's mirror of that pool."""
        if came is not None:
            pool[self._slots, self._heads] = came


def pack_bits(wanted: Mask, index: Ints) -> Tensor | None:
    """A question: a bit for each KV head of each page; None where there is nothing to ask for."""
    return torch.from_numpy(np.packbits(wanted[index])) if len(index) else None


def bits_room(pages: int, kv_heads: int) -> Tensor | None:
    """Where a question about so many pages arrives."""
    return torch.empty(-(-pages * kv_heads // 8), dtype=torch.uint8) if pages else None


def unpack_bits(bits: Tensor | None, wanted: Mask, index: Ints) -> None:
    """Write a question into `wanted`."""
    if bits is not None:
        shape = (len(index), wanted.shape[1])
        flags = np.unpackbits(bits.numpy(), count=shape[0] * shape[1])
        wanted[index] = flags.reshape(shape).astype(np.bool_)


class FarPages:
    """What may cross hosts in one step.

    Args:
        need: pages that each member's choosing rows see, as masks of the layout's table.
    """

    def __init__(self, step: StepState, need: Sequence[Mask]) -> None:
        layout, self.step = step.layout, step
        self.kv_heads = step.context.store.shape.kv_heads
        self.table = len(layout.pages.ids)
        self._need, self._due = need, [summaries_due(layout, each) for each in need]
        reached = step.readable() | np.isin(layout.pages.owners, layout.group)
        if (need[step.me] & ~reached).any():
            raise ValueError(f"epoch {layout.epoch} chooses among pages that cannot be read")

    def index(self, owner: int, reader: int) -> Ints:
        """Places of an owner's pages that a reader may ask for; none within a host."""
        return self._crossing(self._need[reader], owner, reader)

    def due(self, owner: int, reader: int) -> Ints:
        """Places of an owner's pages whose summaries a reader gets in this step."""
        return self._crossing(self._due[reader], owner, reader)

    def _crossing(self, of: Mask, owner: int, reader: int) -> Ints:
        if self.step.same_host(owner, reader):
            return np.zeros(0, dtype=np.int64)
        mine = self.step.layout.pages.owners == self.step.layout.group[owner]
        return np.flatnonzero(of & mine)

    def summaries_of(self, layer: int, index: Ints) -> Tensor | None:
        """Own summaries ``[pages, kv_heads, nbytes]``; None for none."""
        return self._summaries(layer, self.step.me)[self._slots(index)] if len(index) else None

    def summaries_room(self, index: Ints) -> Tensor | None:
        """Where summaries of another member's pages arrive."""
        own = self._summaries(0, self.step.me)
        return own.new_empty(len(index), *own.shape[1:]) if len(index) else None

    def keep_summaries(self, layer: int, owner: int, index: Ints, came: Tensor | None) -> None:
        """Put them into this rank's mirror."""
        if came is not None:
            self._summaries(layer, owner)[self._slots(index)] = came

    def owner_pool(self, mirror: Mirror, owner: int) -> tuple[Tensor, Tensor]:
        """K and V of a member's pages in a layer."""
        rank = self.step.layout.group[owner]
        return mirror.pool.k[rank], mirror.pool.v[rank]

    def _summaries(self, layer: int, member: int) -> Tensor:
        sparse = self.step.context.sparse
        assert sparse is not None
        return sparse.store.layer(layer)[self.step.layout.group[member]]

    def _slots(self, index: Ints) -> Tensor:
        ids = self.step.layout.pages.ids[index].astype(np.int64)
        return torch.from_numpy(ids % self.step.context.store.shape.slots)


class FarExchange:
    """`FarPages` for a step in one piece, layer by layer: collective calls."""

    def __init__(self, far: FarPages) -> None:
        self._far, self._step = far, far.step
        size, me = self._step.size, self._step.me
        self._from = [far.index(owner, me) for owner in range(size)]
        self._to = [far.index(me, reader) for reader in range(size)]
        self._here = np.zeros((far.table, far.kv_heads), dtype=np.bool_)
        self._mirror: Mirror | None = None

    def begin(self, layer: int) -> None:
        """Every member's mirrors know the new pages that its rows see; no page has come yet."""
        self._mirror = Mirror(self._step, layer)
        self._here[:] = False
        far = self._far
        size, me = self._step.size, self._step.me
        wanted = [far.due(owner, me) for owner in range(size)]
        send = [far.summaries_of(layer, far.due(me, reader)) for reader in range(size)]
        recv = [far.summaries_room(index) for index in wanted]
        self._swap(send, recv)
        for owner, (index, came) in enumerate(zip(wanted, recv, strict=True)):
            far.keep_summaries(layer, owner, index, came)

    @property
    def pool(self) -> PagePool:
        """The layer's pages, those of other hosts as far as they have been fetched."""
        assert self._mirror is not None
        return self._mirror.pool

    def fetch(self, layer: int, wanted: Mask, of: Mask) -> list[Ints]:
        """Bring what this rank wants and has not got.

        Args:
            wanted: ``[pages of the layout's table, kv_heads]``.
            of: pages of the table that members may ask for, as all of them know.

        Returns:
            Of each member, places of the pages that it was asked about.
        """
        far, step = self._far, self._step
        fresh = wanted & ~self._here
        self._here |= wanted
        places = [index[of[index]] for index in self._from]
        theirs = [index[of[index]] for index in self._to]
        came = [bits_room(len(index), far.kv_heads) for index in theirs]
        self._swap([pack_bits(fresh, index) for index in places], came)
        asked = []
        for bits, index in zip(came, theirs, strict=True):
            mask = np.zeros_like(wanted)
            unpack_bits(bits, mask, index)
            asked.append(Units(step, mask, index))
        self._bring(layer, [Units(step, fresh, index) for index in places], asked)
        return places

    def _bring(self, layer: int, mine: Sequence[Units], asked: Sequence[Units]) -> None:
        """Keys, then values."""
        far, own, mirror = self._far, self._step.context.store.own, self._mirror
        assert mirror is not None
        pools = [far.owner_pool(mirror, owner) for owner in range(self._step.size)]
        for side, source in enumerate((own.k[layer], own.v[layer])):
            recv = [units.room(source) for units in mine]
            self._swap([units.take(source) for units in asked], recv)
            for units, part, pool in zip(mine, recv, pools, strict=True):
                units.put(part, pool[side])

    def _swap(self, send: Sequence[Tensor | None], recv: Sequence[Tensor | None]) -> None:
        nothing = torch.empty(0, dtype=torch.uint8)
        self._step.communicate(*([nothing if x is None else x for x in s] for s in (send, recv)))
