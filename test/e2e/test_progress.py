"""How far a long prefill is: by its id, and in the comments of its stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from test.kit.echo_engine import eventually
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

from sps_runtime.config.environment import hash_keys
from sps_runtime.server.auth import Keys
from sps_runtime.types.messages import PrefillProgress

TEXT = "x" * 40


class SlowPrefill(FakeEngine):
    """Answers nothing while `held`; says on demand how far every prefill is."""

    def advance(self, done: int) -> None:
        for rid in self.running:
            self.put(PrefillProgress(rid, done, 40))
        self.put(PrefillProgress("unknown", 1, 2))

    def hold(self, held: bool) -> None:
        self.held = held


@pytest.fixture
def live(tokenizer_directory: Path) -> Iterator[LiveServer]:
    with LiveServer(tokenizer_directory, SlowPrefill) as server:
        server.call(server.engine.hold, True)
        yield server


def body(**fields: object) -> dict[str, object]:
    return {"text": TEXT, "sampling_params": {"max_new_tokens": 3}, **fields}


def advance(live: LiveServer, done: int) -> None:
    live.call(live.engine.advance, done)


def test_a_stream_tells_in_comments(live: LiveServer, http: httpx.Client) -> None:
    with http.stream("POST", "/generate", json=body(rid="mine", stream=True)) as response:
        lines = (line for line in response.iter_lines() if line)
        for done in (8, 24):
            advance(live, done)
            assert next(lines) == f": prefill {done}/40"
            found = http.get("/v1/progress/mine").json()
            assert (found["prefill_done"], found["prefill_total"]) == (done, 40)
            assert found["sequences"][0]["phase"] == "prefill"
        live.call(live.engine.hold, False)
        events = [line for line in lines if not line.startswith(": ")]
    assert events[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in events)
    assert http.get("/v1/progress/mine").status_code == 404


def test_openais_client_reads_over_the_comments(live: LiveServer, client: openai.OpenAI) -> None:
    stream = client.completions.create(model="default", prompt=TEXT, max_tokens=3, stream=True)
    advance(live, 16)
    live.call(live.engine.hold, False)
    assert "".join(chunk.choices[0].text for chunk in stream) == "xxx"


def test_by_the_id_of_the_answer_and_of_each_sequence(
    live: LiveServer, http: httpx.Client, client: openai.OpenAI
) -> None:
    messages = [{"role": "user", "content": "hello"}]
    stream = client.chat.completions.create(model="default", messages=messages, n=2, stream=True)
    first = next(iter(stream))
    found = http.get(f"/v1/progress/{first.id}")
    assert found.status_code == 200 and found.json()["sequences"][0]["phase"] == "waiting"
    live.call(live.engine.hold, False)
    stream.close()
    answers = body(text=["a", "b"], rid=["one", "two"], stream=True)
    live.call(live.engine.hold, True)
    with http.stream("POST", "/generate", json=answers):
        eventually(lambda: len(live.engine.running) >= 2, 5, "both run")
        for label in ("one", "two"):
            assert len(http.get(f"/v1/progress/{label}").json()["sequences"]) == 1


def test_it_is_the_owners_alone(tokenizer_directory: Path) -> None:
    keys = Keys(hash_keys(["a", "b"]), hash_keys(["root"]))
    with LiveServer(tokenizer_directory, SlowPrefill, keys=keys) as live:
        live.call(live.engine.hold, True)

        def headers(key: str) -> dict[str, str]:
            return {"authorization": f"Bearer {key}"}

        with (
            httpx.Client(base_url=live.url, timeout=20) as http,
            http.stream("POST", "/generate", json=body(rid="m", stream=True), headers=headers("a")),
        ):
            rid = next(iter(live.engine.running))
            status = {
                (key, name): http.get(f"/v1/progress/{name}", headers=headers(key)).status_code
                for key in ("a", "b", "root")
                for name in ("m", rid)
            }
            assert status == {
                ("a", "m"): 200,
                ("a", rid): 200,
                ("b", "m"): 404,
                ("b", rid): 404,
                ("root", "m"): 404,
                ("root", rid): 200,
            }
            assert http.get("/v1/progress/m").status_code == 401
