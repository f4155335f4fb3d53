"""Generated tokens that read chosen pages are the reference's, whoever owns what."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil

import msgspec
import numpy as np
import pytest
import torch
from test.dist.sparse_case import LAYERS, SETTINGS
from torch import Tensor

from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.attention.sequence_parallel.build import sequence_attention
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import ThreadFences
from sps_runtime.distributed.mesh import Mesh, shares
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.sparse.estimators.registry import estimator
from sps_runtime.sparse.kernel_operators import KernelSparseOperators
from sps_runtime.sparse.operators import SparseOperators
from sps_runtime.sparse.reference import Block, own_block
from sps_runtime.sparse.selection import select
from sps_runtime.sparse.summaries import paged, summarise
from sps_runtime.sparse.torch_operators import TorchOperators, selection_settings
from sps_runtime.types.attention import EXACT, AttentionSpec
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams

SLOTS = 96
GREEDY = SamplePlan(SamplingParams(temperature=0.0))
HEADS, KV_HEADS, DIM, PAGE = 4, 2, 16, 16
BOUND = 2e-5


def sparse(**changes: object) -> AttentionSpec:
    return AttentionSpec("csa", msgspec.structs.replace(SETTINGS, decode="sparse", **changes))


@dataclass
class DecodeCase:
    """Some steps of one new token for each sequence, from given lengths on.

    Attributes:
        group: SP ranks that run all steps, and hold what is new.
        mean: bound of a row's mean error, where some page may be another; 0: no element is off.
    """

    lengths: list[int]
    specs: list[AttentionSpec]
    sp: int = 1
    placement: str = "replicated"
    strategy: str = "pass_q"
    steps: int = 1
    group: tuple[int, ...] | None = None
    window: int | None = None
    seed: int = 0
    operators: SparseOperators = field(default_factory=TorchOperators)
    mean: float = 0.0

    def __post_init__(self) -> None:
        self.group = self.group or tuple(range(self.sp))
        generator = torch.Generator().manual_seed(self.seed)
        rng = np.random.default_rng(self.seed)
        total = [length + self.steps for length in self.lengths]
        self.q, self.k, self.v = (
            [torch.randn(LAYERS, n, heads, DIM, generator=generator) * size for n in total]
            for heads, size in ((HEADS, 2.0), (KV_HEADS, 1.0), (KV_HEADS, 1.0))
        )
        free = [list(rng.permutation(SLOTS)) for _ in range(self.sp)]
        self.pages = []
        for length, n in zip(self.lengths, total, strict=True):
            owners = [
                int(rng.integers(self.sp) if (p + 1) * PAGE <= length else rng.choice(self.group))
                for p in range(ceil(n / PAGE))
            ]
            self.pages.append([rank * SLOTS + int(free[rank].pop()) for rank in owners])

    def plan(self, step: int) -> StepPlan:
        sequences = tuple(
            SequencePlan(
                slot=slot, start=length + step, count=1, tokens=b"\0" * 4,
                pages=np.array(pages, dtype=np.int32).tobytes(), sample=GREEDY, attention=spec,
            )
            for slot, (length, pages, spec) in enumerate(
                zip(self.lengths, self.pages, self.specs, strict=True)
            )
        )  # fmt: skip
        return StepPlan(step + 1, self.group, sequences, self.placement, self.strategy)

    def run(self) -> list[Traffic]:
        shape = KVShape(LAYERS, SLOTS, KV_HEADS, PAGE, DIM, 4)
        nbytes = self.operators.summary_nbytes(PAGE, DIM, 4)
        room = SummaryShape(LAYERS, SLOTS, KV_HEADS, nbytes)
        pools = [KVPool.private(shape, torch.float32) for _ in range(self.sp)]
        summaries = [room.private().fill_(0xFF) for _ in range(self.sp)]
        for pool, known in zip(pools, summaries, strict=True):
            pool.k.fill_(torch.nan)
            pool.v.fill_(torch.nan)
            self._fill(pools.index(pool), pool, known)
        world, fences = ThreadWorld(self.sp, timeout_s=30), ThreadFences(self.sp, LAYERS, timeout_s=30)
        traffics = [Traffic() for _ in range(self.sp)]

        def work(rank: int) -> None:
            if rank in self.group:
                self._rank(
                    AttentionContext(
                        mesh=Mesh(self.sp, 1, rank),
                        mailroom=world.mailroom(rank, traffics[rank]),
                        store=KVStore(pools, rank),
                        fence=fences.of(rank),
                        backend=TorchBackend(),
                        traffic=traffics[rank],
                        hosts=(0,) * self.sp,
                        sparse=SparseMeans(self.operators, SummaryStore(summaries, rank)),
                    )
                )

        world.run(work)
        return traffics

    def _fill(self, rank: int, pool: KVPool, known: Tensor) -> None:
        """What the prompt left: KV, and summaries of full pages."""
        for length, pages, k, v in zip(self.lengths, self.pages, self.k, self.v, strict=True):
            for index, page in enumerate(pages):
                if page // SLOTS != rank:
                    continue
                at = slice(index * PAGE, min((index + 1) * PAGE, length))
                rows = max(0, at.stop - at.start)
                pool.k[:, page % SLOTS, :, :rows] = k[:, at].transpose(1, 2)
                pool.v[:, page % SLOTS, :, :rows] = v[:, at].transpose(1, 2)
                if rows == PAGE:
                    slots = torch.tensor([page % SLOTS], dtype=torch.int32)
                    for layer in range(LAYERS):
                        self.operators.summarise(
                            pool.k[layer], pool.v[layer], slots, known[layer]
                        )

    def _rank(self, context: AttentionContext) -> None:
        for step in range(self.steps):
            plan = self.plan(step)
            layout = ShardLayout(plan, page_size=PAGE, pages_per_rank=SLOTS)
            member = layout.member(context.mesh.sp_rank)
            attend = sequence_attention(plan, layout, context)
            sequences = layout.sequences(member).tolist()
            for layer, window in enumerate((self.window, None)):
                q, k, v = (
                    torch.stack([x[s][layer, self.lengths[s] + step] for s in sequences])
                    if sequences
                    else x[0].new_empty(0, *x[0].shape[2:])
                    for x in (self.q, self.k, self.v)
                )
                o = attend(layer, q, k, v, scale=DIM**-0.5, window=window)
                for row, s in enumerate(sequences):
                    want = self.truth(s, step, layer, window)
                    if self.placement == "replicated" and len(self.group) > 1:
                        begin, end = shares(HEADS, len(self.group))[member]
                        want[:begin], want[end:] = 0, 0
                    if self.mean:
                        assert float((o[row] - want).abs().mean()) < self.mean
                    else:
                        torch.testing.assert_close(o[row], want, atol=BOUND, rtol=0)

    def truth(self, s: int, step: int, layer: int, window: int | None) -> Tensor:
        position, spec = self.lengths[s] + step, self.specs[s]
        q = self.q[s][layer, position].unflatten(0, (KV_HEADS, -1))[:, :, None] * DIM**-0.5
        k, v = (x[s][layer, : position + 1] for x in (self.k, self.v))
        settings = spec.sparse if spec.sparse and spec.sparse.decode == "sparse" else None
        if settings is None or window is not None or position == settings.align(position):
            seen = slice(0 if window is None else max(0, position - window + 1), None)
            score = torch.einsum("kgtd,skd->kgts", q, k[seen])
            return torch.einsum("kgts,skd->kgtd", score.softmax(-1), v[seen])[:, :, 0].flatten(0, 1)
        begin = position - position % settings.block
        (k_pages, counts), (v_pages, _) = paged(k, PAGE), paged(v, PAGE)
        before = begin // PAGE
        needs = {*estimator(settings.estimator).needs, "mean_k_NKD", "mean_v_NKD"}
        known = summarise(k_pages, v_pages, counts, needs).first(before)
        own = own_block_row(q, k[begin:], v[begin:])
        block = Block(begin, q, before, settings.block // PAGE, own)
        setting = selection_settings(settings, position, PAGE, 1)
        if before:
            share = block.shares(known, estimator(settings.estimator), setting)
            kept = select(share, block.own_pages, setting)
        else:
            kept = torch.zeros(KV_HEADS, 0, dtype=torch.bool)
        return block.attend(k_pages, v_pages, known, kept, settings.tail)[0][:, :, 0].flatten(0, 1)


def own_block_row(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The partial of one row over all of some keys."""
    score = torch.einsum("kgtd,skd->kgts", q, k)
    return torch.einsum("kgts,skd->kgtd", score.softmax(-1), v), score.logsumexp(-1)


