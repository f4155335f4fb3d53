"""What a program asks of a server, over two ways of asking: at once, and as a stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from sps_runtime.lang import scoring
from sps_runtime.lang.chat_templates import ChatTemplate, get_chat_template, template_of_model
from sps_runtime.lang.choices import ChoicesDecision, ChoicesSamplingMethod
from sps_runtime.lang.sampling import Sampling

Meta = dict[str, Any]


class Backend(ABC):
    """A model that answers bodies of SGLang's ``/generate``. Its methods are thread-safe.

    Args:
        model_path: names the model, and thereby its chat template.
        chat_template_name: a template of `chat_templates`, instead.

    Attributes:
        skip_special_tokens: whether generated text leaves special tokens out.
    """

    def __init__(self, model_path: str, chat_template_name: str | None = None) -> None:
        self.model_path = model_path
        self.chat_template = (
            get_chat_template(chat_template_name)
            if chat_template_name
            else template_of_model(model_path)
        )
        self.skip_special_tokens = True

    @abstractmethod
    def ask(self, body: dict[str, Any]) -> Any:
        """The answer to a body of ``/generate``: a dict, for several prompts or n > 1 a list."""

    @abstractmethod
    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The cumulative answers to a body of one prompt as they come."""

    @abstractmethod
    def flush_cache(self) -> None:
        """Drop every cached prefix."""

    @abstractmethod
    def get_server_info(self) -> dict[str, Any]:
        """What the server says about itself."""

    def get_model_name(self) -> str:
        return self.model_path

    def get_chat_template(self) -> ChatTemplate:
        return self.chat_template

    def cache_prefix(self, prefix: str) -> None:
        """Have `prefix` computed and kept: texts that begin with it are sooner answered."""
        self.ask({"text": prefix, "sampling_params": {"max_new_tokens": 0}})

    def generate(self, text: str, sampling: Sampling) -> tuple[str | list[str], Meta | list[Meta]]:
        """What comes after `text`, and its meta_info; lists of both for n > 1."""
        answer = self.ask(self._body(text, sampling))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def generate_stream(self, text: str, sampling: Sampling) -> Iterator[tuple[str, Meta]]:
        """The same in pieces; each with the meta_info so far.

        Raises:
            ValueError: for n > 1, which cannot be one text.
        """
        if (sampling.n or 1) > 1:
            raise ValueError("n > 1 cannot be streamed into one text")
        seen = 0
        for event in self.events(self._body(text, sampling)):
            yield event["text"][seen:], event["meta_info"]
            seen = max(seen, len(event["text"]))

    def select(
        self,
        text: str,
        choices: Sequence[str],
        temperature: float,
        method: ChoicesSamplingMethod,
    ) -> ChoicesDecision:
        """Which of `choices` comes best after `text`: all are scored in one batch.

        Raises:
            ValueError: for a temperature, which this has no use for.
        """
        if temperature > 1e-5:
            raise ValueError(f"select decides, it does not sample: temperature is {temperature}")
        return scoring.decide(self.ask, text, list(choices), method)

    def _body(self, text: str, sampling: Sampling) -> dict[str, Any]:
        body = sampling.request()
        body["sampling_params"]["skip_special_tokens"] = self.skip_special_tokens
        return {"text": text, **body}
