"""The second backend, where it is installed: the same grammars, the same random cases."""

from __future__ import annotations

import json

import numpy as np
import pytest
from test.kit.grammar_walk import EOS, TOKENIZER, accepts, random_answer
from test.kit.tokenizers import wordpiece_tokenizer

from sps_runtime.grammar.backends import make_backend
from sps_runtime.grammar.protocol import GrammarBackend, GrammarError, Vocabulary
from sps_runtime.types.grammar import ANY_JSON_OBJECT, GrammarSpec

pytest.importorskip("xgrammar", reason="the extra [xgrammar] is not installed")

IM_START = 1
TAG = json.dumps(
    {
        "type": "structural_tag",
        "structures": [{"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"}],
        "triggers": ["<f="],
    }
)


@pytest.fixture(scope="module")
def second(vocabulary: Vocabulary) -> GrammarBackend:
    return make_backend("xgrammar", vocabulary)


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("regex", "[0-9]{2,3}", "12", "1"),
        ("regex", r"\d", "4", "٤"),
        ("regex", "[äöü]+日?", "äü日", "a"),
        ("json_schema", ANY_JSON_OBJECT, '{"a": [1, {"b": null}]}', "[1]"),
        ("json_schema", '{"enum": ["x", 3]}', '"x"', "4"),
        ("ebnf", 'root ::= "a" list\nlist ::= ("," [0-9]+)*', "a,1,22", "a,"),
        ("lark", 'start: "say \\"hi\\""', 'say "hi"', "say"),
        ("structural_tag", TAG, "free <f=a>7</f> text", "<f=b>"),
    ],
)
def test_kinds(second: GrammarBackend, kind: str, source: str, good: str, bad: str) -> None:
    assert accepts(second, kind, source, good)
    assert not accepts(second, kind, source, bad)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a"),
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("ebnf", "root ::= undefined_rule"),
        ("lark", "start: (("),
        ("structural_tag", "{}"),
        ("structural_tag", TAG.replace('"<f="', "")),
    ],
)
def test_bad_grammars_are_told_in_one_line(second: GrammarBackend, kind: str, source: str) -> None:
    with pytest.raises(GrammarError) as caught:
        second.prepare(GrammarSpec(kind, source))  # type: ignore[arg-type]
    assert str(caught.value) and "\n" not in str(caught.value)


def test_ends_errors_and_copies(second: GrammarBackend, vocabulary: Vocabulary) -> None:
    matcher = second.matcher(second.prepare(GrammarSpec("regex", "ab?")))
    a, b = TOKENIZER.encode("a").ids[0], TOKENIZER.encode("b").ids[0]
    assert matcher.allowed().shape == (vocabulary.size,)
    assert matcher.allowed()[a] and not matcher.allowed()[[EOS, IM_START]].any()
    other = matcher.copy()
    matcher.accept([a])
    assert matcher.allowed()[EOS] and not other.allowed()[EOS]
    with pytest.raises(GrammarError, match="no such token"):
        other.accept([b])
    matcher.accept([b, EOS])
    assert np.flatnonzero(matcher.allowed()).tolist() == [EOS]
    with pytest.raises(GrammarError, match="follow the end"):
        matcher.accept([a])


def test_random_grammars_are_kept_and_end(second: GrammarBackend, vocabulary: Vocabulary) -> None:
    for seed in range(200):
        random_answer(second, vocabulary.size, seed, longest=2000)


def test_other_vocabularies_are_refused() -> None:
    tokenizer = wordpiece_tokenizer()
    vocabulary = Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), (0,))
    with pytest.raises(GrammarError, match="takes no grammars"):
        make_backend("xgrammar", vocabulary)
