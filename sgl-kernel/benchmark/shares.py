"""What a rank's share of a weight costs to read: two threads, each with its half of a layer's rows
or columns, as decoding on two ranks has them; columns cut when packing, and uncut."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

import torch
from timing import arguments, report

from sps_kernel import Program, pack_weight, packed_linear, packed_nbytes, use_huge_pages

COLD_BYTES = 160e6  # several times the caches
ROUNDS = 6


@dataclass(frozen=True)
class Layer:
    """A weight [n, k] of the 0.5b shape; two ranks share `rows` of its outputs, or its columns."""

    name: str
    n: int
    k: int
    rows: int = 0

    def slices(self, rank: int, unit: int) -> dict[str, tuple[int, int]]:
        if self.rows:
            middle = self.rows // 2 // unit * unit
            return {"rows": ((0, middle), (middle, 2 * middle))[rank]}
        middle = self.k // 2 // unit * unit
        return {"columns": ((0, middle), (middle, self.k))[rank]}


LAYERS = (
    Layer("gate", 9728, 896, rows=4864),
    Layer("output", 896, 896),
    Layer("down", 896, 4864),
)


def copies(layer: Layer, kind: str, cuts: tuple[int, ...]) -> list[torch.Tensor]:
    """One weight packed in huge pages, as often as it takes to fit no cache."""
    size = packed_nbytes(layer.n, layer.k, kind, cuts=cuts)
    step = -(-size // 64) * 64
    count = int(COLD_BYTES) // step
    arena = torch.ones(count * step // 8 + 8, dtype=torch.int64)
    use_huge_pages(arena)
    rooms = arena.view(torch.uint8)[-arena.data_ptr() % 64 :][: count * step].view(count, step)
    weight = torch.randn(layer.n, layer.k).bfloat16()
    pack_weight(weight, kind, rooms[0, :size], cuts=cuts)
    rooms[1:] = rooms[0]
    return [room[:size] for room in rooms]


def program(
    layer: Layer, kind: str, cuts: tuple[int, ...], weights: list[torch.Tensor], m: int, rank: int
) -> tuple[Program, float]:
    """All products of one rank, and the bytes that they read."""
    slices = layer.slices(rank, 16 if kind == "bf16" else 64)
    rows, columns = slices.get("rows", (0, layer.n)), slices.get("columns", (0, layer.k))
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    x = torch.randn(m, width).bfloat16()
    out = torch.empty(m, height, dtype=torch.bfloat16)
    made = Program()
    with made.recording():
        for weight in weights:
            packed_linear(x, weight, layer.n, layer.k, kind, out=out, cuts=cuts, **slices)
    share = height * width / (layer.n * layer.k)
    return made, sum(len(weight) for weight in weights) * share


def seconds(programs: list[Program]) -> list[float]:
    """Of the slower thread, each time."""
    times = []
    for _ in range(ROUNDS):
        took = [0.0] * len(programs)
        start = threading.Barrier(len(programs))

        def run(rank: int, took: list[float] = took, start: threading.Barrier = start) -> None:
            start.wait()
            began = time.perf_counter()
            programs[rank].run()
            took[rank] = time.perf_counter() - began

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(programs))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        times.append(max(took))
    return times


def main() -> None:
    args = arguments(__doc__)
    figures: dict[str, float] = {}
    raw: dict[str, list[float]] = {}
    for kind in ("bf16", "int8", "int4"):
        for layer in LAYERS:
            end = layer.slices(0, 16 if kind == "bf16" else 64).get("columns", (0, 0))[1]
            for form, cuts in {"uncut": (), "cut": (end,)}.items():
                if cuts == (0,):
                    continue
                weights = copies(layer, kind, cuts)
                for m in (1, 8) if args.quick else (1, 2, 4, 8, 12):
                    made = [program(layer, kind, cuts, weights, m, rank) for rank in range(2)]
                    key = f"{layer.name}_{kind}_{form}_m{m}"
                    raw[key] = seconds([one for one, _ in made])
                    figures[f"{key}_gb_s"] = sum(size for _, size in made) / min(raw[key]) / 1e9
    report(args.json, figures, raw)


if __name__ == "__main__":
    main()
