"""Tool calls in text that comes in pieces."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection

from sps_runtime.frontend.parsing.call_reader import (
    CallReader,
    MalformedCall,
    PlainArguments,
    Reader,
)
from sps_runtime.frontend.parsing.events import CallArguments, CallBegin, Event, Text
from sps_runtime.frontend.parsing.markers import first_marker, settled
from sps_runtime.frontend.parsing.tool_formats import ToolFormat

_BLANK = " \t\r\n"
_LETTERS = string.ascii_letters + string.digits
MAX_NAME_CHARS = 256


class ToolParser:
    """Splits text into text and calls.

    What looks like a call but is none (no object, no name, a name that is not among the tools)
    stays text. Blanks around calls are dropped.

    Args:
        form: how the model writes calls.
        names: functions that may be called.
        most: calls that are reported; further ones are dropped.

    Attributes:
        calls: how many were reported.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], most: int = 1 << 30) -> None:
        self._form = form
        self._names = names
        self._most = most
        self._between = _BLANK + ",;[" + ("" if form.closing == "]" else "]")
        self._buffer = ""  # not looked at yet
        self._raw = ""  # looked at; text after all if no call begins here
        self._state: Callable[[list[Event]], bool] = self._in_text
        self._reader: Reader = CallReader()
        self._begun = False
        self._said = False
        self._after_call = False
        self._dropped = False
        self.calls = 0

    def push(self, text: str) -> list[Event]:
        """Take more text; return what is certain by now."""
        self._buffer += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """Return what was held back; the answer has ended."""
        rest = "" if self._begun else self._raw + self._buffer
        self._raw = self._buffer = ""
        if self._after_call:
            rest = rest.lstrip()
        if self.calls:
            rest = rest.rstrip()
        return [Text(rest)] if rest else []

    # Each state takes from the buffer, and returns whether the next one may have something to do.

    def _in_text(self, events: list[Event]) -> bool:
        if self._form.bare and not self._said and self._buffer.lstrip().startswith("{"):
            return self._go(self._between_calls)
        found = first_marker(self._buffer, self._form.markers)
        if found is None:
            self._say(settled(self._buffer, self._form.markers), events)
            return False
        at, marker = found
        self._say(len(self._buffer[:at].rstrip()), events)
        self._take(self._buffer.index(marker) + len(marker))
        self._begun = False
        return self._go(self._between_calls)

    def _between_calls(self, events: list[Event]) -> bool:
        """After a marker or a call: the next call, the closing, or text again."""
        if self._at_marker():
            return self._back_to_text()
        if self._may_be_marker():
            return False
        stripped = self._buffer.lstrip(self._between)
        self._take(len(self._buffer) - len(stripped))
        closing = self._form.closing
        if not stripped or (len(stripped) < len(closing) and closing.startswith(stripped)):
            return False
        if stripped[0] == "{":
            self._reader, self._begun = CallReader(), False
            return self._go(self._in_call)
        if closing and stripped.startswith(closing):
            self._take(len(closing))
            return self._back_to_text()
        if self._form.plain_name and self._raw and (stripped[0].isalnum() or stripped[0] in "_-"):
            return self._go(self._in_name)
        return self._back_to_text()

    def _at_marker(self) -> bool:
        """Whether another marker follows; a bracket may begin one, or a list of calls."""
        rest = self._buffer.lstrip(_BLANK)
        return any(rest.startswith(marker) for marker in self._form.markers)

    def _may_be_marker(self) -> bool:
        rest = self._buffer.lstrip(_BLANK)
        return bool(rest) and any(marker.startswith(rest) for marker in self._form.markers)

    def _in_name(self, events: list[Event]) -> bool:
        """Mistral's newer style: ``[TOOL_CALLS]name[ARGS]{...}``."""
        brace = self._buffer.find("{")
        if brace < 0:
            return len(self._buffer) > MAX_NAME_CHARS and self._back_to_text()
        name = self._buffer[:brace].partition("[")[0].strip()
        self._take(brace)
        self._reader, self._begun = PlainArguments(name), False
        return self._go(self._in_call)

    def _in_call(self, events: list[Event]) -> bool:
        for at, char in enumerate(self._buffer, 1):
            try:
                self._reader.push(char)
            except MalformedCall:
                return self._back_to_text()
            if self._reader.done:
                self._take(at)
                certain = self._report(events)
                return self._go(self._between_calls) if certain else self._back_to_text()
        self._take(len(self._buffer))
        if self._reader.name is not None and not self._report(events):
            return self._back_to_text()
        return False

    def _report(self, events: list[Event]) -> bool:
        """Report what is known of a call, if it is one; its text is not needed any more then."""
        name = self._reader.name
        if name is None or name not in self._names:
            return False
        if not self._begun:
            self._begun = self._after_call = True
            self._dropped = self.calls >= self._most
            if not self._dropped:
                events.append(CallBegin(self.calls, self._new_id(), name))
                self.calls += 1
        self._raw = ""
        arguments = self._reader.take_arguments()
        if arguments and not self._dropped:
            events.append(CallArguments(self.calls - 1, arguments))
        return True

    def _say(self, length: int, events: list[Event]) -> None:
        """What was looked at and the first characters of the buffer are text."""
        text, self._buffer = self._raw + self._buffer[:length], self._buffer[length:]
        self._raw = ""
        if self._after_call:
            text = text.lstrip()
        if text:
            self._said, self._after_call = True, False
            events.append(Text(text))

    def _take(self, length: int) -> None:
        self._raw, self._buffer = self._raw + self._buffer[:length], self._buffer[length:]

    def _go(self, state: Callable[[list[Event]], bool]) -> bool:
        self._state = state
        return True

    def _back_to_text(self) -> bool:
        """What was looked at is text unless it belongs to a call that was reported."""
        if self._begun:
            self._raw = ""
        self._begun, self._said = False, True
        return self._go(self._in_text)

    def _new_id(self) -> str:
        if self._form.id_length:
            return "".join(secrets.choice(_LETTERS) for _ in range(self._form.id_length))
        return f"call_{secrets.token_hex(12)}"
