"""Reasoning before the answer, as ``<think>...</think>``, in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sps_runtime.frontend.parsing.events import Event, Reasoning, Text
from sps_runtime.frontend.parsing.markers import settled
from sps_runtime.types.errors import ConfigError

BEGIN, END = "<think>", "</think>"


@dataclass(frozen=True)
class ReasoningFormat:
    """Attributes:
    opened: the prompt ends inside of the reasoning, so that answers begin with it.
    """

    opened: bool


REASONING_FORMATS: Mapping[str, ReasoningFormat] = {
    "deepseek-r1": ReasoningFormat(opened=True),
    "qwen3": ReasoningFormat(opened=False),
    "qwen3-thinking": ReasoningFormat(opened=True),
}


def find_reasoning_format(name: str) -> ReasoningFormat | None:
    """The format called `name`, None for none. Raises ConfigError for an unknown name."""
    if name in ("", "none"):
        return None
    if name not in REASONING_FORMATS:
        known = ", ".join([*REASONING_FORMATS, "none"])
        raise ConfigError(f"unknown reasoning parser {name!r}; known: {known}")
    return REASONING_FORMATS[name]


class ReasoningParser:
    """Splits text into reasoning and the rest; blanks around the markers are dropped."""

    def __init__(self, form: ReasoningFormat) -> None:
        self._opened = form.opened
        self._state = self._before
        self._buffer = ""

    def push(self, text: str) -> list[Event]:
        """Take more text; return what is certain by now."""
        self._buffer += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Return what was held back; the answer has ended."""
        rest, self._buffer = self._buffer, ""
        if self._state == self._thinking:
            rest = rest.rstrip()
            return [Reasoning(rest)] if rest else []
        return [Text(rest)] if rest and self._state != self._before_answer else []

    # Each state takes from the buffer, and returns whether the next one may have something to do.

    def _before(self, events: list[Event]) -> bool:
        stripped = self._buffer.lstrip()
        if stripped.startswith(BEGIN):
            self._buffer = stripped[len(BEGIN) :]
            self._state = self._begin_thinking
            return True
        if not stripped or BEGIN.startswith(stripped):
            return False
        self._state = self._begin_thinking if self._opened else self._answering
        return True

    def _begin_thinking(self, events: list[Event]) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = self._thinking
        return True

    def _thinking(self, events: list[Event]) -> bool:
        at = self._buffer.find(END)
        length = settled(self._buffer, (END,)) if at < 0 else len(self._buffer[:at].rstrip())
        if length:
            events.append(Reasoning(self._buffer[:length]))
        if at < 0:
            self._buffer = self._buffer[length:]
            return False
        self._buffer = self._buffer[at + len(END) :]
        self._state = self._before_answer
        return True

    def _before_answer(self, events: list[Event]) -> bool:
        self._buffer = self._buffer.lstrip()
        if not self._buffer:
            return False
        self._state = self._answering
        return True

    def _answering(self, events: list[Event]) -> bool:
        if self._buffer:
            events.append(Text(self._buffer))
        self._buffer = ""
        return False
