"""POST /v1/responses; GET and DELETE /v1/responses/{id}."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import ASGIApp

from sps_runtime.frontend.query import ChatPrompt, Query
from sps_runtime.frontend.request_state import Finish, Output, RequestState
from sps_runtime.server.admin import as_json
from sps_runtime.server.answers import complete
from sps_runtime.server.chat_job import ChatJob, chat_job
from sps_runtime.server.error_handlers import request_id_header
from sps_runtime.server.event_stream import EventStream
from sps_runtime.server.requests import read_request
from sps_runtime.server.responses_prompt import Messages, add_call, messages_of
from sps_runtime.server.responses_store import StoredResponse
from sps_runtime.server.responses_types import ResponsesBody
from sps_runtime.server.responses_writer import RESPONSES, ResponseWriter
from sps_runtime.server.service import Call
from sps_runtime.server.tools import make_toolbox
from sps_runtime.types.errors import InvalidRequest

_NAMES = {"prompt": "input", "max_new_tokens": "max_output_tokens"}


@dataclass(frozen=True)
class _Turn:
    """One request: what it asks, and what it leaves behind."""

    call: Call
    body: ResponsesBody
    messages: Messages
    job: ChatJob

    def writer(self, state: RequestState) -> ResponseWriter:
        model = self.body.model or self.call.service.model_name
        return ResponseWriter(self.body, model, state, self.job.new_parser())

    def keep(self, writer: ResponseWriter, finish: Finish) -> dict[str, Any]:
        """Remember the conversation with its answer; return the response."""
        content = writer.response(finish)
        if self.body.store is False:
            return content
        text, calls = writer.answer()
        messages = [*self.messages, {"role": "assistant", "content": text}]
        for call in calls:
            add_call(messages, call["call_id"], call["name"], call["text"])
        chars = sum(len(str(message)) for message in messages) + len(str(content))
        stored = StoredResponse(tuple(messages), content, chars)
        self.call.service.responses.put(self.call.identity.owner, writer.id, stored)
        return content


async def create_response(call: Call) -> ASGIApp:
    """Answer one turn, whole or streamed."""
    service = call.service
    body, headers = await read_request(call, ResponsesBody)
    service.check_model(body.model)
    turn = _turn(call, body)
    if not body.stream:
        (answer,) = await complete(call, [turn.job.query])
        writer = turn.writer(answer.state)
        assert answer.finish is not None
        list(writer.push(answer.text, answer.finish))
        content = msgspec.json.encode(turn.keep(writer, answer.finish))
        headers = {**headers, **request_id_header(call.request)}
        return Response(content, 200, headers, "application/json")
    group = await service.manager.submit([turn.job.query])
    writer = turn.writer(group.states[0])

    def events(output: Output) -> Iterable[Any]:
        yield from writer.events(output)
        if output.finish is not None:
            turn.keep(writer, output.finish)

    return EventStream(
        call, group, events, opening=writer.opening(), headers=headers, framing=RESPONSES
    )


async def get_response(call: Call) -> ASGIApp:
    """A former response."""
    return as_json(_stored(call).content)


async def delete_response(call: Call) -> ASGIApp:
    """Forget a former response."""
    response_id = _stored(call).content["id"]
    call.service.responses.delete(call.identity.owner, response_id)
    return as_json({"id": response_id, "object": "response", "deleted": True})


def _stored(call: Call) -> StoredResponse:
    response_id = call.request.path_params["response"]
    owner = call.identity.owner
    return call.service.responses.get(owner, response_id, field="response_id", status=404)


def _turn(call: Call, body: ResponsesBody) -> _Turn:
    messages: Messages = []
    if body.previous_response_id:
        field, owner = "previous_response_id", call.identity.owner
        former = call.service.responses.get(
            owner, body.previous_response_id, field=field, status=400
        )
        messages += former.messages
    messages += messages_of(body.input, _called(messages))
    if not messages:
        raise InvalidRequest("input is empty", field="input")
    return _Turn(call, body, messages, _job(call, body, messages))


def _called(messages: Messages) -> dict[str, str]:
    """Functions by the ids of their calls."""
    calls = [call for message in messages for call in message.get("tool_calls", ())]
    return {call["id"]: call["function"]["name"] for call in calls}


def _job(call: Call, body: ResponsesBody, messages: Messages) -> ChatJob:
    toolbox = make_toolbox(
        call.service, body.openai_tools(), body.openai_choice(), body.parallel_tool_calls
    )
    told = [{"role": "system", "content": body.instructions}] if body.instructions else []
    query = Query(
        prompt=ChatPrompt([*told, *messages], {}, toolbox.described()),
        options=body.sampling(),
        attention=body.attention,
        default_max_new_tokens=None,
        use_model_defaults=True,
        tenant=call.identity.tenant,
        owner=call.identity.owner,
        names=_NAMES,
    )
    return chat_job(call.service, query, toolbox, body.grammar())
