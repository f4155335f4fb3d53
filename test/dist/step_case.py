"""A random step over thread ranks, and the truth about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.sequence_parallel.build import sequence_attention
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.config.cache import kv_row
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh, shares
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.ops import kv_rows, reference
from sps_runtime.types.plan import SequencePlan, StepPlan

LAYERS = 2
SLOTS = 96


@dataclass
class StepCase:
    """One step: sequences as (start, count), and how it is run."""

    sequences: list[tuple[int, int]]
    strategy: str = "pass_kv"
    placement: str = "sharded"
    sp: int = 2
    group: tuple[int, ...] | None = None
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    page: int = 16
    window: int | None = None
    hosts: tuple[int, ...] | None = None
    lay: str = "random"
    seed: int = 0
    backend: AttentionBackend = field(default_factory=TorchBackend)
    dtype: torch.dtype = torch.float32
    epoch: int = 7
    kv_format: str = "native"

    LAYERS: ClassVar[int] = LAYERS

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.group = self.group or tuple(range(self.sp))
        self.hosts = self.hosts or (0,) * self.sp
        self.free = [list(self.rng.permutation(SLOTS)) for _ in range(self.sp)]
        self.page_lists = [self._lay_pages(start, count) for start, count in self.sequences]
        self.plan = StepPlan(
            epoch=self.epoch,
            group=self.group,
            sequences=tuple(
                SequencePlan(
                    slot=index,
                    start=start,
                    count=count,
                    tokens=np.arange(count, dtype=np.int32).tobytes(),
                    pages=np.asarray(pages, dtype=np.int32).tobytes(),
                )
                for index, ((start, count), pages) in enumerate(
                    zip(self.sequences, self.page_lists, strict=True)
                )
            ),
            placement=self.placement,
            strategy=self.strategy,
        )
        self.layout = ShardLayout(self.plan, page_size=self.page, pages_per_rank=SLOTS)
        self.q = [self._random(count, self.heads) for _, count in self.sequences]
        self.k = [self._random(sum(span), self.kv_heads) for span in self.sequences]
        self.v = [self._random(sum(span), self.kv_heads) for span in self.sequences]

    def _random(self, tokens: int, heads: int) -> Tensor:
        shape = (LAYERS, tokens, heads, self.dim)
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def _lay_pages(self, start: int, count: int) -> list[int]:
        total = -(-(start + count) // self.page)
        owners = self._owners(total, start // self.page)
        return [int(rank) * SLOTS + int(self.free[rank].pop()) for rank in owners]

    def _owners(self, total: int, first_new: int) -> list[int]:
        group = list(self.group)
        if self.lay == "one":
            return [group[-1]] * total
        if self.lay == "zigzag":  # 2P chunks of pages, rank r gets chunks r and 2P - 1 - r
            order = group + group[::-1]
            return [order[i * len(order) // total] for i in range(total)]
        if self.lay == "contiguous":
            return [group[i * len(group) // total] for i in range(total)]
        if self.lay == "two-blocks":  # what is cached on the first rank, what is new on the last
            return [group[0]] * first_new + [group[-1]] * (total - first_new)
        if self.lay == "outside":  # committed pages anywhere on the mesh, new ones in the group
            anywhere = self.rng.integers(0, self.sp, first_new).tolist()
            return anywhere + self.rng.choice(group, total - first_new).tolist()
        return self.rng.choice(group, total).tolist()

    # -- truth

    def truth(self, layer: int, window: int | None) -> Tensor:
        """o of all new tokens, in the order of the plan."""
        outs = []
        for (start, count), q, k, v in zip(self.sequences, self.q, self.k, self.v, strict=True):
            o, _ = reference.attention(
                q[layer],
                self._read(k[layer]),
                self._read(v[layer]),
                torch.arange(start, start + count),
                torch.arange(start + count),
                scale=self.dim**-0.5,
                window=window,
            )
            outs.append(o)
        return torch.cat(outs)

    # -- the ranks

    def run(self) -> list[Traffic]:
        """Run both layers on every rank of the group and compare; return each member's traffic.

        Layer 0 has the window, layer 1 has none.
        """
        stored = kv_rows.storage_dtype(self.kv_format, self.dtype)
        pools = [KVPool.private(self.kv_shape(), stored) for _ in range(self.sp)]
        for rank in range(self.sp):
            self.fill_own(pools, rank)
        world = ThreadWorld(self.sp, timeout_s=20)
        fences = ThreadFences(self.sp, LAYERS, timeout_s=20)

        def work(rank: int) -> Traffic | None:
            if rank not in self.group:
                return None
            return self.check_rank(self.context(rank, world, fences, pools))

        return [traffic for traffic in world.run(work) if traffic]

    def kv_shape(self) -> KVShape:
        native = self.kv_format == "native"
        itemsize, scale = (self.dtype.itemsize, 0) if native else kv_row(self.kv_format)
        return KVShape(LAYERS, SLOTS, self.kv_heads, self.page, self.dim, itemsize, scale)

    def _read(self, x: Tensor) -> Tensor:
        """K or V as they are read from pages."""
        return kv_rows.decode(kv_rows.encode(x, self.kv_format), self.kv_format, self.dtype)

    def fill_own(self, pools: list[KVPool], rank: int) -> None:
        """Put cached KV into a rank's pool, and NaN where nothing was written: that must never be
        read."""
        nothing = torch.nan if self.kv_format == "native" else 0xFF  # decodes to NaN too
        pools[rank].k.fill_(nothing)
        pools[rank].v.fill_(nothing)
        for (start, _), pages, k, v in zip(
            self.sequences, self.page_lists, self.k, self.v, strict=True
        ):
            k, v = kv_rows.encode(k, self.kv_format), kv_rows.encode(v, self.kv_format)
            for position in range(start):
                page, at = pages[position // self.page], position % self.page
                if page // SLOTS == rank:
                    pools[rank].k[:, page % SLOTS, :, at] = k[:, position]
                    pools[rank].v[:, page % SLOTS, :, at] = v[:, position]

    def context(
        self, rank: int, world: ThreadWorld, fences: ThreadFences, pools: list[KVPool]
    ) -> AttentionContext:
        traffic = Traffic()
        here = self.hosts[rank]
        readable = [p if h == here else None for p, h in zip(pools, self.hosts, strict=True)]
        return AttentionContext(
            mesh=Mesh(self.sp, 1, rank),
            mailroom=world.mailroom(rank, traffic),
            store=KVStore(readable, rank),
            fence=fences.of(rank),
            backend=self.backend,
            traffic=traffic,
            hosts=self.hosts,
        )

    def check_rank(self, context: AttentionContext) -> Traffic:
        """Run both layers on one rank and compare what it computed."""
        member = self.layout.member(context.mesh.sp_rank)
        attend = sequence_attention(self.plan, self.layout, context)
        index = torch.from_numpy(self.layout.token_index(member))
        for layer, window in enumerate((self.window, None)):
            q, k, v = (self._new(x, layer)[index] for x in (self.q, self.k, self.v))
            o = attend(layer, q, k, v, scale=self.dim**-0.5, window=window)
            assert o.dtype == q.dtype
            want = self.truth(layer, window)[index]
            if self.placement == "replicated" and len(self.group) > 1:
                begin, end = shares(self.heads, len(self.group))[member]
                hidden = torch.ones(self.heads, dtype=torch.bool)
                hidden[begin:end] = False
                want[:, hidden] = 0
            tolerance = 1e-5 if self.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(o.float(), want, rtol=0, atol=tolerance)
        return context.traffic

    def _new(self, parts: list[Tensor], layer: int) -> Tensor:
        return torch.cat(
            [x[layer, -count:] for (_, count), x in zip(self.sequences, parts, strict=True)]
        )
