"""SGLang's native route, as its own front end and its users call it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest
from test.kit.live_server import LiveServer

GEN = {  # what SGLang's front end sends with every gen, nulls and empty lists included
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "max_new_tokens": 8,
    "min_new_tokens": 0,
    "n": 1,
    "stop": [],
    "stop_token_ids": None,
    "stop_regex": None,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "ignore_eos": False,
    "regex": None,
    "json_schema": None,
}


def events(http: httpx.Client, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", "/generate", json={**body, "stream": True}) as response:
        assert response.status_code == 200
        data = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def ok(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_gen(http: httpx.Client, method: str) -> None:
    answer = ok(http.request(method, "/generate", json={"text": "ABC", "sampling_params": GEN}))
    assert answer["text"] == "ABCABCAB"
    assert len(answer["output_ids"]) == 8
    meta = answer["meta_info"]
    assert meta["finish_reason"] == {"type": "length", "length": 8}
    assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (3, 8, 0)
    assert meta["e2e_latency"] >= 0
    assert {"id", "reasoning_tokens", "weight_version", "num_retractions"} <= set(meta)
    assert "output_token_logprobs" not in meta


def test_stream_is_cumulative(http: httpx.Client) -> None:
    seen = events(http, {"text": "ABC", "sampling_params": GEN})
    texts = [event["text"] for event in seen]
    assert texts[-1] == "ABCABCAB"
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
    assert seen[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    assert all(event["meta_info"]["finish_reason"] is None for event in seen[:-1])
    assert all("index" not in event for event in seen)


def test_lists_in_lists_out(http: httpx.Client) -> None:
    one = ok(http.post("/generate", json={"text": ["AB"], "sampling_params": GEN}))
    assert [answer["text"] for answer in one] == ["ABABABAB"]
    many = ok(
        http.post(
            "/generate",
            json={
                "input_ids": [[67], [68, 69]],
                "sampling_params": [{"max_new_tokens": 1}, {"max_new_tokens": 3}],
                "rid": ["first", "second"],
            },
        )
    )
    assert [answer["output_ids"] for answer in many] == [[67], [68, 69, 68]]
    assert [answer["meta_info"]["id"] for answer in many] == ["first", "second"]
    several = ok(
        http.post("/generate", json={"text": "A", "sampling_params": {"n": 2, "max_new_tokens": 2}})
    )
    assert [answer["text"] for answer in several] == ["AA", "AA"]


def test_batch_streams_carry_an_index(http: httpx.Client) -> None:
    last: dict[int, str] = {}
    for event in events(http, {"text": ["A", "B"], "sampling_params": GEN}):
        last[event["index"]] = event["text"]
    assert last == {0: "A" * 8, 1: "B" * 8}


def test_fork_prefills_only(http: httpx.Client) -> None:
    answer = ok(
        http.post("/generate", json={"text": "ABC", "sampling_params": {"max_new_tokens": 0}})
    )
    assert answer["text"] == ""
    assert answer["meta_info"]["prompt_tokens"] == 3


def test_select_gets_real_numbers(http: httpx.Client) -> None:
    """SGLang answers null for the first of them, and two of its choice methods then fail."""
    body = {
        "text": ["XABC", "XADE"],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0},
        "return_logprob": True,
        "return_text_in_logprobs": True,
        "logprob_start_len": 2,
    }
    first, second = ok(http.post("/generate", json=body))
    assert first["meta_info"]["input_token_logprobs"] == [[-0.5, 36, "B"], [-0.5, 37, "C"]]
    assert len(second["meta_info"]["input_token_logprobs"]) == 2
    assert first["meta_info"]["output_token_logprobs"] == []


def test_unconditional_likelihoods(http: httpx.Client) -> None:
    """Nothing generated, no start told: the whole prompt is meant."""
    body = {"input_ids": [[36, 37]], "sampling_params": {"max_new_tokens": 0}}
    (answer,) = ok(http.post("/generate", json={**body, "return_logprob": True}))
    assert answer["meta_info"]["input_token_logprobs"] == [[None, 36, None], [-0.5, 37, None]]


def test_null_stands_at_the_true_beginning_only(http: httpx.Client) -> None:
    body = {
        "input_ids": [67, 68, 69],
        "sampling_params": {"max_new_tokens": 1},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": 2,
        "token_ids_logprob": [5, 6],
    }
    meta = ok(http.post("/generate", json=body))["meta_info"]
    assert meta["input_token_logprobs"] == [[None, 67, None], [-0.5, 68, None], [-0.5, 69, None]]
    assert meta["input_top_logprobs"][0] is None
    assert meta["input_top_logprobs"][1] == [[-0.5, 68, None], [-1.5, 69, None]]
    assert meta["output_top_logprobs"] == [[[-0.5, 67, None], [-1.5, 68, None]]]
    assert meta["output_token_ids_logprobs"] == [[[-5.0, 5, None], [-6.0, 6, None]]]
    assert meta["output_token_logprobs_length"] == 1


def test_no_prompt_logprobs_unless_asked(http: httpx.Client) -> None:
    body = {"text": "AB", "sampling_params": {"max_new_tokens": 1}, "return_logprob": True}
    meta = ok(http.post("/generate", json=body))["meta_info"]
    assert meta["input_token_logprobs"] == []
    assert len(meta["output_token_logprobs"]) == 1


def test_literal_special_tokens_are_parsed(http: httpx.Client, live: LiveServer) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n"
    answer = ok(http.post("/generate", json={"text": text, "sampling_params": GEN}))
    assert answer["meta_info"]["prompt_tokens"] < len("user Hi ") + 3
    assert live.engine.requests[-1].tokens[:4] == (1).to_bytes(4, "little")


def test_stop_matched_is_told(http: httpx.Client) -> None:
    sampling = {"max_new_tokens": 50, "stop": "CD"}
    answer = ok(http.post("/generate", json={"text": "ABCDE", "sampling_params": sampling}))
    assert answer["text"] == "AB"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": "CD"}
    sampling = {"max_new_tokens": 50, "stop_token_ids": [37], "no_stop_trim": True}
    answer = ok(http.post("/generate", json={"text": "ABCDE", "sampling_params": sampling}))
    assert answer["text"] == "ABC"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": 37}


def test_information(http: httpx.Client) -> None:
    for path in ("/get_model_info", "/model_info"):
        info = ok(http.get(path))
        assert info["model_path"] == "test-model"
        assert info["is_generation"] is True
    for path in ("/get_server_info", "/server_info"):
        info = ok(http.get(path))
        assert info["max_total_num_tokens"] == 1 << 20
        assert info["page_size"] == 64
        assert isinstance(info["internal_states"][0], dict)
        assert info["disable_radix_cache"] is False
        assert info["version"]
    assert ok(http.get("/v1/loads"))["loads"][0]["num_total_reqs"] == 0
    assert ok(http.post("/concate_and_append_request", json={"src_rids": [], "dst_rid": "x"})) == {}


def test_tokenize_and_back(http: httpx.Client) -> None:
    text = "Ä fox <|im_end|>"
    answer = ok(http.post("/tokenize", json={"prompt": text}))
    assert answer["count"] == len(answer["tokens"])
    assert answer["max_model_len"] == 4096
    body = {"tokens": answer["tokens"], "skip_special_tokens": False}
    assert ok(http.post("/detokenize", json=body)) == {"text": text}
    both = ok(http.post("/tokenize", json={"prompt": ["A", "BC"]}))
    assert both["count"] == [1, 2]
    assert ok(http.post("/detokenize", json={"tokens": both["tokens"]}))["text"] == ["A", "BC"]
    chat = ok(http.post("/tokenize", json={"messages": [{"role": "user", "content": "Hi"}]}))
    assert chat["tokens"][0] == 1


def test_metrics_have_sglangs_names(http: httpx.Client) -> None:
    ok(http.post("/generate", json={"text": "ABC", "sampling_params": GEN}))
    text = http.get("/metrics").text
    for name in (
        'sglang:prompt_tokens_total{model_name="test-model"}',
        'sglang:generation_tokens_total{model_name="test-model"}',
        "sglang:time_to_first_token_seconds_bucket",
        "sglang:e2e_request_latency_seconds_bucket",
        "sglang:num_running_reqs",
        "sps:event_loop_lag_seconds",
        "sps:event_loop_delay_seconds_bucket",
    ):
        assert name in text, name


def test_flush_cache(http: httpx.Client) -> None:
    for method in ("GET", "POST"):
        assert http.request(method, "/flush_cache").status_code == 200


def test_probes(http: httpx.Client) -> None:
    for path in ("/livez", "/readyz", "/ready", "/health", "/ping", "/health_generate"):
        assert http.get(path).status_code == 200, path


@pytest.mark.parametrize("keep", [False, True])
def test_expressions_stop_and_are_trimmed(http: httpx.Client, keep: bool) -> None:
    """The fake engine says the prompt again and again."""
    sampling = {"max_new_tokens": 200, "stop_regex": [r"j\w+s", "z{9}"], "no_stop_trim": keep}
    body = {"text": "the quick brown fox jumps over the lazy dog ", "sampling_params": sampling}
    whole = http.post("/generate", json=body).json()
    assert whole["text"] == "the quick brown fox " + "jumps" * keep
    reason = {"type": "stop", "matched": r"j\w+s"}
    assert whole["meta_info"]["finish_reason"] == reason
    streamed = events(http, body)
    assert streamed[-1]["text"] == whole["text"]
    assert streamed[-1]["meta_info"]["finish_reason"] == reason
    assert all(whole["text"].startswith(event["text"]) for event in streamed)


def test_expressions_stop_on_openai_routes(http: httpx.Client) -> None:
    body = {"prompt": "number 1234 of 5", "max_tokens": 100, "stop_regex": r"\d{4}"}
    answer = http.post("/v1/completions", json=body)
    assert "x-sps-ignored" not in answer.headers
    (choice,) = answer.json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("number ", "stop")
    assert choice["matched_stop"] == r"\d{4}"
    refused = http.post("/v1/completions", json={**body, "stop_regex": "(?=a)b"})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "stop_regex"
    assert refused.json()["error"]["code"] == "invalid_regex"
