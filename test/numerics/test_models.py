"""Every architecture's logits against transformers (issue: fp32 within 1e-4; we hold 1e-5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from test.numerics.helpers.one_rank import PlainPlacement, logits_of, tp_logits_of
from test.numerics.helpers.tiny_models import CASES, make_reference, prompt, save
from torch import Tensor
from transformers import PreTrainedModel

from sps_runtime.config.model import ModelConfig, load_model_config
from sps_runtime.models.loader import LoadSpec, build_model, load_model, load_weights
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.operators import Operators

LENGTH = 61
CHUNKS = [40, 1, 16, 4]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(params=["torch", "sps_kernel"])
def ops(request: pytest.FixtureRequest) -> Operators:
    if request.param == "sps_kernel":
        pytest.importorskip("sps_kernel")
    return choose_ops(request.param).operators


def reference_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def plain(ops: Operators) -> Callable[[], PlainPlacement]:
    return partial(PlainPlacement, ops=ops)


def saved(case: str, tmp_path: Path) -> tuple[PreTrainedModel, ModelConfig, LoadSpec]:
    reference = make_reference(case)
    save(reference, tmp_path)
    return reference, load_model_config(tmp_path), LoadSpec(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_fp32_logits_follow_transformers(case: str, ops: Operators, tmp_path: Path) -> None:
    """In chunks of many rows and of few, which are multiplied by different means."""
    reference, config, spec = saved(case, tmp_path)
    tokens = prompt(LENGTH)
    expected = reference_logits(reference, tokens)
    assert expected.std() > 0.3, "the model must say something"
    logits = logits_of(load_model(config, spec, ops=ops), tokens, CHUNKS, plain(ops))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["mistral-window", "qwen3", "llama3"])
def test_chunks_and_single_tokens_compute_the_same(
    case: str, ops: Operators, tmp_path: Path
) -> None:
    _, config, spec = saved(case, tmp_path)
    model, tokens = load_model(config, spec, ops=ops), prompt(LENGTH)
    whole = logits_of(model, tokens, None, plain(ops))
    chunked = logits_of(model, tokens, [17, 1, 40, 1, 1, 1], plain(ops))
    torch.testing.assert_close(chunked, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["llama-biases", "qwen2", "qwen3"])
def test_weights_that_are_cut_compute_the_same_as_fused_ones(
    case: str, ops: Operators, tmp_path: Path
) -> None:
    _, config, spec = saved(case, tmp_path)
    model, tokens = load_model(config, spec, ops=ops), prompt(LENGTH)
    cut = logits_of(model, tokens, make_placement=lambda: PlainPlacement(False, ops))
    whole = logits_of(model, tokens, None, plain(ops))
    torch.testing.assert_close(cut, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tp_size", [2, 4, 8])
@pytest.mark.parametrize("case", ["llama2-tied", "llama-biases", "qwen2", "qwen3"])
def test_tp_slices_add_up(case: str, tp_size: int, ops: Operators, tmp_path: Path) -> None:
    """2 KV heads: at tp 4 and 8 each is on several ranks; the vocabulary of 259 never divides."""
    reference, config, spec = saved(case, tmp_path)
    tokens = prompt(LENGTH)
    arena = load_weights(config, LoadSpec(spec.directory, tp_size=tp_size), ops=ops)
    models = [build_model(config, arena, rank, ops=ops) for rank in range(tp_size)]
    for logits in tp_logits_of(models, tokens, ops):
        torch.testing.assert_close(
            logits, reference_logits(reference, tokens), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("case", ["llama3", "mistral", "qwen2", "qwen3"])
def test_bf16_is_as_near_to_fp64_as_transformers_is(
    case: str, ops: Operators, tmp_path: Path
) -> None:
    """No more rounding points than it has: our RMS error against fp64 is that of transformers' bf16
    model, or less."""
    rounded = make_reference(case).to(torch.bfloat16)
    save(rounded, tmp_path)
    tokens = prompt(LENGTH)
    config = load_model_config(tmp_path)
    assert config.dtype == "bfloat16"
    model = load_model(config, LoadSpec(tmp_path), ops=ops)
    ours = logits_of(model, tokens, CHUNKS, plain(ops))
    assert ours.dtype == torch.bfloat16
    theirs = reference_logits(rounded, tokens)
    exact = reference_logits(rounded.to(torch.float64), tokens)

    def rms(logits: Tensor) -> float:
        return (logits.double() - exact).square().mean().sqrt().item()

    assert 0 < rms(ours) <= 1.1 * rms(theirs)


def test_no_tokens_at_all(ops: Operators, tmp_path: Path) -> None:
    """A rank of a group may have no token of a short prompt."""
    _, config, spec = saved("qwen3", tmp_path)
    model = load_model(config, spec, ops=ops)
    assert logits_of(model, [], None, plain(ops)).shape == (0, config.vocab_size)
