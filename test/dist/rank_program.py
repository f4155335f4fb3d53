"""A rank as a process of its own: exchanges and fences whose results it checks itself.

Run as ``python rank_program.py KIND RANK SIZE ARGUMENT``: KIND is ``shared`` (ARGUMENT: descriptors
of links, fences and values), ``steps`` (whole attention steps over shared pools; ARGUMENT:
descriptors of links, fences and each rank's pool), ``file`` (gloo; ARGUMENT: path of the rendezvous
file) or ``tcp`` (gloo; ARGUMENT: port of the rendezvous). With gloo it also checks that it listens
on loopback alone.
"""

from __future__ import annotations

import random
import sys

import psutil
import torch
from test.dist.step_case import StepCase
from test.dist.stride_case import StrideCase, spec
from torch import Tensor

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.distributed.collectives import all_gather, all_reduce, all_to_all, reduce_scatter
from sps_runtime.distributed.communicator import Mailroom, Traffic
from sps_runtime.distributed.fences import NoFence, SharedLayerFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.regions import fence_bytes, link_bytes, map_region
from sps_runtime.distributed.shared_memory import SharedMemoryMailroom
from sps_runtime.distributed.torch_dist import (
    file_store,
    gloo_mailroom,
    tcp_store,
)
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.types.attention import AttentionSpec

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


def check_started(mailroom: Mailroom, rank: int, group: tuple[int, ...]) -> None:
    """Several exchanges under way at once, ended in the order in which they were begun."""
    communicator = mailroom.group(group)
    before = communicator.traffic.attention_bytes
    begun = []
    for step in range(100, 104):
        send = [message(rank, peer, step) for peer in group]
        want = [message(peer, rank, step) for peer in group]
        recv = [torch.full_like(wanted, torch.nan) for wanted in want]
        begun.append((communicator.start(send, recv, "attention"), send, recv, want))
    for pending, _, recv, want in begun:
        assert pending.wait() >= 0
        assert all(map(torch.equal, recv, want)), rank
    sent = sum(t.nbytes for _, send, *_ in begun for i, t in enumerate(send) if group[i] != rank)
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


def check_steps(rank: int, size: int, descriptors: list[int]) -> None:
    """Random steps of every strategy, each on pools that hold NaN wherever nothing was written."""
    traffic = Traffic()
    links = map_region(descriptors[0], link_bytes(size, RING))
    mailroom = SharedMemoryMailroom(links, rank, size, traffic, ring_bytes=RING, timeout_s=30)
    fences = map_region(descriptors[1], fence_bytes(size))
    fence = SharedLayerFence(fences, rank, size, StepCase.LAYERS, timeout_s=30)
    everyone = mailroom.group(tuple(range(size)))
    shape = StepCase([(0, 1)]).kv_shape()
    pools = [
        KVPool.shared(shape, torch.float32, descriptor, writable=peer == rank)
        for peer, descriptor in enumerate(descriptors[2:])
    ]
    for epoch in range(1, 21):
        strategy = ("pass_kv", "pass_q", "ulysses", "replicated", "stride")[epoch % 5]
        rng = random.Random(epoch)
        sequences = [(rng.choice((0, 5, 100)), rng.randint(1, 60)) for _ in range(3)]
        same = {"sp": size, "seed": epoch, "epoch": epoch, "window": rng.choice((None, 30))}
        if strategy == "stride":
            case: StepCase = StrideCase(sequences, specs=[spec(4), spec(2), AttentionSpec()], **same)
        else:
            replicated = strategy == "replicated"
            case = StepCase(
                sequences,
                strategy="pass_q" if replicated else strategy,
                placement="replicated" if replicated else "sharded",
                **same,
            )
        case.fill_own(pools, rank)
        all_gather(everyone, torch.ones(1), [1] * size, "control")
        store = KVStore(pools, rank)
        case.check_rank(
            AttentionContext(
                Mesh(size, 1, rank), mailroom, store, fence, TorchBackend(), traffic, (0,) * size
            )
        )
        all_gather(everyone, torch.ones(1), [1] * size, "control")


def check_strides(mailroom: TorchDistMailroom, rank: int, size: int) -> None:
    """Stride attention between hosts: messages under several tags on their way at once."""
    for seed, lay in enumerate(("contiguous", "zigzag", "random")):
        case = StrideCase(
            [(0, 133), (40, 61)], sp=size, lay=lay, seed=seed, hosts=tuple(range(size)), heads=8,
            kv_heads=4, specs=[spec(4, ((2, 2),)), spec(4), AttentionSpec()],
        )  # fmt: skip
        pools = [KVPool.private(case.kv_shape(), torch.float32) for _ in range(size)]
        case.fill_own(pools, rank)
        store = KVStore([pool if r == rank else None for r, pool in enumerate(pools)], rank)
        case.check_rank(
            AttentionContext(
                Mesh(size, 1, rank), mailroom, store, NoFence(), TorchBackend(), mailroom.traffic,
                tuple(range(size)),
            )
        )  # fmt: skip


def main(kind: str, rank: int, size: int, argument: str) -> None:
    torch.set_num_threads(1)
    traffic = Traffic()
    if kind == "steps":
        check_steps(rank, size, [int(part) for part in argument.split(",")])
        return
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
        if kind == "file":
            store = file_store(argument, size)
        else:
            store = tcp_store("127.0.0.1", int(argument), size, master=rank == 0, timeout_s=30)
        mailroom = gloo_mailroom(store, rank, size, traffic, address="127.0.0.1", timeout_s=30)
        check_strides(mailroom, rank, size)
        listening = [c for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN"]
        assert listening and all(c.laddr.ip == "127.0.0.1" for c in listening), listening
    check_exchanges(mailroom, rank, tuple(range(size)), 30)
    check_started(mailroom, rank, tuple(range(size)))
    if size > 2 and rank != 1:
        check_exchanges(mailroom, rank, tuple(r for r in range(size) if r != 1), 10)
    check_exchanges(mailroom, rank, tuple(range(size)), 4)
    check_started(mailroom, rank, tuple(range(size)))
    check_collectives(mailroom, rank, size)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
