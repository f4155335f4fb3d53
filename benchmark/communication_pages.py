"""The pages that the embedded model's query blocks choose, and operators that choose them again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from communication_ranks import DTYPE, PAGE
from gate_capture import SEED, EmbeddedModel
from sps_runtime.attention.choose import choose_backend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.attention.sequence_parallel.build import sequence_attention
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import NoFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.sparse.dispatch import choose_operators
from sps_runtime.sparse.operators import Chosen, QueryBlocks, SparseOperators, SummaryPool
from sps_runtime.sparse.torch_operators import TorchOperators
from sps_runtime.types.attention import AttentionSpec, SparseSettings
from sps_runtime.types.plan import SamplePlan, SequencePlan, StepPlan
from sps_runtime.types.sampling import SamplingParams

KV_HEADS, HEAD_DIM, LAYERS = 2, 64, 4


def page_sets(
    model: EmbeddedModel, task: str, tokens: int, settings: SparseSettings, folder: Path | None
) -> Tensor:
    """What the runtime's own block CSA chooses on one rank: bool ``[layers, kv_heads, query blocks,
    pages]``, own pages included. A longer prompt loses its middle, so that it has `tokens`.

    Args:
        folder: kept there for the next run.
    """
    known = hashlib.sha256(repr(settings).encode()).hexdigest()[:12]
    path = folder / f"pages_{task}_{tokens}_{known}.npy" if folder else None
    if path and path.exists():
        return torch.from_numpy(np.load(path))
    ids = model.prompts(task, int(tokens * 1.15), 1, SEED)[0].prompt
    if len(ids) < tokens:
        raise ValueError(f"the prompt has {len(ids)} tokens, not {tokens}")
    prefill = _Prefill(tokens, AttentionSpec("csa", settings))
    model.forward([*ids[: tokens - CHAT], *ids[-CHAT:]], prefill.attend, [], 0)
    sets = torch.stack(prefill.sets)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, sets.numpy())
    return sets


CHAT = 256
"""Last tokens of a prompt, its question among them, that stay."""


class _Prefill:
    """Attention of the embedded model by the engine, on one rank, which notes what is chosen."""

    def __init__(self, tokens: int, attention: AttentionSpec) -> None:
        pages = -(-tokens // PAGE)
        sequence = SequencePlan(
            slot=0,
            start=0,
            count=tokens,
            tokens=bytes(4 * tokens),
            pages=np.arange(pages, dtype=np.int32).tobytes(),
            sample=SamplePlan(SamplingParams(temperature=0.0)),
            attention=attention,
        )
        plan, traffic, ops = StepPlan(1, (0,), (sequence,)), Traffic(), choose_ops("auto", 1)
        self._noting = Noting(choose_operators(ops.kernels, 1))
        shape = KVShape(LAYERS, pages, KV_HEADS, PAGE, HEAD_DIM, DTYPE.itemsize)
        nbytes = self._noting.summary_nbytes(PAGE, HEAD_DIM, DTYPE.itemsize)
        room = SummaryShape(LAYERS, pages, KV_HEADS, nbytes)
        context = AttentionContext(
            mesh=Mesh(1, 1, 0),
            mailroom=ThreadWorld(1).mailroom(0, traffic),
            store=KVStore([KVPool.private(shape, DTYPE)], 0),
            fence=NoFence(),
            backend=choose_backend(ops, page_size=PAGE, head_dim=HEAD_DIM),
            traffic=traffic,
            hosts=(0,),
            ops=ops.operators,
            sparse=SparseMeans(self._noting, SummaryStore([room.private()], 0)),
        )
        layout = ShardLayout(plan, page_size=PAGE, pages_per_rank=pages)
        self._attention = sequence_attention(plan, layout, context)
        self._pages = pages

    @property
    def sets(self) -> list[Tensor]:
        """By layer."""
        return [dense_sets(chosen, self._pages) for chosen in self._noting.chosen]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        q, k, v = (x.to(DTYPE).contiguous() for x in (q, k, v))
        out: Tensor = self._attention(layer, q, k, v, scale=HEAD_DIM**-0.5)
        return out.float()


class Noting:
    """Operators that keep what was chosen, layer after layer."""

    def __init__(self, operators: SparseOperators) -> None:
        self._operators = operators
        self.chosen: list[Chosen] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._operators, name)

    def choose(self, *arguments: object) -> Chosen:
        self.chosen.append(self._operators.choose(*arguments))  # type: ignore[arg-type]
        return self.chosen[-1]


def dense_sets(chosen: Chosen, pages: int) -> Tensor:
    """bool ``[kv_heads, query blocks, pages]`` of a prompt chosen as a whole."""
    heads = int(chosen.items[:, 6].max()) + 1
    sets = torch.zeros(heads, len(chosen.items) // heads, pages, dtype=torch.bool)
    for item, (_, _, _, begin, count, _, head, _) in enumerate(chosen.items.tolist()):
        at = chosen.page_positions[begin : begin + count].long() // PAGE
        sets[head, item // heads, at] = True
    return sets


class CarriedOver(TorchOperators):
    """Operators that choose given sets, ``[kv_heads, query blocks, pages]``, whatever queries say.
    Nothing is summarised, and nothing stands for what was dropped: that is computed, not sent."""

    def __init__(self, sets: Tensor) -> None:
        self._sets = sets

    def summarise(self, k_SKBD: Tensor, v_SKBD: Tensor, slots: Tensor, out_SKX: Tensor) -> None:
        pass

    def tail(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        chosen: Chosen,
        summaries: SummaryPool,
        scale: float,
        onto: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros(q_THD.shape), torch.full(q_THD.shape[:2], -torch.inf)
        return nothing if onto is None else onto

    def choose(
        self,
        q_THD: Tensor,
        queries: QueryBlocks,
        k_pools: Sequence[Tensor],
        summaries: SummaryPool,
        settings: SparseSettings,
        scale: float,
    ) -> Chosen:
        items, positions, ids, dropped, dropped_ids = [], [], [], [], []
        entries = gone = causal = 0
        for row, rows, position, _, first, kv_len in queries.blocks.tolist():
            block = position // PAGE
            for head, sets in enumerate(self._sets[:, block, : block + 1]):
                kept, lost = sets.nonzero()[:, 0], (~sets).nonzero()[:, 0]
                items.append((row, rows, position, entries, len(kept), kv_len, head, 1))
                dropped.append((gone, len(lost)))
                positions.append(kept.to(torch.int32) * PAGE)
                ids.append(queries.page_ids[first + kept])
                dropped_ids.append(queries.page_ids[first + lost])
                entries, gone, causal = entries + len(kept), gone + len(lost), causal + block + 1
        nothing = torch.zeros(0, dtype=torch.int32)
        return Chosen(
            items=torch.tensor(items, dtype=torch.int32).reshape(-1, 8),
            page_ids=torch.cat([nothing, *ids]),
            page_positions=torch.cat([nothing, *positions]),
            dropped=torch.tensor(dropped, dtype=torch.int32).reshape(-1, 2),
            dropped_ids=torch.cat([nothing, *dropped_ids]),
            read_pairs=entries,
            causal_pairs=causal,
        )
