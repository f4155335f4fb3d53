"""Training batches: documents as chats of many turns, every answer supervised."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from .documents import PLACES, Question, Writer, approximate_tokens, place_question

SYSTEM_MESSAGES = (
    "You answer questions about a document.",
    "You are a helpful assistant.",
    "Read the document and answer the question.",
)
TASK_WEIGHTS = {
    "single": 0.12,
    "lookalike": 0.25,
    "multi": 0.2,
    "chain": 0.13,
    "count": 0.15,
    "mixed": 0.15,
}
OPEN_SHARE = 0.15  # documents with invented names and words
LISTS = ("multi", "count")
OTHER_WEIGHT = 0.02  # of tokens that are no answer
FIRST_VALUE_WEIGHT = 4.0  # the first token of a value is the hard one
FIRST_TURN_WEIGHT = 2.0  # only there the question stands in or before the document
_PIECES = re.compile(r"<\|\w+\|>| ?[^\W\d_]+| ?\d| ?[^\w\s]|\n+| ")


class Encoder:
    """Encodes generated text by remembering the ids of each word (BPE never crosses words)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        known = self._known
        for piece in _PIECES.findall(text):
            found = known.get(piece)
            if found is None:
                found = known[piece] = self._tokenizer.encode(piece, add_special_tokens=False).ids
            ids += found
        return ids


@dataclass
class Answer:
    """Where an answer stands in a sample: ``start`` to ``stop``, and its values within."""

    task: str
    place: str
    start: int
    stop: int
    values: list[tuple[int, int]]


@dataclass
class Sample:
    """Token ids of one chat, its answers, and where sentences end outside answers."""

    ids: list[int] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def spaced(question: Question) -> Question:
    """The question with a space before its answer."""
    (text, is_value), *rest = question.parts
    return Question(question.task, question.text, ((f" {text}", is_value), *rest))


