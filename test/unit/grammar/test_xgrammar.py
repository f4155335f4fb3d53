"""The second backend, where it is installed: the same grammars, the same random cases."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from test.kit.random_grammars import random_case
from test.kit.tokenizers import byte_level_tokenizer, wordpiece_tokenizer

from sps_runtime.frontend.token_bytes import speller
from sps_runtime.grammar.backends import make_backend
from sps_runtime.grammar.protocol import GrammarBackend, GrammarError, Vocabulary
from sps_runtime.types.grammar import ANY_JSON_OBJECT, GrammarSpec

pytest.importorskip("xgrammar", reason="the extra [xgrammar] is not installed")

EOS, IM_START = 2, 1
TOKENIZER = byte_level_tokenizer()
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


def accepts(backend: GrammarBackend, kind: str, source: str, text: str) -> bool:
    matcher = backend.matcher(backend.prepare(GrammarSpec(kind, source)))  # type: ignore[arg-type]
    for token in TOKENIZER.encode(text).ids:
        if not matcher.allowed()[token]:
            return False
        matcher.accept([token])
    return bool(matcher.allowed()[EOS])


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
    spell = speller({"type": "ByteLevel"})
    assert spell is not None
    for seed in range(200):
        case, noise = random_case(random.Random(seed)), np.random.default_rng(seed)
        matcher, output = second.matcher(second.prepare(case.spec)), list[int]()
        while len(output) < 2000:
            logits = np.where(matcher.allowed(), noise.normal(size=vocabulary.size), -np.inf)
            token = int(logits.argmax())
            if token == EOS:
                break
            output.append(token)
            matcher.accept([token])
        else:
            pytest.fail(f"seed {seed}: no end: {case.spec}")
        text = b"".join(spell(TOKENIZER.id_to_token(token)) for token in output).decode()
        assert case.holds(text), f"seed {seed}: {text!r} violates {case.spec}"


def test_other_vocabularies_are_refused() -> None:
    tokenizer = wordpiece_tokenizer()
    vocabulary = Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), (0,))
    with pytest.raises(GrammarError, match="takes no grammars"):
        make_backend("xgrammar", vocabulary)
