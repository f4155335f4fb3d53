"""How many bytes each way of crossing ranks sends per token and layer, beside what formulas say.

python benchmark/communication.py [--quick] [--json FILE] [--captures FOLDER] [--lengths 4096 ...]

Rows of other lengths that FILE already has are kept, so that long ones can be run one by one.

Logical bytes as the runtime counts them (a page read in place counts as if it had been sent), one
layer of one fresh prompt in one step, ranks as threads, over tokens, all ranks together. `gqa8` has
eight KV heads: under block CSA they read what the embedded model's 4 layers x 2 KV heads chose, one
each, in the runtime's own csa at its default setting. docs/communication.md has the table.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

import communication_formulas as formulas
from communication_pages import CarriedOver, page_sets
from communication_ranks import DTYPE, PAGE, Crossed, Prefill, Shape, tensor_parallel
from gate_capture import CHECKPOINT, EmbeddedModel
from harness import arguments, report
from make_model import SHAPES
from sps_runtime.sparse.torch_operators import TorchOperators
from sps_runtime.types.attention import AttentionSpec, SparseSettings

Row = dict[str, Any]
LENGTHS, RANKS = (4096, 8192, 16384, 32768), (2, 4, 8)
TASKS = ("chain", "lookalike")
PLACEMENTS = ("zigzag", "contiguous")
STRIDE, BLOCK = SparseSettings(estimator="stride"), SparseSettings()
TOLERANCE = 0.02
GOALS = {"ulysses": 1 / 4, "pass_kv": 1 / 6}


def shape_of(name: str) -> Shape:
    config = SHAPES["gqa8"]
    if name == "embedded":
        config = json.loads((CHECKPOINT / "config.json").read_text())
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size")
    return Shape(*(config[field] for field in names))


def exact_rows(name: str, tokens: int, ranks: int) -> Iterator[Row]:
    """Every strategy but block CSA in one cell, its formulas beside it."""
    shape = shape_of(name)
    spec = AttentionSpec("csa", STRIDE)
    for strategy in ("pass_kv", "pass_q"):
        full = getattr(formulas, strategy)(shape, ranks)
        for placement in PLACEMENTS:
            crossed = Prefill(shape, tokens, ranks, strategy, placement).run()
            trimmed = full * formulas.TRIMMED[placement]
            yield row(name, strategy, tokens, ranks, crossed, trimmed, placement, full)
    once: dict[str, tuple[float, Callable[[], Crossed]]] = {
        "ulysses": (
            formulas.ulysses(shape, ranks),
            lambda: Prefill(shape, tokens, ranks, "ulysses").run(),
        ),
        "tp": (
            formulas.tensor_parallel(shape, ranks),
            lambda: tensor_parallel(shape, tokens, ranks),
        ),
        "stride": (
            formulas.stride(shape, ranks, STRIDE.stride),
            lambda: Prefill(shape, tokens, ranks, placement="contiguous", attention=spec).run(),
        ),
    }
    for strategy, (expected, measure) in once.items():
        if reason := formulas.indivisible(shape, strategy, ranks):
            yield skipped(name, strategy, tokens, ranks, reason)
        else:
            yield row(name, strategy, tokens, ranks, measure(), expected)


def block_rows(
    name: str, task: str, sets: Tensor, ranks: int, settings: SparseSettings = BLOCK
) -> Iterator[Row]:
    """Block CSA in one cell. On `gqa8` layer and KV head of the embedded model become one of 8 KV
    heads; on the embedded model its layers are taken one by one."""
    shape, tokens = shape_of(name), sets.shape[2] * PAGE
    superblocks = tokens / settings.superblock_at(tokens - 1)
    if superblocks < ranks:
        yield skipped(name, "block", tokens, ranks, "fewer superblocks than ranks", task)
        return
    layers = [sets.flatten(0, 1)] if name == "gqa8" else list(sets)
    spec = AttentionSpec("csa", settings)
    for placement in PLACEMENTS:
        prefills = [
            Prefill(
                shape, tokens, ranks, placement=placement, attention=spec, operators=CarriedOver(s)
            )
            for s in layers
        ]
        crossed = [prefill.run() for prefill in prefills]
        counted = [one for each in crossed for one in each.counters]
        share = sum(c.fetched_units for c in counted) / sum(c.remote_units for c in counted)
        density = sum(c.read_pairs for c in counted) / sum(c.causal_pairs for c in counted)
        total = Crossed(round(sum(c.attention for c in crossed) / len(crossed)), 0)
        remote = prefills[0].remote_tokens()
        expected = formulas.block(shape, remote, share, summary_share(shape))
        found = row(name, "block", tokens, ranks, total, expected, placement)
        audits = {"audits": found["bytes"] - expected}
        yield {**found, **audits, "task": task, "union_share": share, "density": density}


def summary_share(shape: Shape) -> float:
    """A page's summaries over its K and V."""
    nbytes = TorchOperators().summary_nbytes(PAGE, shape.head_dim, DTYPE.itemsize)
    return nbytes / (2 * PAGE * shape.head_dim * DTYPE.itemsize)


