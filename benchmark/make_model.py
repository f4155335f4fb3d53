"""Write a model directory with random weights: `python benchmark/make_model.py 0.5b DIR`.

For speed questions only: random weights attend almost uniformly and say nothing. The directory is
an ordinary Hugging Face one (config.json, generation_config.json, safetensors, tokenizer.json, chat
template), so everything that reads checkpoints can read it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sps_runtime.config.model import parse_model_config
from sps_runtime.models.checkpoint import INDEX, RandomWeights
from sps_runtime.models.layout import Part, plan_layout

COMMON: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "max_position_embeddings": 131072,
    "bos_token_id": None,
    "eos_token_id": 2,
}
TINY: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 8192,
}
SHAPES: Mapping[str, dict[str, Any]] = {
    # Qwen2.5-0.5B's, with a smaller vocabulary and an output matrix of its own.
    "0.5b": {
        **COMMON,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "use_sliding_window": False,
    },
    # Many KV heads beside the hidden dim, few layers: attention weighs more. TinyLlama's widths.
    "gqa8": {
        **COMMON,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
    "tiny-llama": {
        **TINY,
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 1024,
        },
    },
    "tiny-mistral": {
        **TINY,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 100,
    },
    "tiny-qwen2": {
        **TINY,
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
    },
    "tiny-qwen3": {
        **TINY,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
    },
}
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_model(
    name: str, directory: str | Path, *, seed: int = 0, dtype: str = "bfloat16", shards: int = 1
) -> Path:
    """Write the model of a shape in `SHAPES` and return its directory (made if need be)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[name], "torch_dtype": dtype}
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"eos_token_id": [0, 2]})
    _write_tokenizer(directory, config["vocab_size"])
    _write_weights(directory, config, seed, dtype, shards)
    return directory


def _write_weights(
    directory: Path, config: dict[str, Any], seed: int, dtype: str, shards: int
) -> None:
    torch_dtype: torch.dtype = getattr(torch, dtype)
    layout = plan_layout(parse_model_config(config), 1, torch_dtype)
    parts: list[Part] = [part for entry in layout.entries.values() for part in entry.parts]
    size = -(-len(parts) // shards)
    weights, weight_map = RandomWeights(seed), {}
    for number in range(shards):
        file = "model.safetensors"
        if shards > 1:
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        mine = parts[number * size : (number + 1) * size]
        tensors = {p.source: weights.read(p.source, p.source_shape).to(torch_dtype) for p in mine}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if shards > 1:
        _write_json(directory / INDEX, {"metadata": {}, "weight_map": weight_map})


def _write_tokenizer(directory: Path, vocab_size: int) -> None:
    """Byte-level BPE whose merges are letter pairs, then pairs of pairs: every id has a text."""
    names = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = list(islice(_merges(), vocab_size - len(names)))
    names += [left + right for left, right in merges]
    if len(names) != vocab_size:
        raise ValueError(f"a vocabulary of {vocab_size} cannot be made, {len(names)} at most")
    vocab = {token: index for index, token in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[2],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    _write_json(directory / "tokenizer_config.json", settings)


def _merges() -> Iterator[tuple[str, str]]:
    yield from product(ascii_lowercase, repeat=2)
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    yield from product(pairs, repeat=2)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files to write")
    told = parser.parse_args()
    make_model(
        told.shape, told.directory, seed=told.seed, dtype=told.dtype, shards=max(1, told.shards)
    )
    print(told.directory)


if __name__ == "__main__":
    main()
