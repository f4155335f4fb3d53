"""A whole model on one rank: time to the first token, time of a decode step, tables of costs."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gpu_rank import LLAMA_8B, TINY, LocalRank, forced
from gpu_timing import Budget, Ceilings, seconds_of
from sps_runtime.config.model import ModelConfig
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.runner.measure import linear_part

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192)


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        lengths: of prompts.
        decodes: (sequences, tokens of each) of decode steps.
        chunk: new tokens of a step; a multiple of superblocks.
        pages: of the pool.
    """

    config: ModelConfig
    lengths: tuple[int, ...]
    decodes: tuple[tuple[int, int], ...]
    chunk: int
    pages: int
    steps: int


FULL = Plan(
    LLAMA_8B,
    (8192, 32768, 131072),
    ((1, 8192), (1, 32768), (1, 131072), (8, 8192), (32, 4096)),
    32768,
    1200,
    24,
)
QUICK = Plan(TINY, (512, 2048), ((1, 256), (3, 128)), 1024, 40, 3)


def linear_flops(config: ModelConfig, tokens: int) -> float:
    """Of the products of all layers' weights; the head sees one row."""
    attention = config.hidden_size * config.head_dim * 2 * (config.num_heads + config.num_kv_heads)
    layer = attention + 3 * config.hidden_size * config.intermediate_size
    return 2.0 * tokens * config.num_layers * layer


def attention_flops(config: ModelConfig, tokens: int) -> float:
    """Of causal pairs."""
    return 2.0 * tokens**2 * config.num_layers * config.num_heads * config.head_dim


def first_tokens(
    rank: LocalRank, plan: Plan, top: Ceilings, budget: Budget
) -> Iterator[tuple[str, float]]:
    """Exact beside forced page sets of a tenth, in turns (exact, csa, csa, exact); random weights,
    so nothing here is about answers."""
    rng = random.Random(0)
    setups = {"exact": None, "csa_10": forced(0.1)}
    warm = [rng.randrange(plan.config.vocab_size) for _ in range(plan.lengths[0])]
    for name, attention in setups.items():
        if name == "exact" or rank.means.sparse is not None:
            _first_token(rank, warm, attention, plan.chunk)
    for length in plan.lengths:
        times: dict[str, list[float]] = {name: [] for name in setups}
        for name in ("exact", "csa_10", "csa_10", "exact"):
            if budget.over or (name != "exact" and rank.means.sparse is None):
                continue
            ids = [rng.randrange(plan.config.vocab_size) for _ in range(length)]
            took, density = _first_token(rank, ids, setups[name], plan.chunk)
            times[name].append(took)
            if density is not None:
                yield f"density_csa_10_{length}", density
        for name, found in times.items():
            if found:
                yield f"ttft_s_{name}_{length}", min(found)
                yield f"ttft_spread_{name}_{length}", max(found) / min(found)
        if times["exact"]:
            flops = linear_flops(plan.config, length) + attention_flops(plan.config, length)
            yield f"exact_share_of_gemm_{length}", flops / min(times["exact"]) / top.flops_per_s
        if times["exact"] and times["csa_10"]:
            ratio = min(times["exact"]) / min(times["csa_10"])
            yield f"ttft_ratio_exact_over_csa_10_{length}", ratio


def _first_token(
    rank: LocalRank, ids: list[int], attention: object, chunk: int
) -> tuple[float, float | None]:
    sequence = rank.open(0, len(ids))
    try:
        chosen = {} if attention is None else {"attention": attention}
        took, results = rank.prefill(sequence, ids, chunk=chunk, **chosen)
    finally:
        rank.close(sequence)
    counts = [counted for result in results for counted in result.sparse]
    causal = sum(counted.causal_pairs for counted in counts)
    return took, sum(counted.read_pairs for counted in counts) / causal if causal else None


def decode_steps(
    rank: LocalRank, plan: Plan, top: Ceilings, budget: Budget, label: str
) -> Iterator[tuple[str, float]]:
    """Median seconds of a step of some sequences, mean seconds of steps launched ahead of their
    tokens, and the share of the memory ceiling: weights and KV read once. KV is whatever lies in
    the pages: attention's time does not depend on it."""
    config = plan.config
    weights = linear_flops(config, 1) + 2.0 * config.vocab_size * config.hidden_size  # 2 bytes each
    for rows, length in plan.decodes:
        if budget.over:
            return
        sequences = [rank.open(slot, length + plan.steps + 4) for slot in range(rows)]
        for sequence in sequences:
            sequence.length = length
        tokens, seconds = [1] * rows, []
        for _ in range(plan.steps):
            took, tokens = rank.decode(sequences, tokens)
            seconds.append(took)
        for sequence in sequences:
            sequence.length = length
        ahead = rank.decode_ahead(sequences, tokens, plan.steps).step_s
        for sequence in sequences:
            rank.close(sequence)
        median = statistics.median(seconds[len(seconds) // 4 :])
        nbytes = weights + rows * length * rank.shape.token_bytes * config.num_layers
        for name, took in (("decode", median), ("decode_ahead", ahead)):
            share = nbytes / took / top.bytes_per_s
            yield f"{name}_ms_{label}_{rows}x{length}", 1e3 * took
            yield f"{name}_share_of_memory_{label}_{rows}x{length}", share


def cost_tables(rank: LocalRank, plan: Plan, budget: Budget) -> Iterator[tuple[str, float]]:
    """What `costmodel` asks of a device: a layer's linear part by rows, whole and as if a second
    rank had half of it."""
    layer, group = rank.model.layers[0], rank.means.mailroom.group((0,))
    links = GroupLinks(group, group, group)
    linear = place("sharded", "ntp", links, (0,), rank.means.ops)
    for rows in ROWS:
        if budget.over or rows > plan.chunk:
            return
        x_TD = torch.randn(rows, plan.config.hidden_size, device=rank.device).to(rank.model.dtype)
        with torch.inference_mode():
            took = seconds_of(lambda x=x_TD: linear_part(layer, x, linear), rank.device, rounds=10)
        yield f"layer_linear_us_{rows}", 1e6 * took
