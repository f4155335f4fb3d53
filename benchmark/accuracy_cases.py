"""What is asked: documents, questions, prompts and answers as token ids.

Documents are those of the embedded model's recipe, from seeds that its training never uses. Four
tasks are asked of one `mixed` document, half of whose tokens are facts, so that one prefill serves
many questions; `lookalike` has documents of its own, of nothing but look-alikes.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # recipes are no part of the package

from recipes.embedded_model.documents import (  # noqa: E402
    Document,
    Question,
    Writer,
    place_question,
)

TASKS = ("single", "lookalike", "multi", "chain", "count")
KINDS = {"mixed": ("single", "multi", "chain", "count"), "lookalike": ("lookalike",)}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
PLACES = ("end", "start", "middle")
FACTS = {"mixed": 0.5, "lookalike": 0.7}
CHAT = 80  # tokens left for the question, the answer and the chat's marks
SPREAD = 2048  # documents are shorter by up to this: questions lie anywhere in a superblock
OPENING = "<|im_start|>user\n"
CHECKPOINT = ROOT / "python/sps_runtime/assets/embedded"


@dataclass(frozen=True)
class Prompt:
    """A question with its answer, its end of turn included."""

    task: str
    prompt: list[int]
    answer: list[int]

    @property
    def ids(self) -> list[int]:
        """What a prefill is fed: everything but the last token of the answer."""
        return (self.prompt + self.answer)[:-1]


@dataclass(frozen=True)
class Group:
    """Questions about one document: they begin alike where the question comes at the end."""

    kind: str
    length: int
    place: str
    number: int
    prompts: list[Prompt]

    @property
    def name(self) -> str:
        return f"{self.kind}/{self.length}/{self.place}/{self.number}"

    @property
    def shared(self) -> int:
        """Tokens that all prompts begin with, less than the shortest has."""
        shortest = min(len(p.prompt) for p in self.prompts) - 1
        for at, column in enumerate(zip(*(p.prompt[:shortest] for p in self.prompts), strict=True)):
            if len(set(column)) > 1:
                return at
        return shortest


class Cases:
    """Makes groups; `seed` names a set of documents."""

    def __init__(self, seed: str = "accuracy0") -> None:
        self.seed = seed
        self.tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))

    def group(self, kind: str, length: int, place: str, number: int, each: int) -> Group:
        """Up to `each` questions of each task about document `number` of a kind and length."""
        name = f"{self.seed}/{kind}/{length}/{number}"
        rng = random.Random(f"{name}/{place}")
        tokens = length - CHAT - random.Random(name).randrange(min(SPREAD, length // 4))
        document = Writer(name).document(kind, tokens, FACTS[kind])
        asked = [q for task in KINDS[kind] for q in _some(document, task, each, rng)]
        before = self._encode(OPENING + document.text) if place == "end" else []
        prompts = [self._prompt(document, question, place, rng, before) for question in asked]
        return Group(kind, length, place, number, prompts)

    def groups(self, kind: str, length: int, place: str, count: int, each: int) -> Iterator[Group]:
        """Documents until `count` questions of each of the kind's tasks were asked."""
        left = dict.fromkeys(KINDS[kind], count)
        number = 0
        while max(left.values()) > 0:
            group = self.group(kind, length, place, number, each)
            kept = []
            for prompt in group.prompts:
                if left[prompt.task] > 0:
                    left[prompt.task] -= 1
                    kept.append(prompt)
            if kept:
                yield Group(kind, length, place, number, kept)
            number += 1

    def _prompt(
        self,
        document: Document,
        question: Question,
        place: str,
        rng: random.Random,
        before: list[int],
    ) -> Prompt:
        """`before`: the ids of a document that the question follows; encoded once for all."""
        message = place_question(document, question.text, place, rng)
        chat = f"{OPENING}{message}<|im_end|>\n<|im_start|>assistant\n"
        chat = chat[len(OPENING) + len(document.text) :] if before else chat
        answer = f"{question.answer}<|im_end|>"
        return Prompt(question.task, before + self._encode(chat), self._encode(answer))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)


def _some(document: Document, task: str, each: int, rng: random.Random) -> list[Question]:
    questions = [question for question in document.questions if question.task == task]
    rng.shuffle(questions)
    return questions[:each]
