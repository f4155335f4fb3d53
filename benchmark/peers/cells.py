"""What is measured: cells (batch x prompt), sides (an engine with its settings), pairs of sides."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from peers.maths import Floor, prefill_flops, step_bytes

MODEL = "0.5b"
RUNS = 4
"""A B B A."""


@dataclass(frozen=True)
class Cell:
    """`batch` prompts of `length` tokens sent at once, `new_tokens` decoded for each."""

    batch: int
    length: int
    new_tokens: int = 65

    @property
    def name(self) -> str:
        return f"b{self.batch}_{self.length}"

    @property
    def tokens(self) -> int:
        """Tokens of KV that the cell needs."""
        return self.batch * (self.length + self.new_tokens)

    def prompts(self, run: int) -> list[list[int]]:
        """The token ids of one repetition: both sides get the same, no side gets them twice."""
        rng = random.Random(f"{self.name}/{run}")
        return [[rng.randrange(300, 1000) for _ in range(self.length)] for _ in range(self.batch)]


@dataclass(frozen=True)
class Side:
    """One engine with its settings; `peer` is a name of `install.RECIPES`, "" for ours.

    `density`: the share of causal pairs that a peer's sparse prefill is told to keep; 0: dense.
    """

    name: str
    peer: str = ""
    weights: str = "bf16"
    threads: int = 2
    flags: tuple[str, ...] = ()
    density: float = 0.0


@dataclass(frozen=True)
class Pair:
    """Ours beside one other: `other` and `ours` take turns on every cell."""

    name: str
    other: Side
    ours: Side
    cells: tuple[Cell, ...]
    pace: tuple[float, float] = field(default=(0.6, 0.5))
    """Shares of the two floors that the slower of both reaches, for estimating time only."""
    ready_s: float = 15.0
    """Seconds until both are started and warm, for estimating time only."""

    @property
    def context(self) -> int:
        return max(cell.tokens for cell in self.cells) + 512

    @property
    def sequences(self) -> int:
        return max(cell.batch for cell in self.cells)


SHORT, MIDDLE, LONG, LONGEST = (Cell(1, length) for length in (512, 2048, 8192, 16384))
EIGHT = Cell(8, 512)
ONE_RANK = ("--sp-size", "1")
TWO_RANKS = ("--sp-size", "2", "--threads-per-rank", "1")
SP2 = Side("sps_sp2", flags=TWO_RANKS)
SP1 = Side("sps_sp1", flags=(*ONE_RANK, "--threads-per-rank", "2"))
MAIN = (SHORT, MIDDLE, EIGHT, LONG)
BRIEF = (SHORT, MIDDLE, EIGHT)


def quantized(weights: str, flag: str) -> Pair:
    other = Side(f"llama.cpp_{weights}", "llama.cpp", weights)
    ours = Side(f"sps_sp2_{flag}", weights=flag, flags=(*TWO_RANKS, "--quantization", flag))
    return Pair(f"llama.cpp-{weights}", other, ours, (SHORT, EIGHT), (0.4, 0.5))


def sparse(density: float, budget: float, tokens: int) -> Pair:
    """Block-sparse prefill on both sides. Random weights attend almost uniformly, so the peer's
    threshold of a mass is a share of blocks; ours keeps its budget's share, and what is always
    read besides (the latest pages, the sink) makes it `density` at this length."""
    percent = round(100 * density)
    other = Side(f"openvino_xattention_{percent}", "openvino", density=density)
    csa = ("--attention-mode", "csa", "--csa-min-tokens", "1", "--csa-budget", str(budget))
    flags = (*TWO_RANKS, *csa, "--csa-tau", "0", "--csa-max-tau", "1")
    ours = Side(f"sps_sp2_csa_{percent}", flags=flags)
    cells = (Cell(1, tokens, 9),)
    return Pair(f"openvino-xattention-{percent}", other, ours, cells, (0.6, 0.4))


PAIRS: dict[str, Pair] = {
    pair.name: pair
    for pair in (
        Pair("openvino", Side("openvino", "openvino"), SP2, (*MAIN, LONGEST)),
        Pair("vllm", Side("vllm", "vllm"), SP2, MAIN, (0.55, 0.4), ready_s=100.0),
        Pair("llama.cpp", Side("llama.cpp", "llama.cpp"), SP2, MAIN, (0.4, 0.5)),
        Pair("sp1", SP1, SP2, MAIN),
        Pair(
            "openvino-1core",
            Side("openvino_1core", "openvino", threads=1),
            Side("sps_1core", threads=1, flags=(*ONE_RANK, "--threads-per-rank", "1")),
            (SHORT, MIDDLE, LONG),
        ),
        quantized("q8_0", "int8"),
        quantized("q4_0", "int4"),
        sparse(0.14, budget=0.10, tokens=16384),
        sparse(0.11, budget=0.10, tokens=32768),
        Pair("transformers", Side("transformers", "transformers"), SP2, BRIEF, (0.4, 0.2)),
        Pair("vllm-zen", Side("vllm-zen", "vllm-zen"), SP2, MAIN, (0.55, 0.4), ready_s=100.0),
    )
}
IMPORTANT = ("openvino", "vllm", "llama.cpp")
QUICK_CELLS = (Cell(1, 512, 33),)


def estimate_s(pair: Pair, cell: Cell, floor: Floor) -> float:
    """Seconds that the four runs of a cell take, roughly."""
    prefill = cell.batch * prefill_flops(cell.length) / (floor.gemm_flops_per_s * pair.pace[0])
    step = step_bytes(cell.batch, cell.length) / (floor.read_bytes_per_s * pair.pace[1])
    return RUNS * (prefill + cell.new_tokens * step)
