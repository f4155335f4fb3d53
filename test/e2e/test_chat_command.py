"""``sps chat`` against the real HTTP server."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer
from test.kit.script import Script, scripted_server

from sps_runtime.chat.conversation import Conversation
from sps_runtime.chat.display import Display
from sps_runtime.chat.main import converse, main
from sps_runtime.chat.stream import ChatError, Ended, Endpoint, Prefilled, Text
from sps_runtime.types.messages import PrefillProgress


@pytest.fixture
def script(tokenizer_directory: Path) -> Iterator[tuple[Script, str]]:
    script, server = scripted_server(tokenizer_directory)
    with server:
        yield script, server.url


def talk(url: str, **fields: object) -> Conversation:
    return Conversation(Endpoint(url), {"temperature": 0}, **fields)


def test_an_answer_is_streamed_and_remembered(script: tuple[Script, str]) -> None:
    told, url = script
    told.text = "Grüße, 世界"
    one = talk(url, document="It was a dark night.", system="Be brief.")
    events = list(one.ask("When?"))
    assert "".join(e.text for e in events if isinstance(e, Text)) == told.text
    end = events[-1]
    assert isinstance(end, Ended) and end.reason == "stop" and end.completion_tokens > 1
    assert one.messages == [
        {"role": "user", "content": "It was a dark night.\n\nWhen?"},
        {"role": "assistant", "content": told.text},
    ]
    told.text = "Yes."
    later = list(one.ask("Really?"))[-1]
    assert isinstance(later, Ended) and later.prompt_tokens > end.prompt_tokens
    assert [m["content"] for m in one.messages[2:]] == ["Really?", "Yes."]
    one.forget()
    assert one.messages == []


def test_reasoning_and_what_was_refused(script: tuple[Script, str]) -> None:
    _, url = script
    one = talk(url)
    one.options["max_tokens"] = -1
    with pytest.raises(ChatError, match=r"400: .*max_tokens"):
        list(one.ask("?"))
    assert one.messages == []
    with pytest.raises(ChatError, match="address"):
        list(talk("ftp://nowhere").ask("?"))
    with pytest.raises(ChatError, match="refused"):
        list(talk("127.0.0.1:9").ask("?"))


class SlowPrefill(FakeEngine):
    """Says how far every prefill is, and answers once it is let go."""

    def advance(self, done: int) -> None:
        for rid in self.running:
            self.put(PrefillProgress(rid, done, 40))

    def hold(self, held: bool) -> None:
        self.held = held


def test_a_bar_shows_a_prefill(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, SlowPrefill) as server:
        server.call(server.engine.hold, True)
        out, notes = io.StringIO(), io.StringIO()
        one = talk(server.url)
        one.options["max_tokens"] = 2
        events = iter(one.ask("x" * 30))
        threading.Timer(0.3, lambda: server.call(server.engine.advance, 16)).start()
        first = next(events)
        assert isinstance(first, Prefilled) and first.done == 16 and first.total > 30
        server.call(server.engine.hold, False)
        Display(out, notes).show([first, *events])
    assert f"16/{first.total} [" in notes.getvalue() and "first token after" in notes.getvalue()
    assert "cut off" in notes.getvalue() and out.getvalue().endswith("\n")


def test_breaking_off_ends_the_request(tokenizer_directory: Path) -> None:
    with LiveServer(tokenizer_directory, lambda: FakeEngine(delay_s=0.02)) as server:
        one = talk(server.url)
        events = one.ask("hello there")
        assert isinstance(next(events), Text)
        events.close()
        deadline = threading.Event()
        for _ in range(100):
            if server.engine.aborted:
                break
            deadline.wait(0.05)
        assert server.engine.aborted and one.messages == []


def test_a_talk_of_commands(
    script: tuple[Script, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, url = script
    told.text = "ok"
    (tmp_path / "book.txt").write_text("Once upon a time")
    lines = iter([
        f"/file {tmp_path}/book.txt", "who?", "", "/help", f"/file {tmp_path}/none", "/new",
        "again", "/quit", "never",
    ])  # fmt: skip
    one = talk(url)
    converse(one, Display(notes=None), lambda _: next(lines))
    assert [m["content"] for m in one.messages] == ["again", "ok"]
    assert next(lines) == "never"
    said = capsys.readouterr()
    assert said.out == "ok\nok\n" and "/file PATH" in said.err and "No such file" in said.err


def test_one_question_from_the_command_line(
    script: tuple[Script, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told, url = script
    told.text = "seven"
    (tmp_path / "book.txt").write_text("Once upon a time")
    flags = ["--url", url, "--file", str(tmp_path / "book.txt")]
    assert main([*flags, "how", "many?"]) == 0
    said = capsys.readouterr()
    assert said.out == "seven\n" and "tokens read" in said.err
    assert main(["--url", "http://127.0.0.1:9", "--quiet", "?"]) == 1
    assert "refused" in capsys.readouterr().err


def test_the_command_is_installed_light() -> None:
    """It imports neither the server nor torch."""
    check = (
        "import sys, sps_runtime.chat.main\n"
        "assert not {'torch', 'starlette', 'sps_runtime.server', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", check], check=True, timeout=60)
    command = [sys.executable, "-m", "sps_runtime.cli", "chat", "--help"]
    help_text = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True)
    assert "/file PATH" in help_text.stdout
