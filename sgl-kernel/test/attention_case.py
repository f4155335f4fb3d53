"""Random cases of paged attention, and their comparison with float64."""

from __future__ import annotations

import math

import pytest
import torch

import kv_rows
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
        kv_format="native",
    ):
        self.dtype, self.page, self.kv_heads = dtype, page, kv_heads
        self.kv_format = kv_format
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
        if kv_format != "native":
            self.quantize(unaligned)

    def quantize(self, unaligned):
        """Pages of rows; `k` and `v` become what these decode to. Unwritten rows decode to NaN."""
        self.rows = []
        for side in (self.k, self.v):
            for i, pool in enumerate(side):
                rows = kv_rows.encode(pool, self.kv_format)
                rows[pool.isnan()[..., 0]] = 0xFF  # a NaN of fp8, and the scale of int8
                side[i] = kv_rows.decode(rows, self.kv_format, self.dtype)
                at = torch.empty(rows.numel() + 1, dtype=torch.uint8)[int(unaligned) :]
                self.rows.append(at[: rows.numel()].view(rows.shape).copy_(rows))

    def pools(self):
        if self.kv_format == "native":
            return KVPools(self.k, self.v)
        n = len(self.k)
        return KVPools(self.rows[:n], self.rows[n:], self.kv_format)

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
            self.pools(),
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
