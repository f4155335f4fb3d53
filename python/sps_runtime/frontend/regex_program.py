"""Regular expressions as small programs that run in linear time.

Python's own engine backtracks: a client's expression could keep the event loop busy for ever. These
programs are nondeterministic automata after Thompson (1968), run in lockstep (`regex_search`), so a
character costs at most a step of each state. The syntax is Python's (`re`), less what a stream does
not know: the end of the text or of a word, look-around and back-references are refused by name.
Single characters and classes are matched by Python's engine itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sps_runtime.frontend.regex_syntax import Char, Choice, Node, Parser, RegexError, Repeat, Start

MAX_STATES = 256
"""Of all expressions of one request together: a bound on the work of one character."""


@dataclass(frozen=True, slots=True)
class Take:
    """Consume one character that passes the test."""

    test: Callable[[str], bool]
    next: int


@dataclass(slots=True)
class Split:
    """Go on in several places."""

    ways: list[int]


@dataclass(frozen=True, slots=True)
class Guard:
    """Go on at the start of the text, or (`line`) of a line."""

    line: bool
    next: int


@dataclass(frozen=True, slots=True)
class Accept:
    """The expression of this index has matched."""

    pattern: int


State = Take | Split | Guard | Accept


@dataclass
class Program:
    """Several expressions as one automaton.

    Attributes:
        patterns: the expressions' texts.
        states: by number.
        entry: where each attempt starts.
    """

    patterns: tuple[str, ...]
    states: list[State] = field(default_factory=list)
    entry: int = 0

    def add(self, state: State) -> int:
        """Append a state; its number. Raises RegexError beyond `MAX_STATES`."""
        if len(self.states) >= MAX_STATES:
            raise RegexError(f"is too large: more than {MAX_STATES} states")
        self.states.append(state)
        return len(self.states) - 1


def compile_patterns(patterns: Sequence[str]) -> Program:
    """One program for all expressions.

    Raises:
        RegexError: saying what is wrong, or not possible here.
    """
    program = Program(tuple(patterns))
    ways = []
    for index, pattern in enumerate(patterns):
        accept = program.add(Accept(index))
        entry = _emit(program, Parser(pattern).parse(), accept)
        if _reaches(program, entry, accept):
            raise RegexError("matches the empty text")
        ways.append(entry)
    program.entry = program.add(Split(ways)) if len(ways) > 1 else ways[0]
    return program


def _emit(program: Program, node: Node, after: int) -> int:
    """Add the states of a node that goes on at `after`; where it begins."""
    if isinstance(node, Char):
        return program.add(Take(node.test, after))
    if isinstance(node, Start):
        return program.add(Guard(node.line, after))
    if isinstance(node, Choice):
        return program.add(Split([_emit(program, way, after) for way in node.ways]))
    if isinstance(node, Repeat):
        return _emit_repeat(program, node, after)
    for part in reversed(node.parts):
        after = _emit(program, part, after)
    return after


def _emit_repeat(program: Program, node: Repeat, after: int) -> int:
    entry = after
    if node.most is None:
        loop = Split([after])
        entry = program.add(loop)
        loop.ways.append(_emit(program, node.node, entry))
    else:
        for _ in range(node.most - node.least):
            entry = program.add(Split([_emit(program, node.node, entry), after]))
    for _ in range(node.least):
        entry = _emit(program, node.node, entry)
    return entry


def _reaches(program: Program, entry: int, goal: int) -> bool:
    """Whether `goal` is reached without a character."""
    waiting, seen = [entry], set[int]()
    while waiting:
        number = waiting.pop()
        if number == goal:
            return True
        state = program.states[number]
        if number in seen or isinstance(state, Take | Accept):
            continue
        seen.add(number)
        waiting += state.ways if isinstance(state, Split) else [state.next]
    return False
