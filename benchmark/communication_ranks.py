"""One layer of one prompt's prefill over ranks that are threads: what crosses, to the byte.

Where bytes follow from where tokens lie, not from what attention computes, nothing is computed: the
backend returns zeros, and long prompts over many ranks take seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sps_runtime.attention.backend import (
    AttentionBackend,
    PageLists,
    PagePool,
    Partial,
    QueryRun,
)
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.attention.sequence_parallel.build import sequence_attention, sparse_counters
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.distributed.collectives import all_reduce
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvcache.placement import divide_units, make_placement
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.scheduler.chunking import superblock_pages
from sps_runtime.sparse.operators import SparseOperators
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseCounters
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan, Strategy
from sps_runtime.types.sampling import SamplingParams

PAGE = 64
CHUNK = 4096
DTYPE = torch.bfloat16
PATIENCE_S = 120.0


@dataclass(frozen=True)
class Shape:
    """What of a model decides what crosses."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


@dataclass(frozen=True)
class Crossed:
    """Of one layer, all ranks together.

    Attributes:
        attention, linear: logical bytes.
        counters: of the ranks that computed sparse rows.
    """

    attention: int
    linear: int
    counters: Sequence[SparseCounters] = ()


class Nothing:
    """An `attention.backend.AttentionBackend` that computes nothing."""

    name = "nothing"
    recordable = False

    def partial(
        self,
        q_THD: Tensor,
        runs: Sequence[QueryRun],
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
        kv_heads: tuple[int, int] | None = None,
    ) -> Partial:
        return Partial(torch.zeros(q_THD.shape), torch.zeros(q_THD.shape[:2]))

    def partial_lists(
        self,
        q_THD: Tensor,
        lists: PageLists,
        pool: PagePool,
        *,
        scale: float,
        window: int | None = None,
    ) -> Partial:
        return Partial(torch.zeros(q_THD.shape), torch.zeros(q_THD.shape[:2]))

    def refresh(self, lists: PageLists) -> bool:
        return False

    def form(self, lists: PageLists) -> str | None:
        return None

    def merge(self, partials: Sequence[Partial], out_THD: Tensor) -> None:
        out_THD.zero_()


