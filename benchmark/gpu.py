"""Everything that one GPU can confirm, in one command of at most eight minutes with test/gpu.

Each section has its time and is left when that is over; one that fails is noted and the next goes
on. Results are written after every section, so that nothing is lost when the machine is. Ceilings
(a copy, a bf16 product) are measured on the same device in the same run. Weights are random and
attend almost uniformly: page sets are forced, and nothing here is about answers.

    python benchmark/gpu.py [--json benchmark/results/gpu_NAME.json] [--minutes 5]
    python benchmark/gpu.py --device cpu --quick      small shapes: the benchmark itself, checked
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

import gpu_end_to_end as whole
import gpu_kernels as kernels
from gpu_rank import LocalRank
from gpu_timing import Budget, Ceilings, ceilings
from harness import ROOT, commit, machine

Rows = Iterator[tuple[str, float]]


@dataclass
class Report:
    """What was found so far, and where it goes."""

    path: Path
    machine: dict[str, Any]
    figures: dict[str, float] = field(default_factory=dict)
    raw: dict[str, Any] = field(default_factory=dict)

    def write(self) -> None:
        """All of it, atomically."""
        content = asdict(self) | {"commit": commit()}
        del content["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.rename(self.path)


@dataclass(frozen=True)
class Section:
    """Attributes:
    share: of the minutes that there are.
    """

    name: str
    share: float
    run: Callable[[Budget], Rows]


def run_sections(report: Report, sections: list[Section], seconds: float) -> None:
    """Each in its time; what one leaves over goes to the others."""
    ends, left = time.monotonic() + seconds, sum(section.share for section in sections)
    for section in sections:
        now = time.monotonic()
        budget = Budget(now + max(5.0, (ends - now) * section.share / left))
        left -= section.share
        noted: dict[str, Any] = {"limit_s": round(budget.ends - now, 1)}
        print(f"{section.name} ({noted['limit_s']} s)", flush=True)
        try:
            for name, value in section.run(budget):
                report.figures[name] = value
                print(f"  {name} {value:.4g}", flush=True)
        except Exception as error:
            noted["error"] = f"{type(error).__name__}: {error}"
            noted["traceback"] = traceback.format_exc().splitlines()[-12:]
            print(f"  failed: {noted['error']}", flush=True)
        noted["took_s"] = round(time.monotonic() - now, 1)
        report.raw[section.name] = noted
        report.write()


class Ranks:
    """Ranks that sections share; one at a time has the device."""

    def __init__(self, plan: whole.Plan, device: torch.device) -> None:
        self._plan, self._device = plan, device
        self._held: tuple[tuple[object, ...], LocalRank] | None = None

    def get(self, **changes: Any) -> LocalRank:
        key = tuple(sorted(changes.items()))
        if self._held is None or self._held[0] != key:
            self._held = None
            gc.collect()  # a rank and its graphs hold each other
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            made = LocalRank(self._plan.config, self._device, self._plan.pages, **changes)
            self._held = (key, made)
        return self._held[1]


def make_sections(device: torch.device, top: Ceilings, quick: bool) -> list[Section]:
    heads, plan = (kernels.SMALL, whole.QUICK) if quick else (kernels.LLAMA, whole.FULL)
    lengths = (512,) if quick else (8192, 32768)
    cells = ((1, 512), (2, 256)) if quick else ((1, 32768), (1, 131072), (8, 32768), (64, 4096))
    rows = (64,) if quick else (16, 8192)
    relays = ((4, 256, 64),) if quick else ((2, 8192, 1024), (8, 32768, 1024), (32, 32768, 1024))
    ranks = Ranks(plan, device)

    def over_rows(one: Callable[..., Rows]) -> Callable[[Budget], Rows]:
        return lambda budget: (
            found for count in rows for found in one(device, heads, top, count, budget)
        )

    def eager(budget: Budget) -> Rows:
        return whole.decode_steps(ranks.get(graphs=False), plan, top, budget, "eager")

    def fp8(budget: Budget) -> Rows:
        return whole.decode_steps(ranks.get(kv_dtype="fp8_e4m3"), plan, top, budget, "fp8")

    sections = [
        Section("layers", 1, over_rows(kernels.layers)),
        Section("merges", 0.5, over_rows(kernels.merges)),
        Section("decode attention", 2, lambda b: kernels.decode(device, heads, top, cells, b)),
        Section("relay attention", 1, lambda b: kernels.relay(device, heads, top, relays, b)),
        Section("prefill attention", 3, lambda b: kernels.prefill(device, heads, top, lengths, b)),
        Section("first tokens", 4, lambda b: whole.first_tokens(ranks.get(), plan, top, b)),
        Section(
            "decode steps", 2, lambda b: whole.decode_steps(ranks.get(), plan, top, b, "graphs")
        ),
        Section("cost tables", 0.5, lambda b: whole.cost_tables(ranks.get(), plan, b)),
        Section("decode steps, eager", 1, eager),
        Section("decode steps, fp8", 1, fp8),
    ]
    if device.type == "cuda":
        plain = Section(
            "plain FlashInfer", 1, lambda b: kernels.plain_flashinfer(device, heads, lengths, b)
        )
        sections.insert(5, plain)
    return sections


def describe(device: torch.device) -> dict[str, Any]:
    """The machine with its device."""
    found = machine() | {"torch": torch.__version__, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["device_memory_gb"] = round(properties.total_memory / 1e9, 1)
        found["cuda"] = torch.version.cuda
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path, help="benchmark/results/gpu_DEVICE.json unless told")
    options = parser.parse_args()
    device = torch.device(options.device)
    about = describe(device)
    name = re.sub(r"\W+", "_", about["device"].lower()).strip("_")
    path = options.json or ROOT / "benchmark" / "results" / f"gpu_{name}.json"
    report = Report(path, about)
    top = ceilings(device, options.quick)
    report.figures |= {
        "ceiling_memory_bytes_per_s": top.bytes_per_s,
        "ceiling_gemm_flops_per_s": top.flops_per_s,
    }
    report.write()
    print(f"{about['device']}: {top.bytes_per_s / 1e9:.0f} GB/s, {top.flops_per_s / 1e12:.1f} TF/s")
    seconds = 60.0 if options.quick else 60.0 * options.minutes
    with torch.inference_mode():
        run_sections(report, make_sections(device, top, options.quick), seconds)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
