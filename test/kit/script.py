"""An engine that says what it is told, for tests of what becomes of answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sps_runtime.config.server import ServerConfig
from sps_runtime.frontend.tokenizer import Tokenizer
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.tokens import unpack_ids
from test.kit.fake_engine import FakeEngine
from test.kit.live_server import LiveServer

EOS = 2


class Script:
    """Attributes:
    text: the next answers' text; the end of sequence follows.
    """

    def __init__(self, directory: Path) -> None:
        self._tokenizer = Tokenizer(directory)
        self.text = ""

    def answer(self, request: GenerateRequest) -> list[int]:
        ids = self._tokenizer.encode(self.text, add_special_tokens=False)
        return [*ids, EOS][: request.sampling.max_new_tokens]

    def engine(self) -> FakeEngine:
        return FakeEngine(self.answer, eos=(EOS,))


class Scripted:
    """A scripted server, running; tests add the client that they ask it by."""

    def __init__(self, script: Script, live: Any) -> None:
        self.script, self.live = script, live

    def prompt(self) -> str:
        """The last request's, with its special tokens."""
        ids = list(unpack_ids(self.live.engine.requests[-1].tokens))
        return str(self.live.manager.tokenizer.decode(ids, skip_special_tokens=False))

    def grammar(self) -> str:
        """The last request's, as ranks get it."""
        return str(self.live.engine.requests[-1].sampling.grammar)


def scripted_server(directory: Path, **settings: str) -> tuple[Script, LiveServer]:
    """A script, and a server (not yet started) that follows it; `settings` of the server."""
    script = Script(directory)
    server = ServerConfig(served_model_name="test-model", enable_cache_report=True, **settings)
    return script, LiveServer(directory, script.engine, server=server)
