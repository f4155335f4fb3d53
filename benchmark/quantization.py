"""What do int8 and int4 weights cost in answers? The embedded model's tasks, by quantization.

    python benchmark/quantization.py [--quick] [--json FILE]

Every weight form answers the same questions of the same documents (seeds that training never used),
greedily, in the offline engine; an answer counts when it is the expected text to the last
character. Beside that: how many answers are those of the unquantized model, right or wrong. Nothing
is timed here.
"""

from __future__ import annotations

import sys
from typing import Any, Protocol

from harness import ROOT, arguments, report
from sps_runtime.engine import Engine

FORMS = ("none", "int8", "int4")
GREEDY = {"temperature": 0, "max_new_tokens": 96}


class Case(Protocol):
    """What this reads of `recipes.embedded_model.evaluate.Case`."""

    message: str
    question: Any


def answers(engine: Engine, cases: list[Case]) -> list[str]:
    """The texts of the answers, in order."""
    prompts = [
        f"<|im_start|>user\n{case.message}<|im_end|>\n<|im_start|>assistant\n" for case in cases
    ]
    return [reply["text"] for reply in engine.generate(prompts, GREEDY)]


def ask_all(form: str, questions: dict[str, list[Case]]) -> dict[str, list[str]]:
    """Every cell's answers by an engine of its own."""
    with Engine("embedded", quantization=form, sp_size=1) as engine:
        return {cell: answers(engine, cases) for cell, cases in questions.items()}


def all_questions(count: int, lengths: list[int]) -> dict[str, list[Case]]:
    """Cell (task_length) -> its questions, asked at the document's end."""
    sys.path.insert(0, str(ROOT))
    from recipes.embedded_model.documents import TASKS
    from recipes.embedded_model.evaluate import test_cases

    return {
        f"{task}_{length}": [
            case for group in test_cases(task, length, "end", count, "test") for case in group
        ]
        for task in TASKS
        for length in lengths
    }


def compare(
    questions: dict[str, list[Case]], replies: dict[str, dict[str, list[str]]]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures, and one row for each cell and form."""
    figures, rows = {}, []
    for cell, cases in questions.items():
        task, length = cell.rsplit("_", 1)
        for form, texts in replies.items():
            right = sum(t == c.question.answer for t, c in zip(texts[cell], cases, strict=True))
            same = sum(map(str.__eq__, texts[cell], replies["none"][cell]))
            figures[f"accuracy_share_{task}_{length}_{form}"] = right / len(cases)
            rows.append(
                {
                    "task": task,
                    "length": int(length),
                    "quantization": form,
                    "asked": len(cases),
                    "right": right,
                    "same_as_unquantized": same,
                }
            )
    for form in replies:
        mine = [row for row in rows if row["quantization"] == form]
        asked = sum(row["asked"] for row in mine)
        figures[f"accuracy_share_all_{form}"] = sum(row["right"] for row in mine) / asked
        same = sum(row["same_as_unquantized"] for row in mine)
        figures[f"same_answer_share_all_{form}"] = same / asked
        figures[f"accuracy_share_worst_cell_{form}"] = min(r["right"] / r["asked"] for r in mine)
    return figures, rows


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--questions", type=int, default=50, help="of each task and length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096])
    options = parser.parse_args()
    if options.quick:
        options.questions, options.lengths = 10, [1024]
    questions = all_questions(options.questions, options.lengths)
    replies = {form: ask_all(form, questions) for form in FORMS}
    figures, rows = compare(questions, replies)
    report(options.json, figures, rows)


if __name__ == "__main__":
    main()