@dataclass(frozen=True)
class Prefill:
    """A prompt over `ranks`, as one step.

    Attributes:
        strategy: of exact attention.
        placement: a name of `kvcache.placement`; of superblocks under csa.
        operators: what chooses pages under csa.
        given: q, k, v ``[tokens, heads, head_dim]`` of the layer, in `DTYPE`; zeros unless told.
        backend: what attends to them.
        apart: every rank is a host of its own.
    """

    shape: Shape
    tokens: int
    ranks: int
    strategy: Strategy = "pass_kv"
    placement: str = "zigzag"
    attention: AttentionSpec = EXACT
    operators: SparseOperators | None = None
    given: tuple[Tensor, Tensor, Tensor] | None = None
    backend: AttentionBackend = field(default_factory=Nothing)
    apart: bool = False

    def run(self) -> Crossed:
        """Prefill one layer; every rank is a thread."""
        plan, slots = self._plan()
        layout = ShardLayout(plan, page_size=PAGE, pages_per_rank=slots)
        shape = self.shape
        room = KVShape(1, slots, shape.kv_heads, PAGE, shape.head_dim, DTYPE.itemsize)
        pools = [KVPool.private(room, DTYPE) for _ in range(self.ranks)]
        summaries = self._summaries(slots)
        world = ThreadWorld(self.ranks, timeout_s=PATIENCE_S)
        fences = ThreadFences(self.ranks, 1, timeout_s=PATIENCE_S)

        def work(rank: int) -> tuple[Traffic, tuple[SparseCounters, ...]]:
            traffic = Traffic()
            means = None
            if self.operators is not None:
                mine = self._summaries(slots) if self.apart else summaries
                means = SparseMeans(self.operators, SummaryStore(mine, rank))
            context = AttentionContext(
                mesh=Mesh(self.ranks, 1, rank),
                mailroom=world.mailroom(rank, traffic),
                store=KVStore(
                    [p if r == rank or not self.apart else None for r, p in enumerate(pools)], rank
                ),
                fence=fences.of(rank),
                backend=self.backend,
                traffic=traffic,
                hosts=tuple(range(self.ranks)) if self.apart else (0,) * self.ranks,
                sparse=means,
            )
            return traffic, self._attend(plan, layout, context)

        found = world.run(work)
        counters = [one for _, each in found for one in each]
        return Crossed(sum(traffic.attention_bytes for traffic, _ in found), 0, counters)

    def remote_tokens(self) -> float:
        """Tokens of other ranks that each rank's last token sees, all ranks together, over tokens:
        (ranks - 1) times `communication_formulas.TRIMMED` where all ranks have as many units."""
        plan, slots = self._plan()
        pages = torch.frombuffer(bytearray(plan.sequences[0].pages), dtype=torch.int32)
        owners = pages // slots
        seen = 0
        for rank in torch.unique(owners).tolist():
            last = int((owners == rank).nonzero().max())
            seen += int((owners[: last + 1] != rank).sum())
        return seen * PAGE / self.tokens

    def _attend(
        self, plan: StepPlan, layout: ShardLayout, context: AttentionContext
    ) -> tuple[SparseCounters, ...]:
        shape, rows = self.shape, layout.rows[context.mesh.sp_rank]
        q, k, v = (
            torch.zeros(rows, heads, shape.head_dim, dtype=DTYPE)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
        )
        if self.given is not None:
            mine = layout.token_index(layout.member(context.mesh.sp_rank))
            q, k, v = (x[torch.from_numpy(mine)] for x in self.given)
        attend = sequence_attention(plan, layout, context)
        attend(0, q, k, v, scale=shape.head_dim**-0.5)
        return sparse_counters(attend)

    def _plan(self) -> tuple[StepPlan, int]:
        sparse = self.attention.sparse
        pages = -(-self.tokens // PAGE)
        units = [1] * pages
        if sparse is not None and sparse.estimator != "stride":
            units = superblock_pages(sparse, 0, self.tokens, PAGE)
        room = dict.fromkeys(range(self.ranks), pages)
        owners = divide_units(units, room, make_placement(self.placement))
        taken = dict.fromkeys(range(self.ranks), 0)
        ids = []
        for owner in owners:
            ids.append(owner * pages + taken[owner])
            taken[owner] += 1
        slots = max(taken.values())
        ids = [page // pages * slots + page % pages for page in ids]
        sequence = SequencePlan(
            slot=0,
            start=0,
            count=self.tokens,
            tokens=bytes(4 * self.tokens),
            pages=torch.tensor(ids, dtype=torch.int32).numpy().tobytes(),
            sample=SamplePlan(SamplingParams(temperature=0.0)),
            attention=self.attention,
        )
        return StepPlan(1, tuple(range(self.ranks)), (sequence,), strategy=self.strategy), slots

    def _summaries(self, slots: int) -> list[Tensor | None]:
        if self.operators is None:
            return [None] * self.ranks
        shape = self.shape
        nbytes = self.operators.summary_nbytes(PAGE, shape.head_dim, DTYPE.itemsize)
        room = SummaryShape(1, slots, shape.kv_heads, nbytes)
        return [room.private() for _ in range(self.ranks)]


def tensor_parallel(shape: Shape, tokens: int, ranks: int) -> Crossed:
    """TP's two all-reduces of a layer, in chunks of a prompt."""
    world = ThreadWorld(ranks, timeout_s=PATIENCE_S)

    def work(rank: int) -> int:
        traffic = Traffic()
        group = world.mailroom(rank, traffic).group(tuple(range(ranks)))
        for start in range(0, tokens, CHUNK):
            x_TD = torch.zeros(min(CHUNK, tokens - start), shape.hidden, dtype=DTYPE)
            for _ in ("attention", "feed-forward"):
                all_reduce(group, x_TD, "linear")
        return traffic.linear_bytes

    return Crossed(0, sum(world.run(work)))
