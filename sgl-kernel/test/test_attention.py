"""Paged attention against float64, per instruction set."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import sps_kernel
from reference import attention_ref
from sps_kernel import KVPools, paged_attention

NAN = float("nan")
# Largest error relative to the largest output: float32 sums of thousands of terms; bfloat16 also
# rounds the probabilities (2^-9 each) and the output.
OUT_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1.2e-2}
LSE_TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 4e-6}


def randint(low, high):
    return int(torch.randint(low, high, ()))


class Case:
    """A random ragged batch: pools in which everything unwritten is NaN, items and page lists."""

    def __init__(
        self,
        dtype,
        d,
        *,
        page=16,
        kv_heads=2,
        group=2,
        pools=1,
        lengths=((5, 40),),
        per_head=False,
        unaligned=False,
    ):
        self.dtype, self.page, self.kv_heads = dtype, page, kv_heads
        pages = sum(-(-(cached + new) // page) for new, cached in lengths)
        heads_factor = kv_heads if per_head else 1
        self.slots = pages * heads_factor + 3
        shape = (self.slots, kv_heads, page, d)
        self.k = [self.array(shape, unaligned) for _ in range(pools)]
        self.v = [self.array(shape, unaligned) for _ in range(pools)]
        tokens = sum(new for new, _ in lengths)
        self.q = self.array((tokens, kv_heads * group, d), unaligned)
        self.q.copy_(torch.randn(self.q.shape) * 1.5)
        self.free = torch.randperm(pools * self.slots).tolist()
        self.items, ids, pos = [], [], []
        row = 0
        for new, cached in lengths:
            for h in range(heads_factor):
                heads = (h, 1) if per_head else (0, kv_heads)
                begin = len(ids)
                self.add_pages(new + cached, ids, pos, heads)
                self.items.append([row, new, cached, begin, len(ids) - begin, new + cached, *heads])
            row += new
        self.items = torch.tensor(self.items, dtype=torch.int32).reshape(-1, 8)
        self.page_ids = torch.tensor(ids, dtype=torch.int32)
        self.page_pos = torch.tensor(pos, dtype=torch.int32)

    def array(self, shape, unaligned):
        n = math.prod(shape)
        whole = torch.full((n + 1,), NAN, dtype=self.dtype)
        return whole[1:].view(shape) if unaligned else whole[:n].view(shape)

    def add_pages(self, total, ids, pos, heads):
        """Pages of one list, in random order, filled up to `total` keys."""
        h = slice(heads[0], heads[0] + heads[1])
        made = []
        for first in range(0, total, self.page):
            page_id = self.free.pop()
            pool, slot = divmod(page_id, self.slots)
            used = min(self.page, total - first)
            shape = (heads[1], used, self.q.shape[-1])
            self.k[pool][slot, h, :used] = torch.randn(shape).to(self.dtype)
            self.v[pool][slot, h, :used] = torch.randn(shape).to(self.dtype)
            made.append((page_id, first))
        for i in torch.randperm(len(made)).tolist():
            ids.append(made[i][0])
            pos.append(made[i][1])

    def check(self, *, out_dtype=None, **options):
        scale = options.setdefault("scale", self.q.shape[-1] ** -0.5)
        out = torch.full(self.q.shape, NAN, dtype=out_dtype or self.dtype)
        lse = torch.full(self.q.shape[:2], NAN)
        got = paged_attention(
            self.q,
            KVPools(self.k, self.v),
            self.items,
            self.page_ids,
            self.page_pos,
            out=out,
            lse=lse,
            **options,
        )
        assert got[0] is out and got[1] is lse
        want = attention_ref(
            self.q,
            self.k,
            self.v,
            self.items,
            self.page_ids,
            self.page_pos,
            scale,
            options.get("causal", True),
            options.get("window", 0),
        )
        compare(out, lse, want, self.dtype)
        return out, lse


def compare(out, lse, want, dtype):
    want_out, want_lse = want
    assert torch.equal(torch.isnan(out).any(-1), torch.isnan(want_out).any(-1))
    assert torch.equal(torch.isnan(lse), torch.isnan(want_lse))
    out, want_out = out.double().nan_to_num(), want_out.nan_to_num()
    empty = want_lse == -torch.inf
    # A score of size s is itself rounded by s * 2^-24 in float32.
    score = float(want_lse[~empty].nan_to_num().abs().max()) if (~empty).any() else 0.0
    bound = OUT_TOLERANCE[dtype] * max(1.0, score / 16)
    if out.numel():
        assert float((out - want_out).abs().max()) <= bound * float(want_out.abs().max())
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.all(out[empty] == 0)
    gap = (lse.double() - want_lse)[~empty].nan_to_num().abs()
    bound = LSE_TOLERANCE[dtype] * (1 + want_lse[~empty].nan_to_num().abs())
    assert torch.all(gap <= bound), float((gap / bound).max())


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


@DTYPES
@pytest.mark.parametrize("d", [8, 32, 40, 64, 80, 96, 128, 256])
def test_head_dims(isa, dtype, d):
    Case(dtype, d, lengths=((37, 50), (1, 90), (3, 0))).check()


@DTYPES
@pytest.mark.parametrize("page", [16, 48, 64, 128])
def test_page_sizes(isa, dtype, page):
    Case(dtype, 64, page=page, lengths=((70, 133), (1, 300), (9, 0)), pools=2).check()


@DTYPES
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (1, 7), (2, 4), (1, 8), (3, 3), (1, 16)])
@pytest.mark.parametrize("new", [1, 2, 17])
def test_groups(isa, dtype, heads, new):
    Case(dtype, 32, kv_heads=heads[0], group=heads[1], lengths=((new, 61), (new, 0))).check()


@DTYPES
@pytest.mark.parametrize("rows", [1, 7, 8, 9, 15, 16, 17, 33, 47, 48, 49, 63, 64, 65, 129])
def test_row_counts(isa, dtype, rows):
    Case(dtype, 32, kv_heads=1, group=1, lengths=((rows, 75),)).check()


@DTYPES
def test_many_rows_and_chunks(isa, dtype):
    """More rows than a unit, more keys than a chunk of tiles."""
    Case(dtype, 128, kv_heads=1, group=3, page=64, lengths=((400, 600),)).check()


@DTYPES
@pytest.mark.parametrize("window", [1, 5, 16, 40, 1000])
def test_window(isa, dtype, window):
    Case(dtype, 64, lengths=((50, 90), (1, 130), (30, 0))).check(window=window)


@DTYPES
def test_not_causal(isa, dtype):
    Case(dtype, 64, lengths=((20, 45), (1, 7))).check(causal=False)


@DTYPES
@pytest.mark.parametrize("window", [0, 33])
def test_lists_per_head(isa, dtype, window):
    Case(dtype, 64, kv_heads=3, group=2, lengths=((40, 70), (1, 64)), per_head=True, pools=3).check(
        window=window
    )


@DTYPES
def test_unaligned(isa, dtype):
    Case(dtype, 64, lengths=((21, 40), (1, 40)), unaligned=True).check()


def test_float32_output_of_bfloat16(isa):
    case = Case(torch.bfloat16, 64, lengths=((21, 40), (1, 40)))
    case.check(out_dtype=torch.float32)


@DTYPES
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(dtype, threads):
    """Several threads, among them long lists that are split and merged."""
    case = Case(dtype, 64, page=64, pools=2, lengths=((1, 6000), (2, 3000), (100, 100)))
    case.check(threads=threads)
    Case(dtype, 64, page=16, kv_heads=1, lengths=((1, 5000),)).check(threads=threads, window=700)


@DTYPES
def test_sparse_lists(isa, dtype):
    """Only some of the pages: rows that see no key give 0 and -inf."""
    case = Case(dtype, 64, lengths=((64, 64),))
    keep = torch.tensor(sorted(torch.randperm(8)[:3].tolist()))
    order = case.page_pos.argsort()
    late = order[keep + 0]
    case.page_ids, case.page_pos = case.page_ids[late], case.page_pos[late]
    case.items[0, 4] = 3
    case.check()
    case.check(window=8)


@DTYPES
@pytest.mark.parametrize("new", [1, 30])
def test_nothing_to_see(isa, dtype, new):
    case = Case(dtype, 64, lengths=((new, 20),))
    case.items[0, 5] = 0
    _, lse = case.check()
    assert torch.all(lse == -torch.inf)
    case.items[0, 4] = 0
    case.check()
    case.items[0, 1] = 0
    case.check()
    case.items = case.items[:0]
    case.check()


def test_no_queries():
    case = Case(torch.float32, 64, lengths=((1, 20),))
    case.q = case.q[:0]
    case.items = case.items[:0]
    case.check()


@DTYPES
def test_large_scores(isa, dtype):
    """Scores of hundreds must not overflow, and one huge score must not lose the others' lse."""
    case = Case(dtype, 64, lengths=((40, 100), (1, 100)))
    case.q *= 40
    case.check()
    case.check(scale=1.0)


