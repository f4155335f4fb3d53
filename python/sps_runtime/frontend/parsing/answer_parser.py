"""Reasoning and tool calls of one answer together."""

from __future__ import annotations

from collections.abc import Iterable

from sps_runtime.frontend.parsing.events import Event, Text
from sps_runtime.frontend.parsing.reasoning import ReasoningParser
from sps_runtime.frontend.parsing.tool_parser import ToolParser


class AnswerParser:
    """Text in pieces to events; without parsers everything is text.

    Args:
        reasoning, tools: fresh parsers of this answer, or None.
    """

    def __init__(
        self, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None
    ) -> None:
        self._reasoning = reasoning
        self._tools = tools

    @property
    def calls(self) -> int:
        """Tool calls that were found so far."""
        return self._tools.calls if self._tools is not None else 0

    def push(self, text: str) -> list[Event]:
        """Take more text; return what is certain by now."""
        if self._reasoning is None:
            return self._into_tools([Text(text)])
        return self._into_tools(self._reasoning.push(text))

    def finish(self) -> list[Event]:
        """Return what was held back; the answer has ended."""
        events = [] if self._reasoning is None else self._reasoning.finish()
        found = self._into_tools(events)
        return found if self._tools is None else [*found, *self._tools.finish()]

    def _into_tools(self, events: Iterable[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if self._tools is not None and isinstance(event, Text):
                found += self._tools.push(event.text)
            else:
                found.append(event)
        return found
