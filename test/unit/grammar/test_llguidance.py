"""Which tokens may come: by llguidance, judged by what the texts are."""

from __future__ import annotations

import json

import pytest
from test.kit.grammar_walk import EOS, TOKENIZER, accepts, ids, random_answer, start
from test.kit.tokenizers import sentencepiece_tokenizer, wordpiece_tokenizer

from sps_runtime.grammar.backends import load_vocabulary, make_backend
from sps_runtime.grammar.protocol import GrammarBackend, GrammarError, Vocabulary
from sps_runtime.types.errors import ConfigError
from sps_runtime.types.grammar import ANY_JSON_OBJECT

IM_START = 1


TAG = json.dumps(
    {
        "type": "structural_tag",
        "structures": [
            {"begin": "<f=a>", "schema": {"type": "integer", "maximum": 99}, "end": "</f>"},
            {"begin": "<|im_start|>b", "schema": {"enum": ["x"]}, "end": ""},
        ],
        "triggers": ["<f=", "<|im_start|>"],
    }
)
PROPERTIES = '{"properties": {"a": {"properties": {"b": {"type": "integer"}}}}, "type": "object"}'
OPEN = '{"type": "object", "properties": {"a": {}}, "additionalProperties": true}'
ALL_OF = json.dumps(
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}},
            {"type": "object", "properties": {"b": {"type": "integer"}}},
        ]
    }
)
GBNF = 'root ::= "a" list\nlist ::= ("," [0-9]+)*'


@pytest.mark.parametrize(
    ("kind", "source", "good", "bad"),
    [
        ("regex", "[0-9]{2,3}", "12", "1"),
        ("regex", "(yes|no)", "no", "nope"),
        ("regex", "[äöü]+日?", "äü日", "a"),
        ("json_schema", ANY_JSON_OBJECT, '{"a": [1, {"b": null}]}', "[1]"),
        ("json_schema", '{"type": "integer", "minimum": 3, "maximum": 17}', "17", "18"),
        ("json_schema", ANY_JSON_OBJECT, '{\n  "a": 1\n}', '{"a":      1}'),
        ("json_schema", '{"type": "object", "x-guidance": {}}', "{}", "{"),
        ("json_schema", PROPERTIES, '{"a": {"b": 1}}', '{"a": {"c": 1}}'),
        ("json_schema", PROPERTIES, "{}", '{"x": 1}'),
        ("json_schema", OPEN, '{"a": 1, "x": 1}', "1"),
        ("json_schema", ALL_OF, '{"a": 1, "b": 2}', '{"a": "x"}'),
        ("ebnf", GBNF, "a,1,22", "a,"),
        ("ebnf", 'start: "x" /[0-9]/', "x1", "x"),
        ("structural_tag", TAG, "free <f=a>7</f> text", "<f=b>"),
        ("structural_tag", TAG, "no tag at all", "<f=a>77"),
        ("structural_tag", TAG, 'so <|im_start|>b"x" on', "<|im_start|>c"),
        ("lark", 'start: "say \\"hi\\""', 'say "hi"', "say"),
    ],
)
def test_kinds(backend: GrammarBackend, kind: str, source: str, good: str, bad: str) -> None:
    assert accepts(backend, kind, source, good)
    assert not accepts(backend, kind, source, bad)


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(a"),
        ("regex", "(?=a)b"),
        ("regex", r"(a)\1"),
        ("json_schema", "{"),
        ("json_schema", "[1]"),
        ("json_schema", '{"type": "nothing"}'),
        ("json_schema", '{"$ref": "http://example.com/schema"}'),
        ("json_schema", '{"type": "object", "if": {}, "unevaluatedProperties": false}'),
        ("ebnf", "root ::= undefined_rule"),
        ("ebnf", "root := "),
        ("lark", "start: (("),
        ("structural_tag", "{}"),
        ("structural_tag", '{"type": "structural_tag", "structures": [], "triggers": []}'),
        ("structural_tag", TAG.replace('"<f=", ', "")),
    ],
)
def test_bad_grammars_are_told_in_one_line(backend: GrammarBackend, kind: str, source: str) -> None:
    with pytest.raises(GrammarError) as caught:
        start(backend, kind, source)
    message = str(caught.value)
    assert message and "\n" not in message and len(message) <= 600


