"""From a rank's configuration and inherited memory to its means: links, pools, fences, model."""

from __future__ import annotations

import logging
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from mmap import mmap
from types import ModuleType

import torch

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.config.cache import kv_row, resolve_kv_dtype
from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import ModelConfig
from sps_runtime.config.process import RankConfig
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.fences import LayerFence, NoFence, SharedLayerFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.native_links import NativeMailroom
from sps_runtime.distributed.regions import fence_bytes, link_bytes, map_region
from sps_runtime.distributed.routed import RoutedMailroom
from sps_runtime.distributed.shared_memory import RING_BYTES, SharedMemoryMailroom
from sps_runtime.distributed.torch_dist import gloo_mailroom, tcp_store
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.ops.kv_rows import storage_dtype
from sps_runtime.ops.operators import Operators
from sps_runtime.runner.gpu import (
    gpu_summaries,
    open_gpu_fence,
    open_gpu_mailroom,
    open_gpu_store,
    share_gpu,
    with_domains,
)
from sps_runtime.runner.place import Place
from sps_runtime.sparse.dispatch import choose_operators, possible
from sps_runtime.sparse.operators import SparseOperators
from sps_runtime.types.errors import ConfigError

logger = logging.getLogger(__name__)


def _kv_dtype(config: EngineConfig) -> str:
    return resolve_kv_dtype(config.cache.kv_dtype, config.dtype)


def kv_shape(config: EngineConfig, model: ModelConfig) -> KVShape:
    """The pool of one global rank."""
    itemsize, scale_bytes = kv_row(_kv_dtype(config))
    return KVShape(
        layers=model.num_layers,
        slots=config.cache.pages_per_rank,
        kv_heads=model.kv_heads_per_rank(config.parallel.tp_size),
        page_size=config.cache.page_size,
        head_dim=model.head_dim,
        itemsize=itemsize,
        scale_bytes=scale_bytes,
    )


def open_store(place: Place, shape: KVShape, dtype: torch.dtype, fds: Mapping[str, int]) -> KVStore:
    """This rank's pool, writable, and its SP peers' on this host, read only."""
    pools: list[KVPool | None] = [None] * place.mesh.sp_size
    for sp_rank, rank in place.sp_peers_here().items():
        own = rank == place.mesh.rank
        pools[sp_rank] = KVPool.shared(shape, dtype, fds[f"kv.{rank}"], writable=own)
    return KVStore(pools, place.mesh.sp_rank)


def open_sparse(
    place: Place,
    shape: KVShape,
    fds: Mapping[str, int],
    kernels: ModuleType | None,
    threads: int,
) -> SparseMeans | None:
    """Room for the summaries of this rank's pages, for its SP peers' on this host, read only, and
    for mirrors of those on other hosts: memory is touched where a summary is written."""
    if not possible(shape.page_size, shape.head_dim, native=shape.itemsize > 1):
        return None
    operators = choose_operators(kernels if shape.page_size % 16 == 0 else None, threads)
    room = _summary_shape(shape, operators)
    here = place.sp_peers_here()
    pools = [None if rank in here else room.private() for rank in range(place.mesh.sp_size)]
    for sp_rank, rank in here.items():
        own = rank == place.mesh.rank
        pools[sp_rank] = room.shared(fds[f"summaries.{rank}"], writable=own)
    return SparseMeans(operators, SummaryStore(pools, place.mesh.sp_rank))


def _summary_shape(shape: KVShape, operators: SparseOperators) -> SummaryShape:
    nbytes = operators.summary_nbytes(shape.page_size, shape.head_dim, shape.itemsize)
    return SummaryShape(shape.layers, shape.slots, shape.kv_heads, nbytes)


def open_mailroom(
    config: EngineConfig,
    place: Place,
    traffic: Traffic,
    fds: Mapping[str, int],
    kernels: ModuleType | None,
) -> Mailroom:
    """Links to all ranks: shared memory on one host, torch.distributed between hosts.

    Args:
        kernels: carry messages on this host; all its ranks have them, or none.

    Raises:
        ConnectionError: when the ranks of other hosts do not come in time.
    """
    mesh, timeout_s = place.mesh, config.watchdog_timeout_s
    memory = map_region(fds["links"], link_bytes(mesh.world_size, RING_BYTES))
    local = _local_mailroom(memory, mesh, traffic, kernels, timeout_s, config.spin_s)
    if config.parallel.nnodes == 1:
        return local
    host, port = _split_address(config.parallel.dist_init_addr or "")
    store = tcp_store(host, port, mesh.world_size, master=mesh.rank == 0, timeout_s=timeout_s)
    address = _address_towards(host, port)
    remote = gloo_mailroom(
        store, mesh.rank, mesh.world_size, traffic, address=address, timeout_s=timeout_s
    )
    return RoutedMailroom(local, remote, place.rank_hosts())