LENGTHS = [330, 17, 5, 479, 256, 100]
SPECS = [sparse(), sparse(), sparse(tail="none"), sparse(budget=0.2), sparse(), sparse()]


@pytest.mark.parametrize("sp", [1, 2, 4])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_tokens_are_the_references(sp: int, placement: str) -> None:
    DecodeCase(LENGTHS, SPECS, sp=sp, placement=placement, steps=3, seed=sp).run()


@pytest.mark.parametrize("sp", [1, 2, 4])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_kernels_judge_pages_in_place(sp: int, placement: str) -> None:
    """Rounding to bytes moves a page over the threshold now and then; nothing else is read, and
    what is not a sequence's own is NaN."""
    kernels = KernelSparseOperators(pytest.importorskip("sps_kernel"))
    case = DecodeCase(
        LENGTHS, SPECS, sp, placement, steps=3, seed=sp, operators=kernels, mean=0.1
    )
    sent = sum(traffic.attention_bytes for traffic in case.run())
    assert (sent > 0) == (sp > 1)
    all_pages = [sparse(tau=0.0, budget=1.0)] * len(LENGTHS)
    DecodeCase(LENGTHS, all_pages, sp, placement, steps=2, operators=kernels).run()


@pytest.mark.parametrize("sp", [1, 2])
def test_pages_that_tokens_fill_are_judged_by_their_summaries(sp: int) -> None:
    """Over more than a block, so that what was generated becomes what is chosen from."""
    DecodeCase([200, 333], [sparse(), sparse(minimum=2)], sp=sp, steps=40, seed=9).run()