def row(
    name: str, strategy: str, tokens: int, ranks: int, crossed: Crossed, expected: float,
    placement: str = "", untrimmed: float | None = None,
) -> Row:  # fmt: skip
    each = (crossed.attention + crossed.linear) / tokens
    return {
        "shape": name,
        "strategy": strategy,
        "placement": placement,
        "tokens": tokens,
        "ranks": ranks,
        "bytes": each,
        "formula": expected,
        "untrimmed": untrimmed or expected,
        "error": each / expected - 1,
    }


def skipped(name: str, strategy: str, tokens: int, ranks: int, reason: str, task: str = "") -> Row:
    return {
        "shape": name, "strategy": strategy, "tokens": tokens, "ranks": ranks, "skipped": reason,
        "task": task,
    }  # fmt: skip


def figures(rows: list[Row]) -> dict[str, float]:
    """Bytes per token and layer, means over documents; block CSA over others where both are."""
    found: dict[str, list[float]] = {}
    for entry in rows:
        if "skipped" not in entry:
            found.setdefault(key(entry), []).append(entry["bytes"])
            if "union_share" in entry:
                found.setdefault(f"u_{key(entry, '')}", []).append(entry["union_share"])
                found.setdefault(f"density_{key(entry, '')}", []).append(entry["density"])
                found.setdefault(f"audits_{key(entry)}", []).append(entry["audits"])
    flat = {name: statistics.fmean(values) for name, values in found.items()}
    for entry in rows:
        if entry["strategy"] == "block" and "skipped" not in entry:
            flat |= ratios(entry, flat)
    errors = [abs(e["error"]) for e in rows if "skipped" not in e and e["strategy"] != "block"]
    return flat | {"largest_relative_difference_from_a_formula": max(errors)}


def ratios(entry: Row, flat: dict[str, float]) -> dict[str, float]:
    """Block CSA over Ulysses, stride and pass-KV: as it runs, trimmed, and by the formula."""
    ours, cell = flat[key(entry)], {**entry, "placement": ""}
    others = {
        name: flat.get(key({**cell, "strategy": name})) for name in ("ulysses", "stride", "tp")
    }
    for placement in PLACEMENTS:
        other = key({**entry, "strategy": "pass_kv", "placement": placement})
        others[f"pass_kv_{placement}"] = flat[other]
    full = formulas.pass_kv(shape_of(entry["shape"]), entry["ranks"])
    others["pass_kv_untrimmed"] = full
    return {
        f"ratio_block_over_{name}_{key(entry, '', skip_strategy=True)}": ours / value
        for name, value in others.items()
        if value
    }


def key(entry: Row, unit: str = "bytes_per_token_layer_", skip_strategy: bool = False) -> str:
    names = ["shape", "strategy", "placement"]
    parts = [entry[n] for n in names if entry.get(n) and not (skip_strategy and n == "strategy")]
    return f"{unit}{'_'.join(parts)}_p{entry['ranks']}_{entry['tokens']}"


def disagreeing(rows: list[Row]) -> list[str]:
    """Cells that are further from their formula than allowed; block's audits are beside it."""
    return [
        f"{key(entry)}: {entry['bytes']:.1f}, formula {entry['formula']:.1f}"
        for entry in rows
        if "skipped" not in entry
        and abs(entry["error"] - entry.get("audits", 0) / entry["formula"]) > TOLERANCE
    ]


def older(path: Path | None, lengths: Sequence[int]) -> list[Row]:
    """The rows of an earlier result that are not measured again."""
    if path is None or not path.exists():
        return []
    return [row for row in json.loads(path.read_text())["raw"] if row["tokens"] not in lengths]


def measured(
    lengths: Sequence[int], tasks: Sequence[str], captures: Path | None, settings: SparseSettings
) -> Iterator[Row]:
    """All rows of some prompt lengths."""
    for name, tokens, ranks in itertools.product(("gqa8", "embedded"), lengths, RANKS):
        yield from exact_rows(name, tokens, ranks)
    model = EmbeddedModel()
    for task, tokens in itertools.product(tasks, lengths):
        settled = settings.for_prompt(tokens)
        sets = page_sets(model, task, tokens, settled, captures)
        for name, ranks in itertools.product(("gqa8", "embedded"), RANKS):
            yield from block_rows(name, task, sets, ranks, settled)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--captures", type=Path, help="chosen pages are kept there")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--wide-from", type=int, default=BLOCK.wide_from, help="of block CSA")
    options = parser.parse_args()
    settings = msgspec.structs.replace(BLOCK, wide_from=options.wide_from)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    lengths = LENGTHS[:2] if options.quick else options.lengths
    tasks = TASKS[:1] if options.quick else TASKS
    rows = older(options.json, lengths)
    rows += measured(lengths, tasks, options.captures, settings)
    report(options.json, figures(rows), rows)
    for row in rows:
        if "skipped" in row:
            cell = f"{row['strategy']} {row['shape']} P={row['ranks']} {row['tokens']}"
            print(f"skipped: {cell}: {row['skipped']}")
    for line in disagreeing(rows):
        print(f"beyond {TOLERANCE:.0%}: {line}")


if __name__ == "__main__":
    main()
