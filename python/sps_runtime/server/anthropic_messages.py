"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.query import Query
from sps_runtime.server.admin import as_json
from sps_runtime.server.answers import complete
from sps_runtime.server.anthropic_prompt import anthropic_prompt
from sps_runtime.server.anthropic_types import CountBody, MessagesBody
from sps_runtime.server.anthropic_writer import NAMED, MessageWriter, anthropic_error
from sps_runtime.server.chat_job import ChatJob, chat_job
from sps_runtime.server.error_handlers import handle_error, request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.server.tools import Toolbox, make_toolbox

Handler = Callable[[Call], Awaitable[ASGIApp]]
_NAMES = {"prompt": "messages", "max_new_tokens": "max_tokens", "stop": "stop_sequences"}


def _anthropic_errors(handler: Handler) -> Handler:
    """Errors in Anthropic's form, with the headers that every route has."""

    async def handle(call: Call) -> ASGIApp:
        try:
            return await handler(call)
        except Exception as error:
            response = await handle_error(call.request, error)
            response.body = msgspec.json.encode(anthropic_error(error)[1])
            response.headers["content-length"] = str(len(response.body))
            return response

    return handle


@_anthropic_errors
async def messages(call: Call) -> ASGIApp:
    """Answer one conversation, whole or streamed."""
    service = call.service
    body, headers = await read_request(call, MessagesBody)
    service.check_model(body.model)
    job = _job(call, body)
    model, cache_report = body.model or service.model_name, service.server.enable_cache_report
    if body.stream:
        group = await service.manager.submit([job.query])
        writer = MessageWriter(model, group.states[0], job.new_parser(), cache_report=cache_report)
        return EventStream(
            call, group, writer.events, opening=writer.opening(), headers=headers, framing=NAMED
        )
    (answer,) = await complete(call, [job.query])
    writer = MessageWriter(model, answer.state, job.new_parser(), cache_report=cache_report)
    content = msgspec.json.encode(writer.whole(answer))
    headers = {**headers, **request_id_header(call.request)}
    return Response(content, 200, headers, "application/json")


@_anthropic_errors
async def count_tokens(call: Call) -> ASGIApp:
    """How long the prompt of a conversation is."""
    service = call.service
    body, headers = await read_request(call, CountBody)
    service.check_model(body.model)
    query = Query(prompt=anthropic_prompt(body, _toolbox(call, body)), names=_NAMES)
    return as_json({"input_tokens": len(await service.manager.tokenize(query))}, headers=headers)


def _toolbox(call: Call, body: CountBody) -> Toolbox:
    tools, choice = body.openai_tools(), body.openai_choice()
    return make_toolbox(call.service, tools, choice, body.parallel)


def _job(call: Call, body: MessagesBody) -> ChatJob:
    toolbox = _toolbox(call, body)
    query = Query(
        prompt=anthropic_prompt(body, toolbox),
        options=body.sampling(),
        attention=body.attention,
        use_model_defaults=True,
        tenant=call.identity.tenant,
        owner=call.identity.owner,
        names=_NAMES,
    )
    return chat_job(call.service, query, toolbox, body.grammar())
