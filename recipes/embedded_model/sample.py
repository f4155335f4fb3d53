"""Write the sample document that ships with the model, and questions that the model gets right.

    python -m recipes.embedded_model.sample

The document has facts for every task among filler. Questions are tried in order; kept are those
that the checkpoint answers right with the question after, before and inside the document, up to
``--each`` of a task. How many of the tried ones were right is printed: this file shows the model,
it is no test of it (``evaluate`` is).
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from .documents import TASKS, Document, Question, Writer, place_question
from .evaluate import ROOT, Case, Judge, torch_judge

ASSETS = ROOT / "python/sps_runtime/assets"


def choose(document: Document, judge: Judge, each: int, tries: int) -> list[Question]:
    """Of the first ``tries`` questions of each task, up to ``each`` answered right everywhere."""
    kept: list[Question] = []
    for task in TASKS:
        questions = [q for q in document.questions if q.task == task][:tries]
        cases = [Case(f"{document.text}\n\n{q.text}", q) for q in questions]
        after = [q for q, right in zip(questions, judge(cases), strict=True) if right]
        good: list[Question] = []
        for question in after:
            if len(good) < each and all(
                judge([case])[0] for case in _elsewhere(document, question)
            ):
                good.append(question)
        print(f"{task}: {len(after)} of {len(questions)} right at the end, kept {len(good)}")
        kept += good
    return kept


def _elsewhere(document: Document, question: Question) -> list[Case]:
    rng = random.Random(question.text)
    places = ("start", "middle")
    return [Case(place_question(document, question.text, p, rng), question) for p in places]


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
