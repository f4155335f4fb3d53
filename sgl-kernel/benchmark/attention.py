"""Paged attention, one thread: prefill against the GEMM rate, decode against memory's speed."""

from __future__ import annotations

import torch
from timing import arguments, best_seconds, gemm_peak, read_speed, report

import sps_kernel as sps

# query heads, KV heads, head dim
SHAPES = {"0.5b": (14, 2, 64), "gqa8": (32, 8, 64), "llama-8b": (32, 8, 128)}


def batch(context, new, heads, kv_heads, d, page=64, density=1.0, dtype=torch.bfloat16):
    """One request: ``new`` queries at the end of ``context`` keys, pages at random slots."""
    pages = -(-context // page)
    k = torch.randn(pages, kv_heads, page, d).to(dtype)
    v = torch.randn(pages, kv_heads, page, d).to(dtype)
    q = torch.randn(new, heads, d).to(dtype)
    ids = torch.randperm(pages).int()
    pos = (torch.arange(pages) * page).int()
    if density < 1:
        items, ids, pos = sparse_lists(new, context, page, kv_heads, ids, pos, density)
    else:
        items = torch.tensor(
            [[0, new, context - new, 0, pages, context, 0, kv_heads]], dtype=torch.int32
        )
    return q, sps.KVPools([k], [v]), items, ids, pos


def sparse_lists(new, context, page, kv_heads, ids, pos, density, block=128):
    """Per (query block, KV head): the diagonal, and random earlier pages up to the density."""
    items, chosen = [], []
    for begin in range(0, new, block):
        count = min(block, new - begin)
        first = (context - new + begin) // page
        last = (context - new + begin + count - 1) // page
        for head in range(kv_heads):
            earlier = torch.randperm(first)[: round(first * density)].tolist()
            picked = sorted(earlier) + list(range(first, last + 1))
            items.append(
                [begin, count, context - new + begin, len(chosen), len(picked), context, head, 1]
            )
            chosen += picked
    index = torch.tensor(chosen)
    return torch.tensor(items, dtype=torch.int32), ids[index], pos[index]


def prefill(figures, raw, args, peak):
    lengths = (512, 2048) if args.quick else (512, 2048, 8192)
    for name, (heads, kv_heads, d) in SHAPES.items():
        for n in lengths:
            call = batch(n, n, heads, kv_heads, d)
            key = f"prefill_{name}_{n}"
            raw[key] = best_seconds(lambda call=call: sps.paged_attention(*call), 2 + 2048 // n)
            rate = 4 * heads * d * n * (n + 1) / 2 / min(raw[key]) / 1e9
            figures[f"{key}_gflops"] = rate
            figures[f"{key}_share_of_gemm"] = rate / peak


def decode(figures, raw, args, speed):
    contexts = (8192,) if args.quick else (1024, 8192, 131072)
    for name, (heads, kv_heads, d) in SHAPES.items():
        for n in contexts:
            call = batch(n, 1, heads, kv_heads, d)
            key = f"decode_{name}_{n}"
            raw[key] = best_seconds(lambda call=call: sps.paged_attention(*call), 10)
            rate = 4 * n * kv_heads * d / min(raw[key]) / 1e9
            figures[f"{key}_gb_s"] = rate
            figures[f"{key}_share_of_read"] = rate / speed


def sparse(figures, raw, args):
    """Time at forced density over density x dense time, of one query chunk at the end: a list of
    its own for each block of 128 queries and each KV head. Density counts pages, the diagonal's
    whole; over causal pairs it is a little less, so the ratio is not flattered."""
    heads, kv_heads, d = SHAPES["0.5b"]
    n, new, density = (8192 if args.quick else 32768), 1024, 0.1
    dense = batch(n, new, heads, kv_heads, d)
    thin = batch(n, new, heads, kv_heads, d, density=density)
    calls = {"dense": dense, "sparse": thin}
    for key in ("dense", "sparse", "sparse", "dense"):
        times = best_seconds(lambda key=key: sps.paged_attention(*calls[key]), 3)
        raw[f"{key}_{n}"] = raw.get(f"{key}_{n}", []) + times
    ratio = min(raw[f"sparse_{n}"]) / min(raw[f"dense_{n}"])
    share = float((thin[2][:, 4] * thin[2][:, 1]).sum()) * 64 / (new * kv_heads * (n - new / 2))
    figures[f"sparse_density_{n}"] = share
    figures[f"sparse_ms_{n}"] = min(raw[f"sparse_{n}"]) * 1e3
    figures[f"dense_ms_{n}"] = min(raw[f"dense_{n}"]) * 1e3
    figures[f"sparse_time_over_density_times_dense_{n}"] = ratio / share


def main() -> None:
    args = arguments(__doc__, sparse="only lists of pages at forced density")
    figures: dict[str, float] = {}
    raw: dict[str, list[float]] = {}
    peak, speed = gemm_peak(torch.bfloat16), read_speed()
    figures |= {"gemm_peak_bf16_gflops": peak, "read_gb_s": speed}
    if not args.sparse:
        prefill(figures, raw, args, peak)
        decode(figures, raw, args, speed)
    sparse(figures, raw, args)
    figures["gemm_peak_bf16_gflops_after"] = gemm_peak(torch.bfloat16)
    figures["read_gb_s_after"] = read_speed()
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
