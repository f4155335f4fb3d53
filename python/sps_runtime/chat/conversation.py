"""What has been said so far, and the document it is about."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from sps_runtime.chat.stream import Ended, Endpoint, Event, Text


@dataclass
class Conversation:
    """Messages with one server. An answer that was broken off leaves no trace.

    Attributes:
        options: fields of every request's body.
        document: stands before the next question, and is then part of what has been said: the
            prefix cache keeps it, so that later questions cost only themselves.
    """

    endpoint: Endpoint
    options: dict[str, Any] = field(default_factory=dict)
    system: str = ""
    document: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Generator[Event, None, None]:
        """Events of one answer; it is remembered once it has ended.

        Raises:
            ChatError: see `Endpoint.answer`.
        """
        content = f"{self.document}\n\n{question}" if self.document else question
        asked = [*self.messages, {"role": "user", "content": content}]
        opening = [{"role": "system", "content": self.system}] if self.system else []
        said: list[str] = []
        with closing(self.endpoint.answer([*opening, *asked], **self.options)) as events:
            for event in events:
                if isinstance(event, Text):
                    said.append(event.text)
                elif isinstance(event, Ended):
                    self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]
                    self.document = ""
                yield event

    def forget(self) -> None:
        """Begin anew, without the document."""
        self.messages, self.document = [], ""
