"""Ids to text: whatever ids come and however they are cut, the deltas join to one text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sps_runtime.frontend.detokenizer import TextStream
from sps_runtime.frontend.tokenizer import Tokenizer

TEXTS = [
    "The lazy dog, naïve café. Straße!",
    "你好，世界 👩‍👩‍👧‍👦 🏳️‍🌈 done",
    "tabs\tand\nnewlines\r\n  two spaces",
    "\x00 nul and é combining",
]


def cut(ids: list[int], rng: random.Random) -> list[list[int]]:
    chunks = []
    while ids:
        size = rng.randint(1, 4)
        chunks.append(ids[:size])
        ids = ids[size:]
    return chunks


def joined(tokenizer: Tokenizer, chunks: list[list[int]], **options: bool) -> str:
    decoder = tokenizer.decoder(**options)
    return "".join(decoder.push(chunk) for chunk in chunks) + decoder.finish()


@pytest.mark.parametrize("seed", range(4))
def test_random_ids_decode_as_the_library_does(byte_level: Tokenizer, seed: int) -> None:
    """5,000 sequences: mostly invalid UTF-8, special tokens and ids beyond the vocabulary too."""
    rng = random.Random(seed)
    for _ in range(1250):
        ids = [rng.randrange(405) for _ in range(rng.randint(1, 40))]
        for skip in (True, False):
            whole = byte_level._fast.decode(ids, skip_special_tokens=skip)
            assert joined(byte_level, cut(ids, rng), skip_special_tokens=skip) == whole


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_text_survives_the_round_trip(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(kind)
    ids = tokenizer.encode(text, add_special_tokens=False)
    rng = random.Random(1)
    for _ in range(20):
        got = joined(tokenizer, cut(ids, rng))
        assert got == (text if kind == "byte_level" else " " + text)
        assert "\ufffd" not in got


@given(st.lists(st.integers(0, 290), max_size=60), st.integers(0, 1 << 30))
@settings(max_examples=300, deadline=None)
def test_byte_fallback_deltas_join(sentencepiece: Tokenizer, ids: list[int], seed: int) -> None:
    assert joined(sentencepiece, cut(ids, random.Random(seed))) == sentencepiece.decode(ids)


def test_valid_byte_fallback_equals_the_library(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the fox 你 ü. fox", add_special_tokens=False)
    assert sentencepiece.decode(ids).removeprefix(" ") == sentencepiece._fast.decode(ids)


def test_at_most_three_bytes_are_held(byte_level: Tokenizer) -> None:
    """32,000 continuation bytes: nothing piles up (sglang#34740 was quadratic here)."""
    stray = byte_level._fast.token_to_id("¢")  # byte 0xA2
    decoder = byte_level.decoder()
    for _ in range(32_000):
        assert len(decoder.push([stray])) == 1
    assert decoder.finish() == ""


def test_incomplete_tail_becomes_one_replacement(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("👩")
    assert len(ids) > 1
    decoder = byte_level.decoder()
    assert decoder.push(ids[:-1]) == ""
    assert decoder.finish() == "\ufffd"


def test_wordpiece_uses_the_window(wordpiece: Tokenizer) -> None:
    ids = wordpiece.encode("the foxes jumps .")
    assert joined(wordpiece, [[i] for i in ids]) == wordpiece._fast.decode(ids)


def test_special_tokens_are_hidden_unless_wanted(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert byte_level.decode(ids) == "ab"
    assert byte_level.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"


def run(tokenizer: Tokenizer, chunks: list[list[int]], stops: list[str], keep: bool = False):
    stream = TextStream(tokenizer.decoder(), stops, keep_stop=keep)
    text, used = "", 0
    for chunk in chunks:
        delta = stream.push(chunk)
        text, used = text + delta.text, used + delta.used
        if delta.matched is not None:
            return text, used, delta.matched
    return text + stream.finish(), used, None


@given(
    st.text(alphabet="abc ", max_size=40),
    st.lists(st.text(alphabet="abc ", min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(0, 1 << 30),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_do_not_depend_on_chunks(
    byte_level: Tokenizer, text: str, stops: list[str], seed: int, keep: bool
) -> None:
    ids = [byte_level._fast.token_to_id(c if c != " " else "Ġ") for c in text]
    ends = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    got = run(byte_level, cut(ids, random.Random(seed)), stops, keep)
    if not ends:
        assert got == (text, len(ids), None)
    else:
        end, start, stop = min(ends)
        assert got == (text[: end if keep else start], end, stop)


def test_partial_match_is_held_and_released(byte_level: Tokenizer) -> None:
    stream = TextStream(byte_level.decoder(), ["END"])
    encode = byte_level.encode
    assert stream.push(encode("xE")).text == "x"
    assert stream.push(encode("N")).text == ""
    assert stream.push(encode("T")).text == "ENT"
    assert stream.push(encode("EN")).text == ""
    assert stream.finish() == "EN"
