"""Initial weights: random, except that some heads of layers 0 and 1 start by construction.

The slowest thing to find from random weights is an induction circuit: heads that look a fixed
number of tokens back, then a head that compares what went before here with what went before there
(Olsson et al., "In-context Learning and Induction Heads", 2022). So they are where training starts:

- Layer 0: its heads look 1, 2, 3 and 4 tokens back. Every embedding shares one constant component,
  queries and keys read it, and the query's is turned by the rotary angle of the offset.
- Layer 1, first KV head: its queries read tokens 0 to 3 back and its keys 1 to 4 back through the
  same random projection, so that they match where the same words went before; its first query
  head copies a quarter of the embedding of the token that it finds.

All else is random, no word or position is singled out, and everything is trained.
"""

from __future__ import annotations

import torch

from .model import Attention, ModelConfig, Qwen3

EMBEDDING_STD = 0.05
CONSTANT = 4 * EMBEDDING_STD
HIGH_FREQUENCIES = 4
LOW_FREQUENCIES = 16


@torch.no_grad()
def initialise(model: Qwen3) -> None:
    """Set every weight of ``model`` in place from torch's global generator."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            std = parameter.shape[1] ** -0.5
            if "o_proj" in name:
                std *= 0.5
            elif "down_proj" in name:
                std *= 0.1
            parameter.normal_(0, std)
        elif "q_norm" in name or "k_norm" in name:
            parameter.fill_(1.25)
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, EMBEDDING_STD)
    embedding[:, 0] = CONSTANT
    _look_back(model.model.layers[0].self_attn, model.config)
    _match(model.model.layers[0].self_attn, model.model.layers[1].self_attn, model.config)


def _look_back(attention: Attention, config: ModelConfig) -> None:
    """Head h attends to the token h + 1 before."""
    attention.q_norm.weight.fill_(1.5)
    attention.k_norm.weight.fill_(1.5)
    half = config.head_dim // 2
    pair = torch.arange(HIGH_FREQUENCIES)
    frequency = config.rope_theta ** (-2 * pair.double() / config.head_dim)
    q = attention.q_proj.weight.view(config.num_attention_heads, config.head_dim, -1)
    k = attention.k_proj.weight.view(config.num_key_value_heads, config.head_dim, -1)
    q.mul_(0.3)
    k.mul_(0.3)
    k[:, pair, 0] = 3.0
    k[:, pair + half, 0] = 0.0
    for head in range(config.num_attention_heads):
        # A query turned back by the offset meets the key that many tokens earlier best.
        angle = -(head + 1) * frequency
        q[head, pair, 0] = (3.0 * angle.cos()).float()
        q[head, pair + half, 0] = (3.0 * angle.sin()).float()


def _match(before: Attention, attention: Attention, config: ModelConfig) -> None:
    """KV head 0 and its query heads compare the words that went before."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    group = heads // kv_heads
    size = config.hidden_size
    value = before.v_proj.weight.view(kv_heads, d, size)
    out = before.o_proj.weight.view(size, heads, d)
    no_constant = torch.eye(size)
    no_constant[0, 0] = 0
    # What layer 0 writes for the token `offset` back, offset 0 being the token itself.
    written = [EMBEDDING_STD * no_constant]
    written += [out[:, h] @ value[h // group] @ no_constant for h in range(heads)]
    readers = [w.T / w.norm() * size**0.5 for w in written]
    half = d // 2
    rows = torch.arange(LOW_FREQUENCIES, half)
    rows = torch.cat((rows, rows + half))
    q = attention.q_proj.weight.view(heads, d, size)
    k = attention.k_proj.weight.view(kv_heads, d, size)
    q[:group] *= 0.1
    k[0] *= 0.1
    for offset in range(heads):
        projection = torch.randn(len(rows), size) / size**0.5
        q[:group, rows] += projection @ readers[offset]
        k[0, rows] += projection @ readers[offset + 1]
    copy = torch.linalg.qr(torch.randn(size, d)).Q.T
    copy[:, 0] = 0
    attention.v_proj.weight.view(kv_heads, d, size)[0] = copy
    attention.o_proj.weight.view(size, heads, d)[:, 0] = 0.5 * copy.T