@pytest.mark.parametrize("name", ["mean", "quest", "oracle"])
def test_other_estimators(name: str) -> None:
    DecodeCase(LENGTHS[:4], [sparse(estimator=name)] * 4, sp=2, seed=5).run()


@pytest.mark.parametrize("strategy", ["pass_q", "pass_kv"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_beside_exact_ones_and_in_layers_with_a_window(placement: str, strategy: str) -> None:
    specs = [sparse(), EXACT, sparse(budget=0.2), EXACT, AttentionSpec("csa", SETTINGS), sparse()]
    case = DecodeCase(
        LENGTHS, specs, sp=3, placement=placement, strategy=strategy, steps=2, window=40, seed=3
    )
    case.run()


@pytest.mark.parametrize("group", [(1,), (0, 2)])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_pages_outside_of_the_group(group: tuple[int, ...], placement: str) -> None:
    case = DecodeCase(LENGTHS, SPECS, sp=4, group=group, placement=placement, seed=7)
    traffics = case.run()
    assert all((traffics[rank].attention_bytes > 0) == (rank in group) for rank in range(4))


def test_bytes_do_not_grow_by_pages_but_by_their_shares() -> None:
    """Two ranks: a query's sum of masses, shares of own pages, and a partial."""
    (length,) = lengths = [480 + 3]
    case = DecodeCase(lengths, [sparse()], sp=2, seed=1)
    sent = sum(traffic.attention_bytes for traffic in case.run())
    shares_ = 4 * KV_HEADS * (length // 32 * 32 // PAGE)
    partial = HEADS * (DIM * 4 + 4)
    assert sent == LAYERS * (2 * 4 * HEADS + shares_ + partial)
