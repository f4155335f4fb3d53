"""Beginnings and ends: failures, draining, clients that leave or do not read, keys."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

from sps_runtime.config.server import ServerConfig
from sps_runtime.server.admin import as_json
from sps_runtime.server.app import ROUTES, RouteSpec
from sps_runtime.server.auth import Access, Keys
from sps_runtime.server.service import Timeouts

LONG = {"text": "ABC", "sampling_params": {"max_new_tokens": 4000}}


def slow() -> FakeEngine:
    return FakeEngine(delay_s=0.005)


def unready() -> FakeEngine:
    return FakeEngine(ready=False)


def until(condition: Any, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def in_background(
    function: Any, *arguments: Any, **named: Any
) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function(*arguments, **named)))
    thread.start()
    return thread, results


def test_starting_then_ready(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, unready) as live:
        assert httpx.get(f"{live.url}/livez").status_code == 200
        for path in ("/health", "/readyz"):
            response = httpx.get(live.url + path)
            assert (response.status_code, response.json()) == (503, {"status": "starting"})
        refused = httpx.post(f"{live.url}/generate", json=LONG)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        live.call(live.engine.become_ready)
        until(lambda: httpx.get(f"{live.url}/health").status_code == 200)


def test_disconnect_aborts(tokenizer_directory: Path) -> None:
    """Streamed or not, a client that leaves takes its sequences along."""
    with LiveServer(tokenizer_directory, slow) as live:
        for stream in (True, False):
            client = httpx.Client(timeout=0.3)
            with pytest.raises(httpx.ReadTimeout):
                body = {
                    **LONG,
                    "stream": stream,
                    "sampling_params": {"n": 3, "max_new_tokens": 4000},
                }
                with client.stream("POST", f"{live.url}/generate", json=body) as response:
                    live.engine.held = True
                    response.read()
            client.close()
            until(lambda: live.manager.inflight == 0)
            until(lambda: not live.engine.running)
            live.engine.held = False
        assert len(live.engine.aborted) == 6


def test_engine_failure_answers_everyone_and_ends(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, slow) as live:
        whole, answers = in_background(httpx.post, f"{live.url}/generate", json=LONG, timeout=10)
        with httpx.stream("POST", f"{live.url}/generate", json={**LONG, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            until(lambda: len(live.engine.running) == 2)
            failed = time.monotonic()
            live.call(live.engine.fail, "rank 0 died")
            data = [line[6:] for line in lines if line.startswith("data: ")]
        whole.join(5)
        assert time.monotonic() - failed < 2
        assert answers[0].status_code == 503
        assert "error" in json.loads(data[-2])
        assert data[-1] == "[DONE]"
        live.join(3)
        assert live.good_end is False


def test_crashed_health(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory) as live:
        live.call(live.engine.fail)
        until(lambda: live.manager.health.failure)
        response = httpx.get(f"{live.url}/health")
        assert (response.status_code, response.json()["status"]) == (503, "crashed")


def test_a_silent_engine_is_hung(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, heartbeat_timeout_s=0.3) as live:
        until(lambda: httpx.get(f"{live.url}/health").json()["status"] == "hung", 3)
        assert httpx.get(f"{live.url}/health").status_code == 503
        assert httpx.get(f"{live.url}/livez").status_code == 200


def test_draining(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, lambda: FakeEngine(delay_s=0.01)) as live:
        body = {**LONG, "sampling_params": {"max_new_tokens": 60}}
        running, answers = in_background(httpx.post, f"{live.url}/generate", json=body)
        until(lambda: live.engine.running)
        kept = httpx.Client(base_url=live.url)
        assert kept.get("/readyz").status_code == 200
        began = time.monotonic()
        live.call(live.http.handle_exit, 15, None)
        until(lambda: kept.get("/readyz").json()["status"] == "draining", 1.0)
        assert kept.post("/generate", json=LONG).status_code == 503
        running.join(5)
        assert answers[0].status_code == 200
        assert answers[0].json()["meta_info"]["completion_tokens"] == 60
        live.join(5)
        assert live.good_end is True
        assert time.monotonic() - began < 4


def test_pings_in_silence(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, timeouts=Timeouts(ping=0.1)) as live:
        live.engine.held = True
        with httpx.stream("POST", f"{live.url}/generate", json={**LONG, "stream": True}) as stream:
            assert stream.status_code == 200, "headers come at admission"
            lines = stream.iter_lines()
            seen = [next(lines) for _ in range(4)]
        assert seen == [": ping", "", ": ping", ""]


def test_probes_for_a_token_share_one_request(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, timeouts=Timeouts(probe=2.0)) as live:
        live.engine.held = True
        probes = [in_background(httpx.get, f"{live.url}/health_generate") for _ in range(12)]
        for thread, _ in probes:
            thread.join(10)
        assert len(live.engine.requests) <= 2
        assert {answers[0].status_code for _, answers in probes} <= {200, 503}
        until(lambda: not live.engine.running)
        live.engine.held = False
        assert httpx.get(f"{live.url}/health_generate").status_code == 200


def test_a_client_that_never_reads_is_cut_off(tokenizer_directory: Path) -> None:
    timeouts = Timeouts(stall=0.5)
    with LiveServer(tokenizer_directory, timeouts=timeouts, context_length=200_000) as live:
        body = json.dumps(
            {"text": "ABC" * 100, "stream": True, "sampling_params": {"max_new_tokens": 100_000}}
        )
        with socket.create_connection(("127.0.0.1", live.port)) as reader:
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = (
                "POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                f"content-length: {len(body)}\r\n\r\n"
            )
            reader.sendall(head.encode() + body.encode())
            until(lambda: live.engine.requests)
            other = httpx.post(
                f"{live.url}/generate",
                json={"text": "Z", "sampling_params": {"max_new_tokens": 50}},
            )
            assert other.json()["text"] == "Z" * 50
            until(lambda: live.manager.inflight == 0, 15)
            until(
                lambda: (
                    not live.http.server_state.connections
                    or len(live.http.server_state.connections) <= 1
                )
            )


def test_aborting_by_rid(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, slow) as live:
        running, answers = in_background(
            httpx.post, f"{live.url}/generate", json={**LONG, "rid": "job-1"}
        )
        until(lambda: live.engine.running)
        twice = httpx.post(f"{live.url}/generate", json={**LONG, "rid": "job-1"})
        assert twice.status_code == 400
        assert twice.json()["error"]["param"] == "rid"
        assert httpx.get(f"{live.url}/flush_cache").status_code == 400
        for wrong in ("job", "job-12", ""):
            httpx.post(f"{live.url}/abort_request", json={"rid": wrong})
        assert running.is_alive()
        assert httpx.post(f"{live.url}/abort_request", json={"rid": "job-1"}).status_code == 200
        running.join(5)
        assert answers[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert answers[0].json()["meta_info"]["id"] == "job-1"


def test_overload_is_refused(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, slow, max_inflight=2) as live:
        busy, _ = in_background(
            httpx.post,
            f"{live.url}/generate",
            json={"text": ["A", "B"], "sampling_params": {"max_new_tokens": 100}},
        )
        until(lambda: len(live.engine.running) == 2)
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"]
        assert httpx.get(f"{live.url}/health").status_code == 200
        busy.join(5)


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def test_keys(tokenizer_directory: Path) -> None:
    async def secret(call: Any) -> Any:
        return as_json({"admin": True})

    routes = (*ROUTES, RouteSpec("/secret", ("GET",), Access.ADMIN, secret))
    keys = Keys([digest("ann"), digest("bob")], [digest("root")])
    config = ServerConfig(
        served_model_name="m",
        enable_metrics=True,
        api_key_hashes=(digest("ann"), digest("bob")),
        admin_key_hashes=(digest("root"),),
    )
    with LiveServer(tokenizer_directory, slow, keys=keys, routes=routes, server=config) as live:
        client = httpx.Client(base_url=live.url)
        ann, bob, root = ({"authorization": f"Bearer {key}"} for key in ("ann", "bob", "root"))
        for spec in routes:
            path = spec.path.replace("{model:path}", "m")
            response = client.request(spec.methods[0], path, json={})
            public = spec.access is Access.PUBLIC
            assert (response.status_code == 401) is (not public), path
        for path in (
            "//v1/models",
            "/v1/models/",
            "/V1/models",
            "/v1/../v1/models",
            "/v1%2fmodels",
        ):
            response = client.get(path, headers={"host": "x/health"})
            assert response.status_code in (401, 404), path
        assert client.get("/v1/models", headers={"x-api-key": "ann"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer no"}).status_code == 401
        assert client.get("/secret", headers=ann).status_code == 403
        assert client.get("/secret", headers=root).status_code == 200
        info = client.get("/server_info", headers=ann)
        assert info.status_code == 200
        assert digest("ann") not in info.text
        running, _ = in_background(
            httpx.post, f"{live.url}/generate", json={**LONG, "rid": "r"}, headers=ann
        )
        until(lambda: live.engine.running)
        for body in ({"rid": "r"}, {"abort_all": True}):
            ended = client.post("/abort_request", json=body, headers=bob).json()
            assert ended == {"aborted": 0}
        assert client.post("/abort_request", json={"abort_all": True}, headers=root).json() == {
            "aborted": 1
        }
        running.join(5)
        client.post(
            "/generate", json={"text": "A", "sampling_params": {"max_new_tokens": 1}}, headers=bob
        )
        tenants = {request.tenant for request in live.engine.requests} - {""}  # "": the probe
        assert [len(tenant) for tenant in tenants] == [64, 64]
