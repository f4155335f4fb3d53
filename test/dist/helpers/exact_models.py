"""Tiny random models whose heads divide by two and not by three: what exactness is shown on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sps_runtime.config.model import ModelConfig, load_model_config
from sps_runtime.models.arena import Arena
from sps_runtime.models.loader import LoadSpec, load_weights
from sps_runtime.ops.dispatch import choose_ops

SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 120,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 299,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
KINDS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 6, "head_dim": 16}),
    "window": (MistralConfig, MistralForCausalLM, {"sliding_window": 37}),
    "ties": (LlamaConfig, LlamaForCausalLM, {}),
}


@dataclass(frozen=True)
class ExactModel:
    """A model directory, its configuration, and transformers' own model of it."""

    directory: Path
    config: ModelConfig
    oracle: PreTrainedModel
    _keep: TemporaryDirectory[str]

    @cache  # noqa: B019  (as many as kinds of models)
    def arena(self, tp: int = 1, dtype: str = "float32", ops: str = "auto") -> Arena:
        """Weights as the operators `ops` want them, with columns as two ranks would share them."""
        spec = LoadSpec(self.directory, dtype, tp_size=tp, sp_size=2)
        return load_weights(self.config, spec, ops=choose_ops(ops).operators)


@cache
def exact_model(kind: str) -> ExactModel:
    """Every parameter random, seeded by the kind; ``ties`` has every head row twice, so that each
    token's margin to the next is rounding alone."""
    config_class, model_class, changes = KINDS[kind]
    config = config_class(**{**SHAPE, **changes})
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(kind.encode()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.12 * noise)
        if kind == "ties":
            head = model.lm_head.weight
            head[150:299] = head[:149]
    keep = TemporaryDirectory(prefix="sps-exact-")
    model.save_pretrained(keep.name)
    return ExactModel(Path(keep.name), load_model_config(keep.name), model, keep)


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(SHAPE["vocab_size"], (length,), generator=generator).tolist()
