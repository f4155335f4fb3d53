"""A prompt prefilled sparsely over thread ranks, and what the reference says of it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.attention.sequence_parallel.build import sequence_attention, sparse_counters
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.sparse.blob import BlobShape, decode, encode
from sps_runtime.sparse.estimators.registry import estimator
from sps_runtime.sparse.operators import Chosen, SparseOperators
from sps_runtime.sparse.reference import sparse_attention
from sps_runtime.sparse.summaries import paged, summarise
from sps_runtime.sparse.torch_operators import TorchOperators, selection_settings
from sps_runtime.types.attention import AttentionSpec, SparseCounters, SparseSettings
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams

LAYERS = 2
SLOTS = 128
SETTINGS = SparseSettings(
    tau=0.02, budget=0.3, minimum=3, window=1, rows=8, end_rows=16, end=32, block=32,
    superblock=64, wide_from=256
)
CSA = AttentionSpec("csa", SETTINGS)
GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Prompt:
    """A sequence: its tokens, where its steps end, how it is attended to."""

    tokens: int
    cuts: tuple[int, ...] = ()
    attention: AttentionSpec = CSA

    def spans(self) -> list[tuple[int, int]]:
        return list(itertools.pairwise((0, *self.cuts, self.tokens)))


@dataclass
class Outcome:
    """What ranks computed: ``o [layers, tokens, heads, dim]`` of each prompt, counters by prompt
    (summed), each rank's traffic, and which pages each (layer, prompt's block, KV head) read."""

    outs: list[Tensor]
    counters: dict[int, SparseCounters]
    attention_bytes: int
    read: dict[tuple[int, int, int, int], frozenset[int]]


@dataclass
class SparseCase:
    """Prompts whose k-th steps run together, sp x tp ranks, pages dealt by superblock."""

    prompts: Sequence[Prompt]
    sp: int = 1
    tp: int = 1
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    page: int = 16
    window: int | None = None
    data: int = 0
    deal: int = 0
    dtype: torch.dtype = torch.float32
    backend: AttentionBackend = field(default_factory=TorchBackend)
    operators: SparseOperators = field(default_factory=TorchOperators)
    summaries_from_start: bool = False
    hosts: tuple[int, ...] | None = None
    groups: tuple[tuple[int, ...], ...] = ()
    """SP ranks of each step; all of them unless told."""
    given: tuple[Tensor, Tensor, Tensor] | None = None
    """q, k, v ``[layers, tokens, heads, dim]`` of the only prompt; random ones unless told."""

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.data)
        self.q, self.k, self.v = (
            [
                torch.randn(LAYERS, p.tokens, heads, self.dim, generator=generator).to(self.dtype)
                * sharpness
                for p in self.prompts
            ]
            for heads, sharpness in ((self.heads, 2.0), (self.kv_heads, 1.0), (self.kv_heads, 1.0))
        )
        if self.given is not None:
            self.q, self.k, self.v = ([x] for x in self.given)
        rng = np.random.default_rng(self.deal)
        free = [list(rng.permutation(SLOTS)) for _ in range(self.sp)]
        self.pages = [self._deal(prompt, rng, free) for prompt in self.prompts]

    def _deal(self, prompt: Prompt, rng: np.random.Generator, free: list[list[int]]) -> list[int]:
        sparse = prompt.attention.sparse or SETTINGS
        owner: dict[int, int] = {}
        ids = []
        for position in range(0, prompt.tokens, self.page):
            unit = sparse.align(position)
            step = sum(position >= cut for cut in prompt.cuts)
            rank = owner.setdefault(unit, int(rng.choice(self.group(step))))
            ids.append(rank * SLOTS + int(free[rank].pop()))
        return ids

    def group(self, step: int) -> tuple[int, ...]:
        return self.groups[step] if self.groups else tuple(range(self.sp))

    def plans(self) -> list[StepPlan]:
        steps = max(len(p.spans()) for p in self.prompts)
        return [self._plan(step) for step in range(steps)]

    def _plan(self, step: int) -> StepPlan:
        sequences = []
        for slot, prompt in enumerate(self.prompts):
            if step >= len(prompt.spans()):
                continue
            start, stop = prompt.spans()[step]
            sequences.append(
                SequencePlan(
                    slot=slot, start=start, count=stop - start,
                    tokens=np.arange(stop - start, dtype=np.int32).tobytes(),
                    pages=np.array(self.pages[slot], dtype=np.int32).tobytes(),
                    attention=prompt.attention,
                    sample=SamplePlan(GREEDY) if stop == prompt.tokens else None,
                    summaries_from=start if self.summaries_from_start else 0,
                )  # fmt: skip
            )
        return StepPlan(step + 1, self.group(step), tuple(sequences))

    # -- the ranks

    def run(self) -> Outcome:
        kv_heads = self.kv_heads // self.tp
        shape = KVShape(
            LAYERS, SLOTS, kv_heads, self.page, self.dim, self.dtype.itemsize
        )
        world_size = self.sp * self.tp
        pools = [KVPool.private(shape, self.dtype) for _ in range(world_size)]
        nbytes = self.operators.summary_nbytes(self.page, self.dim, self.dtype.itemsize)
        room = SummaryShape(LAYERS, SLOTS, kv_heads, nbytes)
        summaries = [room.private().fill_(0xFF) for _ in range(world_size)]
        for pool in pools:
            pool.k.fill_(torch.nan)
            pool.v.fill_(torch.nan)
        world = ThreadWorld(world_size, timeout_s=30)
        fences = ThreadFences(world_size, LAYERS, timeout_s=30)
        outs = [torch.full_like(q, torch.nan) for q in self.q]
        self.committed = threading.Barrier(world_size)

        def work(rank: int) -> _Rank:
            traffic, mesh = Traffic(), Mesh(self.sp, self.tp, rank)
            peers = [other * self.tp + mesh.tp_rank for other in range(self.sp)]
            watched = Watched(self.operators)
            hosts = self.hosts or (0,) * self.sp
            near = [host == hosts[mesh.sp_rank] for host in hosts]
            context = AttentionContext(
                mesh=mesh,
                mailroom=world.mailroom(rank, traffic),
                store=KVStore(
                    [pools[p] if here else None for p, here in zip(peers, near, strict=True)],
                    mesh.sp_rank,
                ),
                fence=fences.of(rank),
                backend=self.backend,
                traffic=traffic,
                hosts=hosts,
                sparse=SparseMeans(
                    watched,
                    SummaryStore(
                        [
                            summaries[p] if here else room.private().fill_(0xFF)
                            for p, here in zip(peers, near, strict=True)
                        ],
                        mesh.sp_rank,
                    ),
                ),
            )
            return self._rank(context, watched, outs)

        return self._outcome(outs, world.run(work))

    def _rank(self, context: AttentionContext, watched: Watched, outs: list[Tensor]) -> _Rank:
        found = _Rank([], 0, {})
        for plan in self.plans():
            if self.groups:
                self.committed.wait(30)  # pages outside of a group are read once acknowledged
            if context.mesh.sp_rank not in plan.group:
                continue
            layout = ShardLayout(plan, page_size=self.page, pages_per_rank=SLOTS)
            member = layout.member(context.mesh.sp_rank)
            attend = sequence_attention(plan, layout, context)
            index = layout.token_index(member)
            slots = np.array([s.slot for s in plan.sequences])[layout.sequences(member)]
            positions = layout.positions(member)
            for layer, window in enumerate((self.window, None)):
                watched.begin(layer, layout)
                q, k, v = (self._rows(x, layer, slots, positions) for x in (self.q, self.k, self.v))
                q, k, v = (self._tp_slice(x, context.mesh) for x in (q, k, v))
                o = attend(layer, q, k, v, scale=self.dim**-0.5, window=window)
                assert o.dtype == self.dtype and len(o) == len(index)
                first = context.mesh.tp_rank * o.shape[1]
                for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
                    outs[slot][layer, position, first : first + o.shape[1]] = o[row]
            found.counters += sparse_counters(attend)
        first_kv = context.mesh.tp_rank * (self.kv_heads // self.tp)
        found.read = {(*key[:3], key[3] + first_kv): pages for key, pages in watched.read.items()}
        found.attention_bytes = context.traffic.attention_bytes
        return found

    def _rows(self, parts: list[Tensor], layer: int, slots: np.ndarray, at: np.ndarray) -> Tensor:
        rows = [parts[slot][layer, position] for slot, position in zip(slots, at, strict=True)]
        return torch.stack(rows) if rows else parts[0].new_empty(0, *parts[0].shape[2:])

    def _tp_slice(self, x: Tensor, mesh: Mesh) -> Tensor:
        each = x.shape[1] // self.tp
        return x[:, mesh.tp_rank * each : (mesh.tp_rank + 1) * each].contiguous()

    def _outcome(self, outs: list[Tensor], ranks: list[_Rank]) -> Outcome:
        counters: dict[int, SparseCounters] = {}
        for one in itertools.chain.from_iterable(rank.counters for rank in ranks):
            counters[one.slot] = add(counters.get(one.slot, SparseCounters(one.slot)), one)
        read: dict[tuple[int, int, int, int], frozenset[int]] = {}
        for rank in ranks:
            assert not read.keys() & rank.read.keys(), "a block was computed twice"
            read |= rank.read
        return Outcome(outs, counters, sum(rank.attention_bytes for rank in ranks), read)

    # -- truth

    def reference(self, slot: int, layer: int) -> tuple[Tensor, list[tuple[int, Tensor]]]:
        """o ``[tokens, heads, dim]`` and the pages kept by each block, all in fp32 but summaries,
        which are rounded to the pool's dtype."""
        prompt, sparse = self.prompts[slot], self.prompts[slot].attention.sparse
        assert sparse is not None
        found = estimator(sparse.estimator)
        q, k, v = (x[slot][layer].float() for x in (self.q, self.k, self.v))
        k_pages, counts = paged(k, self.page)
        needs, v_pages = {*found.needs, "mean_k_NKD", "mean_v_NKD"}, paged(v, self.page)[0]
        known = summarise(k_pages, v_pages, counts, needs)
        if self.dtype != torch.float32:
            rounded = BlobShape(self.page, self.dim, self.dtype)
            known = decode(encode(k_pages.to(self.dtype), v_pages.to(self.dtype)), rounded)
        outs, kept = [], []
        last = sparse.align(prompt.tokens - 1)
        edges = (0, min(sparse.wide_from, prompt.tokens), last, prompt.tokens)
        for start, stop in itertools.pairwise(sorted(set(edges))):
            setting = selection_settings(sparse, start, self.page, stop - start)
            part = sparse_attention(
                q[start:stop], k[:stop], v[:stop], known, found, setting,
                start=start, scale=self.dim**-0.5, page_size=self.page, tail=sparse.tail,
            )  # fmt: skip
            outs.append(part.o_THD)
            kept += part.kept
        return torch.cat(outs), kept


