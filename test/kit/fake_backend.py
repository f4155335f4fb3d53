"""A model for programs that answers at once, by rule, and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from sps_runtime.lang import Backend

Answer = Callable[[str, dict[str, Any]], str]


def last_word(text: str, sampling: dict[str, Any]) -> str:
    """The rule unless told: the text's last word in brackets."""
    return f"<{text.split()[-1]}>"


class FakeBackend(Backend):
    """Answers `answer(text, sampling_params)`, in streams character by character.

    A token is a character; its logprob is -1, and -5 where `unlikely` has it.

    Attributes:
        bodies: all requests, in the order in which they came.
        gate: cleared, every call waits for it.
        pace: if set, each further character of a stream takes one of it.
        most_at_once: how many calls were under way together.
    """

    def __init__(
        self, answer: Answer = last_word, *, model_path: str = "fake", unlikely: str = ""
    ) -> None:
        super().__init__(model_path)
        self._answer = answer
        self._unlikely = unlikely
        self._lock = threading.Lock()
        self._under_way = 0
        self.bodies: list[dict[str, Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.most_at_once = 0
        self.pace: threading.Semaphore | None = None

    def ask(self, body: dict[str, Any]) -> Any:
        with self._lock:
            self.bodies.append(body)
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            assert self.gate.wait(10)
            return self._reply(body)
        finally:
            with self._lock:
                self._under_way -= 1

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        whole = self.ask(body)
        for length in range(1, len(whole["text"]) + 1):
            if self.pace is not None:
                assert self.pace.acquire(timeout=10)
            yield {"text": whole["text"][:length], "meta_info": {"completion_tokens": length}}

    def flush_cache(self) -> None:
        self.bodies.append({"flush": True})

    def get_server_info(self) -> dict[str, Any]:
        return {"version": "fake"}

    def _reply(self, body: dict[str, Any]) -> Any:
        texts = (
            body["text"] if "text" in body else ["".join(map(chr, i)) for i in body["input_ids"]]
        )
        sampling = body["sampling_params"]
        if isinstance(texts, list):
            return [self._one(text, body) for text in texts]
        if sampling.get("n", 1) > 1:
            return [self._one(texts, body) for _ in range(sampling["n"])]
        return self._one(texts, body)

    def _one(self, text: str, body: dict[str, Any]) -> dict[str, Any]:
        sampling = body["sampling_params"]
        meta = {"prompt_tokens": len(text), "input_token_logprobs": [], "output_token_logprobs": []}
        if body.get("return_logprob"):
            start = body.get("logprob_start_len", 0)
            scores = [(-5.0 if char in self._unlikely else -1.0, ord(char), char) for char in text]
            if scores:
                scores[0] = (None, *scores[0][1:])  # type: ignore[assignment]
            meta["input_token_logprobs"] = scores[start:]
        empty = sampling.get("max_new_tokens") == 0
        return {"text": "" if empty else self._answer(text, sampling), "meta_info": meta}
