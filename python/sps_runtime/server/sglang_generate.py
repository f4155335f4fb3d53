"""POST and PUT /generate: SGLang's native request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.attention_options import FIELD as ATTENTION
from sps_runtime.frontend.attention_options import report_fields
from sps_runtime.frontend.query import Query
from sps_runtime.frontend.request_state import Finish, Output, RequestState
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.frontend.validation import finite
from sps_runtime.server.answers import Answer, complete
from sps_runtime.server.auth import Identity
from sps_runtime.server.error_handlers import request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.grammars import constrained
from sps_runtime.server.openai_common import labels_of
from sps_runtime.server.openai_logprobs import whole_prompt
from sps_runtime.server.openai_types import as_prompt
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.server.sglang_types import SAMPLING, GenerateBody
from sps_runtime.types.plan import TokenLogprobs
from sps_runtime.types.tokens import unpack_ids

DEFAULT_MAX_NEW_TOKENS = 128
_SAMPLING_FIELDS = (
    "max_new_tokens",
    "min_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "sampling_seed",
    "stop",
    "stop_regex",
    "stop_token_ids",
    "n",
)
_NAMES = {
    **{name: f"{SAMPLING}.{name}" for name in _SAMPLING_FIELDS},
    "top_logprobs": "top_logprobs_num",
}


async def generate(call: Call) -> ASGIApp:
    """Answer one request or batch, whole or streamed (the streamed text is cumulative)."""
    service = call.service
    body, headers = await read_request(call, GenerateBody)
    queries = native_queries(call.identity, body)
    many = body.is_batch or any((query.options.n or 1) > 1 for query in queries)
    writer = NativeWriter(service.manager.tokenizer, body, many)
    if body.stream:
        group = await service.manager.submit(queries)
        writer.begin(group.states)
        return EventStream(call, group, writer.events, headers=headers)
    answers = await complete(call, queries)
    content = [writer.payload(answer) for answer in answers]
    encoded = msgspec.json.encode(content if many else content[0])
    return Response(
        encoded, 200, {**headers, **request_id_header(call.request)}, "application/json"
    )


def native_queries(identity: Identity, body: GenerateBody) -> list[Query]:
    """What a body asks for, one query per prompt."""
    field, prompts = body.prompts()
    told = body.sampling(len(prompts))
    options = [sampling.checked() for sampling in told]
    logprobs = body.logprobs(options)
    labels = labels_of(body.rid, len(prompts))
    attentions = body.attentions(len(prompts))
    names = {**_NAMES, "prompt": field}
    queries = [
        Query(
            prompt=as_prompt(prompt),
            options=options[i],
            logprobs=logprobs[i],
            attention=attentions[i][1],
            default_max_new_tokens=DEFAULT_MAX_NEW_TOKENS,
            tenant=identity.tenant,
            owner=identity.owner,
            label=labels[i],
            names={**names, ATTENTION: attentions[i][0]},
        )
        for i, prompt in enumerate(prompts)
    ]
    return [
        constrained(query, sampling.grammar())
        for query, sampling in zip(queries, told, strict=True)
    ]


class NativeWriter:
    """Writes one request's answers."""

    def __init__(self, tokenizer: Tokenizer, body: GenerateBody, many: bool) -> None:
        self._tokenizer = tokenizer
        self._with_text = bool(body.return_text_in_logprobs)
        self._many = many
        self._so_far: list[Answer] = []

    def begin(self, states: Sequence[RequestState]) -> None:
        self._so_far = [Answer(state) for state in states]

    def events(self, output: Output) -> Iterable[Any]:
        """The event of one output: everything so far, not only what is new."""
        answer = self._so_far[output.state.index]
        answer.add(output)
        payload = self.payload(answer)
        return ({**payload, "index": output.state.index} if self._many else payload,)

    def payload(self, answer: Answer) -> dict[str, Any]:
        """One sequence as SGLang answers it."""
        return {
            "text": answer.text,
            "output_ids": answer.tokens,
            "meta_info": self._meta_info(answer),
        }

    def _meta_info(self, answer: Answer) -> dict[str, Any]:
        state = answer.state
        meta: dict[str, Any] = {
            "id": state.label,
            "finish_reason": _finish_reason(answer),
            "prompt_tokens": state.prompt_tokens,
            "completion_tokens": len(answer.tokens),
            "cached_tokens": state.cached_tokens,
            "reasoning_tokens": 0,
            "weight_version": "default",
            "num_retractions": state.retractions,
        }
        if state.attention is not None:
            meta["attention"] = report_fields(state.attention)
        if answer.finish is not None:
            meta["e2e_latency"] = state.total_s
        if state.request.logprobs is not None:
            meta.update(self._logprobs(answer))
        return meta

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        wanted = answer.state.request.logprobs
        assert wanted is not None
        prompt: list[TokenLogprobs] = []
        if wanted.prompt_start >= 0:
            tokens = unpack_ids(answer.state.request.tokens)
            prompt = whole_prompt(tokens, answer.state.prompt_logprobs, wanted.prompt_start)
        meta: dict[str, Any] = {}
        for side, entries in (("input", prompt), ("output", answer.logprobs)):
            meta[f"{side}_token_logprobs"] = [self._triple(e.token, e.logprob) for e in entries]
            if wanted.top:
                meta[f"{side}_top_logprobs"] = [self._triples(e, e.top) for e in entries]
            if wanted.token_ids:
                meta[f"{side}_token_ids_logprobs"] = [self._triples(e, e.wanted) for e in entries]
        meta["output_token_logprobs_length"] = len(answer.logprobs)
        return meta

    def _triple(self, token: int, value: float | None) -> list[Any]:
        text = self._tokenizer.token_text(token) if self._with_text else None
        return [finite(value), token, text]

    def _triples(
        self, entry: TokenLogprobs, pairs: Sequence[tuple[int, float]]
    ) -> list[list[Any]] | None:
        if entry.logprob is None:
            return None
        return [self._triple(token, value) for token, value in pairs]


def _finish_reason(answer: Answer) -> dict[str, Any] | None:
    finish: Finish | None = answer.finish
    if finish is None:
        return None
    if finish.kind == "stop":
        if finish.matched is None:
            return {"type": "stop"}
        return {"type": "stop", "matched": finish.matched}
    if finish.kind == "length":
        return {"type": "length", "length": len(answer.tokens)}
    return {
        "type": "abort",
        "message": finish.message,
        "status_code": finish.status,
        "err_type": "AbortError",
    }
