"""POST /v1/chat/completions."""

from __future__ import annotations

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.query import LogprobOptions, Query
from sps_runtime.server.answers import complete
from sps_runtime.server.chat_job import ChatJob, chat_job
from sps_runtime.server.chat_messages import chat_prompt, template_variables
from sps_runtime.server.chat_writer import ChatWriter
from sps_runtime.server.error_handlers import request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.openai_common import labels_of
from sps_runtime.server.openai_types import ChatBody
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.server.tools import Toolbox, make_toolbox
from sps_runtime.types.errors import InvalidRequest


async def chat_completions(call: Call) -> ASGIApp:
    """Answer one conversation, whole or streamed."""
    service = call.service
    body, headers = await read_request(call, ChatBody)
    service.check_model(body.model)
    job = _job(call, body)
    writer = ChatWriter(call, body, job.new_parser)
    if body.stream:
        group = await service.manager.submit([job.query])
        writer.begin(group.states)
        return EventStream(
            call,
            group,
            writer.events,
            opening=writer.opening(),
            closing=writer.closing,
            headers=headers,
        )
    answers = await complete(call, [job.query])
    writer.begin([answer.state for answer in answers])
    content = msgspec.json.encode(writer.whole(answers))
    return Response(
        content, 200, {**headers, **request_id_header(call.request)}, "application/json"
    )


def _job(call: Call, body: ChatBody) -> ChatJob:
    toolbox = make_toolbox(call.service, body.tools, body.tool_choice, body.parallel_tool_calls)
    separate = body.separate_reasoning is not False
    query = _query(call, body, toolbox)
    return chat_job(call.service, query, toolbox, body.grammar(), separate_reasoning=separate)


def _query(call: Call, body: ChatBody, toolbox: Toolbox) -> Query:
    told_as = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, told_as)
    variables = template_variables(body.chat_template_kwargs, body.add_generation_prompt)
    return Query(
        prompt=chat_prompt(body.messages, variables, toolbox.described()),
        options=body.sampling(limit),
        logprobs=_logprob_options(body),
        attention=body.attention,
        default_max_new_tokens=None,
        use_model_defaults=True,
        tenant=call.identity.tenant,
        owner=call.identity.owner,
        label=labels_of(body.rid, 1)[0],
        names={
            "prompt": "messages",
            "max_new_tokens": told_as,
            "min_new_tokens": "min_tokens",
            "sampling_seed": "seed",
        },
    )


def _logprob_options(body: ChatBody) -> LogprobOptions | None:
    if body.logprobs:
        return LogprobOptions(body.top_logprobs or 0)
    if body.top_logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", field="top_logprobs")
    return None
