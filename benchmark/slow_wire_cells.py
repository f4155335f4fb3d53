"""What `slow_wire.py` measures: its cells, and how many layers a run of each has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from slow_wire_rank import Prefill
from sps_runtime.types.attention import SparseSettings

LAYERS = 8
"""Of `gqa8`; a run has so many, or half as many, and so on, until it is short enough."""
RATES = {8192: (340.0, 100.0, 34.0, 10.0), 16384: (340.0, 34.0), 32768: (340.0, 34.0, 5.0)}
"""Megabits a second of each end; at 5, exact strategies communicate three times longer than they
compute 32k tokens."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "tp": {"world": "tp"},
    "pass_kv": {"strategy": "pass_kv"},
    "ulysses": {"strategy": "ulysses"},
    "stride_csa": {"sparse": {"estimator": "stride"}, "placement": "contiguous"},
    "block_csa": {"sparse": {}},
}
BYTES = {"tp": 8192, "pass_kv": 1024, "ulysses": 2560, "stride_csa": 648, "block_csa": 360}
"""About what the busier end sends a token and layer: only to say how long a run will be."""
SHORT_CSA = 1150
"""The same of block CSA where a prompt is short, and reads more."""
SECONDS = {
    "tp": (0.25, 0.0125),
    "pass_kv": (0.25, 0.0125),
    "ulysses": (0.25, 0.0125),
    "stride_csa": (0.22, 0.0082),
    "block_csa": (0.25, 0.0031),
}
"""About what a layer computes, for each 1,024 tokens and their square; for the same purpose."""
SHORT_S, TWO_S = 24.0, 58.0
"""A run of several layers is about no longer than this, so that a pair fits into a minute; one of
two layers than that: with one, nothing of a layer hides behind the next."""
LONGEST = 32768
LONGEST_S, LONGEST_TWO_S = 120.0, 300.0
"""The same of the longest prompt's exact strategies, whose layers are so long that filling and
emptying the pipeline is most of what few of them show."""


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        mbit: of each end; 0 for an unlimited wire.
    """

    strategy: str
    pipeline: bool
    tokens: int
    mbit: float

    @property
    def name(self) -> str:
        wire = f"{self.mbit:g}mbit" if self.mbit else "free"
        return f"{self.strategy}{'' if self.pipeline else '_sequential'}_{self.tokens}_{wire}"

    @property
    def layers(self) -> int:
        """Of a run; one is enough where nothing flies from one to the next. The same with and
        without the pipeline."""
        layers = 1 if self.strategy == "tp" else LAYERS
        several, two = SHORT_S, TWO_S
        if self.tokens == LONGEST and self.strategy in ("pass_kv", "ulysses"):
            several, two = LONGEST_S, LONGEST_TWO_S
        while layers > 1 and layers * self.layer_s() > (several if layers > 2 else two):
            layers //= 2
        return layers

    def layer_s(self) -> float:
        """About what a layer takes in one piece."""
        thousands = self.tokens / 1024
        once, square = SECONDS[self.strategy]
        short = self.strategy == "block_csa" and self.tokens < SparseSettings().short_to
        sent = (SHORT_CSA if short else BYTES[self.strategy]) * self.tokens * 8e-6
        return once * thousands + square * thousands**2 + (sent / self.mbit if self.mbit else 0)

    def about_s(self) -> float:
        """About what a run takes."""
        return self.layers * self.layer_s()

    def ask(self) -> Prefill:
        return Prefill(self.tokens, pipeline=self.pipeline, **STRATEGIES[self.strategy])


def cells(quick: bool) -> Iterator[Cell]:
    """All cells; of a length those with as many layers stand together, since ranks that run them
    are started once, and pairs do."""
    rates = {2048: (34.0,)} if quick else RATES
    for tokens in rates:
        yield from sorted(_of_length(tokens, rates[tokens]), key=lambda cell: -cell.layers)


def _of_length(tokens: int, rates: tuple[float, ...]) -> Iterator[Cell]:
    for mbit in (0.0, *rates):
        for strategy in STRATEGIES:
            pipelined = (False,) if strategy == "tp" or not mbit else (False, True)
            yield from (Cell(strategy, on, tokens, mbit) for on in pipelined)
