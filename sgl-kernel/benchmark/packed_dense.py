"""packed_linear: few rows against memory's speed, many against oneDNN plain and prepacked.

Weights of few rows lie one after another in an arena, as a model's do, once in pages of 4 KiB and
once in huge pages; one thread.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import arguments, best_seconds, report

from sps_kernel import pack_weight, packed_linear, packed_nbytes, use_huge_pages

LAYER = [(1152, 896), (896, 896), (9728, 896), (896, 4864)]
DTYPE_OF = {"bf16": torch.bfloat16, "fp32": torch.float32}
Figures = dict[str, float]
Raw = dict[str, list[float]]


def few_rows(rows: tuple[int, ...], layers: int, huge: bool, figures: Figures, raw: Raw) -> None:
    """GB/s of all weights of a model of the 0.5b shape, per number of rows of x."""
    shapes = LAYER * layers + [(32000, 896)]
    sizes = [packed_nbytes(n, k, "bf16") for n, k in shapes]
    arena = torch.ones(sum(sizes) // 8 + 8, dtype=torch.int64)
    pages = "huge" if huge and use_huge_pages(arena) else "4k"
    bytes_ = arena.view(torch.uint8)[-arena.data_ptr() % 64 :]
    weights = bytes_[: sum(sizes)].split(sizes)
    gigabytes = sum(sizes) / 1e9
    raw[f"read_{pages}"] = best_seconds(arena.sum, 5)
    for m in rows:
        x = {k: torch.randn(m, k).bfloat16() for _, k in shapes}
        out = {n: torch.empty(m, n, dtype=torch.bfloat16) for n, _ in shapes}

        def step(x: dict[int, torch.Tensor] = x, out: dict[int, torch.Tensor] = out) -> None:
            for (n, k), weight in zip(shapes, weights, strict=True):
                packed_linear(x[k], weight, n, k, "bf16", out=out[n])

        key = f"few_{pages}_m{m}"
        raw[key] = best_seconds(step, 4)
        figures[f"{key}_gb_s"] = gigabytes / min(raw[key])
    raw[f"read_{pages}"] += best_seconds(arena.sum, 5)
    figures[f"read_{pages}_gb_s"] = arena.nbytes / min(raw[f"read_{pages}"]) / 1e9


def callers(kind: str, m: int, n: int, k: int) -> dict[str, Callable[[], object]]:
    """The same product by us, by torch, and by torch with oneDNN's own packing."""
    dtype = DTYPE_OF[kind]
    x, w = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    packed = torch.empty(packed_nbytes(n, k, kind), dtype=torch.uint8)
    pack_weight(w, kind, packed)
    out = torch.empty(m, n, dtype=dtype)
    theirs = torch.ops.mkldnn._reorder_linear_weight(w, m)
    pointwise = torch.ops.mkldnn._linear_pointwise
    return {
        "ours": lambda: packed_linear(x, packed, n, k, kind, out=out),
        "torch": lambda: torch.nn.functional.linear(x, w),
        "prepacked": lambda: pointwise(x, theirs, None, "none", [], ""),
    }


def many_rows(kind: str, rows: tuple[int, ...], rounds: int, figures: Figures, raw: Raw) -> None:
    """GFLOP/s; the three take turns, forwards and backwards."""
    for n, k in LAYER:
        for m in rows:
            calls = callers(kind, m, n, k)
            times: Raw = {who: [] for who in calls}
            for turn in range(rounds):
                for who in list(calls)[:: 1 if turn % 2 == 0 else -1]:
                    times[who] += best_seconds(calls[who], 2)
            for who, seconds in times.items():
                key = f"many_{kind}_{n}x{k}_m{m}_{who}"
                raw[key] = seconds
                figures[f"{key}_gflop_s"] = 2 * m * n * k / min(seconds) / 1e9


def main() -> None:
    args = arguments(__doc__)
    figures: Figures = {}
    raw: Raw = {}
    for huge in (False, True):
        few_rows((1, 8) if args.quick else (1, 2, 4, 8, 16), 12, huge, figures, raw)
    for kind in ("bf16", "fp32"):
        rows = (64, 512) if args.quick else (64, 512, 2048)
        many_rows(kind, rows, 2 if args.quick else 4, figures, raw)
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
