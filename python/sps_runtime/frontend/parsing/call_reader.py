"""A tool call as JSON, read while it is being written: ``{"name": ..., "arguments": {...}}``."""

from __future__ import annotations

import json
from typing import Protocol

_BLANK = " \t\r\n"
ARGUMENT_KEYS = ("arguments", "parameters")


class MalformedCall(Exception):
    """The text is no call."""


class Reader(Protocol):
    """Reads one call.

    Attributes:
        name: the function, once it is known.
        done: the call is complete.
    """

    name: str | None
    done: bool

    def push(self, char: str) -> None:
        """Take one more character. Raises MalformedCall."""
        ...

    def take_arguments(self) -> str:
        """Arguments that were read since the last call, as they were written."""
        ...


class _Value:
    """Finds the end of an object, an array or a string by its brackets and quotes."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._escaped = False

    def push(self, char: str) -> bool:
        """Whether the value is complete with this character."""
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        return not (self._depth or self._in_string)


class PlainArguments:
    """The arguments' object alone, of a function that is known already."""

    def __init__(self, name: str) -> None:
        self.name: str | None = name
        self.done = False
        self._value = _Value()
        self._arguments: list[str] = []

    def push(self, char: str) -> None:
        self._arguments.append(char)
        self.done = self._value.push(char)

    def take_arguments(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text


class CallReader:
    """An object with a name and arguments (an object, or a string that holds one)."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.done = False
        self._state = self._before
        self._key = ""
        self._text: list[str] = []
        self._value = _Value()
        self._arguments: list[str] = []
        self._has_arguments = False

    def push(self, char: str) -> None:
        self._state(char)

    def take_arguments(self) -> str:
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    # Each state takes one character.

    def _before(self, char: str) -> None:
        if char != "{":
            raise MalformedCall
        self._state = self._before_key

    def _before_key(self, char: str) -> None:
        if char == '"':
            self._begin(self._in_key, char)
        elif char == "}":
            self._end()
        elif char not in _BLANK:
            raise MalformedCall

    def _in_key(self, char: str) -> None:
        self._text.append(char)
        if self._value.push(char):
            self._key = self._string()
            self._state = self._before_colon

    def _before_colon(self, char: str) -> None:
        if char == ":":
            self._state = self._before_value
        elif char not in _BLANK:
            raise MalformedCall

    def _before_value(self, char: str) -> None:
        if char in _BLANK:
            return
        if char in "{[" and self._key in ARGUMENT_KEYS:
            self._has_arguments = True
            self._value = _Value()
            self._value.push(char)
            self._arguments.append(char)
            self._state = self._in_arguments
        elif char in '{["':
            self._begin(self._in_value, char)
        elif char in "}],:":
            raise MalformedCall
        else:
            self._state = self._in_word

    def _in_arguments(self, char: str) -> None:
        self._arguments.append(char)
        if self._value.push(char):
            self._state = self._after_value

    def _in_value(self, char: str) -> None:
        self._text.append(char)
        if not self._value.push(char):
            return
        self._state = self._after_value
        if self._key == "name":
            self.name = self._string()
        elif self._key in ARGUMENT_KEYS:
            self._has_arguments = True
            self._arguments.append(self._string())

    def _in_word(self, char: str) -> None:
        """A number, true, false or null."""
        if char in ",}" or char in _BLANK:
            self._after_value(char)

    def _after_value(self, char: str) -> None:
        self._state = self._after_value
        if char == ",":
            self._state = self._before_key
        elif char == "}":
            self._end()
        elif char not in _BLANK:
            raise MalformedCall

    def _begin(self, state: object, char: str) -> None:
        self._state = state  # type: ignore[assignment]
        self._text = [char]
        self._value = _Value()
        self._value.push(char)

    def _string(self) -> str:
        try:
            text = json.loads("".join(self._text), strict=False)
        except ValueError:
            raise MalformedCall from None
        if not isinstance(text, str):
            raise MalformedCall
        return text

    def _end(self) -> None:
        if self.name is None:
            raise MalformedCall
        if not self._has_arguments:
            self._arguments.append("{}")
        self.done = True
