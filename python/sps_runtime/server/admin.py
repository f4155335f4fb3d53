"""What the server says of itself, and what ends or empties something."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

import sps_runtime
from sps_runtime.server.error_handlers import error_body
from sps_runtime.server.openai_common import legal_label
from sps_runtime.server.requests import read_request
from sps_runtime.server.service import Call
from sps_runtime.types.errors import InvalidRequest


def as_json(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(content), status, headers, "application/json")


async def list_models(call: Call) -> ASGIApp:
    """GET /v1/models."""
    return as_json({"object": "list", "data": [_model_card(call)]})


async def get_model(call: Call) -> ASGIApp:
    """GET /v1/models/{id}."""
    call.service.check_model(call.request.path_params["model"])
    return as_json(_model_card(call))


def _model_card(call: Call) -> dict[str, Any]:
    service = call.service
    return {
        "id": service.model_name,
        "object": "model",
        "created": service.started,
        "owned_by": "sps",
        "root": service.model_name,
        "parent": None,
        "max_model_len": service.manager.limits.context_length,
    }


async def model_info(call: Call) -> ASGIApp:
    """GET /get_model_info, /model_info. SGLang's front end picks a chat template by model_path."""
    engine = call.service.engine
    template = call.service.manager.tokenizer.chat_template
    return as_json(
        {
            "model_path": call.service.model_name,
            "tokenizer_path": engine.tokenizer_path or engine.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
            "has_chat_template": template is not None,
            "max_context_length": call.service.manager.limits.context_length,
            "vocab_size": call.service.manager.limits.vocab_size,
        }
    )


async def server_info(call: Call) -> ASGIApp:
    """GET /server_info, /get_server_info: settings and state, no secrets."""
    service = call.service
    manager = service.manager
    state = await manager.fresh_state()
    ready = manager.ready
    engine = msgspec.to_builtins(service.engine)
    hidden = ("api_key_hashes", "admin_key_hashes")
    server = {k: v for k, v in msgspec.to_builtins(service.server).items() if k not in hidden}
    return as_json(
        {
            **server,
            **{k: v for k, v in engine.items() if not isinstance(v, dict)},
            **engine["parallel"],
            **engine["cache"],
            "kv_cache_dtype": engine["cache"]["kv_dtype"],
            "disable_radix_cache": not service.engine.cache.enable_prefix_cache,
            "attention": engine["attention"],
            **engine["scheduler"],
            "served_model_name": service.model_name,
            "version": sps_runtime.__version__,
            "status": manager.health.state,
            "max_total_num_tokens": ready.max_total_tokens if ready else 0,
            "page_size": ready.page_size if ready else service.engine.cache.page_size,
            "max_req_input_len": manager.limits.context_length,
            "internal_states": [_internal_state(state)],
        }
    )


def _internal_state(state: Any) -> dict[str, Any]:
    """The engine's state, with the few names that SGLang's benchmarks read."""
    values: dict[str, Any] = msgspec.to_builtins(state)
    return {
        **values,
        "num_running_reqs": state.running,
        "num_queue_reqs": state.waiting,
        "last_gen_throughput": 0.0,
    }


async def loads(call: Call) -> ASGIApp:
    """GET /v1/loads: what a router balances by."""
    state = await call.service.manager.fresh_state()
    usage = state.used_tokens / state.max_total_tokens if state.max_total_tokens else 0.0
    one = {
        "dp_rank": 0,
        "num_running_reqs": state.running,
        "num_waiting_reqs": state.waiting,
        "num_total_reqs": state.running + state.waiting,
        "num_used_tokens": state.used_tokens,
        "max_total_num_tokens": state.max_total_tokens,
        "token_usage": usage,
    }
    return as_json({"dp_rank_count": 1, "loads": [one]})


async def flush_cache(call: Call) -> ASGIApp:
    """GET, POST /flush_cache: 400 while requests run or wait."""
    manager = call.service.manager
    if manager.inflight == 0 and (await manager.calls.flush_cache()).ok:
        return PlainTextResponse("Cache flushed.\n")
    message = "the cache is in use: requests are running or waiting"
    return as_json(error_body(message, 400, code="cache_busy"), 400)


async def start_profile(call: Call) -> ASGIApp:
    """GET, POST /start_profile: go on with the timeline of --trace-file."""
    return await _record(call, True)


async def stop_profile(call: Call) -> ASGIApp:
    """GET, POST /stop_profile: pause the timeline and write what was gathered."""
    return await _record(call, False)


async def _record(call: Call, on: bool) -> ASGIApp:
    reply = await call.service.manager.calls.record(on)
    if not reply.ok:
        raise InvalidRequest(reply.detail, code="no_timeline")
    return PlainTextResponse("The timeline goes on.\n" if on else "The timeline is paused.\n")


class AbortBody(msgspec.Struct):
    """POST /abort_request."""

    rid: str | None = None
    abort_all: bool | None = None


async def abort_request(call: Call) -> ASGIApp:
    """POST /abort_request. One's own requests only, unless one is the administrator."""
    body, headers = await read_request(call, AbortBody)
    manager, identity = call.service.manager, call.identity
    if body.abort_all:
        ended = manager.abort_all(None if identity.admin else identity.owner)
    elif body.rid:
        ended = manager.abort_label(identity.owner, legal_label(body.rid))
    else:
        raise InvalidRequest("rid names the request to end", field="rid")
    return as_json({"aborted": ended}, headers=headers)


async def concatenate_and_append(call: Call) -> ASGIApp:
    """POST /concate_and_append_request: a hint; the radix cache shares prefixes by itself."""
    return as_json({})
