"""Write a training run's weights as a Hugging Face checkpoint in bf16.

python -m recipes.embedded_model.export --run DIR --out python/sps_runtime/assets/embedded
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .model import ModelConfig
from .tokenizer import write_tokenizer


def checkpoint_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, object]:
    """The config.json of a Qwen3 checkpoint."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **config.to_dict(),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def export(run: Path, out: Path) -> None:
    """Read RUN/state.safetensors and RUN/tokenizer.json, write the package to ``out``."""
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    with safe_open(run / "state.safetensors", "pt") as file:
        names = [name for name in file.keys() if name.startswith("model/")]  # noqa: SIM118
        tensors = {n.removeprefix("model/"): file.get_tensor(n).to(torch.bfloat16) for n in names}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    size = tensors["model.embed_tokens.weight"].shape[0]
    config = checkpoint_config(ModelConfig(vocab_size=size), tokenizer)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {
        "bos_token_id": None,
        "do_sample": False,
        "eos_token_id": [
            tokenizer.token_to_id("<|im_end|>"),
            tokenizer.token_to_id("<|endoftext|>"),
        ],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(tokenizer, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.run, arguments.out)


if __name__ == "__main__":
    main()
