"""The embedded model over pages in bf16, its attention chosen superblock by superblock.

Linear layers are plain torch, partial attentions the CPU backend's over lists of pages: a method
can be tried here before the engine has it, at the engine's rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from recipes.embedded_model.model import Qwen3, rope_tables
from recipes.embedded_model.plain import load
from torch import Tensor

import accuracy_stride as stride
from accuracy_cases import CHECKPOINT
from accuracy_choose import LOG_PAGE, PAGE, LayerPages, Setup, SuperblockQueries, choose
from sps_runtime.attention.backend import PageLists, PagePool, QueryRun
from sps_runtime.attention.choose import choose_backend
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.merge_state import merge_state


@dataclass
class Counted:
    """What attention read.

    Attributes:
        read_pairs, causal_pairs: of (query block, page, KV head).
        sets: (layer, first page of a superblock) -> bool ``[kv_heads, pages before it]``, the pages
            that some block of the superblock reads.
    """

    read_pairs: int = 0
    causal_pairs: int = 0
    sets: dict[tuple[int, int], Tensor] = field(default_factory=dict)


class PagedModel:
    """The shipped checkpoint in bf16, for prompts of up to `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        model: Qwen3 = load(CHECKPOINT).requires_grad_(False).bfloat16()
        self.model, self.config = model, model.config
        self.scale = self.config.head_dim**-0.5
        self.most = -(-tokens // PAGE)
        dim = self.config.head_dim
        self.backend = choose_backend(choose_ops(), page_size=PAGE, head_dim=dim)

    def store(self) -> list[LayerPages]:
        """Empty pages for one prompt."""
        heads, dim = self.config.num_key_value_heads, self.config.head_dim
        layers = range(self.config.num_hidden_layers)
        return [LayerPages.empty(self.most, heads, dim) for _ in layers]

    def forward(
        self,
        ids: list[int],
        start: int,
        store: list[LayerPages],
        setup: Setup,
        counted: Counted,
        chunk: int = 4096,
    ) -> Tensor:
        """Hidden states of the last two chunks' tokens ``[tokens, hidden]``; earlier ones fill the
        store. Under a sparse setup `start` begins a superblock, which is then the chunk."""
        step = chunk if setup.estimator == "dense" else max(setup.settings.superblock, 1024)
        step = setup.shard or step
        hidden: list[Tensor] = []
        for first in range(start - start % step, len(ids), step):
            begin, end = max(start, first), min(first + step, len(ids))
            found = self._chunk(ids[begin:end], begin, store, setup, counted, end == len(ids))
            hidden = [*hidden[-1:], found]
        return torch.cat(hidden)

    def _chunk(
        self,
        ids: list[int],
        start: int,
        store: list[LayerPages],
        setup: Setup,
        counted: Counted,
        last: bool,
    ) -> Tensor:
        x = self.model.model.embed_tokens(torch.tensor(ids))
        tables = rope_tables(torch.arange(start, start + len(ids))[None], self.config)
        for number, layer in enumerate(self.model.model.layers):
            block = layer.self_attn
            normed = layer.input_layernorm(x).bfloat16()[None]
            q, k, v = (part[0].transpose(0, 1) for part in block.project(normed, *tables))
            pages = store[number]
            pages.write(start, k, v)
            o = self._attend(number, q.contiguous(), start, pages, setup, counted, last)
            x = x + block.o_proj(o.flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x).bfloat16())
        return self.model.model.norm(x).bfloat16()

    def _attend(
        self,
        number: int,
        q_THD: Tensor,
        start: int,
        pages: LayerPages,
        setup: Setup,
        counted: Counted,
        last: bool,
    ) -> Tensor:
        if setup.estimator == "dense":
            return self._dense(q_THD, start, pages)
        if setup.estimator == "stride":
            return stride.attend(q_THD, start, pages, setup, self.backend, self.scale)
        end = start + len(q_THD)
        pages.summarise(start // PAGE, end // PAGE, setup)
        q = q_THD.float().unflatten(1, (pages.k.shape[1], -1)).permute(1, 2, 0, 3) * self.scale
        wide = max(setup.settings.superblock, PAGE)
        kept: list[Tensor] = []
        for first in range(start, end, wide):
            queries = SuperblockQueries(first, q[:, :, first - start : first - start + wide])
            chosen = choose(queries, pages, setup)
            kept += chosen
            note(counted, number, first // PAGE, chosen)
        if last and setup.dense_last:
            kept[-1] = torch.ones_like(kept[-1])
        o, lse = self._listed(q_THD, start, pages, kept)
        if setup.settings.tail == "mean":
            o, _ = merge_state(o, lse, *mean_tail(q, start, pages, kept))
        return o.bfloat16()

    def _dense(self, q_THD: Tensor, start: int, pages: LayerPages) -> Tensor:
        end = start + len(q_THD)
        ids = torch.arange(-(-end // PAGE), dtype=torch.int32)
        run = QueryRun(0, len(q_THD), start, ids, ids * PAGE, end)
        pool = PagePool([pages.k], [pages.v], self.most)
        return self.backend.partial(q_THD, [run], pool, scale=self.scale).o.bfloat16()

    def _listed(
        self, q_THD: Tensor, start: int, pages: LayerPages, kept: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The partial over chosen pages and each block's own."""
        items, lists, at = [], [], 0
        for number, chosen in enumerate(kept):
            row = number * PAGE
            count = min(PAGE, len(q_THD) - row)
            for head, pages_of in enumerate(chosen):
                ids = torch.cat((pages_of.nonzero()[:, 0], torch.tensor([start // PAGE + number])))
                where = (row, count, start + row, at, len(ids), start + row + count, head, 1)
                items.append(where)
                lists.append(ids)
                at += len(ids)
        ids = torch.cat(lists).int()
        listed = PageLists(torch.tensor(items, dtype=torch.int32), ids, ids * PAGE, True)
        pool = PagePool([pages.k], [pages.v], self.most)
        found = self.backend.partial_lists(q_THD, listed, pool, scale=self.scale)
        return found.o, found.lse


def note(counted: Counted, layer: int, first: int, chosen: list[Tensor]) -> None:
    """Add a superblock's blocks to what was read."""
    for kept in chosen:
        counted.read_pairs += int(kept.sum()) + len(kept)
        counted.causal_pairs += kept.numel() + len(kept)
    union = torch.stack([kept[:, :first] for kept in chosen]).any(0)
    counted.sets[layer, first] = union


def mean_tail(
    q_KGTD: Tensor, start: int, pages: LayerPages, kept: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """`sparse.tail.tail_partial`, kind ``mean``, for all blocks of a chunk: o ``[tokens, heads,
    head_dim]`` and lse ``[tokens, heads]``, fp32."""
    most = kept[-1].shape[1]
    tokens = q_KGTD.shape[2]
    dropped = torch.zeros(len(kept[0]), len(kept), most, dtype=torch.bool)
    for number, chosen in enumerate(kept):
        dropped[:, number, : chosen.shape[1]] = ~chosen
    dropped = dropped.repeat_interleave(PAGE, 1)[:, None, :tokens]
    score = q_KGTD @ pages.mean_k_KND[:, None, :most].transpose(-1, -2)
    score = (score + LOG_PAGE).masked_fill_(~dropped, -torch.inf)
    top = score.amax(-1, keepdim=True).clamp_min(-1e30)
    weight = score.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    o = (weight @ pages.mean_v_KND[:, None, :most]) / total.clamp_min(1e-30)
    lse = (total.log() + top)[..., 0].masked_fill(total[..., 0] == 0, -torch.inf)
    return o.permute(2, 0, 1, 3).flatten(1, 2), lse.permute(2, 0, 1).flatten(1)
