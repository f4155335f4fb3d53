"""What attention needs of a rank, the same for every step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sps_runtime.attention.backend import AttentionBackend, PagePool
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.fences import LayerFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.kvstore.pool import KVStore
from sps_runtime.kvstore.summaries import SummaryStore
from sps_runtime.ops.operators import TORCH, Operators
from sps_runtime.sparse.operators import SparseOperators, SummaryPool


@dataclass(frozen=True)
class SparseMeans:
    """What sparse attention needs of a rank beside the others.

    Attributes:
        operators: summarise pages and choose among them.
        store: the summaries of the pages in `AttentionContext.store`.
    """

    operators: SparseOperators
    store: SummaryStore


@dataclass(frozen=True)
class AttentionContext:
    """One rank's means, made once when the rank starts.

    Attributes:
        mesh: where the rank stands.
        mailroom: makes the communicator of a group's SP peers.
        store: own KV pool and those of SP peers that can be read from here.
        fence: the layer fence of this global rank.
        backend: computes partials.
        traffic: the rank's counters, the same object that the mailroom's communicators count in.
        hosts: the host of each SP rank. Ranks of one host read each other's pools in place; `store`
            must hold the pools of every rank of this host. Between hosts pages travel. All ranks
            know the same tuple, so both sides of a transfer agree.
        ops: what writes KV, and what the runner gives to placements.
        sparse: None where pages of this shape have no summaries.
        windows: of each layer, where that is known before a layer is run.
        boards: the host of each SP rank as token boards have it, where `hosts` are GPUs.
    """

    mesh: Mesh
    mailroom: Mailroom
    store: KVStore
    fence: LayerFence
    backend: AttentionBackend
    traffic: Traffic
    hosts: tuple[int, ...]
    ops: Operators = TORCH
    sparse: SparseMeans | None = None
    windows: tuple[int | None, ...] = ()
    boards: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        here = self.hosts[self.mesh.sp_rank]
        readable = tuple(host == here for host in self.hosts)
        if len(self.hosts) != self.mesh.sp_size or self.store.readable != readable:
            raise ValueError(f"pools {self.store.readable} do not fit hosts {self.hosts}")

    @property
    def device(self) -> torch.device:
        """Where pages, and all that is computed from them, lie."""
        return self.store.own.k.device

    def pages(self, layer: int) -> PagePool:
        """All pools of a layer, as far as they can be read."""
        k, v = self.store.layer(layer)
        return PagePool(k, v, self.store.shape.slots)

    def summaries(self, layer: int) -> SummaryPool:
        """All summaries of a layer, as far as they can be read.

        Raises:
            ValueError: there are none.
        """
        if self.sparse is None:
            raise ValueError("a plan is sparse where pages have no summaries")
        shape = self.store.shape
        return SummaryPool(
            self.sparse.store.layer(layer), shape.slots, shape.page_size, shape.head_dim
        )
