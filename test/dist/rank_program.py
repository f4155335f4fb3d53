"""A rank as a process of its own: exchanges and fences whose results it checks itself.

Run as ``python rank_program.py KIND RANK SIZE ARGUMENT``: KIND is ``shared`` (ARGUMENT: descriptors
of links and fences) or ``gloo`` (ARGUMENT: path of the rendezvous file).
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from sps_runtime.distributed.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.fences import SharedLayerFence
from sps_runtime.distributed.regions import fence_bytes, link_bytes, map_region
from sps_runtime.distributed.shared_memory import SharedMemoryMailroom
from sps_runtime.distributed.torch_dist import TorchDistMailroom, file_store, gloo_group

RING = 4096
LAYERS = 50


def message(source: int, target: int, step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What `source` gives `target` in a step: both know it; lengths from 0 to several rings."""
    length = (source * 7919 + target * 104729 + step * 1299709) % 5000
    if step % 3 == 0:
        length %= 7
    generator = torch.Generator().manual_seed(source * 1000 + target * 100 + step)
    return torch.randn(length, generator=generator).to(dtype)


def check_exchanges(mailroom: Mailroom, rank: int, group: tuple[int, ...], steps: int) -> None:
    communicator = mailroom.group(group)
    before = communicator.traffic.attention_bytes
    sent = 0
    for step in range(steps):
        dtype = torch.bfloat16 if step % 2 else torch.float32
        send = [message(rank, peer, step, dtype) for peer in group]
        want = [message(peer, rank, step, dtype) for peer in group]
        recv = all_to_all(communicator, send, [tuple(w.shape) for w in want], "attention")
        for got, wanted in zip(recv, want, strict=True):
            assert torch.equal(got, wanted), (rank, step)
        sent += sum(t.nbytes for t, peer in zip(send, group, strict=True) if peer != rank)
    assert communicator.traffic.attention_bytes - before == sent


def check_collectives(mailroom: Mailroom, rank: int, size: int) -> None:
    communicator = mailroom.group(tuple(range(size)))
    parts = [torch.randn(5, 3, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    rows = [5 - 2 * (size - 1), *[2] * (size - 1)] if size <= 3 else [2, 0, 3, 0][:size]
    assert torch.equal(all_reduce(communicator, parts[rank], "linear"), total)
    mine = reduce_scatter(communicator, parts[rank], rows, "linear")
    assert torch.equal(mine, total.split(rows)[rank])
    assert torch.equal(all_gather(communicator, mine, rows, "linear"), total)


def check_fences(fence: SharedLayerFence, shared: Tensor, rank: int, size: int) -> None:
    """Each rank writes, publishes, and must then see what all others wrote."""
    for epoch in range(1, 4):
        for layer in range(LAYERS):
            shared[rank, layer] = epoch * 1000 + layer
            fence.publish(epoch, layer)
            for peer in range(size):
                fence.wait(peer, epoch, layer)
                assert shared[peer, layer] >= epoch * 1000 + layer


def main(kind: str, rank: int, size: int, argument: str) -> None:
    torch.set_num_threads(1)
    traffic = Traffic()
    if kind == "shared":
        links, fences, values = (int(part) for part in argument.split(","))
        mailroom: Mailroom = SharedMemoryMailroom(
            map_region(links, link_bytes(size, RING)),
            rank, size, traffic, ring_bytes=RING, timeout_s=30,
        )  # fmt: skip
        fence = SharedLayerFence(
            map_region(fences, fence_bytes(size)), rank, size, LAYERS, timeout_s=30
        )
        memory = map_region(values, size * LAYERS * 8)
        shared = torch.frombuffer(memory, dtype=torch.int64).view(size, LAYERS)
        check_fences(fence, shared, rank, size)
    else:
        store = file_store(argument, size)
        group = gloo_group(store, rank, size, address="127.0.0.1", timeout_s=30)
        mailroom = TorchDistMailroom(group, traffic)
    check_exchanges(mailroom, rank, tuple(range(size)), 30)
    if size > 2 and rank != 1:
        check_exchanges(mailroom, rank, tuple(r for r in range(size) if r != 1), 10)
    check_exchanges(mailroom, rank, tuple(range(size)), 4)
    check_collectives(mailroom, rank, size)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
