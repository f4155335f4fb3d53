"""Packed weights: what is packed, what stays plain, and that views of both multiply alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test.numerics.helpers.tiny_models import CASES, make_reference, save

from sps_runtime.config.model import load_model_config
from sps_runtime.layers.placement import unit_shares
from sps_runtime.models.loader import LoadSpec, load_weights
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.operators import TORCH
from sps_runtime.ops.weight import PackedWeight, PlainWeight
from sps_runtime.types.errors import ConfigError

pytest.importorskip("sps_kernel")
OPS = choose_ops("sps_kernel").operators


def unpacked(weight: PackedWeight | PlainWeight) -> torch.Tensor:
    """By the kernel's own inverse, a share of it cut afterwards."""
    if isinstance(weight, PlainWeight):
        return weight.tensor_NK.float()
    packing = OPS.packing()
    assert packing is not None
    whole = packing.kernels.unpack_weight(
        weight.packed, weight.n, weight.k, weight.kind, torch.float32, weight.group
    )
    return whole[slice(*weight.row_range), slice(*weight.column_range)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_every_architecture_is_packed_as_it_was(case: str, dtype: str, tmp_path: Path) -> None:
    """At every TP degree, packed entries hold the plain ones' numbers. Heads of 16 and 32 dims are
    packed, of 8 dims are not; and inner dims are where their TP share is whole panels."""
    config = load_model_config(save(make_reference(case), tmp_path))
    for tp in (1, 2, 4):
        if config.num_heads % tp:
            continue
        spec = LoadSpec(tmp_path, dtype, tp_size=tp)
        plain, packed = load_weights(config, spec), load_weights(config, spec, ops=OPS)
        for rank in range(tp):
            expected, got = plain.matrices(rank), packed.matrices(rank)
            assert list(expected) == list(got)
            for name, weight in got.items():
                assert torch.equal(unpacked(weight), unpacked(expected[name])), name
            kinds = {name.split(".")[-1]: isinstance(w, PackedWeight) for name, w in got.items()}
            inner = config.intermediate_size // tp % 16 == 0
            heads = config.head_dim % 16 == 0
            assert kinds == {
                "qkv": heads, "output": True, "gate_up": inner, "down": True, "head": True
            }  # fmt: skip
            tables = (plain.tensors(rank), packed.tensors(rank))
            assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_a_packed_weight_multiply_as_shares_of_a_plain_one(
    parts: int, dtype: torch.dtype
) -> None:
    """q, k and v by heads, and hidden columns by units; 5 ranks do not find 5 units everywhere."""
    packing = OPS.packing()
    assert packing is not None
    make = torch.Generator().manual_seed(parts)
    tensor = torch.randn(6 * 16 + 3, 40, generator=make).to(dtype)
    kind = packing.kind(dtype, "")
    memory = torch.empty(packing.nbytes(*tensor.shape, kind), dtype=torch.uint8)
    packing.pack(tensor, kind, memory)
    forms = PlainWeight(tensor), packing.weight(memory, *tensor.shape, kind)
    bias = torch.randn(len(tensor), generator=make).to(dtype)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.05}
    )
    for rows in (1, 7, 40):
        x = torch.randn(rows, 40, generator=make).to(dtype)
        want, got = (OPS.linear(x, form, bias) for form in forms)
        torch.testing.assert_close(got, want, **tolerance)
        for part_want, part_got in zip(*(form.split((64, 32, 3)) for form in forms), strict=True):
            torch.testing.assert_close(
                OPS.linear(x, part_got), OPS.linear(x, part_want), **tolerance
            )
        for begin, end in unit_shares(len(tensor), 16, parts):
            want, got = (OPS.linear(x, f.rows(begin, end), bias[begin:end]) for f in forms)
            torch.testing.assert_close(got, want, **tolerance)
        for begin, end in unit_shares(40, 16, parts):
            mine = x[:, begin:end]
            want, got = (OPS.linear(mine, f.columns(begin, end).rows(16, 64)) for f in forms)
            torch.testing.assert_close(got, want, **tolerance)


def test_without_kernels_nothing_is_packed_or_quantized(tmp_path: Path) -> None:
    config = load_model_config(save(make_reference("qwen3"), tmp_path))
    spec = LoadSpec(tmp_path)
    matrices = load_weights(config, spec, ops=TORCH).matrices(0)
    assert all(isinstance(weight, PlainWeight) for weight in matrices.values())
    with pytest.raises(ConfigError, match="quantization int8 needs sps_kernel"):
        load_weights(config, replace(spec, quantization="int8"), ops=TORCH)


def test_packed_weights_stay_on_cpus(tmp_path: Path) -> None:
    config = load_model_config(save(make_reference("qwen3"), tmp_path))
    head = load_weights(config, LoadSpec(tmp_path), ops=OPS).matrices(0)["head"]
    with pytest.raises(ValueError, match="for CPUs"):
        head.to("cuda")
