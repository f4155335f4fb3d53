"""Exactness beyond the matrix: changing degrees, hosts, ties, bf16, sampling, logprobs, replay."""

from __future__ import annotations

import copy

import pytest
import torch
from msgspec.structs import replace
from test.dist.helpers.exact_models import exact_model, prompt
from test.dist.helpers.exactness import (
    CHUNKS,
    MARGIN,
    NEW_TOKENS,
    check,
    first_difference,
    requests_of_a_cell,
    truth,
)
from test.dist.helpers.planner import Planner, Request, Shape
from test.dist.helpers.thread_engine import Run, ThreadEngine, drive
from torch import Tensor

from sps_runtime.runner import prompt_logprobs
from sps_runtime.runner.model_runner import replay
from sps_runtime.types.plan import StepResult, TokenLogprobs
from sps_runtime.types.sampling import SamplingParams

PAGES = 700
DEGREES = [(2, 1, "ntp", "pass_kv"), (3, 1, "tp", "pass_q"), (2, 2, "tp", "ulysses")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_engine(kind: str, sp: int, tp: int, arch: str, **more: object) -> ThreadEngine:
    model = exact_model(kind)
    arena = model.arena(tp, str(more.pop("dtype", "float32")))
    return ThreadEngine(
        model.config, arena, sp=sp, tp=tp, arch=arch, page_size=16, pages_per_rank=PAGES, **more
    )


def drive_once(
    kind: str, degree: tuple, requests: list[Request], shape: Shape | None = None, **more: object
) -> Run:
    sp, tp, arch, strategy = degree
    engine = make_engine(kind, sp, tp, arch, **more)
    shape = shape or Shape(sp, 16, PAGES, chunk=64, strategy=strategy, seed=sp + tp)
    try:
        return drive(engine, Planner(shape), requests)
    finally:
        engine.close()


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
@pytest.mark.parametrize("tp", [1, 2])
def test_degrees_that_change_with_every_step(strategy: str, tp: int) -> None:
    """Each step runs on another sub-group; pages of ranks outside are read in place."""
    engine = make_engine("llama", 4, tp, "ntp")
    shape = Shape(4, 16, PAGES, strategy=strategy, dealing="random", elastic=True, seed=tp)
    requests = requests_of_a_cell(16)
    try:
        run = drive(engine, Planner(shape), requests)
        assert len({plan.group for plan in run.plans}) > 8
        check("llama", engine, shape, requests, run)
    finally:
        engine.close()


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
@pytest.mark.parametrize(("tp", "arch"), [(1, "ntp"), (1, "tp"), (2, "ntp")])
def test_ranks_on_two_hosts(strategy: str, tp: int, arch: str) -> None:
    """Pools of the other host cannot be read and each host has its own board."""
    engine = make_engine("qwen3", 4, tp, arch, hosts=(0, 0, 1, 1))
    shape = Shape(4, 16, PAGES, strategy=strategy, dealing="random", seed=11)
    requests = requests_of_a_cell(16)
    try:
        run = drive(engine, Planner(shape), requests)
        check("qwen3", engine, shape, requests, run)
    finally:
        engine.close()


@pytest.mark.parametrize("degree", DEGREES)
def test_where_the_reference_is_not_sure_the_rest_is_forced(degree: tuple) -> None:
    """Every head row stands twice: the two best logits differ by rounding at most, so tokens may
    differ, and the rule of small margins must carry the comparison."""
    sp, tp, arch, strategy = degree
    engine = make_engine("ties", sp, tp, arch)
    shape = Shape(sp, 16, PAGES, chunk=64, strategy=strategy)
    requests = [Request(prompt(length), NEW_TOKENS) for length in (1, 40, 151)]
    try:
        run = drive(engine, Planner(shape), requests)
        for request in requests:
            expected = truth("ties", tuple(request.prompt))
            assert max(expected.margin(index) for index in range(NEW_TOKENS)) < MARGIN
            if first_difference(request.sampled, expected.tokens) > 9:  # else a tie fell otherwise
                request.sampled = list(expected.tokens)
                request.sampled[9] = (expected.tokens[9] + 149) % 298
                assert first_difference(request.sampled, expected.tokens) == 9
        check("ties", engine, shape, requests, run)
        rows = run.logits[requests[0].slot]
        rows[0] = rows[0] + 1.0
        with pytest.raises(AssertionError, match="logits differ"):
            check("ties", engine, shape, requests[:1], run)
    finally:
        engine.close()


@pytest.mark.parametrize(
    "degree", [*DEGREES, (4, 1, "ntp", "ulysses"), (3, 2, "ntp", "pass_q"), (4, 2, "tp", "pass_kv")]
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_bf16_is_as_near_to_fp64_as_one_rank_is(kind: str, degree: tuple) -> None:
    """RMS of the logits' error against fp64 over the same bf16 weights, at most 1.25 times."""
    prompts = [prompt(length) for length in (17, 64, 151, 600)]
    forced = [truth(kind, tuple(tokens)).tokens for tokens in prompts]
    wide = copy.deepcopy(exact_model(kind).oracle).bfloat16().double()
    with torch.inference_mode():
        exact = [
            wide(torch.tensor([tokens + more])).logits[0, len(tokens) - 1 : -1]
            for tokens, more in zip(prompts, forced, strict=True)
        ]

    def rms(degree: tuple) -> float:
        requests = [
            Request(tokens, NEW_TOKENS, forced=more)
            for tokens, more in zip(prompts, forced, strict=True)
        ]
        run = drive_once(kind, degree, requests, dtype="bfloat16")
        errors = [
            torch.stack(run.logits[request.slot]).double() - rows
            for request, rows in zip(requests, exact, strict=True)
        ]
        return float(torch.cat(errors).square().mean().sqrt())

    one, many = rms((1, 1, "ntp", "pass_kv")), rms(degree)
    print(f"{kind} {degree}: {many / one:.3f} of one rank's {one:.4f}")
    assert many <= 1.25 * one


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=seed)


def test_seeded_sampling_is_the_same_at_every_degree() -> None:
    def tokens(degree: tuple) -> list[list[int]]:
        requests = [
            Request(prompt(length), 48, params=seeded(1000 + index), chunk=CHUNKS[index % 3])
            for index, length in enumerate((1, 16, 90, 151))
        ]
        drive_once("llama", degree, requests)
        return [request.sampled for request in requests]

    expected = tokens((1, 1, "ntp", "pass_kv"))
    assert expected[0] != truth("llama", tuple(prompt(1))).tokens[:48], "sampling does sample"
    for degree in DEGREES:
        assert tokens(degree) == expected


def oracle_logprobs(kind: str, tokens: list[int]) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = exact_model(kind).oracle(torch.tensor([tokens])).logits[0]
    return torch.log_softmax(logits, -1)


@pytest.mark.parametrize("rows_per_chunk", [7, 10**6])
@pytest.mark.parametrize("degree", [(1, 1, "ntp", "pass_kv"), *DEGREES, (2, 1, "tp", "pass_kv")])
def test_prompt_logprobs(
    degree: tuple, rows_per_chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocab = exact_model("llama").config.vocab_size
    monkeypatch.setattr(prompt_logprobs, "LOGIT_BYTES", rows_per_chunk * vocab * 4)
    requests = [
        Request(prompt(151), 2, judge_from=1, logprobs=2),
        Request(prompt(70), 2, judge_from=40),
        Request(prompt(33), 2),
    ]
    run = drive_once("llama", degree, requests)
    values: dict[int, dict[int, TokenLogprobs]] = {}
    for results in run.results:
        for piece in (piece for result in results for piece in result.prompt_logprobs):
            for position, value in enumerate(piece.values, piece.start):
                assert values.setdefault(piece.slot, {}).setdefault(position, value) is value
    assert values.keys() == {requests[0].slot, requests[1].slot}
    for request in requests[:2]:
        expected = oracle_logprobs("llama", request.prompt)
        assert values[request.slot].keys() == set(range(request.judge_from, len(request.prompt)))
        for position, value in values[request.slot].items():
            row = expected[position - 1]
            assert value.token == request.prompt[position]
            assert value.logprob == pytest.approx(float(row[value.token]), abs=1e-4)
            assert value.top[0][1] == pytest.approx(float(row.max()), abs=1e-4)
    sampled = requests[0].logprob_entries[0]
    assert sampled is not None and sampled.token == requests[0].sampled[0] == sampled.top[0][0]


def without_times(results: list[StepResult]) -> list[StepResult]:
    return [
        replace(result, counters=replace(result.counters, exposed_s=0.0, compute_s=0.0))
        for result in sorted(results, key=lambda result: result.rank)
    ]


@pytest.mark.parametrize("degree", [(1, 1, "ntp", "pass_kv"), *DEGREES])
def test_recorded_plans_replay_to_the_same_results(degree: tuple) -> None:
    """All plans are queued at once: tokens that they name come over the board alone."""
    sp, tp, arch, _ = degree
    requests = [Request(prompt(length), 24, arrival=length % 3) for length in (1, 40, 151)]
    run = drive_once("llama", degree, requests)
    assert any(s.board_epoch >= 0 for plan in run.plans for s in plan.sequences)
    engine = make_engine("llama", sp, tp, arch)
    try:
        for plan in run.plans:
            engine.send(plan)
        again = [[a.result for a in engine.receive(plan)] for plan in run.plans]
        assert list(map(without_times, again)) == list(map(without_times, run.results))
    finally:
        engine.close()


def test_a_runner_alone_replays_a_recording() -> None:
    requests = [Request(prompt(length), 12) for length in (5, 40)]
    degree = (1, 1, "ntp", "pass_kv")
    run = drive_once("llama", degree, requests)
    engine = make_engine("llama", 1, 1, "ntp")
    engine.close()  # no thread: the runner is called from here
    tokens: dict[int, list[int]] = {}
    for result in replay(engine.runners[0], run.plans):
        for sampled in result.sampled:
            tokens.setdefault(sampled.slot, []).append(sampled.token)
    assert tokens == {request.slot: request.sampled for request in requests}
