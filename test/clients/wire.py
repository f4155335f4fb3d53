"""What lies between SGLang's front end and the server in these tests: it looks at every call.

`Wire` takes the place of the front end's function that sends HTTP requests. It passes everything
on as it is, except that a question of an answer key gets a grammar that only the known answer
fulfils: a tiny model does not know capitals, and a program whose next step depends on the answer
can run to its end. Every answer's shape is checked on the way, streams included.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]


class Wire:
    """Sends as `send` does, checks what comes back, and counts the calls by kind.

    Args:
        send: the front end's own function: (url, json=, stream=, method=, ...) -> response.
        answers: what a prompt ends with, and a regular expression of its answer.
    """

    def __init__(self, send: Callable[..., Any], answers: Mapping[str, str]) -> None:
        self._send = send
        self._answers = answers
        self._lock = threading.Lock()
        self.calls: Counter[str] = Counter()

    def __call__(self, url: str, json: Json | None = None, **options: Any) -> Any:
        path = "/" + url.split("/", 3)[3]
        if path != "/generate" or json is None:
            self._count(path)
            return self._send(url, json=json, **options)
        body = self._told(json)
        response = self._send(url, json=body, **options)
        if response.status_code != 200:
            return response
        if body.get("stream"):
            self._count("stream")
            return CheckedStream(response, body)
        self._count(kind_of(body))
        whole = WholeAnswer(response.status_code, response.json())
        check_answers(body, whole.content)
        return whole

    def _count(self, kind: str) -> None:
        with self._lock:
            self.calls[kind] += 1

    def _told(self, body: Json) -> Json:
        text = body.get("text")
        if not isinstance(text, str) or body["sampling_params"].get("max_new_tokens") == 0:
            return body
        for end, answer in self._answers.items():
            if text.endswith(end):
                return {**body, "sampling_params": {**body["sampling_params"], "regex": answer}}
        return body


@dataclass(frozen=True)
class WholeAnswer:
    """A response that was read: the front end's own can be read only once."""

    status_code: int
    content: Any

    def json(self) -> Any:
        return self.content


class CheckedStream:
    """A streamed response whose events are checked as they pass."""

    def __init__(self, response: Any, body: Json) -> None:
        self._response = response
        self._body = body
        self.status_code = response.status_code

    def __getattr__(self, name: str) -> Any:
        return getattr(self._response, name)

    def iter_lines(self, *arguments: Any, **options: Any) -> Iterator[bytes]:
        text, tokens, last = "", 0, None
        for line in self._response.iter_lines(*arguments, **options):
            if line == b"data: [DONE]":
                assert last is not None and last["meta_info"]["finish_reason"] is not None
                check_answer(self._body, last)
            elif line.startswith(b"data:"):
                last = json.loads(line[5:])
                meta = last["meta_info"]
                assert last["text"].startswith(text), "the streamed text is cumulative"
                assert meta["completion_tokens"] >= tokens
                text, tokens = last["text"], meta["completion_tokens"]
            yield line


def kind_of(body: Json) -> str:
    """What the front end wants of /generate."""
    if body["sampling_params"].get("max_new_tokens") == 0:
        if not body.get("return_logprob"):
            return "prefill"
        return "unconditional" if "input_ids" in body else "choices"
    return "gen"


def check_answers(body: Json, answers: Any) -> None:
    """Check the answer of a request, a list for a list."""
    prompts = body.get("text", body.get("input_ids"))
    listed = isinstance(prompts, list) and not (prompts and isinstance(prompts[0], int))
    if not listed:
        answers = [answers]
    assert isinstance(answers, list) and (not listed or len(answers) == len(prompts))
    for answer in answers:
        check_answer(body, answer)


def check_answer(body: Json, answer: Json) -> None:
    """Check the shape of one finished answer against what was asked."""
    sampling, meta = body["sampling_params"], answer["meta_info"]
    assert isinstance(answer["text"], str) and isinstance(meta["id"], str)
    assert meta["prompt_tokens"] > 0 and 0 <= meta["cached_tokens"] < meta["prompt_tokens"]
    assert 0 <= meta["completion_tokens"] <= sampling.get("max_new_tokens", 128)
    reason = meta["finish_reason"]
    assert reason["type"] in ("stop", "length"), reason
    if reason["type"] == "length":
        assert reason["length"] == meta["completion_tokens"]
    elif sampling.get("regex"):
        assert re.fullmatch(sampling["regex"], answer["text"]) or sampling.get("stop")
    stops = sampling.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        assert stop not in answer["text"], (stop, answer["text"])
    if body.get("return_logprob"):
        check_logprobs(body, meta)


def check_logprobs(body: Json, meta: Json) -> None:
    """Check that every logprob is there, and a number wherever one exists."""
    assert len(meta["output_token_logprobs"]) == meta["completion_tokens"]
    start = body.get("logprob_start_len")
    if start is None:
        start = 0 if body["sampling_params"].get("max_new_tokens") == 0 else meta["prompt_tokens"]
    entries = meta["input_token_logprobs"]
    assert start < 0 or len(entries) == meta["prompt_tokens"] - start, (start, len(entries))
    for position, (logprob, token, text) in enumerate(entries, start):
        assert isinstance(token, int)
        assert isinstance(text, str) == bool(body.get("return_text_in_logprobs"))
        assert logprob is None if position == 0 else logprob <= 0, (position, logprob)
