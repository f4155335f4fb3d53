"""One table from the rows of a run, and its figures by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

from peers.cells import Cell, Pair, Side
from peers.maths import Comparison, Floor, compare, decode_share, prefill_share
from peers.rounds import Row, Store

HEAD = (
    "| against | cell | quantity | theirs | of floor | ours | of floor | ours/theirs | A/A | |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
)


@dataclass(frozen=True)
class Line:
    """One quantity of one cell: tok/s of both sides and the shares of the floor they are."""

    pair: str
    cell: str
    quantity: str
    comparison: Comparison
    other_share: float
    our_share: float

    def markdown(self) -> str:
        c = self.comparison
        return (
            f"| {self.pair} | {self.cell} | {self.quantity} "
            f"| {c.other:.4g} | {self.other_share:.0%} | {c.ours:.4g} | {self.our_share:.0%} "
            f"| {c.ratio:.2f} | {c.spread:.2f} | {c.verdict} |"
        )


def floor_of(pair: Pair, store: Store) -> Floor | None:
    """The best probe before and after the pair's cells."""
    rows = store.of("floor", pair.name)
    floors = [Floor(row["gemm_flops_per_s"], row["read_bytes_per_s"]) for row in rows]
    return reduce(Floor.best, floors) if floors else None


def _of(rows: Sequence[Row], side: str, name: str) -> list[float]:
    mine = sorted((row["repetition"], row[name]) for row in rows if row["side"] == side)
    return [value for _, value in mine]


def prefill_line(pair: Pair, cell: Cell, rows: Sequence[Row], floor: Floor) -> Line:
    rates = {
        side: [cell.batch * cell.length / ttft for ttft in _of(rows, side, "ttft_s")]
        for side in ("ours", "other")
    }
    both = compare(rates["ours"], rates["other"])
    shares = [
        prefill_share(cell.length, cell.length / rate, floor) for rate in (both.other, both.ours)
    ]
    return Line(pair.name, cell.name, "prefill tok/s", both, *shares)


def decode_line(pair: Pair, cell: Cell, rows: Sequence[Row], floor: Floor) -> Line:
    name = "decode_tokens_per_s"
    both = compare(_of(rows, "ours", name), _of(rows, "other", name))
    context = cell.length + cell.new_tokens / 2

    def share(side: Side, rate: float) -> float:
        return decode_share(cell.batch, context, rate, floor, side.weights)

    shares = share(pair.other, both.other), share(pair.ours, both.ours)
    return Line(pair.name, cell.name, "decode tok/s", both, *shares)


def lines(pairs: Sequence[Pair], store: Store) -> list[Line]:
    """What has been measured so far, in the order of the pairs."""
    result = []
    for pair in pairs:
        floor = floor_of(pair, store)
        measured = {row["cell"]: row["rows"] for row in store.of("cell", pair.name)}
        for name, rows in measured.items():
            batch, length = map(int, name[1:].split("_"))
            cell = next((c for c in pair.cells if c.name == name), Cell(batch, length))
            assert floor is not None
            if cell.batch == 1:
                result.append(prefill_line(pair, cell, rows, floor))
            result.append(decode_line(pair, cell, rows, floor))
    return result


def starts(pairs: Sequence[Pair], store: Store) -> list[str]:
    """Cold start, memory and floors of each pair, and what was skipped and why."""
    text = []
    for pair in pairs:
        for row in store.of("start", pair.name):
            side = pair.ours if row["side"] == "ours" else pair.other
            version = ", ".join(f"{k} {v}" for k, v in row["versions"].items())
            text.append(
                f"- {pair.name}: {side.name} ({row['api']}; {version or 'this checkout'}) "
                f"cold start {row['cold_start_s']:.1f} s, peak PSS "
                f"{row['peak_pss_bytes'] / 1e9:.2f} GB"
            )
        floor = floor_of(pair, store)
        if floor and store.of("cell", pair.name):
            text.append(
                f"- {pair.name}: floors {floor.gemm_flops_per_s / 1e9:.0f} GFLOP/s, "
                f"{floor.read_bytes_per_s / 1e9:.1f} GB/s on {pair.ours.threads} threads"
            )
        for row in store.of("skipped", pair.name):
            text.append(f"- {pair.name}: {row['side']} skipped: {row['why']}")
    return text


def markdown(pairs: Sequence[Pair], store: Store) -> str:
    rows = [line.markdown() for line in lines(pairs, store)]
    return "\n".join([*HEAD, *rows, "", *starts(pairs, store)]) + "\n"


def figures(pairs: Sequence[Pair], store: Store) -> dict[str, Any]:
    """The flat map of the result file."""
    result: dict[str, Any] = {}
    for line in lines(pairs, store):
        quantity = line.quantity.replace(" tok/s", "")
        name = f"{quantity}_{line.pair}_{line.cell}".replace(".", "_").replace("-", "_")
        result[f"{name}_ratio_ours_over_other"] = line.comparison.ratio
        result[f"{name}_spread"] = line.comparison.spread
        result[f"{name}_tokens_per_s_other"] = line.comparison.other
        result[f"{name}_tokens_per_s_ours"] = line.comparison.ours
        result[f"{name}_share_of_floor_other"] = line.other_share
        result[f"{name}_share_of_floor_ours"] = line.our_share
    for pair in pairs:
        for row in store.of("start", pair.name):
            name = f"{pair.name}_{row['side']}".replace(".", "_").replace("-", "_")
            result[f"cold_start_s_{name}"] = row["cold_start_s"]
            result[f"peak_pss_gb_{name}"] = row["peak_pss_bytes"] / 1e9
    return result