@DTYPES
@pytest.mark.parametrize("new", [1, 40])
def test_accumulate(isa, dtype, new):
    """Two halves of a list, the second merged into the first, equal the whole."""
    case = Case(dtype, 64, lengths=((new, 128),))
    whole = attention_ref(
        case.q, case.k, case.v, case.items, case.page_ids, case.page_pos, 0.125, True, 0
    )
    out, lse = torch.full(case.q.shape, NAN), torch.full(case.q.shape[:2], NAN)
    kv, n = KVPools(case.k, case.v), int(case.items[0, 4])
    for begin, count, merge in ((0, n // 2, False), (n // 2, n - n // 2, True), (0, 0, True)):
        items = case.items.clone()
        items[0, 3], items[0, 4] = begin, count
        paged_attention(
            case.q, kv, items, case.page_ids, case.page_pos, out=out, lse=lse, accumulate=merge
        )
    compare(out, lse, whole, dtype)


def test_strided_queries_and_outputs(isa):
    """q, out and lse may be slices of larger arrays."""
    case = Case(torch.bfloat16, 64, lengths=((20, 40), (1, 30)))
    big = torch.full((case.q.shape[0], 3, 64 * 4 + 10), NAN, dtype=torch.bfloat16)
    big[:, 1, 10:] = case.q.reshape(-1, 256)
    out = torch.full((4, case.q.shape[0], 64), NAN).transpose(0, 1)
    lse = torch.full((4, case.q.shape[0]), NAN).T
    q = big[:, 1, 10:].unflatten(1, (4, 64))
    paged_attention(
        q, KVPools(case.k, case.v), case.items, case.page_ids, case.page_pos, out=out, lse=lse
    )
    want = attention_ref(
        case.q, case.k, case.v, case.items, case.page_ids, case.page_pos, 0.125, True, 0
    )
    compare(out, lse, want, torch.bfloat16)


def test_other_pool_layouts(isa):
    """[slots, page, heads, d] seen through a transpose."""
    case = Case(torch.float32, 64, lengths=((20, 40), (1, 30)))
    case.k = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.k]
    case.check()
    case.v = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.v]
    case.check()