class SampleWriter:
    """Builds samples of one length from a seeded generator."""

    def __init__(self, tokenizer: Tokenizer, seed: str) -> None:
        self.encode = Encoder(tokenizer)
        self.reseed(seed)

    def reseed(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.writer = Writer(f"{seed}/text")

    def sample(self, task: str, length: int) -> Sample:
        """A chat of at most ``length`` tokens about one document."""
        rng = self.rng
        self.writer.open_words = length >= 256 and rng.random() < OPEN_SHARE
        share = rng.uniform(0.4, 0.7)
        density = rng.uniform(0.7, 0.95) if length <= 128 else None
        if density is None and task != "lookalike":
            density = rng.uniform(0.1, 0.6)
        system = rng.choice(SYSTEM_MESSAGES) if length >= 256 and rng.random() < 0.25 else ""
        document = self.writer.document(task, int(length * share) - 8, density)
        questions = list(document.questions)
        rng.shuffle(questions)
        place = rng.choice(("end", "end", "start", "middle"))
        sample = Sample()
        if system:
            self._add(sample, f"<|im_start|>system\n{system}<|im_end|>\n")
        message = place_question(document, questions[0].text, place, rng)
        self._turn(sample, message, questions[0], place)
        for question in questions[1:]:
            needed = approximate_tokens(question.text + question.answer) + 20
            if len(sample.ids) + needed > length:
                break
            self._turn(sample, question.text, question, "next")
        return sample

    def _add(self, sample: Sample, text: str) -> None:
        sample.ids += self.encode(text)

    def _turn(self, sample: Sample, message: str, question: Question, place: str) -> None:
        if sample.answers and self.rng.random() < 0.3:
            message = f"Question: {message}"
        self._add(sample, f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")
        start = len(sample.ids)
        values = self._parts(sample, question)
        self._add(sample, "<|im_end|>")
        sample.answers.append(Answer(question.task, place, start, len(sample.ids), values))
        self._add(sample, "\n")

    def _parts(self, sample: Sample, question: Question) -> list[tuple[int, int]]:
        values = []
        for text, is_value in question.parts:
            start = len(sample.ids)
            self._add(sample, text)
            if is_value:
                values.append((start, len(sample.ids)))
        return values

    def recap(self, task: str, length: int) -> Sample:
        """A document and one answer that states all its facts again, in another order.

        Only the values are supervised (nothing tells which fact comes next), many more of them to
        a token than in questions and answers.
        """
        rng = self.rng
        self.writer.open_words = length >= 256 and rng.random() < OPEN_SHARE
        density = rng.uniform(0.8 if rng.random() < 0.6 else 0.3, 0.98)
        document = self.writer.document(task, int(length * rng.uniform(0.4, 0.6)) - 12, density)
        sample = Sample()
        self._add(
            sample,
            f"<|im_start|>user\n{document.text}\n\nPlease repeat the facts.<|im_end|>\n"
            "<|im_start|>assistant\n",
        )
        questions = list(document.questions)
        rng.shuffle(questions)
        for question in questions:
            if len(sample.ids) + approximate_tokens(question.answer) + 3 > length:
                break
            start = len(sample.ids)
            if sample.answers:
                question = spaced(question)
            values = self._parts(sample, question)
            sample.answers.append(Answer(question.task, "recap", start, len(sample.ids), values))
        self._add(sample, "<|im_end|>\n")
        return sample


@dataclass
class Batch:
    """Arrays (B, T): ids, position ids, loss weights of each token as a target."""

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    answers: list[list[Answer]]


def spread_positions(
    ids: np.ndarray, ends: np.ndarray, context: int, generator: np.random.Generator
) -> np.ndarray:
    """Increasing position ids with random gaps after sentence ends, spanning up to ``context``."""
    positions = np.arange(len(ids))
    (at,) = np.nonzero(np.isin(ids[:-1], ends))
    if len(at) == 0:
        return positions
    room = generator.uniform(0, context - len(ids))
    gaps = generator.exponential(size=len(at)) ** 2
    gaps = (gaps / gaps.sum() * room).astype(np.int64)
    steps = np.zeros(len(ids), dtype=np.int64)
    steps[at + 1] = gaps
    return positions + np.cumsum(steps)


class BatchMaker:
    """Makes batch number ``step`` of a run; the same (seed, step, length) gives the same batch."""

    def __init__(self, tokenizer: Tokenizer, seed: int, context: int, pad: str) -> None:
        self.samples = SampleWriter(tokenizer, str(seed))
        self.seed, self.context = seed, context
        self.pad = tokenizer.token_to_id(pad)
        self.ends = np.array([tokenizer.encode(text).ids[-1] for text in (".", "?", "\n\n")])

    def batch(self, step: int, length: int, count: int, spread: bool, recap: bool) -> Batch:
        self.samples.reseed(f"{self.seed}/{step}/{length}")
        generator = np.random.default_rng((self.seed, step, length))
        names = [name for name in TASK_WEIGHTS if length >= 256 or name != "mixed"]
        chances = [TASK_WEIGHTS[name] for name in names]
        tasks = self.samples.rng.choices(names, chances, k=count)
        ids = np.full((count, length), self.pad, dtype=np.int64)
        positions = np.tile(np.arange(length), (count, 1))
        weights = np.zeros((count, length), dtype=np.float32)
        answers = []
        make = self.samples.recap if recap else self.samples.sample
        for row, task in enumerate(tasks):
            sample = make(task, length)
            used = min(length, len(sample.ids))
            ids[row, :used] = sample.ids[:used]
            weights[row, 1:used] = OTHER_WEIGHT
            answers.append([answer for answer in sample.answers if answer.stop <= length])
            for answer in answers[-1]:
                weigh(weights[row], answer)
            if spread:
                positions[row] = spread_positions(ids[row], self.ends, self.context, generator)
        return Batch(ids, positions, weights, answers)


def weigh(weights: np.ndarray, answer: Answer) -> None:
    """Set the weights (T,) of an answer's tokens; in a recap only its values count."""
    recap = answer.place == "recap"
    scale = FIRST_TURN_WEIGHT if answer.place in PLACES else 1.0
    if not recap:
        weights[answer.start : answer.stop] = scale
    for first, last in answer.values:
        weights[first:last] = scale
        weights[first] = FIRST_VALUE_WEIGHT * scale
        if answer.task in LISTS and not recap and last + 1 < answer.stop:
            # After a value's full stop: is there another value, or is this the end?
            weights[last + 1] = FIRST_VALUE_WEIGHT * scale
