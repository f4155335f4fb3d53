"""Run a checkpoint in plain torch: load it, and check or make answers with a KV cache."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from .model import ModelConfig, Qwen3, rope_tables


def load(checkpoint: Path) -> Qwen3:
    """The model of a Hugging Face directory that ``export`` wrote, in fp32."""
    values = json.loads((checkpoint / "config.json").read_text())
    config = ModelConfig(**{f.name: values[f.name] for f in fields(ModelConfig)})
    model = Qwen3(config)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


@dataclass
class Cache:
    """Keys and values of the tokens so far, one (1, N, T, d) pair for each layer."""

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.layers[0][0].shape[2] if self.layers else 0


def forward(model: Qwen3, ids: list[int], cache: Cache) -> tuple[Tensor, Cache]:
    """Hidden states (T, D) of new tokens after a cache, and the longer cache."""
    start = cache.tokens
    position = torch.arange(start, start + len(ids))[None]
    cos, sin = rope_tables(position, model.config)
    x = model.model.embed_tokens(torch.tensor([ids]))
    longer = Cache()
    mask = None
    if start:
        mask = torch.ones(len(ids), start + len(ids), dtype=torch.bool).tril(start)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        q, k, v = attention.project(layer.input_layernorm(x), cos, sin)
        if start:
            k = torch.cat((cache.layers[index][0], k), dim=2)
            v = torch.cat((cache.layers[index][1], v), dim=2)
        longer.layers.append((k, v))
        group = attention.heads // attention.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x)[0], longer


@torch.inference_mode()
def matches(model: Qwen3, pairs: list[tuple[list[int], list[int]]]) -> list[bool]:
    """For each (prompt, answer): would greedy decoding give exactly this answer?

    What the prompts share at their beginning is computed once.
    """
    shortest = min(len(prompt) for prompt, _ in pairs)
    shared = 0
    if len(pairs) > 1:
        columns = zip(*(prompt[: shortest - 1] for prompt, _ in pairs), strict=True)
        for column in columns:
            if len(set(column)) > 1:
                break
            shared += 1
    results = []
    with torch.autocast("cpu", torch.bfloat16):
        cache = forward(model, pairs[0][0][:shared], Cache())[1] if shared else Cache()
        for prompt, answer in pairs:
            hidden, _ = forward(model, (prompt + answer)[shared:-1], cache)
            logits = model.head(hidden[-len(answer) :])
            results.append(logits.argmax(-1).tolist() == answer)
    return results


@torch.inference_mode()
def generate(model: Qwen3, prompt: list[int], stop: set[int], limit: int = 96) -> list[int]:
    """Greedy tokens after ``prompt``, without the stop token."""
    made: list[int] = []
    with torch.autocast("cpu", torch.bfloat16):
        hidden, cache = forward(model, prompt, Cache())
        while len(made) < limit:
            token = int(model.head(hidden[-1]).argmax())
            if token in stop:
                break
            made.append(token)
            hidden, cache = forward(model, [token], cache)
    return made
