"""The generator of the embedded model's documents: seeded, truthful, torch-free."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from recipes.embedded_model.documents import (
    NOT_GIVEN,
    PLACES,
    TASKS,
    Question,
    Writer,
    approximate_tokens,
    place_question,
)

ROOT = Path(__file__).resolve().parents[2]
_VALUE = r"(\w+(?: [A-Z]\w+)?)"
_FACT = re.compile(rf"[Tt]he (\w+(?: \w+)?) of ([A-Z]\w+ [A-Z]\w+) is {_VALUE}\.")
_FACT_WITH_HAS = re.compile(rf"(\w+ \w+) has the ([a-z]+(?: [a-z]+)?) {_VALUE}\.")
_ORDINALS = ("first", "second", "third", "fourth")


def facts_of(text: str) -> dict[tuple[str, str], str]:
    """(attribute, name) to value, for every fact that the text states."""
    found = [(m[1], m[2], m[3]) for m in _FACT.finditer(text)]
    found += [(m[2], m[1], m[3]) for m in _FACT_WITH_HAS.finditer(text)]
    facts = {(attribute, name): value for attribute, name, value in found}
    assert len(facts) == len(found), "a fact is stated twice"
    return facts


def solve(facts: dict[tuple[str, str], str], question: Question) -> list[str]:
    """The values that the document itself gives for a question."""
    asked = re.search(r"(\w+) (?:of|does) (?:the (\w+) of )?([A-Z]\w+ [A-Z]\w+)", question.text)
    assert asked
    attribute, link, name = asked.groups()
    if question.task == "chain":
        other = facts[link, name]
        return [other, facts[attribute, other]]
    if question.task in ("multi", "count"):
        kind = attribute.removesuffix("s")
        values = [facts[f"{o} {kind}", name] for o in _ORDINALS if (f"{o} {kind}", name) in facts]
        count = [str(len(values))] if question.task == "count" else []
        return values + [NOT_GIVEN] * (len(values) < len(_ORDINALS)) + count
    return [facts[attribute, name]]


@pytest.mark.parametrize("task", [*TASKS, "mixed"])
@pytest.mark.parametrize("tokens", [60, 400, 3000])
def test_answers_are_what_the_document_says(task: str, tokens: int) -> None:
    for seed in range(5):
        document = Writer(f"{task}/{tokens}/{seed}").document(task, tokens)
        assert document.questions
        facts = facts_of(document.text)
        for question in document.questions:
            assert task in (question.task, "mixed")
            stated = [text.strip() for text, is_value in question.parts if is_value]
            assert stated == solve(facts, question), (seed, question)


@pytest.mark.parametrize("task", TASKS)
def test_same_seed_same_document(task: str) -> None:
    first, again = (Writer(5).document(task, 500) for _ in range(2))
    assert first == again
    assert first.text != Writer(6).document(task, 500).text


@pytest.mark.parametrize("tokens", [500, 2000, 8000])
def test_documents_have_the_length_asked_for(tokens: int) -> None:
    for task in TASKS:
        length = approximate_tokens(Writer(1).document(task, tokens).text)
        assert tokens <= length <= tokens + 60


def test_lookalikes_are_many_facts_of_one_attribute() -> None:
    document = Writer(2).document("lookalike", 4000)
    attributes = [attribute for attribute, _ in facts_of(document.text)]
    common = max(attributes.count(a) for a in set(attributes))
    assert common >= 120 and common > 0.7 * len(attributes)


def test_density_zero_states_one_persons_facts() -> None:
    document = Writer(3).document("single", 2000, density=0.0)
    assert len({name for _, name in facts_of(document.text)}) == 1


@pytest.mark.parametrize("place", PLACES)
def test_question_stands_where_it_is_placed(place: str) -> None:
    document = Writer(4).document("single", 600)
    asked = document.questions[0].text
    message = place_question(document, asked, place, random.Random(0))
    before, after = message.split(asked)
    assert (before.removeprefix("Question: ") == "") == (place == "start")
    assert (after == "") == (place == "end")


def test_generator_needs_no_torch() -> None:
    code = "import sys, recipes.embedded_model.documents; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
