"""A rank on a GPU: its device, its memory, and its links to the others.

Ranks whose GPUs are one read each other's pages in place, as ranks of one host do on CPUs: pools
are mapped through CUDA's interprocess handles, and fences are events. Between GPUs pages and
queries travel, as between hosts.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from mmap import mmap

import torch
from torch import Tensor

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.process import RankConfig
from sps_runtime.distributed.boxes import BoxMailroom, counter_bytes
from sps_runtime.distributed.by_device import DeviceMailroom, StagedMailroom
from sps_runtime.distributed.communicator import Communicator, Mailroom, Traffic
from sps_runtime.distributed.cuda_ipc import (
    Driver,
    Exported,
    SharedGpu,
    SideStream,
    box_events,
    events_for,
    open_boxes,
    tell_all,
)
from sps_runtime.distributed.device_fence import DeviceFence
from sps_runtime.distributed.fences import LayerFence
from sps_runtime.distributed.regions import map_region
from sps_runtime.distributed.torch_dist import TorchDistMailroom, nccl_group, tcp_store
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape
from sps_runtime.runner.place import Place

logger = logging.getLogger(__name__)

BOX_BYTES = 16 << 20
"""Of one piece of a message through memory that ranks share."""


def rank_device(engine: EngineConfig, rank: int) -> torch.device:
    """The device of a global rank of this host; made current for this thread."""
    if engine.device != "cuda":
        return torch.device("cpu")
    local = rank % (engine.parallel.world_size // engine.parallel.nnodes)
    device = torch.device("cuda", engine.gpus[local])
    torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Sharing:
    """What ranks of one host made of their GPUs together.

    Attributes:
        gpu: this rank's; None where nothing is shared.
        everyone: what each global rank exports; None for ranks elsewhere.
        why: how it came to this, for the log.
    """

    gpu: SharedGpu | None
    everyone: tuple[Exported | None, ...]
    why: str


def share_gpu(
    config: RankConfig,
    place: Place,
    device: torch.device,
    shape: KVShape,
    room: SummaryShape | None,
    host: Communicator,
) -> Sharing:
    """Map what the ranks of this host export, if all of them can; a collective call.

    Args:
        room: of summaries; None where there are none.
        host: all ranks of this host, by their host links.
    """
    engine, world = config.engine, place.mesh.world_size
    nobody: tuple[Exported | None, ...] = (None,) * world
    if host.size == 1 or engine.parallel.nnodes > 1 or engine.device_links in ("host", "nccl"):
        return Sharing(None, nobody, "not shared")
    sizes = {"kv": shape.nbytes, "boxes": 2 * world * BOX_BYTES}
    if room is not None:
        sizes["summaries"] = room.total
    events = ["fence", *box_events(world, config.rank)]
    try:
        gpu: SharedGpu | None = SharedGpu(device, sizes, events, Driver())
        mine = gpu.exported if gpu is not None else Exported()
    except (OSError, RuntimeError) as error:
        gpu, mine = None, Exported(error=f"{type(error).__name__}: {error}")
    told = tell_all(host, mine)
    failure = next((exported.error for exported in told if exported.error), "")
    if gpu is not None and not failure:
        failure = _open_all(gpu, told, config.rank)
        # Whoever could not open what it was told says so: all go one way.
        others = tell_all(host, Exported(error=failure))
        failure = next((exported.error for exported in others if exported.error), "")
    if gpu is None or failure:
        return Sharing(None, nobody, f"through host memory ({failure})")
    return Sharing(gpu, tuple(told), "CUDA's interprocess memory")


def _open_all(gpu: SharedGpu, told: list[Exported], rank: int) -> str:
    """Open what the others export; what went wrong, empty where nothing did."""
    try:
        for peer, exported in enumerate(told):
            if peer != rank:
                gpu.open_all(exported, events_for(rank))
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def with_domains(place: Place, engine: EngineConfig, shared: bool) -> Place:
    """Ranks read each other's pools in place where they share a GPU."""
    per_host = engine.parallel.world_size // engine.parallel.nnodes
    mesh = place.mesh
    names: dict[tuple[int, int], int] = {}
    domains = []
    for sp_rank, host in enumerate(place.hosts):
        rank = sp_rank * mesh.tp_size + mesh.tp_rank
        where = (host, engine.gpus[rank % per_host]) if shared else (host, -1 - rank)
        domains.append(names.setdefault(where, len(names)))
    return replace(place, hosts=tuple(domains))


