"""Queries, keys and values of the embedded model over its own documents, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from recipes.embedded_model.evaluate import Case, test_cases
from recipes.embedded_model.model import Qwen3, rope_tables
from recipes.embedded_model.plain import load
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

CHECKPOINT = Path(__file__).resolve().parents[1] / "python/sps_runtime/assets/embedded"
SEED = "gate0"
Attend = Callable[[int, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Prompt:
    """Token ids of a chat up to the answer, and of the answer with its end of turn."""

    prompt: list[int]
    answer: list[int]


class EmbeddedModel:
    """The shipped checkpoint in fp32, its attention left to whoever asks."""

    def __init__(self) -> None:
        self.model: Qwen3 = load(CHECKPOINT).requires_grad_(False)
        self.tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
        self.layers = self.model.config.num_hidden_layers
        self.scale = self.model.config.head_dim**-0.5

    def prompts(self, task: str, length: int, count: int, seed: str) -> list[Prompt]:
        """Questions at the end of one document of about `length` tokens."""
        return [self._prompt(case) for case in test_cases(task, length, "end", count, seed)[0]]

    def _prompt(self, case: Case) -> Prompt:
        chat = f"<|im_start|>user\n{case.message}<|im_end|>\n<|im_start|>assistant\n"
        answer = f"{case.question.answer}<|im_end|>"
        return Prompt(self.tokenizer.encode(chat).ids, self.tokenizer.encode(answer).ids)

    def forward(
        self, ids: list[int], attend: Attend, cache: list[tuple[Tensor, Tensor]], start: int
    ) -> Tensor:
        """Hidden states ``[1, tokens, hidden]`` of the tokens from `start` on.

        `attend` gets (layer, q_THD, k_SKD, v_SKD, start), with the keys of the cache before the new
        ones, and gives o_THD. The cache's entries are replaced by longer ones.
        """
        x = self.model.model.embed_tokens(torch.tensor([ids[start:]]))
        cos, sin = rope_tables(torch.arange(start, len(ids))[None], self.model.config)
        for number, layer in enumerate(self.model.model.layers):
            block = layer.self_attn
            projected = block.project(layer.input_layernorm(x), cos, sin)
            q, k, v = (part[0].transpose(0, 1) for part in projected)
            if start:
                k = torch.cat((cache[number][0][:start], k))
                v = torch.cat((cache[number][1][:start], v))
            cache[number : number + 1] = [(k, v)]
            x = x + block.o_proj(attend(number, q, k, v, start).flatten(1)[None])
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.model.norm(x)

    def capture(self, ids: list[int], layers: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(q_THD, k_SKD, v_SKD) of the first layers, rope applied, attention dense."""
        found: list[tuple[Tensor, Tensor, Tensor]] = []

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
            found.append((q.contiguous(), k.contiguous(), v.contiguous()))
            return dense(q, k, v, start) if layer + 1 < layers else torch.zeros_like(q)

        self.forward(ids, attend, [], 0)
        return found[:layers]

    def captured(
        self, task: str, length: int, layers: int, folder: Path | None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """`capture` of the first question about a document, kept in `folder` for the next run."""
        path = folder / f"{task}_{length}.safetensors" if folder else None
        if path and path.exists():
            tensors = load_file(path)
            return [tuple(tensors[f"{n}{i}"] for n in "qkv") for i in range(layers)]  # type: ignore
        prompt = self.prompts(task, length, 1, SEED)[0]
        found = self.capture(prompt.prompt + prompt.answer, layers)
        if path and layers == self.layers:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {
                    f"{n}{i}": t
                    for i, qkv in enumerate(found)
                    for n, t in zip("qkv", qkv, strict=True)
                },
                path,
            )
        return found


def dense(q_THD: Tensor, k_SKD: Tensor, v_SKD: Tensor, start: int) -> Tensor:
    """Causal attention of rows from `start` on."""
    group = q_THD.shape[1] // k_SKD.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_SKD, v_SKD))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    mask = None
    if start:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(start)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return out[0].transpose(0, 1)