def _local_mailroom(
    memory: mmap,
    mesh: Mesh,
    traffic: Traffic,
    kernels: ModuleType | None,
    timeout_s: float,
    spin_s: float,
) -> Mailroom:
    rank, world = mesh.rank, mesh.world_size
    if kernels is None:
        return SharedMemoryMailroom(
            memory, rank, world, traffic, timeout_s=timeout_s, spin_s=spin_s
        )
    return NativeMailroom(kernels, memory, rank, world, traffic, timeout_s=timeout_s, spin_s=spin_s)


def open_fence(
    config: EngineConfig, place: Place, layers: int, fds: Mapping[str, int]
) -> LayerFence:
    """This rank's layer fence; none where no peer reads its pool in place."""
    if len(place.sp_peers_here()) == 1:
        return NoFence()
    world = place.mesh.world_size
    memory = map_region(fds["fences"], fence_bytes(world))
    return SharedLayerFence(
        memory,
        place.mesh.rank,
        world,
        layers,
        timeout_s=config.watchdog_timeout_s,
        spin_s=config.spin_s,
    )


@dataclass(frozen=True)
class Setup:
    """What a rank knows before it meets the others.

    Attributes:
        dtype: of activations.
        backend, ops: what computes.
        fds: inherited memory, by name.
        traffic: where all that is opened counts.
    """

    config: RankConfig
    place: Place
    model: ModelConfig
    dtype: torch.dtype
    backend: AttentionBackend
    ops: Operators
    fds: Mapping[str, int]
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def engine(self) -> EngineConfig:
        return self.config.engine

    @property
    def kv_dtype(self) -> torch.dtype:
        """What the pool's rows lie in."""
        return storage_dtype(_kv_dtype(self.engine), self.dtype)

    def mailroom(self, kernels: ModuleType | None) -> Mailroom:
        return open_mailroom(self.engine, self.place, self.traffic, self.fds, kernels)

    def fence(self) -> LayerFence:
        return open_fence(self.engine, self.place, self.model.num_layers, self.fds)

    def means(
        self,
        mailroom: Mailroom,
        store: KVStore,
        fence: LayerFence,
        sparse: SparseMeans | None,
        boards: tuple[int, ...] = (),
    ) -> AttentionContext:
        """Everything that attention needs of this rank, now that it is open."""
        return AttentionContext(
            mesh=self.place.mesh,
            mailroom=mailroom,
            store=store,
            fence=fence,
            backend=self.backend,
            traffic=self.traffic,
            hosts=self.place.hosts,
            ops=self.ops,
            sparse=sparse,
            windows=self.model.layer_windows,
            boards=boards,
        )


def open_means(setup: Setup, kernels: ModuleType | None = None) -> AttentionContext:
    """The means of a rank on CPUs."""
    place, fds = setup.place, setup.fds
    shape = kv_shape(setup.engine, setup.model)
    return setup.means(
        setup.mailroom(kernels),
        open_store(place, shape, setup.kv_dtype, fds),
        setup.fence(),
        open_sparse(place, shape, fds, kernels, setup.engine.threads_per_rank),
    )


def open_gpu_means(
    setup: Setup, device: torch.device, sparse: SparseOperators | None
) -> AttentionContext:
    """The means of a rank on a GPU.

    Args:
        sparse: choose pages on the GPU; None where nothing does.
    """
    engine, place = setup.engine, setup.place
    shape = kv_shape(engine, setup.model)
    if not possible(shape.page_size, shape.head_dim, native=shape.itemsize > 1):
        sparse = None
    room = _summary_shape(shape, sparse) if sparse is not None else None
    host = setup.mailroom(None)
    here = [rank for rank, at in enumerate(place.rank_hosts()) if at == place.host]
    sharing = share_gpu(setup.config, place, device, shape, room, host.group(tuple(here)))
    if len(here) > 1:
        logger.info("GPUs of this host: %s", sharing.why)
    boards, place = place.hosts, with_domains(place, engine, sharing.gpu is not None)
    setup = replace(setup, place=place)
    mailroom = open_gpu_mailroom(
        setup.config, place, device, host, setup.traffic, sharing, setup.fds
    )
    fence = open_gpu_fence(setup.fence(), place, sharing)
    means = None
    if sparse is not None and room is not None:
        pools = gpu_summaries(place, room, device, sharing)
        means = SparseMeans(sparse, SummaryStore(pools, place.mesh.sp_rank))
    store = open_gpu_store(place, shape, setup.kv_dtype, device, sharing)
    return setup.means(mailroom, store, fence, means, boards)


def _split_address(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"dist_init_addr {address!r} is not host:port")
    return host.strip("[]"), int(port)


def _address_towards(host: str, port: int) -> str:
    """This host's own address on the way to `host`; nothing is sent."""
    family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
