"""Paged attention against float64, per instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from attention_case import DTYPES, NAN, Case, compare, randint
from reference import attention_ref
from sps_kernel import KVPools, paged_attention


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
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 5, 9])
@pytest.mark.parametrize("window", [0, 40])
def test_few_rows_read_heads_side_by_side(isa, dtype, kv_heads, window):
    """Heads that one unit reads together give the bits of each by itself, over lists of all
    lengths, the empty one too; what lies behind the keys is NaN."""
    lengths = ((1, 0), (1, 15), (1, 63), (1, 64), (1, 200), (2, 131))
    case = Case(dtype, 64, kv_heads=kv_heads, group=3, page=64, lengths=lengths, pools=2)
    case.items[0, 4] = 0
    out, lse = case.check(window=window)
    apart = case.items.repeat_interleave(kv_heads, 0)
    apart[:, 6], apart[:, 7] = torch.arange(kv_heads).repeat(len(case.items)), 1
    case.items = apart
    again = case.check(window=window)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


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
@pytest.mark.parametrize("threads", [1, 2])
def test_a_list_for_each_block_and_head(isa, dtype, threads):
    """Some tenth of the pages, others for each block of queries and each KV head."""
    block, page, cached, new = 32, 16, 500, 150
    case = Case(dtype, 64, kv_heads=3, group=7, page=page, lengths=((new, cached),))
    order = case.page_pos.argsort()
    items, chosen = [], []
    for begin in range(0, new, block):
        count = min(block, new - begin)
        first, last = (cached + begin) // page, (cached + begin + count - 1) // page
        for head in range(3):
            picked = torch.randperm(first)[: randint(0, 8)].tolist() + list(range(first, last + 1))
            items.append([begin, count, cached + begin, len(chosen), len(picked), new + cached])
            items[-1] += [head, 1]
            chosen += picked
    case.items = torch.tensor(items, dtype=torch.int32)
    index = order[torch.tensor(chosen)]
    case.page_ids, case.page_pos = case.page_ids[index], case.page_pos[index]
    case.check(threads=threads)


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
