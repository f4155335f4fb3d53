"""small_gemm over rotating weights, one thread, against memory's speed and torch's linear."""

from __future__ import annotations

import torch
from timing import arguments, best_seconds, read_speed, report

from sps_kernel import small_gemm

LAYERS = {"gate_up_0.5b": (9728, 896), "down_0.5b": (896, 4864), "lm_head_0.5b": (32000, 896)}


def main() -> None:
    args = arguments(__doc__)
    figures, raw = {"read_gb_s": read_speed()}, {}
    rows = (1, 8) if args.quick else (1, 2, 4, 8, 16)
    for name, (n, k) in LAYERS.items():
        weights = [torch.randn(n, k).bfloat16() for _ in range(max(1, int(128e6) // (2 * n * k)))]
        gigabytes = len(weights) * n * k * 2 / 1e9
        for m in rows:
            x = torch.randn(m, k).bfloat16()
            calls = {
                "ours": lambda x=x, ws=weights: [small_gemm(x, w) for w in ws],
                "torch": lambda x=x, ws=weights: [torch.nn.functional.linear(x, w) for w in ws],
            }
            for who, call in calls.items():
                key = f"{name}_m{m}_{who}"
                raw[key] = best_seconds(call, 3)
                figures[f"{key}_gb_s"] = gigabytes / min(raw[key])
    figures["read_gb_s_after"] = read_speed()
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
