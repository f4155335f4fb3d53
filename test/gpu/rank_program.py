"""One of two ranks on one GPU: ``python rank_program.py KIND RANK LINKS FENCES COUNTERS``, the last
three descriptors of shared regions. KIND is ``ipc`` or ``host``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.process import RankConfig, local_endpoints
from sps_runtime.distributed.communicator import Communicator, Kind, Mailroom, Pending, Traffic
from sps_runtime.distributed.exchange import TorchSum
from sps_runtime.distributed.fences import SharedLayerFence
from sps_runtime.distributed.regions import fence_bytes, link_bytes, map_region
from sps_runtime.distributed.shared_memory import RING_BYTES, SharedMemoryMailroom
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.runner.gpu import (
    open_gpu_fence,
    open_gpu_mailroom,
    open_gpu_store,
    rank_device,
    share_gpu,
    with_domains,
)
from sps_runtime.runner.place import Place
from test.dist.rank_program import check_collectives, check_exchanges, check_started

SIZE, LAYERS = 2, 4


class OnDevice:
    """Carries the host's tensors as tensors of a device."""

    def __init__(self, mailroom: Mailroom, device: torch.device) -> None:
        self._mailroom, self._device = mailroom, device

    def group(self, members: tuple[int, ...]) -> Crossing:
        return Crossing(self._mailroom.group(members), self._device)


class Crossing(TorchSum):
    """A communicator of `OnDevice`."""

    def __init__(self, inner: Communicator, device: torch.device) -> None:
        self._inner, self._device = inner, device
        self.rank, self.size, self.traffic = inner.rank, inner.size, inner.traffic

    def exchange(self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind) -> None:
        self.start(send, recv, kind).wait()

    def start(
        self, send: Sequence[Tensor], recv: Sequence[Tensor], kind: Kind, tag: int = 0
    ) -> Arriving:
        there = [tensor.to(self._device) for tensor in send]
        room = [torch.empty_like(tensor, device=self._device) for tensor in recv]
        if send[self.rank].data_ptr() == recv[self.rank].data_ptr():
            room[self.rank] = there[self.rank]
        return Arriving(self._inner.start(there, room, kind, tag), room, recv)


@dataclass(frozen=True)
class Arriving:
    """A `Pending` of `Crossing`."""

    pending: Pending
    room: Sequence[Tensor]
    recv: Sequence[Tensor]

    def wait(self) -> float:
        waited = self.pending.wait()
        for to, tensor in zip(self.recv, self.room, strict=True):
            to.copy_(tensor)
        return waited


def main(kind: str, rank: int, links: int, fences: int, counters: int) -> None:
    parallel = ParallelConfig(sp_size=SIZE)
    engine = EngineConfig(
        model_path="", device="cuda", gpus=(0, 0), device_links=kind, parallel=parallel
    )
    config = RankConfig(rank=rank, engine=engine, endpoints=local_endpoints(Path("/nowhere"), SIZE))
    device, place, traffic = rank_device(engine, rank), Place.of(rank, parallel), Traffic()
    shape = KVShape(LAYERS, 8, 2, 16, 64, 2)
    memory = map_region(links, link_bytes(SIZE, RING_BYTES))
    host = SharedMemoryMailroom(memory, rank, SIZE, traffic, timeout_s=60)
    sharing = share_gpu(config, place, device, shape, None, host.group((0, 1)))
    print(f"rank {rank}: {sharing.why}", flush=True)
    if kind == "ipc":
        assert sharing.gpu is not None, sharing.why
    place = with_domains(place, engine, sharing.gpu is not None)
    fds = {"device_links": counters}
    mailroom = open_gpu_mailroom(config, place, device, host, traffic, sharing, fds)
    there = OnDevice(mailroom, device)
    check_exchanges(there, rank, (0, 1), 40)
    check_started(there, rank, (0, 1))
    check_collectives(there, rank, SIZE)
    torch.set_default_device(device)
    big = [torch.full((40 << 20,), rank + 1, dtype=torch.uint8) for _ in range(SIZE)]
    got = [torch.zeros_like(message) for message in big]
    mailroom.group((0, 1)).exchange(big, got, "control")
    assert all((message == member + 1).all() for member, message in enumerate(got))
    if sharing.gpu is None:
        return
    store = open_gpu_store(place, shape, torch.bfloat16, device, sharing)
    memory = map_region(fences, fence_bytes(SIZE))
    fence = open_gpu_fence(SharedLayerFence(memory, rank, SIZE, LAYERS), place, sharing)
    check_pools(store, fence, rank)


def check_pools(store: object, fence: object, rank: int) -> None:
    """Each writes its own pages behind a long kernel, and reads the other's once its fence says."""
    peer = 1 - rank
    work = torch.randn(4096, 4096)
    for epoch in range(1, 6):
        for layer in range(LAYERS):
            for _ in range(3):
                work = work @ work * 1e-4
            store.own.k[layer].fill_(100 * rank + 10 * epoch + layer + 0 * work[0, 0].nan_to_num())
            fence.publish(epoch, layer)
            fence.wait(peer, epoch, layer)
            k, _ = store.layer(layer)
            seen = float(k[peer].float().min())
            assert seen >= 100 * peer + 10 * epoch + layer, (epoch, layer, seen)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
