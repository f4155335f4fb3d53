"""benchmark/make_model.py writes what transformers and the runtime read alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmark.make_model import SHAPES, make_model
from test.numerics.helpers.one_rank import logits_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from sps_runtime.config.model import load_model_config, parse_model_config
from sps_runtime.models.loader import LoadSpec, load_model

TINY = sorted(name for name in SHAPES if name.startswith("tiny"))


@pytest.mark.parametrize("shape", TINY)
def test_transformers_computes_the_same(shape: str, tmp_path: Path) -> None:
    make_model(shape, tmp_path, dtype="float32", shards=2 if shape == "tiny-llama" else 1)
    config = load_model_config(tmp_path)
    assert config.eos_token_ids == (0, 2)
    tokens = AutoTokenizer.from_pretrained(tmp_path).encode("Where is the key? Über dort. " * 9)
    assert 130 < len(tokens) < 300, "longer than tiny-mistral's window"
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    with torch.inference_mode():
        expected = reference(torch.tensor([tokens])).logits[0]
        found = logits_of(load_model(config, LoadSpec(tmp_path)), tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_every_id_has_a_text(tmp_path: Path) -> None:
    make_model("tiny-qwen3", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == SHAPES["tiny-qwen3"]["vocab_size"]
    assert all(tokenizer.convert_ids_to_tokens(id_) for id_ in range(len(tokenizer)))
    text = "A long answer\nwith ünicode and 12,345."
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_the_big_shapes_are_what_they_are_called() -> None:
    half, gqa8 = (parse_model_config(SHAPES[name]) for name in ("0.5b", "gqa8"))
    assert (half.num_layers, half.hidden_size, half.num_heads, half.num_kv_heads) == (
        24,
        896,
        14,
        2,
    )
    assert (half.intermediate_size, half.vocab_size, half.head_dim) == (4864, 32000, 64)
    assert half.qkv_bias and not half.tie_word_embeddings
    assert (gqa8.num_layers, gqa8.hidden_size, gqa8.num_heads, gqa8.num_kv_heads) == (
        8,
        2048,
        32,
        8,
    )
