"""One step on one rank: what every strategy begins with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.shard_layout import Ints, ShardLayout
from sps_runtime.distributed.communicator import Pending
from sps_runtime.kvstore.transfer import Shipment
from sps_runtime.ops.devices import upload


class StepState:
    """A layout seen by one member of its group.

    Attributes:
        me: this rank's index in the group.
        peers: global ranks of the group's members with this rank's TP rank.
        communicator: of the peers; None in a group of one, where nothing crosses.
    """

    def __init__(self, layout: ShardLayout, context: AttentionContext) -> None:
        self.layout = layout
        self.context = context
        self.me = layout.member(context.mesh.sp_rank)
        self.size = len(layout.group)
        self.peers = context.mesh.sp_peers(layout.group)
        self.communicator = context.mailroom.group(self.peers) if self.size > 1 else None
        writes = layout.writes(self.me)
        device = context.device
        self._rows = None if writes.rows is None else upload(writes.rows, device)
        self._slots = upload(writes.slots.astype(np.int32), device)
        self._offsets = upload(writes.offsets.astype(np.int32), device)

    def same_host(self, a: int, b: int) -> bool:
        """Whether members a and b read each other's pools in place."""
        hosts, group = self.context.hosts, self.layout.group
        return hosts[group[a]] == hosts[group[b]]

    @property
    def crosses_hosts(self) -> bool:
        """Whether members lie on several hosts."""
        return not all(self.same_host(self.me, member) for member in range(self.size))

    def neighbours(self, need: npt.NDArray[np.bool_]) -> tuple[int, ...]:
        """The other members on this host that own some of the pages `need` of the table: those
        whose new KV is read in place."""
        owners = self.layout.pages.owners
        return tuple(
            member
            for member, sp_rank in enumerate(self.layout.group)
            if member != self.me and self.same_host(self.me, member)
            if (need & (owners == sp_rank)).any()
        )

    def readable(self) -> npt.NDArray[np.bool_]:
        """Which pages of the layout's table this rank can read in place."""
        return np.asarray(self.context.store.readable)[self.layout.pages.owners]

    def count_in_place(self, tokens: int) -> None:
        """Count the KV of so many tokens, in one layer, as read from other ranks' pools."""
        self.context.traffic.attention_bytes += tokens * self.context.store.shape.token_bytes

    def shipment(self, index: Ints) -> Shipment:
        """Pages at places `index` of the layout's page table, as one owner sends them."""
        pages = self.layout.pages
        slots = pages.ids[index].astype(np.int64) % self.context.store.shape.slots
        return Shipment(slots, pages.tokens[index], self.layout.page_size)

    def communicate(self, send: Sequence[Tensor], recv: Sequence[Tensor]) -> None:
        """Exchange attention traffic with the group."""
        if self.communicator is None:
            raise ValueError("a group of one has nobody to send to")
        self.communicator.exchange(send, recv, "attention")

    def start(self, send: Sequence[Tensor], recv: Sequence[Tensor], tag: int = 0) -> Pending:
        """Begin to exchange attention traffic with the group."""
        if self.communicator is None:
            raise ValueError("a group of one has nobody to send to")
        return self.communicator.start(send, recv, "attention", tag)

    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Put this rank's share of the new KV into its pool."""
        if not len(self._slots):
            return
        if self._rows is not None:
            k_TKD, v_TKD = k_TKD[self._rows], v_TKD[self._rows]
        own = self.context.store.own
        k_pool, v_pool = own.k[layer], own.v[layer]
        self.context.ops.write_kv(k_TKD, v_TKD, k_pool, v_pool, self._slots, self._offsets)

    def publish(self, layer: int) -> None:
        """Let peers read this layer's new KV in place."""
        self.context.fence.publish(self.layout.epoch, layer)

    def wait(self, layer: int, members: tuple[int, ...]) -> None:
        """Wait until the members' new KV of this layer can be read in place."""
        traffic = self.context.traffic
        for member in members:
            traffic.exposed_s += self.context.fence.wait(
                self.peers[member], self.layout.epoch, layer
            )
