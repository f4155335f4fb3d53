"""Pools, links and fences of ranks that are threads of one process."""

from __future__ import annotations

import mmap
from collections.abc import Callable

import torch

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.choose import choose_backend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.native_links import NativeMailroom
from sps_runtime.distributed.regions import link_bytes
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.ops.dispatch import Ops
from sps_runtime.sparse.dispatch import choose_operators, possible

PATIENCE_S = 100.0
RING = 4096


def make_contexts(
    world: ThreadWorld,
    shape: KVShape,
    dtype: torch.dtype,
    sp: int,
    tp: int,
    hosts: tuple[int, ...],
    ops: Ops,
    native: bool,
    windows: tuple[int | None, ...] = (),
    make_backend: Callable[[], AttentionBackend] | None = None,
) -> list[AttentionContext]:
    """Pools, links and fences of every rank. Pools are full of NaN: a read of what nobody wrote
    must show. Messages go through `world`, or as between processes of one host."""
    memory = mmap.mmap(-1, link_bytes(sp * tp, RING))
    pools = [KVPool.private(shape, dtype) for _ in range(sp * tp)]
    nothing = torch.nan if dtype.is_floating_point else 0xFF  # quantised rows that decode to NaN
    for pool in pools:
        pool.k.fill_(nothing)
        pool.v.fill_(nothing)
    fences = ThreadFences(sp * tp, shape.layers, timeout_s=PATIENCE_S)
    sparse = _sparse_means(shape, sp, tp, hosts, ops)
    contexts = []
    for rank in range(sp * tp):
        mesh, traffic = Mesh(sp, tp, rank), Traffic()
        readable = [
            pools[other * tp + mesh.tp_rank] if hosts[other] == hosts[mesh.sp_rank] else None
            for other in range(sp)
        ]
        contexts.append(
            AttentionContext(
                mesh=mesh,
                mailroom=_native(ops, memory, rank, sp * tp, traffic)
                if native
                else world.mailroom(rank, traffic),
                store=KVStore(readable, mesh.sp_rank),
                fence=fences.of(rank),
                backend=make_backend()
                if make_backend is not None
                else choose_backend(ops, page_size=shape.page_size, head_dim=shape.head_dim),
                traffic=traffic,
                hosts=hosts,
                ops=ops.operators,
                sparse=sparse[rank],
                windows=windows,
            )
        )
    return contexts


def _sparse_means(
    shape: KVShape, sp: int, tp: int, hosts: tuple[int, ...], ops: Ops
) -> list[SparseMeans | None]:
    """Summaries of every rank, where pages have any; unwritten ones are rubbish."""
    if not possible(shape.page_size, shape.head_dim, native=shape.itemsize > 1):
        return [None] * (sp * tp)
    operators = choose_operators(ops.kernels)
    nbytes = operators.summary_nbytes(shape.page_size, shape.head_dim, shape.itemsize)
    room = SummaryShape(shape.layers, shape.slots, shape.kv_heads, nbytes)
    pools = [room.private().fill_(0xFF) for _ in range(sp * tp)]
    return [
        SparseMeans(
            operators,
            SummaryStore(
                [
                    pools[other * tp + rank % tp]
                    if hosts[other] == hosts[rank // tp]
                    else room.private().fill_(0xFF)
                    for other in range(sp)
                ],
                rank // tp,
            ),
        )
        for rank in range(sp * tp)
    ]


def _native(ops: Ops, memory: mmap.mmap, rank: int, world: int, traffic: Traffic) -> NativeMailroom:
    assert ops.kernels is not None
    return NativeMailroom(
        ops.kernels, memory, rank, world, traffic, ring_bytes=RING, timeout_s=PATIENCE_S
    )
