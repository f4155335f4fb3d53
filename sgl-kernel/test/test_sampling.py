"""Sampling against a sorted float64 reference, per instruction set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sps_kernel import largest, sample

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])


def kept_ref(logits, temperature, top_k, top_p, min_p):
    """Probabilities of the kept tokens, by index, and how near each filter's edge was."""
    x = logits.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    p = torch.softmax(x / temperature, 0)
    order = torch.argsort(x, descending=True, stable=True)
    if top_k > 0:
        order = order[:top_k]
    front = p[order] / p[order].sum()
    before = front.cumsum(0) - front
    edge = float((before - top_p).abs().min()) if top_p < 1 else 1.0
    order = order[before < top_p]
    if min_p > 0:
        edge = min(edge, float((p[order] / p.max() - min_p).abs().min()))
        order = order[p[order] >= min_p * p.max()]
    kept = torch.zeros_like(p)
    kept[order] = p[order]
    return kept / kept.sum(), edge


SETTINGS = [
    {},
    {"temperature": 0.3},
    {"temperature": 5.0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.01},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.02, "temperature": 1.4},
]


@DTYPES
@pytest.mark.parametrize("n", [1, 2, 17, 1000, 32000])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_draws(isa, dtype, n, settings):
    """Each draw is the token at which the reference's running sum passes the uniform number."""
    logits = (torch.randn(n) * 4).to(dtype)
    all_settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    kept, edge = kept_ref(logits, **all_settings)
    cdf = kept.cumsum(0)
    for u in torch.rand(12, dtype=torch.float64).tolist():
        token = sample(logits, u, **settings)
        assert kept[token] > 0 or edge < 1e-5
        # Float32 weights move the sums by some 1e-6; an edge that near moves one token.
        slack = 2e-5 if edge > 1e-5 else 1.0
        assert float(cdf[token] - kept[token]) - slack <= u <= float(cdf[token]) + slack


def test_frequencies(isa):
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf, 1.0])
    counts = torch.zeros(5)
    for i in range(4000):
        counts[sample(logits, (i + 0.5) / 4000)] += 1
    assert torch.all((counts / 4000 - torch.softmax(logits, 0)).abs() < 1e-3)


@DTYPES
def test_greedy_takes_the_first_largest(isa, dtype):
    logits = torch.randn(1003).to(dtype)
    logits[[70, 500, 1002]] = 9.0
    for kwargs in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-320}):
        assert sample(logits, 0.99, **kwargs) == 70


@pytest.mark.parametrize("n", [1, 7, 8, 16, 33, 1000, 1024, 1040, 32000, 151936])
def test_largest_is_numpys(isa, n):
    logits = np.random.default_rng(torch.initial_seed()).standard_normal((9, n)).astype(np.float32)
    logits[1, :: max(1, n // 3)] = 9.0  # the first of several
    logits[2] = -0.0
    logits[2, n // 2] = 0.0
    logits[3, n // 2 :] = np.nan  # the first of several
    logits[4, n - 1] = np.inf
    logits[5] = -np.inf
    logits[6, : n // 2] = -np.inf
    logits[7, n - 1] = 1e30
    logits[8, n - 1] = np.nan
    found = largest(torch.from_numpy(logits), np.zeros(9, np.int64))
    assert found.tolist() == logits.argmax(-1).tolist()


def test_largest_takes_rows_of_float32():
    out = np.zeros(2, np.int64)
    for logits in (np.zeros((2, 0), np.float32), np.zeros((2, 4)), np.zeros((3, 4), np.float32)):
        with pytest.raises(ValueError):
            largest(logits, out)


def test_ties_are_cut_by_index(isa):
    logits = torch.zeros(100)
    assert {sample(logits, i / 50, top_k=5) for i in range(50)} == set(range(5))
    assert {sample(logits, i / 50, top_p=0.0399) for i in range(50)} == set(range(4))
    logits[40:] = 1.0
    assert {sample(logits, i / 50, top_k=3) for i in range(50)} == {40, 41, 42}


def test_forbidden_and_nan_are_never_drawn(isa):
    logits = torch.full((300,), float("nan"))
    logits[::3] = -torch.inf
    logits[[7, 200]] = torch.tensor([-3e38, -3e38])
    assert {sample(logits, i / 20) for i in range(20)} == {7, 200}
    logits[9] = torch.inf
    assert sample(logits, 0.5) == 9


def test_last_token_at_the_top(isa):
    u = 1.0 - 2.0**-53
    assert sample(torch.zeros(33), u) == 32
    assert sample(torch.tensor([0.0, 0.0, -200.0]), u) == 1


@pytest.mark.parametrize(
    "kwargs",
    [
        {"uniform": 1.0},
        {"uniform": -0.1},
        {"uniform": float("nan")},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"logits": torch.zeros(0)},
        {"logits": torch.zeros(2, 2)},
        {"logits": torch.zeros(4).double()},
        {"logits": torch.full((4,), -torch.inf)},
        {"logits": torch.full((4,), float("nan"))},
        {"logits": torch.zeros(8)[::2]},
    ],
    ids=str,
)
def test_bad_arguments(kwargs):
    args = {"logits": torch.zeros(4), "uniform": 0.5} | kwargs
    with pytest.raises(ValueError):
        sample(args.pop("logits"), args.pop("uniform"), **args)
