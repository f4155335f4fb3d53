"""Packed weights: what is packed, what stays plain, and that views of both multiply alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test.numerics.helpers.one_rank import PlainPlacement, logits_of
from test.numerics.helpers.tiny_models import CASES, make_reference, prompt, save
from torch import Tensor

from sps_runtime.config.model import load_model_config
from sps_runtime.layers.placement import unit_shares
from sps_runtime.models.arena import Arena
from sps_runtime.models.loader import LoadSpec, build_model, load_weights
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.operators import TORCH
from sps_runtime.ops.packing import Quantization
from sps_runtime.ops.weight import PackedWeight, PlainWeight, Weight
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
        weight.packed, weight.n, weight.k, weight.kind, torch.float32, weight.group, weight.cuts
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
        spec = LoadSpec(tmp_path, dtype, tp_size=tp, sp_size=tp + 1)
        plain, packed = load_weights(config, spec), load_weights(config, spec, ops=OPS)
        for rank in range(tp):
            expected, got = plain.matrices(rank), packed.matrices(rank)
            assert list(expected) == list(got)
            down = got["layers.0.down"]
            assert isinstance(down, PackedWeight)
            bounds = unit_shares(down.k, packed.layout.unit, tp + 1)
            assert down.cuts == tuple(begin for begin, _ in bounds[1:])
            for name, weight in got.items():
                assert torch.equal(unpacked(weight), unpacked(expected[name])), name
            kinds = {name.split(".")[-1]: isinstance(w, PackedWeight) for name, w in got.items()}
            inner = config.intermediate_size // tp % 16 == 0
            heads = config.head_dim % 16 == 0
            assert kinds == {
                "qkv": heads, "output": True, "gate_up": inner, "down": True, "head": True
            }  # fmt: skip
            tables = (plain.tensors(rank), packed.tensors(rank))
            assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[1])


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_of_a_packed_weight_multiply_as_shares_of_a_plain_one(
    parts: int, quantization: Quantization, dtype: torch.dtype
) -> None:
    """q, k and v by heads, and hidden columns by units; 5 ranks do not find 5 units everywhere, and
    columns lie as two ranks share them."""
    packing = OPS.packing(quantization)
    assert packing is not None
    make = torch.Generator().manual_seed(parts)
    tensor = torch.randn(6 * 16 + 3, 200, generator=make).to(dtype)
    kind = packing.kind(dtype, "")
    cuts = tuple(begin for begin, _ in unit_shares(200, packing.unit, 2)[1:])
    memory = torch.empty(packing.nbytes(*tensor.shape, kind, cuts), dtype=torch.uint8)
    packing.pack(tensor, kind, memory, cuts)
    packed = packing.weight(memory, *tensor.shape, kind, cuts)
    forms = PlainWeight(unpacked(packed).to(dtype)), packed
    bias = torch.randn(len(tensor), generator=make).to(dtype)

    def check(x: Tensor, weights: Sequence[Weight], bias: Tensor | None = None) -> None:
        want, got = (OPS.linear(x, weight, bias) for weight in weights)
        error = 1e-3 if dtype == torch.float32 else 0.3
        torch.testing.assert_close(got, want, rtol=0.02 if error > 0.1 else 1e-4, atol=error)

    for rows in (1, 7, 60):
        x = torch.randn(rows, 200, generator=make).to(dtype)
        check(x, forms, bias)
        for pair in zip(*(form.split((64, 32, 3)) for form in forms), strict=True):
            check(x, pair)
        for begin, end in unit_shares(len(tensor), 16, parts):
            check(x, [form.rows(begin, end) for form in forms], bias[begin:end])
        for begin, end in unit_shares(200, packing.unit, parts):
            check(x[:, begin:end], [form.columns(begin, end).rows(16, 64) for form in forms])


class Unpacked(Arena):
    """The same numbers in plain weights."""

    def matrices(self, tp_rank: int) -> dict[str, Weight]:
        return {
            name: PlainWeight(unpacked(weight))
            for name, weight in super().matrices(tp_rank).items()
        }


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama2-tied", "qwen2", "qwen3", "mistral"])
def test_a_quantized_model_computes_with_rounded_weights(
    case: str, quantization: Quantization, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Exactly the model of the rounded numbers, whole or cut; the head of int4 is int8, the
    embedding is not rounded, and what could not be cut is named."""
    config = load_model_config(save(make_reference(case), tmp_path))
    spec = LoadSpec(tmp_path, quantization=quantization)
    arena, exact = load_weights(config, spec, ops=OPS), load_weights(config, LoadSpec(tmp_path))
    weights = arena.matrices(0)
    assert getattr(weights["head"], "kind", "") == "int8"
    assert getattr(weights["layers.0.down"], "kind", "") == quantization
    assert isinstance(weights["layers.1.output"], PlainWeight)
    assert "not quantized" in caplog.text and "layers.1.output" in caplog.text
    assert torch.equal(arena.tensors(0)["embed"], exact.tensors(0)["embed"])
    model, rounded = (
        build_model(config, arena, ops=OPS),
        build_model(config, Unpacked(arena.layout, arena.memory)),
    )
    tokens = prompt(70)
    expected = logits_of(rounded, tokens)
    for whole in (True, False):
        got = logits_of(model, tokens, [50, 19, 1], lambda whole=whole: PlainPlacement(whole, OPS))
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    error = (expected - logits_of(build_model(config, exact), tokens)).std() / expected.std()
    assert 0 < error < {"int8": 0.02, "int4": 0.3}[quantization]


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama2-tied", "qwen2-tied", "qwen3-tied"])
def test_a_tied_head_is_the_embedding_and_gives_the_same_bits(
    case: str, dtype: str, tmp_path: Path
) -> None:
    """Against the same checkpoint with both of them, and in as much less memory."""
    tied = load_model_config(save(make_reference(case), tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    both = replace(tied, tie_word_embeddings=False)
    spec = LoadSpec(tmp_path, dtype)
    once, twice = (load_weights(config, spec, ops=OPS) for config in (tied, both))
    table = twice.tensors(0)["embed"]
    saved = twice.layout.nbytes - once.layout.nbytes
    assert "embed" not in once.tensors(0) and table.nbytes <= saved < table.nbytes + 64
    models = [build_model(tied, arena, ops=OPS) for arena in (once, twice)]
    assert all(model.dtype == getattr(torch, dtype) for model in models)
    for tokens in (prompt(70), list(range(tied.vocab_size))):
        got, expected = (
            logits_of(model, tokens, make_placement=lambda: PlainPlacement(True, OPS))
            for model in models
        )
        assert torch.equal(got, expected)


def test_where_rows_are_cut_or_rounded_the_embedding_keeps_its_table(tmp_path: Path) -> None:
    config = load_model_config(save(make_reference("qwen2-tied"), tmp_path))
    for spec in (LoadSpec(tmp_path, tp_size=2), LoadSpec(tmp_path, quantization="int8")):
        arena = load_weights(config, spec, ops=OPS)
        assert arena.tensors(0)["embed"].shape == (config.vocab_size, config.hidden_size)
