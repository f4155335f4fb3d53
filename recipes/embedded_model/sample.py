"""Write the sample document that ships with the model, and questions that the model gets right.

    python -m recipes.embedded_model.sample

The document has facts for every task among filler. Questions are tried in order; kept are those
that the checkpoint answers right with the question after, before and inside the document, up to
``--each`` of a task. How many were tried is printed: this file shows the model, it is no test of it
(``evaluate`` is).
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from .documents import PLACES, Document, Question, Writer, place_question
from .evaluate import ROOT, Case, Judge, torch_judge

ASSETS = ROOT / "python/sps_runtime/assets"


def answered_everywhere(document: Document, question: Question, judge: Judge) -> bool:
    """Whether the judge gets the question right wherever it stands."""
    messages = [f"{document.text}\n\n{question.text}"]
    for place in PLACES:
        messages.append(place_question(document, question.text, place, random.Random(place)))
    return all(judge([Case(message, question)])[0] for message in messages)


def choose(document: Document, judge: Judge, each: int, tries: int) -> list[Question]:
    """Questions answered right, up to ``each`` of a task among the first ``tries`` of a task."""
    kept: list[Question] = []
    tried: Counter[str] = Counter()
    good: Counter[str] = Counter()
    for question in document.questions:
        task = question.task
        if good[task] >= each or tried[task] >= tries:
            continue
        tried[task] += 1
        if answered_everywhere(document, question, judge):
            good[task] += 1
            kept.append(question)
    print({task: f"{good[task]} of {count} tried" for task, count in tried.items()})
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "embedded")
    parser.add_argument("--tokens", type=int, default=7000)
    parser.add_argument("--each", type=int, default=3)
    parser.add_argument("--tries", type=int, default=12)
    parser.add_argument("--seed", default="sample")
    arguments = parser.parse_args()
    writer = Writer(arguments.seed)
    document = writer.document("mixed", arguments.tokens, density=0.3)
    writer.rng.shuffle(document.questions)
    judge = torch_judge(arguments.checkpoint, threads=2)
    questions = choose(document, judge, arguments.each, arguments.tries)
    (ASSETS / "document.txt").write_text(document.text + "\n")
    pairs = [{"task": q.task, "question": q.text, "answer": q.answer} for q in questions]
    (ASSETS / "questions.json").write_text(json.dumps(pairs, indent=1) + "\n")


if __name__ == "__main__":
    main()
