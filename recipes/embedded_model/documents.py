"""Seeded generator of long documents with facts, questions about them and their answers.

Plain Python, no torch. Every document is filler English among which facts stand, each a sentence
such as ``The code of Clara Stone is 4821.``  Five kinds of question are asked (``TASKS``):

- ``single``: one fact among filler.
- ``lookalike``: the right one among many facts of the same attribute.
- ``multi``: every value of a key that has several (the first, the second, ... ticket of someone),
  scattered over the document.
- ``chain``: a reference to a person through another person.
- ``count``: the values of a key, and how many they are.

A ``mixed`` document has facts for all of them.

Answers restate what was asked, so that each answered token depends on little: the first reference
of a chain is written out before the second is followed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from . import words

TASKS = ("single", "lookalike", "multi", "chain", "count")
PLACES = ("end", "start", "middle")

NOT_GIVEN = "not given"  # ends a list: the ordinal after the last
_TOKENS = re.compile(r"\w*[^\W\d_]|\d|[^\w\s]|\n+")
_OPENINGS = (
    "",
    "",
    "",
    "",
    "Note that ",
    "The register says that ",
    "As far as we know, ",
    "It is certain that ",
    "Nobody doubts that ",
)


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    ``parts`` are the pieces of the answer, each with whether it is a value looked up in the
    document; the answer is their concatenation.
    """

    task: str
    text: str
    parts: tuple[tuple[str, bool], ...]

    @property
    def answer(self) -> str:
        return "".join(text for text, _ in self.parts)


@dataclass
class Document:
    """Paragraphs of text and every question that can be asked about them."""

    paragraphs: list[str]
    questions: list[Question] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n\n".join(self.paragraphs)


def approximate_tokens(text: str) -> int:
    """How many tokens the recipe's tokenizer makes of generated text (within a few percent)."""
    return len(_TOKENS.findall(text))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


