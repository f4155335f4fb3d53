"""A scheduler and echo ranks as real processes, spoken to as a front end would."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from sps_runtime.config.options import EngineOptions
from sps_runtime.config.process import LogConfig
from sps_runtime.ipc.links import Receiver, Sender, new_context
from sps_runtime.ipc.process import Child, ChildReady
from sps_runtime.launch.checks import check_model
from sps_runtime.launch.processes import EngineProcesses
from sps_runtime.launch.sizing import settle
from sps_runtime.launch.watch import Died, Said, Watch
from sps_runtime.types.messages import ToFrontend, TokensBatch, TokensOut, ToScheduler
from sps_runtime.types.request import GenerateRequest
from sps_runtime.types.sampling import SamplingParams
from sps_runtime.types.tokens import pack_ids

VOCAB = 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "vocab_size": VOCAB,
}


def write_config(directory: Path) -> Path:
    """A model directory that is enough for echo ranks."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def request(rid: str, prompt: Sequence[int], max_new_tokens: int = 16) -> GenerateRequest:
    sampling = SamplingParams(max_new_tokens=max_new_tokens, temperature=0.0)
    return GenerateRequest(rid=rid, tokens=pack_ids(prompt), sampling=sampling)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid: int) -> list[int]:
    """All descendants of a process."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                found += [child, *children_of(child)]
    return found


def eventually(condition: Callable[[], bool], timeout_s: float, what: str) -> float:
    """Wait for a condition; the seconds it took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < timeout_s, f"not within {timeout_s} s: {what}"
        time.sleep(0.01)
    return time.monotonic() - began


class EchoEngine:
    """An engine over echo ranks; a context manager that leaves nothing behind.

    Args:
        options: of the engine; `device` is echo.

    Attributes:
        messages: everything that came, in order.
    """

    def __init__(self, options: EngineOptions) -> None:
        directory, model = check_model(options)
        self.config = settle(options, model, directory)
        self.processes = EngineProcesses(self.config, model, LogConfig("warning"))
        self.watch = Watch()
        self.messages: list[ToFrontend] = []
        self._context = new_context()
        endpoints = self.processes.endpoints
        self._receiver: Receiver[ToFrontend] = Receiver(
            self._context, endpoints.frontend, ToFrontend
        )
        self._sender: Sender[ToScheduler] = Sender(self._context, endpoints.scheduler)

    def __enter__(self) -> EchoEngine:
        try:
            self.processes.start()
            self._wait_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.processes.close()
        self.watch.close()
        self._receiver.close()
        self._sender.close()
        self._context.term()

    def child(self, name: str) -> Child:
        return next(child for child in self.processes.children if child.name == name)

    def _wait_ready(self) -> None:
        waiting = set(self.processes.children)
        for child in waiting:
            self.watch.add(child)
        end = time.monotonic() + 30
        while waiting:
            assert time.monotonic() < end, f"not ready: {[child.name for child in waiting]}"
            for event in self.watch.wait(1.0):
                match event:
                    case Said(child, ChildReady()):
                        waiting.discard(child)
                    case Said(child, status):
                        raise AssertionError(f"{child.name}: {status}")
                    case Died():
                        raise AssertionError(event.how)

    def send(self, message: ToScheduler) -> None:
        self._sender.send(message)

    def receive(self, timeout_s: float = 10.0) -> ToFrontend:
        """The next message."""
        message = self._receiver.receive(timeout_s)
        assert message is not None, "the engine says nothing"
        self.messages.append(message)
        return message

    def receive_until(
        self, done: Callable[[ToFrontend], bool], timeout_s: float = 10.0
    ) -> ToFrontend:
        """The first message of which `done` holds."""
        end = time.monotonic() + timeout_s
        while True:
            message = self.receive(max(0.01, end - time.monotonic()))
            if done(message):
                return message

    def generate(
        self, prompts: Mapping[str, Sequence[int]], max_new_tokens: int = 16
    ) -> dict[str, list[int]]:
        """Send all prompts at once; their outputs, by rid, each with exactly one final message."""
        for rid, prompt in prompts.items():
            self.send(request(rid, prompt, max_new_tokens))
        outputs: dict[str, list[int]] = {rid: [] for rid in prompts}
        final: dict[str, TokensOut] = {}
        while len(final) < len(prompts):
            message = self.receive()
            if not isinstance(message, TokensBatch):
                continue
            for news in message.items:
                if news.rid not in outputs:
                    continue
                assert news.rid not in final, "news after the final message"
                outputs[news.rid] += news.tokens
                if news.finish is not None:
                    final[news.rid] = news
        return outputs

    def pids(self) -> list[int]:
        return [child.process.pid for child in self.processes.children]


def shm_files() -> set[str]:
    return set(os.listdir("/dev/shm"))
