"""One rank of `slow_wire.py`, alone in a network namespace: JSON lines in, measured prefills out.

The runtime's own runner executes plans made here, whole prompts or chunks; no scheduler and no HTTP
stand between (they add milliseconds). Weights and tokens are random.
"""

from __future__ import annotations

import argparse
import json
import mmap
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from make_model import SHAPES
from sps_runtime.attention.choose import choose_backend
from sps_runtime.attention.context import AttentionContext, SparseMeans
from sps_runtime.config.model import ModelConfig, parse_model_config
from sps_runtime.distributed.collectives import all_gather
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.fences import NoFence
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.torch_dist import gloo_mailroom, tcp_store
from sps_runtime.kvcache.placement import divide, divide_units, make_placement
from sps_runtime.kvstore.pool import KVPool, KVStore
from sps_runtime.kvstore.shape import KVShape
from sps_runtime.kvstore.summaries import SummaryShape, SummaryStore
from sps_runtime.models.loader import LoadSpec, build_model, load_weights
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.runner.model_runner import ModelRunner
from sps_runtime.runner.token_board import TokenBoard, board_bytes
from sps_runtime.runner.traced import trace_means, trace_operators
from sps_runtime.scheduler.chunking import superblock_pages
from sps_runtime.sparse.dispatch import choose_operators
from sps_runtime.telemetry.timeline import open_timeline
from sps_runtime.types.attention import EXACT, AttentionSpec, SparseSettings
from sps_runtime.types.plan import Placement, SamplePlan, SequencePlan, StepPlan, Strategy
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

PAGE, PORT, PATIENCE_S, SLOTS = 64, 29400, 300.0, 4


