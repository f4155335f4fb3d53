"""What sparse attention costs in answers: the embedded model's tasks by estimator, budget, place.

python benchmark/accuracy.py [--quick] [--json FILE] [--cells 16384:end 4096:start ...]
    [--setups block quest:budget=0.15 ...] [--count 200] [--each 40] [--seconds 280]

Each (document, setup) is a row of the JSON; rows that FILE already has are kept and not measured
again, so that a long table can be made in pieces. An answer is right when, prompt and right answer
being fed as one prefill under the setup, every token of it, its end of turn included, is the most
likely one: its own tokens see only what the setup reads (`decode` ``sparse``); ``exact`` generates
the answer, as served by default, ``decoded`` by sparse decode. `judge` ``engine`` is the engine
itself; ``paged`` (accuracy_model.py) tries what no request can ask for, and counts unions.
docs/sparse_attention.md says what came out.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from accuracy_cases import KINDS, Cases, Group
from accuracy_choose import Setup
from accuracy_engine import EngineJudge
from accuracy_figures import figures
from accuracy_judge import Verdict, judge
from accuracy_model import PagedModel
from accuracy_setups import setup
from harness import arguments, commit, machine

Row = dict[str, Any]
KEYS = ("kind", "length", "place", "document", "setup", "decode", "judge")
QUICK = ["dense", "null", "block"]


def cells(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(kind, length, place) asked for."""
    for cell in options.cells:
        length, _, place = cell.partition(":")
        for kind in options.kinds:
            yield kind, int(length), place or "end"


def row_of(group: Group, name: str, options: argparse.Namespace, verdict: Verdict) -> Row:
    """One line of the result file."""
    answers: dict[str, str] = {}
    for prompt, right in zip(group.prompts, verdict.right, strict=True):
        answers[prompt.task] = answers.get(prompt.task, "") + "01"[right]
    return {
        "kind": group.kind,
        "length": group.length,
        "place": group.place,
        "document": group.number,
        "setup": name,
        "decode": options.decode,
        "judge": options.judge,
        "tokens": len(group.prompts[0].ids),
        "answers": answers,
        "nats": round(sum(verdict.nats) / len(verdict.nats), 4),
        "density": verdict.density,
        "unions": verdict.unions,
        "seconds": verdict.seconds,
    }


@contextmanager
def judging(options: argparse.Namespace) -> Iterator[Callable[[Group, Setup], Verdict]]:
    """What judges: nothing is started before the first question."""
    with ExitStack() as stack:
        made: dict[int, Any] = {}

        def judge_one(group: Group, chosen: Setup) -> Verdict:
            tokens = group.length + group.length // 8
            if tokens not in made:
                stack.close()
                made.clear()
                made[tokens] = PagedModel(tokens) if paged else EngineJudge(tokens)
                if not paged:
                    stack.callback(made[tokens].close)
            found = made[tokens]
            if paged:
                return judge(found, group, chosen, options.decode)
            return found(group, chosen, options.decode)

        paged = options.judge == "paged"
        yield judge_one


def measure(options: argparse.Namespace, rows: list[Row], cases: Cases) -> Iterator[Row]:
    """Rows that `rows` lacks, until the time is up; documents outermost, so that setups are always
    compared on the same questions."""
    done = {tuple(row[key] for key in KEYS) for row in rows}
    until = time.monotonic() + options.seconds
    with judging(options) as judge_one:
        for kind, length, place in cells(options):
            for group in cases.groups(kind, length, place, options.count, options.each):
                for name in options.setups:
                    where = (kind, length, place, group.number, name)
                    if (*where, options.decode, options.judge) in done:
                        continue
                    if time.monotonic() > until:
                        return
                    yield row_of(group, name, options, judge_one(group, setup(name)))


def write(path: Path | None, rows: list[Row]) -> None:
    """The result file, a row a line."""
    if path is None:
        return
    rows.sort(key=lambda row: [row[key] for key in KEYS])
    head = {"machine": machine(), "commit": commit(), "figures": figures(rows)}
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(head)[:-1] + ',\n"raw": {"rows": [\n' + lines + "\n]}}\n")


def options_of() -> argparse.Namespace:
    parser = arguments(__doc__ or "")
    parser.add_argument("--cells", nargs="*", default=["4096:end"], help="length[:place]")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--setups", nargs="*", default=QUICK, help="see accuracy_setups.py")
    parser.add_argument("--decode", default="sparse", choices=["sparse", "exact", "decoded"])
    parser.add_argument("--judge", default="engine", choices=["engine", "paged"])
    parser.add_argument("--count", type=int, default=40, help="questions of a task")
    parser.add_argument("--each", type=int, default=40, help="questions of a task and document")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin nothing after these")
    options = parser.parse_args()
    if options.quick:
        options.cells, options.setups, options.count, options.each = ["2048:end"], QUICK, 4, 4
        options.judge = "paged"
    return options


def main() -> None:
    options = options_of()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    warnings.filterwarnings("ignore", message="Mismatch dtype")
    rows: list[Row] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["raw"]["rows"]
    for row in measure(options, rows, Cases()):
        rows.append(row)
        right = {task: f"{bits.count('1')}/{len(bits)}" for task, bits in row["answers"].items()}
        print(row["length"], row["place"], row["setup"], right, row["density"], flush=True)
        write(options.json, rows)
    for name, value in figures(rows).items():
        print(f"{name:<60}  {value:.4g}")


if __name__ == "__main__":
    main()