def test_numpy():
    case = Case(torch.float32, 32, lengths=((20, 40),))
    out, lse = paged_attention(
        case.q.numpy(),
        KVPools([case.k[0].numpy()], [case.v[0].numpy()]),
        case.items.numpy(),
        case.page_ids.numpy(),
        case.page_pos.numpy(),
    )
    assert isinstance(out, np.ndarray) and out.dtype == np.float32
    want = attention_ref(
        case.q, case.k, case.v, case.items, case.page_ids, case.page_pos, 32**-0.5, True, 0
    )
    compare(torch.from_numpy(out), torch.from_numpy(lse), want, torch.float32)


def test_same_result_twice(isa):
    case = Case(torch.bfloat16, 64, lengths=((200, 300), (1, 700)))
    a, b = case.check(), case.check()
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


BAD_ITEMS = {
    "q rows": (0, -1),
    "too many q rows": (1, 100),
    "negative q rows": (1, -2),
    "q_pos": (2, -5),
    "q_pos overflow": (2, 2**31 - 2),
    "list begin": (3, -1),
    "list count": (4, 1000),
    "negative list": (4, -1),
    "kv_len": (5, -1),
    "head": (6, 2),
    "heads": (7, 3),
    "head begin": (6, -1),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(name):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    column, value = BAD_ITEMS[name]
    case.items[0, column] = value
    with pytest.raises(ValueError, match="item 0"):
        case.check()


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_bad_pages(bad):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    case.page_ids[1] = bad
    with pytest.raises(ValueError, match="page id"):
        case.check()


def call(case, **changes):
    args = {
        "q": case.q,
        "kv": KVPools(case.k, case.v),
        "items": case.items,
        "page_ids": case.page_ids,
        "page_pos": case.page_pos,
        **changes,
    }
    return paged_attention(
        args.pop("q"),
        args.pop("kv"),
        args.pop("items"),
        args.pop("page_ids"),
        args.pop("page_pos"),
        **args,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.zeros(5, 4, 32, dtype=torch.bfloat16)},
        {"q": torch.zeros(5, 4, 32, dtype=torch.float64)},
        {"q": torch.zeros(5, 4, 16)},
        {"q": torch.zeros(5, 3, 32)},
        {"q": torch.zeros(4, 32)},
        {"q": torch.zeros(5, 4, 64)[:, :, ::2]},
        {"items": torch.zeros(1, 7, dtype=torch.int32)},
        {"items": torch.zeros(1, 8, dtype=torch.int64)},
        {"items": torch.zeros(8, 1, dtype=torch.int32).T.expand(2, 8)},
        {"page_ids": torch.zeros(2, dtype=torch.int32)},
        {"page_pos": torch.zeros(3, dtype=torch.int64)},
        {"page_pos": [0, 16, 32]},
        {"out": torch.zeros(5, 4, 16)},
        {"out": torch.zeros(5, 4, 32, dtype=torch.float16)},
        {"lse": torch.zeros(5, 3)},
        {"lse": torch.zeros(5, 4, dtype=torch.bfloat16)},
        {"scale": 0.0},
        {"scale": NAN},
        {"scale": -1.0},
        {"window": -1},
        {"threads": 0},
        {"accumulate": True},
    ],
    ids=str,
)
def test_bad_arguments(changes):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    with pytest.raises(ValueError):
        call(case, **changes)


def test_read_only_output():
    case = Case(torch.float32, 32, lengths=((5, 40),))
    out = np.zeros((5, 4, 32), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        call(case, out=out)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 2, 16, 32), (4, 2, 16, 40)),
        ((4, 2, 20, 32),) * 2,
        ((4, 2, 8, 32),) * 2,
        ((4, 2, 16, 12),) * 2,
        ((4, 2, 16, 520),) * 2,
        ((2, 16, 32),) * 2,
        ((0, 2, 16, 32),) * 2,
    ],
    ids=str,
)
def test_bad_pools(shapes):
    with pytest.raises(ValueError):
        KVPools([torch.zeros(shapes[0])], [torch.zeros(shapes[1])])
    with pytest.raises(ValueError):
        KVPools([], [])


def test_pools_describe_themselves():
    kv = KVPools([torch.zeros(4, 2, 16, 32)] * 3, [torch.zeros(4, 2, 16, 32)] * 3)
    assert (kv.pools, kv.slots, kv.kv_heads, kv.page_size, kv.head_dim) == (3, 4, 2, 16, 32)
    assert kv.dtype == "float32"


def test_isa_is_checked():
    with pytest.raises(ValueError):
        sps_kernel.set_isa("mmx")
