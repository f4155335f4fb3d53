"""config.model: Hugging Face configuration files -> ModelConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sps_runtime.config.hub import resolve_model_path
from sps_runtime.config.model import (
    ModelConfig,
    check_degrees,
    load_model_config,
    parse_model_config,
)
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.types.errors import ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def made(**changes: Any) -> ModelConfig:
    return parse_model_config({**LLAMA, **changes})


def test_reads_both_files_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    generation = {"eos_token_id": [7, 2, 5], "temperature": 0.6, "top_k": 20, "do_sample": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    model = load_model_config(tmp_path)
    assert model.eos_token_ids == (2, 5, 7)
    assert model.bos_token_id == 1
    assert model.sampling_defaults == (("temperature", 0.6), ("top_k", 20))
    assert (model.head_dim, model.num_kv_heads, model.heads_per_kv_head) == (8, 2, 4)
    assert model.dtype == "bfloat16"
    assert model.layer_windows == (None, None, None)
    assert not model.tie_word_embeddings


def test_missing_or_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a directory"):
        load_model_config(tmp_path / "none")
    with pytest.raises(ConfigError, match="does not exist"):
        load_model_config(tmp_path)
    for content in ("{", "[]", "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"config\.json"):
            load_model_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": None}, "architecture none"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "KV heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "dynamic"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"torch_dtype": "int8"}, "int8"),
        ({"eos_token_id": ["</s>"]}, "token ids"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_refusals_name_the_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made(**changes)


def test_biases_and_norms_by_architecture() -> None:
    llama = made(attention_bias=True, mlp_bias=True)
    assert (llama.qkv_bias, llama.output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = made(architectures=["Qwen2ForCausalLM"], mlp_bias=True)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.mlp_bias) == (True, False, False)
    qwen3 = made(architectures=["Qwen3ForCausalLM"], head_dim=16)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 16)


def test_sliding_windows() -> None:
    assert made(sliding_window=16).layer_windows == (None,) * 3
    mistral = ["MistralForCausalLM"]
    assert made(architectures=mistral, sliding_window=16).layer_windows == (16,) * 3
    assert made(architectures=mistral, sliding_window=None).layer_windows == (None,) * 3
    qwen2: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}
    assert made(**qwen2, use_sliding_window=False).layer_windows == (None,) * 3
    qwen2["use_sliding_window"] = True
    assert made(**qwen2, max_window_layers=2).layer_windows == (None, None, 16)
    types = ["sliding_attention", "full_attention", "full_attention"]
    assert made(**qwen2, layer_types=types).layer_windows == (16, None, None)
    with pytest.raises(ConfigError, match="layer_types"):
        made(**qwen2, layer_types=["chunked_attention"] * 3)


def test_rope_spellings_agree() -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}
    old = made(rope_theta=5e5, rope_scaling=scaling).rope
    new = made(rope_parameters={**scaling, "rope_theta": 5e5}).rope
    assert old == new
    assert (old.kind, old.theta, old.original_positions) == ("llama3", 5e5, 128)
    assert made(rope_scaling=None).rope.kind == "default"


def test_context_length_follows_the_scaling() -> None:
    assert made().context_length == 512
    assert made(rope_scaling={"type": "linear", "factor": 4.0}).context_length == 2048
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert made(rope_scaling=yarn).context_length == 2048
    assert made(rope_scaling=yarn, max_position_embeddings=2048).context_length == 2048
    llama3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}
    assert made(rope_scaling=llama3).context_length == 512


def test_dtype() -> None:
    assert made().resolve_dtype("auto") == "bfloat16"
    assert made().resolve_dtype("float32") == "float32"
    assert made(torch_dtype="float16").resolve_dtype("auto") == "bfloat16"
    assert made(dtype="float32", torch_dtype=None).resolve_dtype("auto") == "float32"
    with pytest.raises(ConfigError, match="float64"):
        made().resolve_dtype("float64")


def test_degrees() -> None:
    model = made()
    for tp, kv_heads in ((1, 2), (2, 1), (4, 1), (8, 1)):
        check_degrees(model, ParallelConfig(tp_size=tp))
        assert model.kv_heads_per_rank(tp) == kv_heads
        assert model.heads_per_rank(tp) == 8 // tp
    check_degrees(model, ParallelConfig(sp_size=3))
    with pytest.raises(ConfigError, match="8 heads"):
        check_degrees(model, ParallelConfig(tp_size=3))
    with pytest.raises(ConfigError, match="KV heads"):
        check_degrees(
            made(num_attention_heads=12, num_key_value_heads=4, hidden_size=96),
            ParallelConfig(tp_size=6),
        )
    with pytest.raises(ConfigError, match="intermediate_size"):
        check_degrees(made(intermediate_size=97), ParallelConfig(tp_size=2))
    with pytest.raises(ConfigError, match="sp_arch tp"):
        check_degrees(model, ParallelConfig(sp_size=3, tp_size=4, arch="tp"))


def test_a_path_that_is_no_model() -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model_path("/no/such/model")
    with pytest.raises(ConfigError, match="does not exist"):
        resolve_model_path("./no-such-model")


def test_a_directory_resolves_to_itself(tmp_path: Path) -> None:
    assert resolve_model_path(str(tmp_path)) == tmp_path.resolve()
