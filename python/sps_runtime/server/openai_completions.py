"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.query import LogprobOptions, Query
from sps_runtime.frontend.request_state import Output, RequestState
from sps_runtime.server.answers import Answer, complete
from sps_runtime.server.error_handlers import request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.grammars import constrained
from sps_runtime.server.openai_common import (
    attention_report,
    finish_reason,
    labels_of,
    matched_stop,
    usage,
)
from sps_runtime.server.openai_logprobs import completion_logprobs, whole_prompt
from sps_runtime.server.openai_types import CompletionBody, as_prompt, parse_prompts
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.tokens import unpack_ids

DEFAULT_MAX_TOKENS = 16
NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "top_logprobs": "logprobs",
}


async def completions(call: Call) -> ASGIApp:
    """Answer one request, whole or streamed."""
    service = call.service
    body, headers = await read_request(call, CompletionBody)
    service.check_model(body.model)
    prompts = parse_prompts(body.prompt, "prompt")
    writer = _Writer(call, body, prompts)
    queries = _queries(call, body, prompts)
    if body.stream:
        group = await service.manager.submit(queries)
        writer.begin(group.states)
        return EventStream(call, group, writer.events, closing=writer.closing, headers=headers)
    answers = await complete(call, queries)
    writer.begin([answer.state for answer in answers])
    content = msgspec.json.encode(writer.whole(answers))
    return Response(
        content, 200, {**headers, **request_id_header(call.request)}, "application/json"
    )


def _queries(call: Call, body: CompletionBody, prompts: list[str | list[int]]) -> list[Query]:
    logprobs = None
    if body.logprobs is not None:
        logprobs = LogprobOptions(body.logprobs, (), 0 if body.echo else -1)
    grammar = body.grammar()
    queries = [
        Query(
            prompt=as_prompt(prompt, body.add_special_tokens),
            options=body.sampling(body.max_tokens),
            logprobs=logprobs,
            attention=body.attention,
            default_max_new_tokens=DEFAULT_MAX_TOKENS,
            use_model_defaults=True,
            tenant=call.identity.tenant,
            owner=call.identity.owner,
            label=label,
            names=NAMES,
        )
        for prompt, label in zip(prompts, labels_of(body.rid, len(prompts)), strict=True)
    ]
    return [constrained(query, grammar) for query in queries]


class _Writer:
    """Writes one request's answers."""

    def __init__(self, call: Call, body: CompletionBody, prompts: list[str | list[int]]) -> None:
        self._tokenizer = call.service.manager.tokenizer
        self._cache_report = call.service.server.enable_cache_report
        self._body = body
        self._prompts = prompts
        self._choices = body.n or 1
        self._model = body.model or call.service.model_name
        self._created = int(time.time())
        self._states: Sequence[RequestState] = ()
        self._offsets: list[int] = []
        self._begun: set[int] = set()

    def begin(self, states: Sequence[RequestState]) -> None:
        self._states = states
        self._offsets = [0] * len(states)

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for answer in answers:
            state = answer.state
            text, entries = self._echoed(state)
            choices.append(
                self._choice(state, text + answer.text, [*entries, *answer.logprobs])
                | self._end(answer)
            )
        return self._envelope(choices) | {"usage": self._usage()}

    def events(self, output: Output) -> Iterable[Any]:
        """The chunk of one output."""
        state = output.state
        text, entries = "", list[TokenLogprobs]()
        if state.index not in self._begun:
            self._begun.add(state.index)
            text, entries = self._echoed(state)
        choice = self._choice(state, text + output.text, [*entries, *output.logprobs])
        return (self._envelope([choice | self._end(output)]),)

    def closing(self) -> Iterable[Any]:
        if self._body.wants_usage_chunk:
            yield self._envelope([]) | {"usage": self._usage()}

    def _choice(
        self, state: RequestState, text: str, entries: Sequence[TokenLogprobs]
    ) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs is not None:
            logprobs, self._offsets[state.index] = completion_logprobs(
                entries,
                self._tokenizer,
                top=self._body.logprobs,
                offset=self._offsets[state.index],
            )
        return {"index": state.index, "text": text, "logprobs": logprobs}

    def _end(self, part: Answer | Output) -> dict[str, Any]:
        return {
            "finish_reason": finish_reason(part.finish),
            "matched_stop": matched_stop(part.finish),
            **attention_report(part.finish, part.state),
        }

    def _echoed(self, state: RequestState) -> tuple[str, list[TokenLogprobs]]:
        """The prompt's text and logprobs, where they are wanted."""
        if not self._body.echo:
            return "", []
        prompt = self._prompts[state.index // self._choices]
        text = prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)
        if self._body.logprobs is None:
            return text, []
        return text, whole_prompt(unpack_ids(state.request.tokens), state.prompt_logprobs)

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{self._states[0].label}",
            "object": "text_completion",
            "created": self._created,
            "model": self._model,
            "choices": choices,
        }

    def _usage(self) -> dict[str, Any]:
        return usage(self._states, self._choices, cache_report=self._cache_report)
