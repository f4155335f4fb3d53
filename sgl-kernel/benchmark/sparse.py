"""Sparse attention's operators, one thread: what choosing, the tail and the pages that are read take
of the dense attention that they replace, for one superblock at the end of a context.

The floor of scoring is its products at twice the bf16 GEMM rate (bytes, VNNI) and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from timing import arguments, best_seconds, gemm_peak, report

import sps_kernel as sps

# query heads, KV heads, head dim
SHAPES = {"0.5b": (14, 2, 64), "gqa8": (32, 8, 64), "llama-8b": (32, 8, 128)}
PAGE = BLOCK = 64
ROWS, BUDGET = 6, 0.1
END_ROWS, END = 32, 128  # rows in the last tokens of a superblock


@dataclass
class Case:
    """A superblock of queries at the end of `context` tokens whose pages lie anywhere."""

    shape: tuple[int, int, int]
    context: int
    superblock: int

    def __post_init__(self) -> None:
        heads, self.kv_heads, d = self.shape
        pages = self.context // PAGE
        size = (pages, self.kv_heads, PAGE, d)
        self.k, self.v = (torch.randn(size).bfloat16() for _ in range(2))
        self.q = torch.randn(self.superblock, heads, d).bfloat16()
        self.scale = d**-0.5
        nbytes = sps.summary_nbytes(PAGE, d, 2)
        self.summaries = torch.zeros(pages, self.kv_heads, nbytes, dtype=torch.uint8)
        self.page_ids = torch.randperm(pages).int()
        self.slots = torch.arange(pages, dtype=torch.int32)
        at = range(self.context - self.superblock, self.context, BLOCK)
        rows = [(BLOCK * i, BLOCK, position, 0, 0, self.context) for i, position in enumerate(at)]
        self.blocks = torch.tensor(rows, dtype=torch.int32)
        self.rows = np.full(len(rows), ROWS)
        self.rows[-END // BLOCK :] = END_ROWS
        self.out = torch.empty(self.q.shape)
        self.lse = torch.empty(self.q.shape[:2])
        self.kv = sps.KVPools([self.k], [self.v])

    def summarise(self) -> None:
        sps.summarise_pages(self.k, self.v, self.slots, self.summaries)

    def shares(self) -> torch.Tensor:
        return sps.page_shares(
            self.q,
            self.blocks,
            self.page_ids,
            [self.summaries],
            [self.k],
            slots=len(self.k),
            rows=self.rows,
            block=BLOCK,
            scale=self.scale,
        )

    def choose(self, shares: torch.Tensor) -> sps.PageChoice:
        return sps.choose_pages(
            shares,
            self.blocks,
            self.page_ids,
            page_size=PAGE,
            kv_heads=self.kv_heads,
            tau=0.0,
            budget=BUDGET,
            minimum=8,
            sink=1,
            window=2,
            block=BLOCK,
        )

    def sparse(self, made: sps.PageChoice) -> None:
        lists = (made.items, made.page_ids, made.page_pos)
        sps.paged_attention(self.q, self.kv, *lists, out=self.out, lse=self.lse)

    def tail(self, made: sps.PageChoice) -> None:
        sps.tail_attention(
            self.q,
            self.blocks,
            made.dropped,
            made.dropped_ids,
            [self.summaries],
            slots=len(self.k),
            page_size=PAGE,
            out=self.out,
            lse=self.lse,
            scale=self.scale,
        )

    def dense(self) -> None:
        first, pages = self.context - self.superblock, len(self.page_ids)
        item = [0, self.superblock, first, 0, pages, self.context, 0, self.kv_heads]
        items = torch.tensor([item], dtype=torch.int32)
        positions = torch.arange(pages, dtype=torch.int32) * PAGE
        sps.paged_attention(
            self.q, self.kv, items, self.page_ids, positions, out=self.out, lse=self.lse
        )


def measure(case: Case, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each part, taken in turns with dense attention."""
    case.summarise()
    made = case.choose(case.shares())
    shares = case.shares()
    parts = {
        "summarise": case.summarise,
        "shares": case.shares,
        "choose": lambda: case.choose(shares),
        "sparse": lambda: case.sparse(made),
        "tail": lambda: case.tail(made),
        "dense": case.dense,
    }
    raw: dict[str, list[float]] = {name: [] for name in parts}
    for names in (list(parts), list(reversed(parts))):
        for name in names:
            raw[name] += best_seconds(parts[name], repetitions)
    raw["density"] = [len(made.page_ids) / (len(made.page_ids) + len(made.dropped_ids))]
    return raw


def main() -> None:
    args = arguments(__doc__)
    peak = gemm_peak(torch.bfloat16)
    figures, raw = {"gemm_peak_bf16_gflops": peak}, {}
    contexts = (8192,) if args.quick else (8192, 32768)
    for name, shape in SHAPES.items():
        for context in contexts:
            case = Case(shape, context, 1024)
            times = raw[f"{name}_{context}"] = measure(case, 2 if args.quick else 3)
            best = {part: min(found) for part, found in times.items()}
            for part in ("shares", "choose", "sparse", "tail"):
                figures[f"{part}_of_dense_{name}_{context}"] = best[part] / best["dense"]
            pages = context // PAGE
            figures[f"density_{name}_{context}"] = best["density"]
            figures[f"summarise_us_a_page_{name}_{context}"] = best["summarise"] / pages * 1e6
            products = 2.0 * shape[0] * shape[2] * case.superblock * (context - case.superblock / 2)
            floor = products * case.rows.mean() / BLOCK / (2e9 * peak)
            figures[f"shares_over_floor_{name}_{context}"] = best["shares"] / floor
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
