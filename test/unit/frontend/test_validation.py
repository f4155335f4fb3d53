"""The gate: what is accepted, what is refused, and the name of what was refused."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from sps_runtime.frontend.limits import Limits
from sps_runtime.frontend.query import LogprobOptions, Query, SamplingOptions, TokenPrompt
from sps_runtime.frontend.validation import Gate, SamplingDefaults, choice_seed
from sps_runtime.types.errors import InvalidRequest
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.tokens import unpack_ids

VOCAB = 1000
GATE = Gate(Limits(context_length=100, vocab_size=VOCAB))


def make(
    prompt: Any = (1, 2, 3),
    gate: Gate = GATE,
    logprobs: LogprobOptions | None = None,
    **options: Any,
) -> list[GenerateRequest]:
    query = Query(
        prompt=TokenPrompt(prompt),
        options=SamplingOptions(**options),
        logprobs=logprobs,
        default_max_new_tokens=16,
    )
    gate.check(query)
    return gate.requests(query, prompt)


def refused(**what: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        make(**what)
    assert caught.value.status == 400
    assert str(caught.value.field) in caught.value.message
    return caught.value


def test_defaults() -> None:
    (request,) = make()
    sampling = request.sampling
    assert list(unpack_ids(request.tokens)) == [1, 2, 3]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (1.0, 1.0, 0)
    assert sampling.max_new_tokens == 16
    assert len(request.rid) == 32


def test_seeds_are_drawn_and_kept() -> None:
    assert make()[0].sampling.seed != make()[0].sampling.seed
    assert make(sampling_seed=7)[0].sampling.seed == 7
    assert 0 <= make(sampling_seed=-1)[0].sampling.seed < 1 << 63
    seeds = [request.sampling.seed for request in make(sampling_seed=7, n=3)]
    assert seeds == [choice_seed(7, i) for i in range(3)]
    assert len(set(seeds)) == 3


def test_choices_are_requests_of_their_own() -> None:
    requests = make(n=16)
    assert len({request.rid for request in requests}) == 16
    assert len({request.tokens for request in requests}) == 1


def test_greedy_below_the_threshold() -> None:
    assert make(temperature=1e-7)[0].sampling.temperature == 0.0
    assert make(temperature=1e-6)[0].sampling.temperature == 1e-6


def test_room() -> None:
    assert make(prompt=[1] * 90)[0].sampling.max_new_tokens == 10, "a default gives way"
    assert make(prompt=[1] * 90, max_new_tokens=10)
    assert refused(prompt=[1] * 90, max_new_tokens=11).code == "context_length_exceeded"
    assert make(prompt=[1] * 100, max_new_tokens=0)
    assert refused(prompt=[1] * 100).code == "context_length_exceeded"
    assert refused(prompt=[1] * 101, max_new_tokens=0).code == "context_length_exceeded"
    open_end = Query(prompt=TokenPrompt([1]), default_max_new_tokens=None)
    assert GATE.requests(open_end, [1])[0].sampling.max_new_tokens == 99


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "1"),
        ("temperature", True),
        ("top_p", 0),
        ("top_p", 2),
        ("top_p", math.nan),
        ("top_k", -2),
        ("top_k", 1 << 31),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("min_p", math.nan),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("repetition_penalty", math.inf),
        ("max_new_tokens", -1),
        ("max_new_tokens", 1 << 31),
        ("max_new_tokens", True),
        ("max_new_tokens", 1.5),
        ("min_new_tokens", -1),
        ("min_new_tokens", 17),
        ("n", 0),
        ("n", 17),
        ("n", 1 << 31),
        ("sampling_seed", 1 << 63),
        ("sampling_seed", -(1 << 63) - 1),
        ("stop", ["x"] * 17),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", "x" * 257),
        ("stop_token_ids", [VOCAB]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", [True]),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [1 << 63]),
        ("stop_token_ids", [1] * 301),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
    ],
)
def test_refused_values(field: str, value: Any) -> None:
    assert refused(**{field: value}).field == field


@pytest.mark.parametrize(
    "prompt", [[], [VOCAB], [-1], [True], [1.0], [1 << 63], ["1"], [None], [[1]]]
)
def test_refused_prompts(prompt: list[Any]) -> None:
    assert refused(prompt=prompt).field == "prompt"


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("top_logprobs", LogprobOptions(top=21)),
        ("top_logprobs", LogprobOptions(top=-1)),
        ("logprob_start_len", LogprobOptions(prompt_start=-2)),
        ("logprob_start_len", LogprobOptions(prompt_start=4)),
        ("token_ids_logprob", LogprobOptions(token_ids=[VOCAB])),
        ("token_ids_logprob", LogprobOptions(token_ids=[1] * 301)),
    ],
)
def test_refused_logprobs(field: str, options: LogprobOptions) -> None:
    assert refused(logprobs=options).field == field


def test_every_field_of_ids_is_checked() -> None:
    """Whoever adds a field of token ids to the options must pass it through `check_ids`."""
    fields = {field.name: field.type for field in msgspec.structs.fields(SamplingOptions)}
    of_ids = {name for name, kind in fields.items() if "list[int]" in str(kind)}
    of_ids |= {name for name, kind in fields.items() if "dict[int" in str(kind)}
    assert of_ids == {"stop_token_ids", "logit_bias"}
    for name in of_ids:
        bad: Any = {VOCAB: 0.5} if "dict" in str(fields[name]) else [VOCAB]
        assert refused(**{name: bad}).code == "token_id_out_of_range"


def test_errors_use_the_clients_names() -> None:
    query = Query(
        prompt=TokenPrompt([1]),
        options=SamplingOptions(max_new_tokens=-1),
        names={"max_new_tokens": "max_completion_tokens"},
    )
    with pytest.raises(InvalidRequest, match="max_completion_tokens") as caught:
        GATE.check(query)
    assert caught.value.field == "max_completion_tokens"


def test_nulls_and_empty_lists_are_not_told() -> None:
    (request,) = make(stop=[], stop_token_ids=[], logit_bias={}, temperature=None, n=None)
    assert request.sampling.stop == ()


def test_top_k_off_and_beyond_the_vocabulary() -> None:
    assert [make(top_k=k)[0].sampling.top_k for k in (-1, 0, VOCAB, 5)] == [0, 0, 0, 5]


def test_model_defaults_are_only_for_who_asks() -> None:
    gate = Gate(GATE.limits, SamplingDefaults(temperature=0.0, top_k=7))
    assert make(gate=gate)[0].sampling.temperature == 1.0
    query = Query(prompt=TokenPrompt([1]), use_model_defaults=True)
    sampling = gate.requests(query, [1])[0].sampling
    assert (sampling.temperature, sampling.top_k) == (0.0, 7)
