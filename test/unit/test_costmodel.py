"""The cost model: published byte counts, a fit that recovers what made its samples, choices."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from sps_runtime.config.engine import EngineConfig
from sps_runtime.config.model import parse_model_config
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.costmodel.costs import StepCosts
from sps_runtime.costmodel.decode import interpolate, replicated_seconds
from sps_runtime.costmodel.prefill import PrefillCost, fit
from sps_runtime.costmodel.sparse import expected_density, imbalance, pays
from sps_runtime.costmodel.strategy import AttentionWork, ModelShape, cheapest, sent_bytes
from sps_runtime.scheduler.process import measured_costs
from sps_runtime.types.attention import SparseSettings
from sps_runtime.types.messages import DecodeCost, LinkCost, RankReady

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, q_heads=32, kv_heads=8, head_dim=128, linear_params=7_000_000_000
)
PROMPT = AttentionWork(8, ((131_072, 0),), 1 / 8)
LINK = LinkCost(latency_s=1e-5, bytes_per_s=1e10)


def test_bytes_are_those_of_the_design() -> None:
    """Llama-8B, 128k tokens, 8 ranks: per layer and rank, in MB."""
    assert sent_bytes("pass_kv", LLAMA_8B, PROMPT) / 1e6 == pytest.approx(470, abs=1)
    assert sent_bytes("pass_q", LLAMA_8B, PROMPT) / 1e6 == pytest.approx(1894, abs=15)
    assert sent_bytes("ulysses", LLAMA_8B, PROMPT) / 1e6 == pytest.approx(294, abs=1)


def test_few_new_tokens_beside_a_long_cache_send_queries() -> None:
    cached = AttentionWork(8, ((64, 131_072),), 1 / 8)
    assert cheapest(LLAMA_8B, cached, LINK, 1e14) == "pass_q"


def test_a_long_fresh_prompt_does_not() -> None:
    assert cheapest(LLAMA_8B, PROMPT, LINK, 1e14) == "ulysses"
    assert cheapest(LLAMA_8B, PROMPT, LinkCost(1e-5, 1e10, zero_copy=True), 1e14) == "pass_kv"


def test_kv_on_one_rank_makes_queries_wait() -> None:
    slow = LinkCost(latency_s=0.0, bytes_per_s=1e12)
    even = AttentionWork(2, ((512, 65_536),), 0.5)
    skewed = AttentionWork(2, ((512, 65_536),), 1.0)
    assert cheapest(LLAMA_8B, even, slow, 1e12) == "pass_q"
    assert cheapest(LLAMA_8B, skewed, slow, 1e12) != "pass_q"


def test_a_fit_recovers_its_coefficients() -> None:
    true = PrefillCost(2e-3, 3e-6, 4e-10)
    works = [((n, c),) for n in (64, 512, 4096, 16_384) for c in (0, 8192)]
    found = fit([(work, true.seconds(work)) for work in works])
    assert (found.a, found.b, found.c) == pytest.approx((true.a, true.b, true.c), rel=1e-6)


def test_a_fit_has_no_negative_costs() -> None:
    samples = [(((n, 0),), 1e-6 * n - 1e-5) for n in (64, 128, 512, 1024)]
    found = fit(samples)
    assert min(found.a, found.b, found.c) >= 0
    assert found.seconds(((256, 0),)) == pytest.approx(2.5e-4, rel=0.2)


def test_a_fit_refuses_what_tells_nothing() -> None:
    with pytest.raises(ValueError):
        fit([(((64, 0),), 1.0)] * 5)
    with pytest.raises(ValueError):
        fit([])


def test_long_prompts_gain_from_ranks_and_short_ones_do_not() -> None:
    costs = StepCosts(LLAMA_8B, LinkCost(2e-4, 1e11, zero_copy=True), 1e14)
    assert costs.prefill_seconds(8, [(65_536, 0)]) < costs.prefill_seconds(1, [(65_536, 0)]) / 4
    assert costs.prefill_seconds(8, [(16, 0)]) > costs.prefill_seconds(1, [(16, 0)])


def test_measured_coefficients_go_before_computed_ones() -> None:
    costs = StepCosts(LLAMA_8B, prefill={2: PrefillCost(1.0, 0.0, 0.0)})
    assert costs.prefill_seconds(2, [(5, 0)]) == 1.0
    assert costs.prefill_seconds(1, [(5, 0)]) != 1.0


def test_decode_slices_weights_when_reading_them_dominates() -> None:
    costs = StepCosts(LLAMA_8B, LinkCost(1e-6, 1e11), 1e14)
    assert costs.decode_placement((1, 1)) == "replicated"
    slow_link = StepCosts(LLAMA_8B, LinkCost(1e-2, 1e11), 1e14)
    assert slow_link.decode_placement((1, 1)) == "sharded"
    assert costs.decode_placement((4,)) == "sharded"


MEASURED = DecodeCost(
    rows=(1, 2, 4, 8, 16),
    sharded_s=(1e-3, 1e-3, 1.1e-3, 1.2e-3, 1.6e-3),
    replicated_s=(0.7e-3, 0.8e-3, 0.9e-3, 1.2e-3, 1.8e-3),
    ranks=2,
)
"""Slices are read in half the time and a sum costs 0.2 ms, more with more tokens."""


@pytest.mark.parametrize(
    ("tokens", "placement"),
    [
        ((1, 0), "replicated"),
        ((1, 1), "replicated"),
        ((3, 4), "sharded"),  # 1.1 ms of 4 rows, 1.125 of 7
        ((4, 4), "sharded"),
        ((8, 0), "sharded"),  # 1.2 ms both
        ((7, 0), "replicated"),
        ((16, 16), "sharded"),
        ((16,), "sharded"),
    ],
)
def test_decode_goes_by_the_measured_table(tokens: tuple[int, ...], placement: str) -> None:
    """Even where computed costs say otherwise."""
    for link in (LinkCost(1e-9, 1e12), LinkCost(1.0, 1e6)):
        costs = StepCosts(LLAMA_8B, link, 1e14, decode=MEASURED)
        assert costs.decode_placement(tokens) == placement


def test_fewer_ranks_than_measured_read_larger_slices() -> None:
    four = DecodeCost((1, 2), (8e-3, 8e-3), (3e-3, 3e-3), ranks=4)  # 2 ms of reading, 1 of sums
    assert replicated_seconds(four, 1, 4) == pytest.approx(3e-3)
    assert replicated_seconds(four, 1, 2) == pytest.approx(5e-3)


def test_between_and_beyond_measured_rows_costs_are_linear() -> None:
    assert interpolate((1, 2, 4), (1.0, 2.0, 3.0), 3) == 2.5
    assert interpolate((1, 2, 4), (1.0, 2.0, 3.0), 8) == 5.0
    assert interpolate((1, 2, 4), (1.0, 2.0, 1.5), 8) == 1.5  # noise makes no row free
    assert interpolate((2, 4), (1.0, 2.0), 1) == 1.0
    assert interpolate((4,), (1.0,), 9) == 1.0


def test_what_ranks_measured_reaches_the_schedulers_policies(tmp_path: Path) -> None:
    model = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
        "vocab_size": 256,
    }
    config = EngineConfig(
        model_path=str(tmp_path), dtype="bfloat16", parallel=ParallelConfig(sp_size=2)
    )
    for seconds, expected in ((1e-3, "replicated"), (3e-3, "sharded")):
        table = DecodeCost((1, 16), (2e-3, 2e-3), (seconds, seconds), ranks=2)
        ready = {
            rank: RankReady(rank, 1, LinkCost(1e-5, 1e9), table, flops_per_s=1e9 + rank)
            for rank in (0, 1)
        }
        costs = measured_costs(config, parse_model_config(model), ready)
        assert costs.decode_placement((1, 1)) == expected
        assert costs.flops_per_s == 1e9


def test_csa_pays_sooner_where_attention_costs_more() -> None:
    settings = SparseSettings()
    lengths = []
    for c in (1e-9, 1e-8, 1e-7):
        cost = PrefillCost(1e-3, 1e-4, c)
        lengths.append(next(n for n in range(1024, 1 << 20, 1024) if pays(cost, settings, n)))
        assert all(pays(cost, settings, n) for n in range(lengths[-1], 1 << 18, 4096))
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    whole = msgspec.structs.replace(settings, budget=1.0)
    assert not pays(PrefillCost(1e-3, 1e-4, 1e-7), whole, 1 << 20)


def test_superblocks_that_do_not_divide_over_ranks_leave_some_idle() -> None:
    settings, cost = SparseSettings(), PrefillCost(0.0, 1e-4, 1e-7)
    assert [imbalance(settings, n * 1024, 2) for n in (1, 2, 3, 4)] == [2.0, 1.0, 4 / 3, 1.0]
    assert imbalance(settings, 2100, 2) == pytest.approx(2 * 1076 / 2100)
    assert imbalance(settings, 1500, 2) == pytest.approx(2 * 1024 / 1500)
    assert imbalance(settings, 34 * 2048, 8) == 8 * 5 / 34
    assert pays(cost, settings, 8192, 2) and not pays(cost, settings, 8192, 64)


def test_short_prompts_are_exact_between_hosts() -> None:
    """Their blocks choose each for itself, and together nearly everything."""
    cost, settings = PrefillCost(1e-3, 1e-6, 1e-7), SparseSettings()
    short = settings.for_prompt(settings.short_to - 1)
    assert pays(cost, short, settings.short_to - 1, 2)
    assert not pays(cost, short, settings.short_to - 1, 2, hosts=2)
    assert pays(cost, settings, settings.short_to, 2, hosts=2)


@pytest.mark.parametrize(
    ("tokens", "measured"), [(1024, 1.0), (2048, 0.742), (4096, 0.435), (8192, 0.234)]
)
def test_density_is_what_ranks_report(tokens: int, measured: float) -> None:
    """Measured: the server's reports of random prompts, no tau."""
    settings = SparseSettings(budget=0.1, minimum=8)
    assert expected_density(settings, tokens) == pytest.approx(measured, abs=0.03)
