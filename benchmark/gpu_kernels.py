"""Kernels by themselves: seconds, and the share of the device's ceilings that this is."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_timing import Budget, Ceilings, seconds_of
from sps_runtime.attention.backend import AttentionBackend, PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.choose import choose_backend, choose_device_backend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.ops.dispatch import choose_ops

Figures = dict[str, float]


@dataclass(frozen=True)
class Heads:
    """Heads of a layer, and pages: an 8B Llama's, or small ones."""

    q: int
    kv: int
    dim: int
    page: int
    hidden: int
    inner: int


LLAMA = Heads(32, 8, 128, 128, 4096, 14336)
SMALL = Heads(4, 2, 32, 64, 128, 256)


def backends(device: torch.device, heads: Heads) -> dict[str, AttentionBackend]:
    """Those that can be had here, by name."""
    if device.type == "cpu":
        ops = choose_ops()
        return {ops.name: choose_backend(ops, page_size=heads.page, head_dim=heads.dim)}
    found = {}
    for name in ("flashinfer", "triton", "torch"):
        try:
            found[name] = choose_device_backend(
                name, device, dtype=torch.bfloat16, head_dim=heads.dim
            )
        except Exception as error:
            print(f"  without {name}: {error}", flush=True)
    return found


def layers(
    device: torch.device, heads: Heads, top: Ceilings, rows: int, budget: Budget
) -> Iterator[tuple[str, float]]:
    """Operators of a layer over `rows` tokens: share of the memory or arithmetic ceiling."""
    ops = choose_ops(device=device).operators
    x, residual, norm = (
        torch.randn(shape, device=device).bfloat16()
        for shape in ((rows, heads.hidden), (rows, heads.hidden), (heads.hidden,))
    )
    gate, up = (torch.randn(rows, heads.inner, device=device).bfloat16() for _ in range(2))
    q, k = (torch.randn(rows, n, heads.dim, device=device).bfloat16() for n in (heads.q, heads.kv))
    pages = -(-rows // heads.page)
    pools = [
        torch.zeros(pages, heads.kv, heads.page, heads.dim, device=device).bfloat16()
        for _ in range(2)
    ]
    at = torch.arange(rows, device=device, dtype=torch.int32)
    frequencies = torch.rand(heads.dim // 2, device=device)
    rotate = ops.rotation(at.long(), frequencies, 1.0, torch.bfloat16)
    moved: dict[str, tuple[Callable[[], object], int]] = {
        "rms_norm": (lambda: ops.rms_norm(x, norm, 1e-5), 2 * x.nbytes),
        "add_rms_norm": (lambda: ops.add_rms_norm(x, residual, norm, 1e-5), 4 * x.nbytes),
        "silu_mul": (lambda: ops.silu_mul(gate, up), 3 * gate.nbytes),
        "rope": (lambda: rotate(q, k), 2 * (q.nbytes + k.nbytes)),
        "write_kv": (
            lambda: ops.write_kv(k, k, *pools, at // heads.page, at % heads.page),
            4 * k.nbytes,
        ),
    }
    for name, (run, nbytes) in moved.items():
        if budget.over:
            return
        took = seconds_of(run, device)
        yield f"{name}_us_{rows}", 1e6 * took
        yield f"{name}_share_of_memory_{rows}", nbytes / took / top.bytes_per_s


@dataclass
class Case:
    """One sequence's pages, shuffled in a pool, and queries at its end."""

    heads: Heads
    length: int
    rows: int
    device: torch.device

    def __post_init__(self) -> None:
        heads, device = self.heads, self.device
        pages = -(-self.length // heads.page)
        shape = (pages, heads.kv, heads.page, heads.dim)
        self.k, self.v = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        self.q = torch.randn(self.rows, heads.q, heads.dim, device=device).bfloat16()
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randperm(pages, generator=generator).int()
        self.starts = torch.arange(pages, dtype=torch.int32) * heads.page
        self.pool = PagePool([self.k], [self.v], pages)
        self.scale = heads.dim**-0.5

    def run(self) -> list[QueryRun]:
        """The last `rows` tokens over all pages."""
        start = self.length - self.rows
        return [QueryRun(0, self.rows, start, self.ids, self.starts, self.length)]

    def flops(self) -> float:
        """Of the two products, causal pairs only."""
        pairs = self.rows * (self.length - self.rows) + self.rows * (self.rows + 1) / 2
        return 4.0 * pairs * self.heads.q * self.heads.dim

    def lists(self, share: float, block: int) -> tuple[PageLists, float]:
        """For each block of queries and KV head a share of the pages before it, drawn anew, and all
        of its own; and the share of causal pairs that this is."""
        heads, rng = self.heads, torch.Generator().manual_seed(1)
        items, chosen = [], []
        at = pairs = causal = 0
        for row in range(0, self.rows, block):
            position = self.length - self.rows + row
            count = min(block, self.rows - row)
            before = position // heads.page
            own = torch.arange(before, -(-(position + count) // heads.page))
            for head in range(heads.kv):
                kept = torch.randperm(before, generator=rng)[: max(1, int(share * before))]
                pages = torch.cat((kept.sort().values, own))
                chosen.append(pages)
                items.append((row, count, position, at, len(pages), self.length, head, 1))
                at += len(pages)
                pairs, causal = pairs + len(pages), causal + before + len(own)
        pages = torch.cat(chosen)
        table = torch.tensor(items, dtype=torch.int32)
        lists = PageLists(table, self.ids[pages], self.starts[pages], complete=True)
        return lists, pairs / causal


def prefill(
    device: torch.device, heads: Heads, top: Ceilings, lengths: tuple[int, ...], budget: Budget
) -> Iterator[tuple[str, float]]:
    """Attention of a whole prompt: dense, planned once, and a tenth of the pages, planned in every
    call as every layer plans its own; rates per visited pair, over the best dense one."""
    found = backends(device, heads)
    for length in lengths:
        case = Case(heads, length, length, device)
        runs, (lists, share) = case.run(), case.lists(0.1, 128)
        dense: dict[str, float] = {}
        for name, backend in found.items():
            if budget.over:
                return
            run = partial(backend.partial, case.q, runs, case.pool, scale=case.scale)
            took = seconds_of(run, device, rounds=5, warm=2)
            dense[name] = case.flops() / took
            yield f"prefill_{name}_ms_{length}", 1e3 * took
            yield f"prefill_{name}_share_of_gemm_{length}", dense[name] / top.flops_per_s
            if name == "torch" and device.type == "cuda":
                continue  # a list after another: seconds
            run = partial(backend.partial_lists, case.q, lists, case.pool, scale=case.scale)
            took = seconds_of(run, device, rounds=5, warm=2)
            yield f"sparse_{name}_ms_{length}", 1e3 * took
            rate = share * case.flops() / took / max(dense.values())
            yield f"sparse_{name}_rate_over_dense_{length}", rate
        if not budget.over:
            yield f"prefill_sdpa_ms_{length}", 1e3 * _sdpa(case, device)
        yield f"sparse_density_{length}", share


def _sdpa(case: Case, device: torch.device) -> float:
    """torch's scaled_dot_product_attention over keys that lie together already."""
    k, v = (
        side.transpose(1, 2).flatten(0, 1)[: case.length].transpose(0, 1)[None]
        for side in (case.k, case.v)
    )
    q = case.q.transpose(0, 1)[None]
    return seconds_of(
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        device,
        rounds=5,
        warm=1,
    )


def decode(
    device: torch.device, heads: Heads, top: Ceilings, cells: tuple[tuple[int, int], ...],
    budget: Budget,
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """Attention of one new token of each of some sequences: share of the memory ceiling."""
    found = backends(device, heads)
    for rows, length in cells:
        case = Case(heads, length * rows, rows, device)
        pages = len(case.ids) // rows
        starts = case.starts[:pages]
        runs = [
            QueryRun(row, 1, length - 1, case.ids[row * pages : (row + 1) * pages], starts, length)
            for row in range(rows)
        ]
        nbytes = 2 * rows * pages * case.k[0].nbytes
        for name, backend in found.items():
            if budget.over:
                return
            run = partial(backend.partial, case.q, runs, case.pool, scale=case.scale)
            took = seconds_of(run, device)
            yield f"decode_{name}_us_{rows}x{length}", 1e6 * took
            yield f"decode_{name}_share_of_memory_{rows}x{length}", nbytes / took / top.bytes_per_s


def relay(
    device: torch.device, heads: Heads, top: Ceilings, cells: tuple[tuple[int, int, int], ...],
    budget: Budget,
) -> Iterator[tuple[str, float]]:  # fmt: skip
    """Decode attention of rows behind one prefix, each with pages of its own: read once for all of
    them (FlashInfer's cascade) and by each for itself; share of the memory ceiling by the bytes
    that have to be read."""
    found = _relay_backends(device, heads)
    for rows, prefix, own in cells:
        pages, own_pages = prefix // heads.page, own // heads.page
        case = Case(heads, prefix + own * rows, rows, device)
        length = prefix + own
        starts = torch.arange(pages + own_pages, dtype=torch.int32) * heads.page
        tables = [
            torch.cat((case.ids[:pages], case.ids[pages + row * own_pages :][:own_pages]))
            for row in range(rows)
        ]
        runs = [QueryRun(i, 1, length - 1, ids, starts, length) for i, ids in enumerate(tables)]
        nbytes = 2 * (pages + rows * own_pages) * case.k[0].nbytes
        cell, took = f"{rows}x{prefix}+{own}", {}
        for name, backend in found.items():
            if budget.over:
                return
            run = partial(backend.partial, case.q, runs, case.pool, scale=case.scale)
            took[name] = seconds_of(run, device)
            yield f"relay_{name}_us_{cell}", 1e6 * took[name]
            yield f"relay_{name}_share_of_memory_{cell}", nbytes / took[name] / top.bytes_per_s
        if len(took) == 2:
            yield f"relay_speedup_{cell}", took["plain"] / took["shared"]


def _relay_backends(device: torch.device, heads: Heads) -> dict[str, AttentionBackend]:
    if device.type == "cpu":
        return {"plain": next(iter(backends(device, heads).values()))}
    library: Any = importlib.import_module("flashinfer")
    torch_backend = choose_device_backend("torch", device, dtype=torch.bfloat16, head_dim=heads.dim)
    never = 1 << 62
    return {
        name: FlashInferBackend(library, torch_backend, device, least)
        for name, least in (("plain", never), ("shared", 0))
    }


def plain_flashinfer(
    device: torch.device, heads: Heads, lengths: tuple[int, ...], budget: Budget
) -> Iterator[tuple[str, float]]:
    """FlashInfer as its own documentation uses it: the baseline of our backend."""
    library: Any = importlib.import_module("flashinfer")
    for length in lengths:
        if budget.over:
            return
        case = Case(heads, length, length, device)
        workspace = torch.empty(384 << 20, dtype=torch.uint8, device=device)
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        rows, pages = torch.tensor([0, length]).int(), torch.tensor([0, len(case.ids)]).int()
        last = torch.tensor([(length - 1) % heads.page + 1]).int()
        wrapper.plan(
            rows, pages, case.ids.to(device), last, heads.q, heads.kv, heads.dim, heads.page,
            causal=True, q_data_type=torch.bfloat16,
        )  # fmt: skip
        took = seconds_of(lambda w=wrapper, c=case: w.run(c.q, (c.k, c.v)), device, 5, 2)
        yield f"prefill_plain_flashinfer_ms_{length}", 1e3 * took


def merges(
    device: torch.device, heads: Heads, top: Ceilings, rows: int, budget: Budget
) -> Iterator[tuple[str, float]]:
    """Two partials of the same queries into one."""
    shape = (rows, heads.q, heads.dim)

    def random() -> Partial:
        lse: Tensor = torch.randn(shape[:2], device=device)
        return Partial(torch.randn(shape, device=device).bfloat16(), lse)

    parts, out = [random(), random()], torch.empty(shape, device=device).bfloat16()
    for name, backend in backends(device, heads).items():
        if budget.over:
            return
        took = seconds_of(lambda b=backend: b.merge(parts, out), device)
        yield f"merge_{name}_us_{rows}", 1e6 * took
        yield f"merge_{name}_share_of_memory_{rows}", 3 * out.nbytes / took / top.bytes_per_s
