"""What does a decode step cost each process and thread: processor time, wakings, waits for a core?

Counted by the kernel (`/proc/PID/task/*/schedstat` and `status`) over one streamed request whose
prompt is cached already, so other load on the machine hardly moves the processor times. "Waited" is
time that a thread could have run and had no core. The client is this program itself.

    python benchmark/step_cost.py --model DIR [--tokens 512] [--answer 300] [--batch 1] [--sp 2]
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import Server, arguments, children, report

Counts = dict[tuple[str, str], "Count"]


@dataclass
class Count:
    """What threads of one role have used so far.

    Attributes:
        cpu_ns, waited_ns: on a core, and ready without one.
        wakings: times that it had gone to sleep by itself.
        preempted: times that another took its core.
    """

    cpu_ns: int = 0
    waited_ns: int = 0
    wakings: int = 0
    preempted: int = 0

    def add(self, other: Count, sign: int = 1) -> None:
        self.cpu_ns += sign * other.cpu_ns
        self.waited_ns += sign * other.waited_ns
        self.wakings += sign * other.wakings
        self.preempted += sign * other.preempted


def thread_count(task: Path) -> Count:
    """What one thread has used."""
    cpu, waited, _ = (task / "schedstat").read_text().split()
    lines = (task / "status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    voluntary = int(fields["voluntary_ctxt_switches"])
    return Count(int(cpu), int(waited), voluntary, int(fields["nonvoluntary_ctxt_switches"]))


def process_name(pid: int) -> str:
    """What the launcher calls a child; its own processes are all "launcher"."""
    command = Path(f"/proc/{pid}/cmdline").read_text()
    return command.split('"name":"')[1].split('"')[0] if '"name":"' in command else "launcher"


def role(task: Path, pid: int) -> str:
    """What a thread is for: the main one, ZMQ's I/O, or another."""
    if task.name == str(pid):
        return "main"
    name = (task / "comm").read_text().strip()
    return "ZMQ" if name.startswith("ZMQ") else "other"


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def snapshot(server: Server) -> Counts:
    """What every thread of the server has used so far, and this process as the client."""
    counts: Counts = defaultdict(Count)
    for pid in tree(server.process.pid):
        with contextlib.suppress(OSError):
            name = process_name(pid)
            for task in Path(f"/proc/{pid}/task").iterdir():
                counts[name, role(task, pid)].add(thread_count(task))
    for task in Path("/proc/self/task").iterdir():
        counts["client", "all"].add(thread_count(task))
    return counts


@dataclass(frozen=True)
class Cost:
    """One measured stretch: what was used per step, and tokens a second of one request."""

    counts: Counts
    steps: int
    tokens_per_s: float

    def beside_ranks_ms(self) -> float:
        """Processor milliseconds a step of everything but ranks and client."""
        other = (
            count.cpu_ns
            for (name, _), count in self.counts.items()
            if not name.startswith("rank") and name != "client"
        )
        return sum(other) / self.steps / 1e6


def measure(server: Server, prompts: list[list[int]], answer: int) -> Cost:
    """Decode `answer` tokens of every prompt at once, after all are cached."""
    for prompt in prompts:
        server.stream(prompt, 8)
    before, steps = snapshot(server), server.state()["steps_total"]
    streams = server.streams(prompts, answer)
    counts, steps = snapshot(server), server.state()["steps_total"] - steps
    for key, count in before.items():
        counts[key].add(count, -1)
    rates = [stream.decode_tokens_per_s for stream in streams]
    return Cost(counts, steps, sum(rates) / len(rates))


def show(cost: Cost) -> dict[str, float]:
    """Print a table; return its figures."""
    figures: dict[str, float] = {}
    head = (
        f"{'process':14}{'thread':8}{'cpu ms':>9}{'waited ms':>11}{'wakings':>9}{'preempted':>11}"
    )
    print(f"per step of {cost.steps}, {cost.tokens_per_s:.1f} tokens/s a request\n{head}")
    for (name, part), count in sorted(cost.counts.items()):
        values = (count.cpu_ns / 1e6, count.waited_ns / 1e6, count.wakings, count.preempted)
        cpu, waited, wakings, preempted = (value / cost.steps for value in values)
        if cpu < 0.001:
            continue
        print(f"{name:14}{part:8}{cpu:9.3f}{waited:11.3f}{wakings:9.2f}{preempted:11.2f}")
        figures[f"cpu_ms_{name}_{part}"] = round(cpu, 4)
        figures[f"wakings_{name}_{part}"] = round(wakings, 3)
    figures["cpu_ms_beside_ranks"] = round(cost.beside_ranks_ms(), 4)
    figures["tokens_per_s"] = round(cost.tokens_per_s, 2)
    return figures


def main() -> None:
    options = arguments(__doc__ or "")
    options.add_argument("--model", required=True)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--answer", type=int, default=300)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--sp", type=int, default=2)
    options.add_argument("flags", nargs="*", help="more flags of the server, after --")
    args = options.parse_args()
    if args.quick:
        args.tokens, args.answer = 128, 64
    draw = random.Random(args.tokens)
    prompts = [[draw.randrange(100, 30_000) for _ in range(args.tokens)] for _ in range(args.batch)]
    flags = ["--model-path", args.model, "--sp-size", str(args.sp), *args.flags]
    raw: dict[str, Any] = {"flags": flags, "cores": os.cpu_count(), "time": time.time()}
    with Server(*flags) as server:
        figures = show(measure(server, prompts, args.answer))
    print()
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
