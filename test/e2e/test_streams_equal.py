"""What a stream says, joined, is what the whole answer says: random requests, ids and chunks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

from sps_runtime.types.request import GenerateRequest

REQUESTS = 120
WORDS = ["the quick", " fox", "é", "你好", "\n", "0", "12", "a", " b", "<|im_end|>", "."]
STOPS = ["x", "e", "th", "fox", "你", "\n\n", "1a"]
REGEXES = [r"\d\d", r"[a-f]{3}", r"\s\w+\s", "(?i)TH|OW", r"é.", "z{20}"]


def gibberish(request: GenerateRequest) -> list[int]:
    """Any ids at all, most of them no valid text; the same for the same prompt and seed."""
    chance = random.Random(repr((bytes(request.tokens), request.sampling.seed)))
    return [chance.randrange(400) for _ in range(request.sampling.max_new_tokens)]


@pytest.fixture(scope="module")
def live(tokenizer_directory: Path) -> Iterator[LiveServer]:
    with LiveServer(tokenizer_directory, lambda: FakeEngine(gibberish, eos=[2])) as server:
        yield server


def sampling(chance: random.Random) -> dict[str, Any]:
    return {
        "n": chance.choice([1, 1, 1, 3]),
        "stop": chance.choice([None, "", chance.sample(STOPS, 2)]) or None,
        "stop_regex": chance.choice([None, None, chance.sample(REGEXES, 2)]),
        "stop_token_ids": chance.choice([None, chance.sample(range(400), 4)]),
        "ignore_eos": chance.random() < 0.3,
        "skip_special_tokens": chance.random() < 0.7,
        "no_stop_trim": chance.random() < 0.3,
    }


def prompt(chance: random.Random) -> str:
    return "".join(chance.choices(WORDS, k=chance.randint(1, 9)))


def events(http: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with http.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200, answer.read()
        lines = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def native_body(chance: random.Random) -> dict[str, Any]:
    batch = chance.choice([0, 0, 2])
    return {
        "text": [prompt(chance) for _ in range(batch)] if batch else prompt(chance),
        "sampling_params": {
            **sampling(chance),
            "max_new_tokens": chance.choice([0, 1, 7, 40]),
            "sampling_seed": chance.randrange(100),
        },
        "return_logprob": chance.random() < 0.4,
        "logprob_start_len": chance.choice([-1, 0]),
        "top_logprobs_num": chance.choice([0, 2]),
        "token_ids_logprob": chance.choice([None, [5, 6]]),
        "return_text_in_logprobs": chance.random() < 0.5,
    }


def settled(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without what differs between two runs of the same request."""
    meta = {k: v for k, v in answer["meta_info"].items() if k not in ("id", "e2e_latency")}
    return {"text": answer["text"], "output_ids": answer["output_ids"], "meta_info": meta}


def test_native_streams(live: LiveServer) -> None:
    with httpx.Client(base_url=live.url, timeout=20) as http:
        for seed in range(REQUESTS):
            chance = random.Random(seed)
            body = native_body(chance)
            live.engine._per_step = chance.choice([1, 3, 50])
            whole = http.post("/generate", json=body).json()
            live.engine._per_step = chance.choice([1, 2, 5])
            last: dict[int, dict[str, Any]] = {}
            for event in events(http, "/generate", body):
                index = event.get("index", 0)
                before = last.get(index, {"text": "", "output_ids": []})
                assert event["text"].startswith(before["text"]), seed
                assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
                last[index] = event
            answers = whole if isinstance(whole, list) else [whole]
            streamed = [settled(last[index]) for index in range(len(answers))]
            assert streamed == [settled(answer) for answer in answers], f"seed {seed}"


def openai_body(chance: random.Random, chat: bool) -> dict[str, Any]:
    wants = chance.random() < 0.5
    asked: dict[str, Any] = (
        {"messages": [{"role": "user", "content": prompt(chance)}], "logprobs": wants}
        if chat
        else {
            "prompt": [prompt(chance) for _ in range(chance.choice([1, 1, 2]))],
            "logprobs": chance.choice([0, 2]) if wants else None,
            "echo": chance.random() < 0.3,
        }
    )
    if chat and wants:
        asked["top_logprobs"] = 2
    return {**asked, **sampling(chance), "max_tokens": chance.choice([1, 7, 40]), "seed": 1}


def joined(chunks: list[dict[str, Any]], chat: bool) -> list[dict[str, Any]]:
    """One choice for each index: text, end and logprobs of all chunks together."""
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        text = (choice["delta"].get("content") or "") if chat else choice["text"]
        one = found.setdefault(choice["index"], {"text": "", "end": None, "logprobs": {}})
        one["text"] += text
        one["end"] = choice["finish_reason"] or one["end"]
        for name, values in (choice.get("logprobs") or {}).items():
            if values is not None:
                one["logprobs"].setdefault(name, []).extend(values)
    return [found[index] for index in sorted(found)]


def said(choice: dict[str, Any], chat: bool) -> dict[str, Any]:
    logprobs = {k: v for k, v in (choice.get("logprobs") or {}).items() if v}
    text = (choice["message"]["content"] or "") if chat else choice["text"]
    return {"text": text, "end": choice["finish_reason"], "logprobs": logprobs}


@pytest.mark.parametrize("chat", [False, True])
def test_openai_streams(live: LiveServer, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    with httpx.Client(base_url=live.url, timeout=20) as http:
        for seed in range(REQUESTS):
            chance = random.Random(1000 + seed)
            body = openai_body(chance, chat)
            live.engine._per_step = chance.choice([1, 3, 50])
            whole = http.post(path, json=body).json()
            live.engine._per_step = chance.choice([1, 2, 5])
            streamed = joined(events(http, path, body), chat)
            for one in streamed:
                one["logprobs"] = {name: v for name, v in one["logprobs"].items() if v}
            expected = [said(choice, chat) for choice in whole["choices"]]
            assert streamed == expected, f"seed {seed}: {body}"