def test_the_end_is_allowed_exactly_where_the_grammar_is_satisfied(
    backend: GrammarBackend,
) -> None:
    matcher = start(backend, "regex", "ab?")
    ends = []
    for token in ids("a") + ids("b"):
        ends.append(bool(matcher.allowed()[EOS]))
        matcher.accept([token])
    ends.append(bool(matcher.allowed()[EOS]))
    assert ends == [False, True, True]
    assert matcher.allowed().sum() == 1
    matcher.accept([EOS])
    assert matcher.allowed()[EOS] and matcher.allowed().sum() == 1


def test_special_tokens_and_unknown_ids_are_never_allowed(
    backend: GrammarBackend, vocabulary: Vocabulary
) -> None:
    allowed = start(backend, "regex", r"(.|\n)*").allowed()
    assert allowed.shape == (vocabulary.size,)
    assert allowed[EOS] and not allowed[IM_START]
    assert not allowed[TOKENIZER.get_vocab_size() :].any()
    assert allowed.sum() > 250


def test_a_token_that_is_not_the_grammars_is_an_error(backend: GrammarBackend) -> None:
    matcher = start(backend, "regex", "[0-9]+")
    with pytest.raises(GrammarError, match="no such token"):
        matcher.accept(ids("x"))
    with pytest.raises(GrammarError):
        matcher.allowed()


def test_copies_go_their_own_ways(backend: GrammarBackend) -> None:
    matcher = start(backend, "regex", "a[0-9]")
    other = matcher.copy()
    other.accept(ids("a"))
    assert matcher.allowed()[ids("a")[0]] and not other.allowed()[ids("a")[0]]


def test_500_random_grammars_are_kept_and_end(
    backend: GrammarBackend, vocabulary: Vocabulary
) -> None:
    """Random logits: whatever a model prefers, an answer follows its grammar."""
    kinds = {"json_schema": 0, "regex": 0}
    for seed in range(500):
        kinds[random_answer(backend, vocabulary.size, seed, longest=700).kind] += 1
    assert min(kinds.values()) > 200


def test_sentencepiece_vocabularies_are_served() -> None:
    tokenizer = sentencepiece_tokenizer()
    vocabulary = Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), (2,))
    matcher = start(make_backend("llguidance", vocabulary), "regex", "ä b")
    for token in ("<0xC3>", "<0xA4>", "▁", "b", "</s>"):
        one = tokenizer.token_to_id(token)
        assert matcher.allowed()[one], token
        matcher.accept([one])


def test_other_vocabularies_are_refused_or_served_rightly() -> None:
    tokenizer = wordpiece_tokenizer()
    vocabulary = Vocabulary(tokenizer.to_str(), tokenizer.get_vocab_size(), (0,))
    try:
        backend = make_backend("llguidance", vocabulary)
    except GrammarError as error:
        assert "takes no grammars" in str(error)
        return
    assert start(backend, "regex", "the.*").allowed()[tokenizer.token_to_id("the")]


def test_backends_by_name(vocabulary: Vocabulary) -> None:
    with pytest.raises(ConfigError, match="llguidance"):
        make_backend("nothing", vocabulary)
    with pytest.raises(GrammarError, match="cannot be read"):
        load_vocabulary("/nonexistent", 10, (0,))


def test_digits_are_ascii(backend: GrammarBackend) -> None:
    for source in (r"\d{2}", r"[\d]{2}", r"[^\D]{2}|[\d-]{2}"):
        assert accepts(backend, "regex", source, "42")
    assert not accepts(backend, "regex", r"\d", "٤")
    assert not accepts(backend, "regex", r"[a\d]", "٤")
    assert accepts(backend, "regex", r"\\d", "\\d")