class Writer:
    """Writes sentences and documents from one random generator.

    With ``open_words`` a part of the names and of the filler is made of invented words, so that
    the model meets more than the lists.
    """

    def __init__(self, seed: int | str, open_words: bool = False) -> None:
        self.rng = random.Random(seed)
        self.open_words = open_words
        self._taken: set[str] = set()

    # -- filler ---------------------------------------------------------------------------------

    def filler(self) -> str:
        """One sentence that states no fact anyone asks about."""
        pick = self.rng.choice
        if self.open_words and self.rng.random() < 0.2:
            return (
                _capital(" ".join(self.invented() for _ in range(self.rng.randrange(3, 9)))) + "."
            )
        kind = self.rng.randrange(10)
        someone = f"the {self.adjective()} {pick(words.PEOPLE)}"
        place, thing = f"the {pick(words.PLACES)}", pick(words.OBJECTS)
        went, did = pick(words.INTRANSITIVE), pick(words.TRANSITIVE)
        where = f"{pick(words.PREPOSITIONS)} {place}"
        if kind == 0:
            text = f"{someone} {did} a {self.adjective()} {thing}"
        elif kind == 1:
            text = f"{pick(words.TIMES)}, {someone} {went} {pick(words.ADVERBS)}"
        elif kind == 2:
            text = f"{someone} {went} {where}"
        elif kind == 3:
            text = f"{pick(words.TIMES)}, the {pick(words.PEOPLE)} {did} the {thing} of {someone}"
        elif kind == 4:
            text = f"{place} was {self.adjective()}, and nobody {did} the {thing}"
        elif kind == 5:
            other = f"the {pick(words.PEOPLE)}"
            text = f"{someone} {went} {pick(words.ADVERBS)} while {other} {did} the {thing}"
        elif kind == 6:
            text = f"there were {self.rng.randrange(2, 100)} {self.adjective()} chairs in {place}"
        elif kind == 7:
            text = f"{self.name()} {went} {where}"
        elif kind == 8:
            text = (
                f"the {thing} was {self.adjective()}, but {someone} {did} it {pick(words.ADVERBS)}"
            )
        else:
            year = self.rng.randrange(1700, 2000)
            text = f"in {year} {place} was {self.adjective()} and {self.adjective()}"
        return f"{_capital(text)}."

    def adjective(self) -> str:
        return self.rng.choice(words.ADJECTIVES)

    # -- facts ----------------------------------------------------------------------------------

    def invented(self) -> str:
        """A word that is in no list."""
        pick = self.rng.choice
        syllables = [
            pick(words.ONSETS) + pick(words.VOWELS) + pick(words.CODAS)
            for _ in range(self.rng.randrange(1, 4))
        ]
        return "".join(syllables) + pick(words.ENDINGS)

    def name(self) -> str:
        if self.open_words:
            first = self.rng.choice((self.rng.choice(words.FIRST_NAMES), self.invented().title()))
            return f"{first} {self.invented().title()}"
        return f"{self.rng.choice(words.FIRST_NAMES)} {self.rng.choice(words.LAST_NAMES)}"

    def names(self, count: int) -> list[str]:
        """Up to ``count`` different names that have no fact in this document yet."""
        if self.open_words:
            found = list(dict.fromkeys(self.name() for _ in range(count)))
        else:
            last = len(words.LAST_NAMES)
            total = len(words.FIRST_NAMES) * last
            chosen = self.rng.sample(range(total), min(total, count + len(self._taken)))
            found = [f"{words.FIRST_NAMES[i // last]} {words.LAST_NAMES[i % last]}" for i in chosen]
        found = [name for name in found if name not in self._taken][:count]
        self._taken.update(found)
        return found

    def number(self) -> str:
        return f"{self.rng.randrange(10000):04d}"

    def attribute(self) -> str:
        if self.rng.random() < 0.65:
            return self.rng.choice(words.NUMBER_ATTRIBUTES)
        return self.rng.choice(list(words.WORD_VALUES))

    def value(self, attribute: str) -> str:
        options = words.WORD_VALUES.get(attribute)
        return self.rng.choice(options) if options else self.number()

    def statement(self, attribute: str, name: str, value: str) -> str:
        """One sentence that states a fact."""
        if self.rng.random() < 0.1:
            return f"{name} has the {attribute} {value}."
        opening = self.rng.choice(_OPENINGS)
        return _capital(f"{opening}the {attribute} of {name} is {value}.")

    # -- questions ------------------------------------------------------------------------------

    def ask(self, task: str, attribute: str, name: str, value: str) -> Question:
        form = self.rng.randrange(5)
        if form == 0:
            text = f"Which {attribute} does {name} have?"
        elif form == 1:
            text = f"Please tell me the {attribute} of {name}."
        else:
            text = f"What is the {attribute} of {name}?"
        parts = ((f"The {attribute} of {name} is", False), (f" {value}", True), (".", False))
        return Question(task, text, parts)

    def ask_list(self, task: str, attribute: str, name: str, values: list[str]) -> Question:
        parts: list[tuple[str, bool]] = []
        for ordinal, value in zip(words.ORDINALS, values, strict=False):
            space = " " if parts else ""
            parts.append((f"{space}The {ordinal} {attribute} of {name} is", False))
            parts += [(f" {value}", True), (".", False)]
        if len(values) < len(words.ORDINALS):
            beyond = words.ORDINALS[len(values)]
            parts.append((f" The {beyond} {attribute} of {name} is", False))
            parts += [(f" {NOT_GIVEN}", True), (".", False)]
        if task == "multi":
            opening, end = self.rng.choice((("What are", "?"), ("Please list", ".")))
            text = f"{opening} the {attribute}s of {name}{end}"
        else:
            text = f"How many {attribute}s does {name} have?"
            parts += [(" So the number is", False), (f" {len(values)}", True), (".", False)]
        return Question(task, text, tuple(parts))

    def ask_chain(self, link: str, name: str, other: str, attribute: str, value: str) -> Question:
        text = f"What is the {attribute} of the {link} of {name}?"
        parts = (
            (f"The {link} of {name} is", False),
            (f" {other}", True),
            (f". The {attribute} of {other} is", False),
            (f" {value}", True),
            (".", False),
        )
        return Question("chain", text, parts)

    # -- documents ------------------------------------------------------------------------------

    def document(self, task: str, tokens: int, density: float | None = None) -> Document:
        """A document of about ``tokens`` tokens with questions of one task, or of all (``mixed``).

        ``density`` is the share of its tokens in facts; by default 0.02 to 0.5 at random, and
        0.5 to 0.95 for look-alikes.
        """
        if density is None:
            low, high = (0.5, 0.95) if task == "lookalike" else (0.02, 0.5)
            density = self.rng.uniform(low, high)
        self._taken.clear()
        facts: Facts = []
        questions: list[Question] = []
        tasks = TASKS if task == "mixed" else (task,)
        for each in tasks:
            more_facts, more_questions = _FACTS[each](self, int(tokens * density / len(tasks)))
            facts += more_facts
            questions += more_questions
        paragraph = 0.2  # of a token for each sentence: a blank line comes after five of them
        used = sum(approximate_tokens(fact) + paragraph for _, fact in facts)
        sentences = facts
        while used < tokens:
            sentence = self.filler()
            used += approximate_tokens(sentence) + paragraph
            sentences.append((self.rng.random(), sentence))
        sentences.sort(key=lambda item: item[0])
        return Document(self._paragraphs([text for _, text in sentences]), questions)

    def _paragraphs(self, sentences: list[str]) -> list[str]:
        paragraphs = []
        start = 0
        while start < len(sentences):
            size = self.rng.randrange(3, 8)
            paragraphs.append(" ".join(sentences[start : start + size]))
            start += size
        return paragraphs


