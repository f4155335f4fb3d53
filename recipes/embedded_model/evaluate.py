"""Exact match of a checkpoint by task, document length and question place.

    python -m recipes.embedded_model.evaluate                      # plain torch, shipped checkpoint
    python -m recipes.embedded_model.evaluate --base-url http://127.0.0.1:30000/v1   # a server

Every question is asked of a document made with seeds that training never uses. An answer counts
when it is the expected text to the last character. In plain torch the expected answer is fed and
every token, the end of turn included, must be the most likely one: the same as greedy decoding.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .documents import PLACES, TASKS, Document, Question, Writer, place_question

ROOT = Path(__file__).resolve().parents[2]
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
# Questions of each task, by length: at the end, where ten share a document, and at each other
# place, where each needs its own and costs ten times as much.
COUNTS = {
    1024: (60, 40),
    2048: (60, 20),
    4096: (60, 20),
    8192: (40, 8),
    16384: (20, 4),
    32768: (10, 2),
}
SINGLE_FACTS = 120  # tokens of facts in a document of the task `single`: about ten facts
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
        density = SINGLE_FACTS / length if task == "single" else None
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


def evaluate(judge: Judge, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each length, place and task: questions asked, answers right, seconds."""
    for length, place, task in product(arguments.lengths, arguments.places, arguments.tasks):
        most, few = COUNTS.get(length, (20, 4))
        count = max(1, round((most if place == "end" else few) * arguments.scale))
        begin = time.monotonic()
        groups = test_cases(task, length, place, count, arguments.seed)
        right = [match for cases in groups for match in judge(cases)]
        yield {
            "task": task,
            "length": length,
            "place": place,
            "asked": len(right),
            "documents": len(groups),
            "right": sum(right),
            "seconds": round(time.monotonic() - begin, 1),
        }


def write(path: Path, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the report; rows of other cells, of the same checkpoint and judge, are kept."""
    same = ("judged_by", "seed", "checkpoint")
    if path.exists():
        older = json.loads(path.read_text())
        if all(older.get(key) == report[key] for key in same):
            new = {(row["task"], row["length"], row["place"]) for row in rows}
            kept = (r for r in older["rows"] if (r["task"], r["length"], r["place"]) not in new)
            rows = [*kept, *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


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
    parser.add_argument("--places", nargs="+", choices=PLACES, default=list(PLACES))
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of questions")
    parser.add_argument("--seed", default="test")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark/results/embedded_model.json")
    arguments = parser.parse_args()
    if arguments.base_url:
        judge = server_judge(arguments.base_url, arguments.model)
    else:
        judge = torch_judge(arguments.checkpoint, arguments.threads)
    weights = arguments.checkpoint / "model.safetensors"
    report = {
        "judged_by": "server" if arguments.base_url else "plain torch, bf16",
        "seed": arguments.seed,
        "checkpoint": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    rows: list[dict[str, Any]] = []
    for row in evaluate(judge, arguments):
        rows.append(row)
        print(json.dumps(row), flush=True)
        write(arguments.out, report, rows)
    print(table(json.loads(arguments.out.read_text())["rows"]))


if __name__ == "__main__":
    main()