@dataclass(frozen=True)
class Prefill:
    """One measurement.

    Attributes:
        world: ``sp``, a rank's tokens on each host, or ``tp``, a rank's heads.
        chunk: tokens of a step; 0 for the whole prompt in one.
        placement: a name of `kvcache.placement`.
        sparse: fields of `SparseSettings`; None for exact attention.
        decode: tokens generated behind the prompt, timed apart.
        decode_strategy: ``pass_q``, where queries travel, or ``pass_kv``, which pulls KV.
        decode_placement: of the linear layers while decoding.
    """

    tokens: int
    world: str = "sp"
    strategy: Strategy = "pass_kv"
    pipeline: bool = True
    chunk: int = 0
    placement: str = "zigzag"
    sparse: dict[str, Any] | None = None
    decode: int = 0
    decode_strategy: Strategy = "pass_q"
    decode_placement: Placement = "sharded"

    def plans(self, epoch: int, ranks: int, slots: int) -> list[StepPlan]:
        """The steps of the prompt; its first token is sampled in the last. Then those that decode,
        one token each."""
        group = tuple(range(ranks if self.world == "sp" else 1))
        draw = random.Random(self.tokens)
        prompt = [draw.randrange(300, 30_000) for _ in range(self.tokens)]
        free = {rank: iter(range(rank * slots, (rank + 1) * slots)) for rank in group}
        size, pages, plans = self.chunk or self.tokens, list[int](), list[StepPlan]()
        spec = EXACT
        if self.sparse is not None:
            spec = AttentionSpec("csa", SparseSettings(**self.sparse).for_prompt(self.tokens))
        for start in range(0, self.tokens, size):
            count = min(size, self.tokens - start)
            pages += [next(free[rank]) for rank in self._deal(spec, start, start + count, group)]
            last = start + count == self.tokens
            told = prompt[start : start + count]
            sequence = _sequence(start, told, pages, last, spec)
            step = StepPlan(epoch + len(plans), group, (sequence,), strategy=self.strategy)
            plans.append(replace(step, phase="prefill"))
        for position in range(self.tokens, self.tokens + self.decode):
            if position % PAGE == 0:
                pages.append(next(free[pages[-1] // slots]))
            sequence = _sequence(position, prompt[:1], pages, True, EXACT)
            step = StepPlan(epoch + len(plans), group, (sequence,), self.decode_placement)
            plans.append(replace(step, strategy=self.decode_strategy, phase="decode"))
        return plans

    def _deal(
        self, spec: AttentionSpec, start: int, stop: int, group: tuple[int, ...]
    ) -> list[int]:
        """Owners of the pages of new tokens; under csa those of a superblock stay together."""
        place, room = make_placement(self.placement), dict.fromkeys(group, stop)
        if spec.sparse is not None:
            sizes = superblock_pages(spec.sparse, start, stop, PAGE)
            return divide_units(sizes, room, place)
        quotas = divide(-(-stop // PAGE) - -(-start // PAGE), room)
        assert quotas is not None
        return place(quotas)


def _sequence(
    start: int, tokens: list[int], pages: list[int], sample: bool, spec: AttentionSpec
) -> SequencePlan:
    return SequencePlan(
        slot=0,
        start=start,
        count=len(tokens),
        tokens=pack_ids(tokens),
        pages=pack_ids(pages),
        sample=SamplePlan(SamplingParams(temperature=0.0)) if sample else None,
        attention=spec,
        summaries_from=start,
    )


class Rank:
    """Runners of both worlds over one gloo group, with and without the pipeline."""

    def __init__(
        self, rank: int, addresses: Sequence[str], layers: int, tokens: int, trace: str = ""
    ) -> None:
        self._timeline = open_timeline(trace, rank, f"rank-{rank}")
        self.rank, self.size = rank, len(addresses)
        self.config = parse_model_config({**SHAPES["gqa8"], "num_hidden_layers": layers})
        self.slots = -(-tokens // PAGE) + 2
        store = tcp_store(addresses[0], PORT, self.size, master=rank == 0)
        self._traffic = Traffic()
        address = addresses[rank]
        self._mailroom = gloo_mailroom(
            store, rank, self.size, self._traffic, address=address, timeout_s=PATIENCE_S
        )
        self._ops = choose_ops("auto", 1)
        self._operators = trace_operators(self._ops.operators, self._timeline)
        self._runners: dict[tuple[str, bool], ModelRunner] = {}
        self._epoch = 1

    def warm(self) -> None:
        """Make the runners ready: weights are drawn, and pages of memory touched."""
        for world in ("sp", "tp"):
            self.run(Prefill(512, world=world))

    def run(self, ask: Prefill) -> dict[str, Any]:
        """Prefill, and say when it began and ended, and what crossed; then decode, and say how long
        a token took."""
        runner = self._runner(ask.world, ask.pipeline)
        plans = ask.plans(self._epoch, self.size, self.slots)
        self._epoch += len(plans)
        everyone = self._mailroom.group(tuple(range(self.size)))
        all_gather(everyone, torch.ones(1), [1] * self.size, "control")
        began = time.monotonic()
        results = [runner.execute(plan) for plan in plans if plan.phase == "prefill"]
        ended = time.monotonic()
        self._timeline.flush()
        decode_s = self._decode(runner, [plan for plan in plans if plan.phase == "decode"])
        counters = [result.counters for result in results]
        sparse = [one for result in results for one in result.sparse]
        counts = {
            name: sum(getattr(one, name) for one in sparse)
            for name in ("read_pairs", "causal_pairs", "fetched_units", "remote_units")
        }
        fields = ("sent_bytes", "linear_bytes", "physical_bytes", "exposed_s", "compute_s")
        totals = {name: sum(getattr(c, name) for c in counters) for name in fields}
        return {"began": began, "ended": ended, "decode_s": decode_s, **totals, **counts}

    def _decode(self, runner: ModelRunner, plans: list[StepPlan]) -> float:
        """Seconds a token, the median."""
        times = [0.0]
        for plan in plans:
            began = time.monotonic()
            runner.execute(plan)
            times.append(time.monotonic() - began)
        return statistics.median(times[1:] or times)

    def _runner(self, world: str, pipeline: bool) -> ModelRunner:
        key = (world, pipeline)
        if key not in self._runners:
            other = self._runners.get((world, not pipeline))
            self._runners[key] = self._make(world, pipeline, other)
        return self._runners[key]

    def _make(self, world: str, pipeline: bool, other: ModelRunner | None) -> ModelRunner:
        sp, tp = (self.size, 1) if world == "sp" else (1, self.size)
        mesh = Mesh(sp, tp, self.rank)
        board = TokenBoard(mmap.mmap(-1, board_bytes(SLOTS)))
        if other is not None:
            model, means = other._model, other._means
        else:
            spec = LoadSpec(Path(), "bfloat16", "dummy", tp_size=tp)
            arena = load_weights(self.config, spec, ops=self._operators)
            model = build_model(self.config, arena, mesh.tp_rank, ops=self._operators)
            means = self._means(mesh)
        vocab = self.config.vocab_size
        return ModelRunner(
            model,
            vocab,
            means,
            board,
            "ntp",
            PATIENCE_S,
            self._timeline,
            pipeline,
        )

    def _means(self, mesh: Mesh) -> AttentionContext:
        shape = kv_shape(self.config, mesh.tp_size, self.slots)
        pools: list[KVPool | None] = [None] * mesh.sp_size
        pools[mesh.sp_rank] = KVPool.private(shape, torch.bfloat16)
        backend = choose_backend(self._ops, page_size=PAGE, head_dim=shape.head_dim)
        means = AttentionContext(
            mesh=mesh,
            mailroom=self._mailroom,
            store=KVStore(pools, mesh.sp_rank),
            fence=NoFence(),
            backend=backend,
            traffic=self._traffic,
            hosts=tuple(range(mesh.sp_size)),
            ops=self._operators,
            sparse=self._sparse(shape, mesh),
            windows=self.config.layer_windows,
        )
        return trace_means(means, self._timeline)

    def _sparse(self, shape: KVShape, mesh: Mesh) -> SparseMeans:
        operators = choose_operators(self._ops.kernels)
        nbytes = operators.summary_nbytes(PAGE, shape.head_dim, shape.itemsize)
        room = SummaryShape(shape.layers, shape.slots, shape.kv_heads, nbytes)
        pools = [room.private() for _ in range(mesh.sp_size)]
        return SparseMeans(operators, SummaryStore(pools, mesh.sp_rank))


def kv_shape(config: ModelConfig, tp: int, slots: int) -> KVShape:
    """A rank's pool in bf16."""
    return KVShape(
        layers=config.num_layers,
        slots=slots,
        kv_heads=config.kv_heads_per_rank(tp),
        page_size=PAGE,
        head_dim=config.head_dim,
        itemsize=2,
        scale_bytes=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rank", type=int)
    parser.add_argument("addresses")
    parser.add_argument("layers", type=int)
    parser.add_argument("tokens", type=int)
    parser.add_argument("trace", nargs="?", default="")
    told = parser.parse_args()
    torch.set_num_threads(1)
    rank = Rank(told.rank, told.addresses.split(","), told.layers, told.tokens, told.trace)
    rank.warm()
    print(json.dumps({"ready": told.rank}), flush=True)
    for line in sys.stdin:
        print(json.dumps(rank.run(Prefill(**json.loads(line)))), flush=True)


if __name__ == "__main__":
    main()
