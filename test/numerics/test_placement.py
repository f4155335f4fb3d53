"""Every placement computes what one rank computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sps_runtime.distributed.mesh import Mesh, shares
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.layers.placement import GroupLinks, ReplicatedTokens, place, unit_shares
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.weight import PlainWeight

HIDDEN, UNIT, VOCAB = 20, 3, 23
Q, KV = 12 * UNIT, 4 * UNIT
CASES = [("sharded", "ntp"), ("sharded", "tp"), ("replicated", "ntp"), ("replicated", "tp")]


class Block:
    """q, k, v -> something per head -> o, summed; then a head over the vocabulary."""

    def __init__(self) -> None:
        make = torch.Generator().manual_seed(7)
        self.x_TD = torch.randn(11, HIDDEN, generator=make)
        self.qkv = [torch.randn(n, HIDDEN, generator=make) for n in (Q, KV, KV)]
        self.bias = [torch.randn(n, generator=make) for n in (Q, KV, KV)]
        self.o = torch.randn(HIDDEN, Q, generator=make)
        self.head = torch.randn(VOCAB, HIDDEN, generator=make)

    @staticmethod
    def mix(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return q * (k + v).unflatten(1, (-1, UNIT)).repeat_interleave(3, 1).flatten(1)

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [F.linear(self.x_TD, w, b) for w, b in zip(self.qkv, self.bias, strict=True)]
        y = F.linear(self.mix(*parts), self.o)
        return y, F.linear(y, self.head)


def tp_slice(weight: torch.Tensor, mesh: Mesh, dim: int = 0) -> torch.Tensor:
    return weight.chunk(mesh.tp_size, dim)[mesh.tp_rank]


def run_block(block: Block, links: GroupLinks, mesh: Mesh, case: tuple[str, str], rows: list[int]):
    placement, arch = case
    linear = place(placement, arch, links, rows)  # type: ignore[arg-type]
    sharded = placement == "sharded"
    x = block.x_TD.split(rows)[links.sp.rank] if sharded else block.x_TD
    entered = linear.enter(x)
    weights = [tp_slice(w, mesh) for w in block.qkv]
    parts = [
        linear.column(entered, PlainWeight(w), tp_slice(b, mesh), UNIT)
        for w, b in zip(weights, block.bias, strict=True)
    ]
    q, k, v = linear.to_tokens_each(parts, [len(w) for w in weights], UNIT)
    assert torch.equal(linear.to_tokens(parts[0], len(weights[0]), UNIT), q)
    mixed = block.mix(q, k, v)
    if isinstance(linear, ReplicatedTokens):  # other ranks' heads are not filled there
        begin, end = unit_shares(mixed.shape[1], UNIT, links.sp.size)[links.sp.rank]
        mixed = F.pad(mixed[:, begin:end], (begin, mixed.shape[1] - end), value=float("nan"))
    columns = linear.to_columns(mixed, UNIT)
    y = linear.leave(linear.row(columns, PlainWeight(tp_slice(block.o, mesh, 1)), UNIT))
    begin, end = shares(VOCAB, mesh.tp_size)[mesh.tp_rank]
    part = linear.column(linear.enter(y), PlainWeight(block.head[begin:end]))
    return y, linear.gather_vocab(linear.to_tokens(part, end - begin), VOCAB)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("sp", "tp"), [(1, 1), (2, 1), (1, 2), (3, 1), (3, 2), (5, 1)])
def test_a_block_on_a_group_is_the_block_on_one_rank(
    sp: int, tp: int, case: tuple[str, str]
) -> None:
    """Uneven rows (one member has none), uneven shares of heads (5 ranks, 4 KV heads)."""
    block = Block()
    rows = {1: [11], 2: [11, 0], 3: [4, 0, 7], 5: [1, 2, 0, 5, 3]}[sp]
    world = ThreadWorld(sp * tp)
    group = tuple(range(sp))

    def work(rank: int):
        mesh, mailroom = Mesh(sp, tp, rank), world.mailroom(rank)
        links = GroupLinks(
            mailroom.group(mesh.sp_peers(group)),
            mailroom.group(mesh.tp_peers()),
            mailroom.group(tuple(range(sp * tp))),
        )
        return run_block(block, links, mesh, case, rows), mailroom.traffic

    results = world.run(work)
    want_y, want_logits = block.expected()
    for rank, ((y, logits), traffic) in enumerate(results):
        mine = slice(None)
        if case[0] == "sharded":
            first = sum(rows[: rank // tp])
            mine = slice(first, first + rows[rank // tp])
        torch.testing.assert_close(y, want_y[mine], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, want_logits[mine], rtol=1e-4, atol=1e-3)
        assert traffic.attention_bytes == 0
        crosses = tp > 1 or (sp > 1 and case != ("sharded", "ntp"))
        assert (sum(t.linear_bytes for _, t in results) > 0) == crosses
    if case[0] == "replicated":  # replicated ranks must not drift apart: the same bits on all
        assert all(torch.equal(y, results[0][0][0]) for (y, _), _ in results)


def test_shares_are_whole_units_but_for_the_end() -> None:
    assert unit_shares(12, 3, 2) == [(0, 6), (6, 12)]
    assert unit_shares(10, 4, 2) == [(0, 8), (8, 10)]
    assert unit_shares(10, 4, 4) == [(0, 4), (4, 8), (8, 10), (10, 10)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17])
def test_few_rows_take_the_kernel_and_give_the_same(rows: int, dtype: torch.dtype) -> None:
    linear = choose_ops().operators.linear
    make = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 40, generator=make).to(dtype)
    weight = torch.randn(30, 64, generator=make).to(dtype)[:, 8:48]
    bias = torch.randn(30, generator=make).to(dtype)
    for b in (None, bias):
        want = F.linear(x.double(), weight.double(), None if b is None else b.double())
        error = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(
            linear(x, PlainWeight(weight), b).double(), want, atol=error, rtol=error
        )
    assert linear(x, PlainWeight(weight[:0])).shape == (rows, 0)
    assert linear(x[:, :0], PlainWeight(weight[:, :0])).eq(0).all()
