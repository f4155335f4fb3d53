"""Exact match of a checkpoint by task, document length and question place.

    python -m recipes.embedded_model.evaluate                      # plain torch, shipped checkpoint
    python -m recipes.embedded_model.evaluate --base-url http://127.0.0.1:30000/v1   # a server

Every question is asked of a document made with seeds that training never uses. An answer counts
when it is the expected text to the last character. In plain torch the expected answer is fed and
every token, the end of turn included, must be the most likely one: the same as greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .documents import PLACES, TASKS, Document, Question, Writer, place_question

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# Questions of each task and place, by length.
COUNTS = {1024: 60, 2048: 60, 4096: 60, 8192: 30, 16384: 16, 32768: 6}
CHAT = 80  # tokens left for the question, the answer and the chat's marks


@dataclass(frozen=True)
class Case:
    """One question asked of one document: the user's message and the answer expected."""

    message: str
    question: Question


def test_cases(task: str, length: int, place: str, count: int, seed: str) -> list[list[Case]]:
    """Cases grouped by document; ``length`` includes the chat around the document.

    Questions at the end share documents, up to ten each: what comes before them is the same.
    """
    groups: list[list[Case]] = []
    number = 0
    while sum(map(len, groups)) < count:
        name = f"{seed}/{task}/{length}/{place}/{number}"
        rng = random.Random(name)
        # A density of zero is a single fact; the other tasks keep their own range.
        density = 0.0 if task == "single" else None
        document = Writer(name).document(task, length - CHAT, density)
        questions = document.questions
        rng.shuffle(questions)
        wanted = min(10 if place == "end" else 1, count - sum(map(len, groups)))
        groups.append([_case(document, q, place, rng) for q in questions[:wanted]])
        number += 1
    return groups


def _case(document: Document, question: Question, place: str, rng: random.Random) -> Case:
    return Case(place_question(document, question.text, place, rng), question)


Judge = Callable[[list[Case]], list[bool]]


def torch_judge(checkpoint: Path, threads: int) -> Judge:
    """Judge by plain torch, in the checkpoint's bf16."""
    import torch

    from .plain import load, matches

    torch.set_num_threads(threads)
    model = load(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))

    def judge(cases: list[Case]) -> list[bool]:
        pairs = []
        for case in cases:
            prompt = f"<|im_start|>user\n{case.message}<|im_end|>\n<|im_start|>assistant\n"
            pairs.append(
                (
                    tokenizer.encode(prompt).ids,
                    tokenizer.encode(f"{case.question.answer}<|im_end|>").ids,
                )
            )
        return matches(model, pairs)

    return judge


def server_judge(base_url: str, model: str) -> Judge:
    """Judge by the chat completions of a server with OpenAI's API."""

    def ask(case: Case) -> bool:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": case.message}],
            "temperature": 0,
            "max_tokens": 96,
        }
        request = urllib.request.Request(
            f"{base_url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as reply:
            answer = json.load(reply)["choices"][0]["message"]["content"]
        return bool(answer == case.question.answer)

    return lambda cases: [ask(case) for case in cases]


def evaluate(judge: Judge, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each task, length and place: questions asked, answers right, seconds."""
    rows = []
    for length in arguments.lengths:
        for task in arguments.tasks:
            for place in PLACES:
                count = max(1, round(COUNTS.get(length, 20) * arguments.scale))
                begin = time.monotonic()
                groups = test_cases(task, length, place, count, arguments.seed)
                right = [match for cases in groups for match in judge(cases)]
                row = {
                    "task": task,
                    "length": length,
                    "place": place,
                    "asked": len(right),
                    "documents": len(groups),
                    "right": sum(right),
                    "seconds": round(time.monotonic() - begin, 1),
                }
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: right / asked by task and place over lengths."""
    lengths = sorted({row["length"] for row in rows})
    lines = ["| task | question at | " + " | ".join(f"{n // 1024}k" for n in lengths) + " |"]
    lines.append("|---|---|" + "---|" * len(lengths))
    cells = {(row["task"], row["place"], row["length"]): row for row in rows}
    for task in TASKS:
        for place in PLACES:
            found = [cells.get((task, place, n)) for n in lengths]
            if any(found):
                shown = [_share(row) for row in found]
                lines.append(f"| {task} | {place} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _share(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    return f"{100 * row['right'] / row['asked']:.0f}% ({row['right']}/{row['asked']})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = ROOT / "python/sps_runtime/assets/embedded"
    parser.add_argument("--checkpoint", type=Path, default=default)
    parser.add_argument("--base-url", help="ask a server instead, e.g. http://127.0.0.1:30000/v1")
    parser.add_argument("--model", default="default", help="model name sent to the server")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of questions")
    parser.add_argument("--seed", default="test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark/results/embedded_model.json")
    arguments = parser.parse_args()
    if arguments.base_url:
        judge = server_judge(arguments.base_url, arguments.model)
    else:
        judge = torch_judge(arguments.checkpoint, arguments.threads)
    rows = evaluate(judge, arguments)
    by = "server" if arguments.base_url else "plain torch, bf16"
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"judged_by": by, "seed": arguments.seed, "rows": rows}
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