Facts = list[tuple[float, str]]


def _single(writer: Writer, tokens: int, task: str = "single") -> tuple[Facts, list[Question]]:
    rng = writer.rng
    facts: Facts = []
    questions: list[Question] = []
    shared = rng.choice(words.NUMBER_ATTRIBUTES) if task == "lookalike" else ""
    used = 0
    for name in writer.names(max(1, tokens // 11)):
        attributes = {shared or writer.attribute()}
        if rng.random() < 0.2:
            attributes.add(writer.attribute())
        for attribute in sorted(attributes):
            value = writer.value(attribute)
            facts.append((rng.random(), writer.statement(attribute, name, value)))
            used += approximate_tokens(facts[-1][1])
            questions.append(writer.ask(task, attribute, name, value))
        if used >= tokens:
            break
    return facts, questions


def _lookalike(writer: Writer, tokens: int) -> tuple[Facts, list[Question]]:
    return _single(writer, tokens, "lookalike")


def _lists(writer: Writer, tokens: int, task: str) -> tuple[Facts, list[Question]]:
    rng = writer.rng
    facts: Facts = []
    questions: list[Question] = []
    used = 0
    for name in writer.names(max(1, tokens // 22)):
        attribute = rng.choice(words.LIST_ATTRIBUTES)
        count = rng.randrange(2, 5) if task == "multi" else rng.randrange(1, 5)
        values = [writer.number() for _ in range(count)]
        for ordinal, value in zip(words.ORDINALS, values, strict=False):
            fact = writer.statement(f"{ordinal} {attribute}", name, value)
            facts.append((rng.random(), fact))
            used += approximate_tokens(facts[-1][1])
        questions.append(writer.ask_list(task, attribute, name, values))
        if used >= tokens:
            break
    return facts, questions


def _multi(writer: Writer, tokens: int) -> tuple[Facts, list[Question]]:
    return _lists(writer, tokens, "multi")


def _count(writer: Writer, tokens: int) -> tuple[Facts, list[Question]]:
    return _lists(writer, tokens, "count")


def _chain(writer: Writer, tokens: int) -> tuple[Facts, list[Question]]:
    rng = writer.rng
    facts: Facts = []
    questions: list[Question] = []
    used = 0
    names = writer.names(2 * max(2, tokens // 20))
    for name, other in zip(names[::2], names[1::2], strict=False):
        link = rng.choice(words.PERSON_ATTRIBUTES)
        attribute = writer.attribute()
        value = writer.value(attribute)
        facts.append((rng.random(), writer.statement(link, name, other)))
        facts.append((rng.random(), writer.statement(attribute, other, value)))
        used += sum(approximate_tokens(fact) for _, fact in facts[-2:])
        questions.append(writer.ask_chain(link, name, other, attribute, value))
        if used >= tokens:
            break
    return facts, questions


_FACTS: dict[str, Callable[[Writer, int], tuple[Facts, list[Question]]]] = {
    "single": _single,
    "lookalike": _lookalike,
    "multi": _multi,
    "chain": _chain,
    "count": _count,
}


def place_question(document: Document, question: str, place: str, rng: random.Random) -> str:
    """The user message: the document with the question at its end, start or middle."""
    label = "Question: " if place == "middle" or rng.random() < 0.5 else ""
    asked = label + question
    paragraphs = list(document.paragraphs)
    at = {"start": 0, "end": len(paragraphs)}.get(place)
    if at is None:
        at = rng.randrange(1, len(paragraphs)) if len(paragraphs) > 1 else 0
    paragraphs.insert(at, asked)
    return "\n\n".join(paragraphs)


def corpus(seed: int, documents: int) -> Iterator[str]:
    """Text to train the tokenizer on: every word about as often as in the documents."""
    writer = Writer(seed)
    for i in range(documents):
        writer.open_words = i % 10 == 0
        document = writer.document(TASKS[i % len(TASKS)], 600)
        yield document.text
        for question in document.questions:
            yield question.text
            yield question.answer
