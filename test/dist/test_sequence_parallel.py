"""Every way of crossing ranks computes what one softmax over all keys computes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from test.dist.step_case import StepCase

from sps_runtime.attention.backend import AttentionBackend
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.torch_sdpa import TorchBackend

# Prefill chunks on cached prefixes beside decode tokens; page size +-1; one token alone.
RAGGED = [(0, 37), (50, 30), (200, 1), (16, 1), (15, 1), (0, 1), (33, 64), (130, 3)]
STRATEGIES = ("pass_kv", "pass_q", "ulysses", "replicated")
HEADS = ((4, 2), (4, 4), (6, 2), (8, 1), (14, 2), (3, 1))

CELLS = list(
    itertools.product(
        STRATEGIES,
        (1, 2, 3, 4),
        HEADS,
        (None, 20),
        (16, 64),
        ("random", "zigzag", "one"),
        ("zero-copy", "copy", "mixed"),
    )
)
random.Random(5).shuffle(CELLS)


def case_of(cell: tuple, sequences: list[tuple[int, int]], seed: int, **more: object) -> StepCase:
    strategy, sp, (heads, kv_heads), window, page, lay, mode = cell
    hosts = {
        "zero-copy": (0,) * sp,
        "copy": tuple(range(sp)),
        "mixed": tuple(rank // 2 for rank in range(sp)),
    }[mode]
    replicated = strategy == "replicated"
    return StepCase(
        sequences,
        strategy="pass_q" if replicated else strategy,
        placement="replicated" if replicated else "sharded",
        sp=sp, heads=heads, kv_heads=kv_heads, window=window, page=page, lay=lay, hosts=hosts,
        seed=seed, **more,
    )  # fmt: skip


def run_cells(cells: list[tuple], **more: object) -> None:
    for cell in cells:
        seed = CELLS.index(cell)
        order = random.Random(seed).sample(RAGGED, k=random.Random(seed).randint(1, 4))
        case_of(cell, order, seed=seed, **more).run()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_spread_of_cells_is_exact(strategy: str) -> None:
    run_cells([cell for cell in CELLS if cell[0] == strategy][:60])


@pytest.mark.slow
@pytest.mark.parametrize("part", range(8))
def test_every_cell_is_exact(part: int) -> None:
    run_cells(CELLS[part::8])


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("group", [(0, 2), (1,), (1, 2, 3)])
def test_committed_pages_outside_the_group_are_read_in_place(
    strategy: str, group: tuple[int, ...]
) -> None:
    case = StepCase(
        RAGGED[:5], strategy="pass_q" if strategy == "replicated" else strategy,
        placement="replicated" if strategy == "replicated" else "sharded",
        sp=4, group=group, lay="outside", window=40,
    )  # fmt: skip
    traffic = case.run()
    assert sum(t.attention_bytes for t in traffic) > 0


def kernels() -> KernelBackend:
    package = pytest.importorskip("sps_kernel")
    return KernelBackend(package)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_kernels_are_exact_too(strategy: str) -> None:
    for cell in [cell for cell in CELLS if cell[0] == strategy][60:120]:
        run_cells([cell], backend=kernels())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("backend", [TorchBackend, kernels])
def test_bf16(strategy: str, backend: Callable[[], AttentionBackend]) -> None:
    for cell in [cell for cell in CELLS if cell[0] == strategy][:6]:
        run_cells([cell], backend=backend(), dtype=torch.bfloat16)