@dataclass
class _Rank:
    counters: list[SparseCounters]
    attention_bytes: int
    read: dict[tuple[int, int, int, int], frozenset[int]]


class Watched:
    """Operators that remember which pages were chosen."""

    def __init__(self, operators: SparseOperators) -> None:
        self._operators = operators
        self.read: dict[tuple[int, int, int, int], frozenset[int]] = {}

    def begin(self, layer: int, layout: ShardLayout) -> None:
        self._layer, self._layout = layer, layout

    def __getattr__(self, name: str):
        return getattr(self._operators, name)

    def choose(self, q_THD, queries, *rest) -> Chosen:
        chosen = self._operators.choose(q_THD, queries, *rest)
        slots = dict(zip(self._layout.pages.first.tolist(), self._layout.board_slots, strict=False))
        kv_heads = len(chosen.items) // max(1, len(queries.blocks))
        for item, fields in enumerate(chosen.items.tolist()):
            _, _, position, begin, count, _, head, _ = fields
            slot = slots[int(queries.blocks[item // kv_heads, 4])]
            pages = chosen.page_positions[begin : begin + count].tolist()
            self.read[self._layer, slot, position, head] = frozenset(pages)
        return chosen


def add(a: SparseCounters, b: SparseCounters) -> SparseCounters:
    sums = {
        name: getattr(a, name) + getattr(b, name)
        for name in a.__struct_fields__
        if name != "slot"
    }
    return SparseCounters(a.slot, **sums)


