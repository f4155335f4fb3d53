"""Norm, rope and gate: the kernels against torch's operators, in the shapes that layers use."""

from __future__ import annotations

import pytest
import torch

from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.elementwise import TorchElementwise

ERROR = {torch.float32: 1e-5, torch.bfloat16: 0.04}
TRUTH = TorchElementwise()


@pytest.mark.parametrize("dtype", list(ERROR))
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_chosen_and_torch_agree(tokens: int, dtype: torch.dtype) -> None:
    chosen = choose_ops().operators
    make = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(dtype)

    def same(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, atol=ERROR[dtype], rtol=ERROR[dtype])

    # A fused product's parts: strided views, as layers get them.
    q, k, _ = (p.unflatten(-1, (-1, 16)) for p in random(tokens, 10 * 16).split((96, 32, 32), -1))
    weight = random(16)
    same(chosen.rms_norm(q, weight, 1e-5), TRUTH.rms_norm(q, weight, 1e-5))
    x, wide = random(tokens, 96), random(96)
    same(chosen.rms_norm(x, wide, 1e-5), TRUTH.rms_norm(x, wide, 1e-5))
    positions = torch.randint(0, 100, (tokens,), generator=make)
    frequencies = torch.rand(8, generator=make)
    want = TRUTH.rotation(positions, frequencies, 1.25, dtype)(q.clone(), k.clone())
    got = chosen.rotation(positions, frequencies, 1.25, dtype)(q, k)
    same(got[0], want[0])
    same(got[1], want[1])
    gate, up = random(tokens, 240).split(120, dim=-1)
    same(chosen.silu_mul(gate, up), TRUTH.silu_mul(gate.clone(), up.clone()))