def open_gpu_store(
    place: Place, shape: KVShape, dtype: torch.dtype, device: torch.device, sharing: Sharing
) -> KVStore:
    """This rank's pool on its GPU, and those of SP peers on the same."""
    if sharing.gpu is None:
        own = KVPool.private(shape, dtype, device)
        pools: list[KVPool | None] = [None] * place.mesh.sp_size
        pools[place.mesh.sp_rank] = own
        return KVStore(pools, place.mesh.sp_rank)
    found = {
        sp_rank: KVPool(shape, _memory(sharing, "kv", rank, place.mesh.rank).view(dtype))
        for sp_rank, rank in place.sp_peers_here().items()
    }
    return KVStore(
        [found.get(sp_rank) for sp_rank in range(place.mesh.sp_size)], place.mesh.sp_rank
    )


def gpu_summaries(
    place: Place, room: SummaryShape, device: torch.device, sharing: Sharing
) -> list[Tensor]:
    """Room for the summaries of all SP ranks' pages: shared, or mirrors."""
    here = place.sp_peers_here() if sharing.gpu is not None else {}
    return [
        room.view(_memory(sharing, "summaries", here[sp_rank], place.mesh.rank))
        if sp_rank in here
        else room.private(device)
        for sp_rank in range(place.mesh.sp_size)
    ]


def _memory(sharing: Sharing, name: str, rank: int, me: int) -> Tensor:
    gpu, exported = sharing.gpu, sharing.everyone[rank]
    assert gpu is not None and exported is not None
    return gpu.memory[name].zero_() if rank == me else gpu.open_memory(exported, name)


def open_gpu_fence(host: LayerFence, place: Place, sharing: Sharing) -> LayerFence:
    """Fences of ranks that share a GPU; `host` says when a peer has launched."""
    gpu = sharing.gpu
    if gpu is None:
        return host
    theirs = {
        rank: gpu.open_event(exported, "fence")
        for rank in place.sp_peers_here().values()
        if rank != place.mesh.rank and (exported := sharing.everyone[rank]) is not None
    }
    return DeviceFence(host, gpu.events["fence"], theirs)


def open_gpu_mailroom(
    config: RankConfig,
    place: Place,
    device: torch.device,
    host: Mailroom,
    traffic: Traffic,
    sharing: Sharing,
    fds: Mapping[str, int],
) -> Mailroom:
    """Links of tensors on GPUs beside `host`, which carries those of the host.

    Raises:
        ConnectionError: ranks do not come in time.
    """
    engine, mesh = config.engine, place.mesh
    own_gpus = len(set(engine.gpus)) == len(engine.gpus)
    timeout_s = engine.watchdog_timeout_s
    if mesh.world_size == 1:
        return DeviceMailroom(host, StagedMailroom(host))
    nccl = engine.device_links == "nccl" or (engine.device_links == "auto" and own_gpus)
    if nccl:
        everyone = host.group(tuple(range(mesh.world_size)))
        store = _rendezvous(everyone, engine, mesh.world_size)
        group = nccl_group(store, mesh.rank, mesh.world_size, timeout_s=timeout_s)
        return DeviceMailroom(host, TorchDistMailroom(group, traffic, coalesce=True))
    if sharing.gpu is None or engine.parallel.nnodes > 1:
        return DeviceMailroom(host, StagedMailroom(host))
    memory = _counters(fds, mesh.world_size)
    boxes, moments = open_boxes(sharing.gpu, sharing.everyone, mesh.rank, BOX_BYTES)
    through = BoxMailroom(
        boxes, moments, SideStream(device), memory, mesh.rank, mesh.world_size, traffic,
        timeout_s=timeout_s, spin_s=engine.spin_s,
    )  # fmt: skip
    return DeviceMailroom(host, through)


def _counters(fds: Mapping[str, int], world_size: int) -> mmap:
    return map_region(fds["device_links"], counter_bytes(world_size))


def _rendezvous(everyone: Communicator, engine: EngineConfig, world_size: int) -> object:
    """A store of all ranks, on a port of rank 0's that it tells the others."""
    address = "127.0.0.1"
    if engine.parallel.nnodes > 1:
        address = (engine.parallel.dist_init_addr or "").rpartition(":")[0].strip("[]")
    port = torch.zeros(1, dtype=torch.int64)
    store = None
    if everyone.rank == 0:
        store = tcp_store(address, 0, world_size, master=True)
        port[0] = int(store.port)
    found = [torch.empty_like(port) for _ in range(everyone.size)]
    everyone.exchange([port] * everyone.size, found, "control")
    if store is None:
        store = tcp_store(address, int(found[0][0]), world_size, master=False)
    return store
