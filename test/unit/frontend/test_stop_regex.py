"""Expressions that stop: what Python's engine would say, whatever the chunks; bounded work."""

from __future__ import annotations

import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps_runtime.frontend.regex_program import MAX_STATES, compile_patterns
from sps_runtime.frontend.regex_search import RegexSearch
from sps_runtime.frontend.regex_syntax import RegexError
from sps_runtime.frontend.stop_matcher import StopMatcher

ATOMS = [
    "a",
    "b",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    r"\w",
    r"\s",
    r"\n",
    "1",
    r"\.",
    "^",
    "[]x]",
    "(?i:B)",
]
TEXT = st.text(alphabet="abB1 \n.", max_size=24)


def patterns() -> st.SearchStrategy[str]:
    def more(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        grouped = inner.map(lambda s: f"(?:{s})")
        times = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{,2}", "{2,}", "*?", "+?"])
        return st.one_of(
            st.lists(inner, min_size=2, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda s: f"({'|'.join(s)})"),
            st.tuples(grouped, times).map("".join),
        )

    return st.recursive(st.sampled_from(ATOMS), more, max_leaves=6)


def oracle(sources: list[str], text: str) -> tuple[int, int] | None:
    """(end, start) of the match that ends first and, of those, starts first: every substring is
    asked of Python's engine."""
    compiled = [re.compile(source) for source in sources]
    for end in range(1, len(text) + 1):
        for start in range(end):
            if any(one.fullmatch(text, start, end) for one in compiled):
                return end, start
    return None


def cut(text: str, chance: random.Random) -> list[str]:
    pieces = []
    while text:
        size = chance.randint(1, 5)
        pieces.append(text[:size])
        text = text[size:]
    return pieces


@given(st.lists(patterns(), min_size=1, max_size=2), TEXT)
@settings(max_examples=600, deadline=None)
def test_what_pythons_engine_says(sources: list[str], text: str) -> None:
    try:
        program = compile_patterns(sources)
    except RegexError as error:
        assert "empty" in str(error) or "states" in str(error)
        assert any(re.fullmatch(source, "") for source in sources) or "states" in str(error)
        return
    found = RegexSearch(program).feed(text)
    assert (None if found is None else (found.end, found.start)) == oracle(sources, text)


@given(
    st.lists(patterns(), max_size=2),
    st.lists(st.text(alphabet="ab1", min_size=1, max_size=3), max_size=2),
    TEXT,
    st.integers(0, 1 << 30),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_the_shown_text_does_not_depend_on_chunks(
    sources: list[str], stops: list[str], text: str, seed: int, keep: bool
) -> None:
    try:
        program = compile_patterns(sources) if sources else None
    except RegexError:
        return
    matcher = StopMatcher(stops, keep=keep, regexes=program)
    first = oracle([*sources, *map(re.escape, stops)], text)
    shown, matched = "", None
    for piece in cut(text, random.Random(seed)):
        more, matched = matcher.push(piece)
        shown += more
        # Nothing that a match could still swallow has been shown before the match was complete.
        assert keep or first is None or len(shown) <= first[1]
        if matched is not None:
            break
    if first is None:
        assert matched is None and shown + matcher.flush() == text
    else:
        end, start = first
        assert matched in (*sources, *stops) and shown == text[: end if keep else start]


def test_only_what_may_still_match_is_held() -> None:
    matcher = StopMatcher((), regexes=compile_patterns([r"\d{4}-\d\d"]))
    assert matcher.push("in 202") == ("in ", None)
    assert matcher.push("x 1999") == ("202x ", None)
    assert matcher.push("-1") == ("", None)
    assert matcher.push(",") == ("1999-1,", None)
    assert matcher.push(" 2024-05-06") == (" ", r"\d{4}-\d\d")


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "unbalanced"),
        (")", "unbalanced"),
        ("[a", "unbalanced"),
        ("a**", "repetition"),
        ("*", "nothing"),
        ("^*a", "length"),
        ("a{3,2}", "at most"),
        ("a{2000}", "times"),
        ("a*", "empty"),
        ("a?|b", "empty"),
        ("^", "empty"),
        ("a$", "follows"),
        (r"a\b", "follows"),
        (r"a\Z", "follows"),
        (r"(a)\1", "escape"),
        (r"\q", "escape"),
        ("(?=a)b", "look-around"),
        ("(?<!a)b", "look-around"),
        ("(?P=x)", "look-around"),
        ("(?x)a", "look-around"),
        ("a++", "possessive"),
        ("[z-a]", "class"),
        ("(" * 40 + "a" + ")" * 40, "nested"),
        ("(a{100}){100}", "large"),
        ("(((a{9}){9}){9}){9}", "large"),
    ],
)
def test_what_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(RegexError, match=re.escape(why)):
        compile_patterns([pattern])


@pytest.mark.parametrize(
    ("pattern", "text", "matched"),
    [
        ("(?i)stop", "please STOP now", "STOP"),
        ("(?i)[^a]z", "AZ bZ", " bZ"[1:]),
        ("(?s)a.b", "a\nb", "a\nb"),
        ("(?m)^#", "x#\n#", "#"),
        (r"\Ab|c", "abc", "c"),
        ("{a", "x{a", "{a"),
        ("a{}", "a{}", "a{}"),
        ("[^]]]", "x]", "x]"),
        (r"[\]\d]+!", "a]1!", "]1!"),
        (r"\x41é", "Aé", "Aé"),
        (r"(?P<year>\d+)(?#a comment);", "12;", "12;"),
        (r"(?a:\w)\s", "éa ", "a "),
        ("\\u4f60", "你好", "你"),
    ],
)
def test_the_syntax_is_pythons(pattern: str, text: str, matched: str) -> None:
    found = RegexSearch(compile_patterns([pattern])).feed(text)
    assert found is not None and text[found.start : found.end] == matched


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(.*)(.*)(.*)x", "(a?){60}a{60}b"])
def test_a_character_costs_at_most_a_step_of_each_state(pattern: str) -> None:
    """Expressions that take Python's engine for ever."""
    program = compile_patterns([pattern])
    assert len(program.states) <= MAX_STATES
    began = time.perf_counter()
    assert RegexSearch(program).feed("a" * 2000) is None
    assert time.perf_counter() - began < 10
