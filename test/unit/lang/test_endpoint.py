"""The HTTP backend against servers that answer, refuse, break and vanish."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import sps_runtime.lang as sgl

pytestmark = pytest.mark.filterwarnings("ignore:a program has stopped")


class Handler(BaseHTTPRequestHandler):
    """``/generate`` does what its text says."""

    def do_GET(self) -> None:
        if self.headers.get("Authorization") != "Bearer secret":
            return self._answer(401, {"error": {"message": "who are you"}})
        info = {"model_path": "Qwen/Qwen2.5-0.5B-Instruct"}
        self._answer(200, info if self.path == "/get_model_info" else {"version": "1"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/flush_cache":
            self._reply(200, b"flushed")
        elif body["text"] == "refuse":
            self._answer(400, {"error": {"message": "temperature is negative"}})
        elif body["text"] == "plain":
            self._reply(500, b"no JSON")
        elif body.get("stream"):
            self._stream(body["text"])
        else:
            self._answer(200, {"text": "é!", "meta_info": {"completion_tokens": 2}})

    def _stream(self, text: str) -> None:
        events = [{"text": "é", "meta_info": {}}, {"text": "é!", "meta_info": {}}]
        if text == "break":
            events = [events[0], {"error": {"message": "a rank died"}}]
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        lines.insert(1, ": progress 5 of 10\n\n")
        lines += [] if text == "vanish" else ["data: [DONE]\n\n"]
        self._reply(200, "".join(lines).encode())

    def _answer(self, status: int, content: dict) -> None:
        self._reply(status, json.dumps(content).encode())

    def _reply(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def backend(url: str) -> sgl.RuntimeEndpoint:
    return sgl.RuntimeEndpoint(url, api_key="secret")


@sgl.function
def program(s, text):
    s += text + sgl.gen("x")


def test_a_server_is_asked(backend: sgl.RuntimeEndpoint) -> None:
    assert backend.get_model_name() == "Qwen/Qwen2.5-0.5B-Instruct"
    assert backend.get_chat_template().name == "qwen"
    assert program.run("go", backend=backend)["x"] == "é!"
    assert "".join(program.run("go", backend=backend, stream=True).text_iter("x")) == "é!"
    assert sgl.get_server_info(backend) == {"version": "1"}
    sgl.flush_cache(backend)
    backend.cache_prefix("go")
    backend.start_profile()
    backend.stop_profile()


def test_a_template_can_be_named(url: str) -> None:
    named = sgl.RuntimeEndpoint(url, "secret", chat_template_name="chatml")
    assert named.get_chat_template().default_system is None


def test_who_may_not_ask_is_told(url: str) -> None:
    with pytest.raises(sgl.ServerError, match="who are you") as caught:
        sgl.RuntimeEndpoint(url)
    assert caught.value.status == 401


@pytest.mark.parametrize(
    ("text", "status", "said"),
    [("refuse", 400, "temperature is negative"), ("plain", 500, "no JSON")],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_server_says_is_raised(
    backend: sgl.RuntimeEndpoint, text: str, status: int, said: str, stream: bool
) -> None:
    state = program.run(text, backend=backend, stream=stream)
    with pytest.raises(sgl.ServerError, match=said) as caught:
        state["x"]
    assert caught.value.status == status


@pytest.mark.parametrize(("text", "said"), [("break", "a rank died"), ("vanish", "has gone")])
def test_a_stream_that_breaks_is_no_answer(
    backend: sgl.RuntimeEndpoint, text: str, said: str
) -> None:
    received = []
    with pytest.raises(sgl.ServerError, match=said):
        for piece in program.run(text, backend=backend, stream=True).text_iter("x"):
            received.append(piece)
    assert "é!".startswith("".join(received)) and received


def test_nobody_there() -> None:
    with pytest.raises(OSError):
        sgl.RuntimeEndpoint("http://127.0.0.1:9", timeout_s=1.0)
