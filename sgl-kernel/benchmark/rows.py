"""Merge, norm, rope with KV write, SiLU-mul and sampling, one thread: bytes against memory."""

from __future__ import annotations

import torch
from timing import arguments, best_seconds, read_speed, report

import sps_kernel as sps


def cases(tokens):
    """Name -> (call, bytes that it must move)."""
    x, residual = torch.randn(tokens, 896).bfloat16(), torch.randn(tokens, 896).bfloat16()
    weight = torch.rand(896).bfloat16()
    both = torch.randn(tokens, 2 * 4864).bfloat16()
    qkv = torch.randn(tokens, 18, 64).bfloat16()
    pool = torch.zeros(tokens // 64 + 1, 2, 64, 64).bfloat16()
    at = torch.arange(tokens, dtype=torch.int32)
    table = torch.rand(tokens, 64)
    rope = (
        qkv[:, :14],
        qkv[:, 14:16],
        qkv[:, 16:],
        at,
        table,
        pool,
        pool.clone(),
        at // 64,
        at % 64,
    )
    os = [torch.randn(tokens, 14, 64) for _ in range(2)]
    lses = [torch.randn(tokens, 14) for _ in range(2)]
    n = tokens * 2
    return {
        "rms_norm": (lambda: sps.rms_norm(x, weight, 1e-6), n * 896 * 2),
        "rms_norm_residual": (
            lambda: sps.rms_norm(x, weight, 1e-6, residual=residual),
            n * 896 * 4,
        ),
        "silu_mul": (lambda: sps.silu_mul(both[:, :4864], both[:, 4864:]), n * 4864 * 3),
        "rope_kv_write": (lambda: sps.rope_kv_write(*rope), n * 64 * (16 * 2 + 2 * 3)),
        "merge_states": (
            lambda: sps.merge_states(os[0], lses[0], os[1], lses[1]),
            tokens * 14 * 65 * 4 * 3,
        ),
    }


def main() -> None:
    args = arguments(__doc__)
    figures, raw = {"read_gb_s": read_speed()}, {}
    for tokens in (1, 2048):
        for name, (call, moved) in cases(tokens).items():
            key = f"{name}_{tokens}"
            raw[key] = best_seconds(call, 10 if args.quick else 30)
            figures[f"{key}_us"] = min(raw[key]) * 1e6
            if tokens > 1:
                figures[f"{key}_gb_s"] = moved / min(raw[key]) / 1e9
    for vocabulary in (32000, 151936):
        logits = torch.randn(vocabulary) * 3
        for label, options in (("all", {}), ("top_p", {"top_p": 0.9}), ("top_k", {"top_k": 50})):
            key = f"sample_{label}_{vocabulary}"
            raw[key] = best_seconds(lambda o=options, x=logits: sps.sample(x, 0.5, **o), 20)
            figures[f"{key}_us"] = min(raw[key]) * 1e6
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
