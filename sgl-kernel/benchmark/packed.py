"""Packed weights of each kind, one thread, over weights that fit no cache: GB/s and weights/s."""

from __future__ import annotations

import torch
from timing import arguments, best_seconds, gemm_peak, read_speed, report

from sps_kernel import pack_weight, packed_linear, packed_nbytes

LAYERS = {"gate_up_0.5b": (9728, 896), "down_0.5b": (896, 4864)}
KINDS = ("bf16", "int8", "int4")
COLD_BYTES = 96e6  # several times the caches


def copies(n: int, k: int, kind: str) -> torch.Tensor:
    """One weight packed, as often as it takes to fit no cache."""
    size = packed_nbytes(n, k, kind)
    out = torch.empty(max(1, int(COLD_BYTES) // size), size, dtype=torch.uint8)
    pack_weight(torch.randn(n, k).bfloat16(), kind, out[0])
    return out.copy_(out[:1].expand_as(out))


def main() -> None:
    args = arguments(__doc__)
    figures = {"read_gb_s": read_speed(), "gemm_gflop_s": gemm_peak(torch.bfloat16)}
    raw = {}
    rows = (1, 8, 256) if args.quick else (1, 2, 4, 8, 16, 32, 256)
    for name, (n, k) in LAYERS.items():
        packed = {kind: copies(n, k, kind) for kind in KINDS}
        for m in rows:
            x, y = torch.randn(m, k).bfloat16(), torch.empty(m, n, dtype=torch.bfloat16)
            for kind in KINDS:
                ws = packed[kind] if m < 256 else packed[kind][:2]

                def call(ws=ws, kind=kind, x=x, y=y, n=n, k=k):
                    for w in ws:
                        packed_linear(x, w, n, k, kind, out=y)

                key = f"{name}_m{m}_{kind}"
                raw[key] = best_seconds(call, 3)
                seconds = min(raw[key]) / len(ws)
                figures[f"{key}_gb_s"] = ws.shape[1] / seconds / 1e9
                figures[f"{key}_gweights_s"] = n * k / seconds / 1e9
                if m > 1:
                    figures[f"{key}_gflop_s"] = 2 * m * n * k / seconds / 1e9
    figures["read_gb_s_after"] = read_speed()
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
