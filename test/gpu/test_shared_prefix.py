"""FlashInfer's cascade on a GPU: prefixes that several queries share, eager and in a graph."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from sps_runtime.attention.backend import PageLists, PagePool, Partial, QueryRun
from sps_runtime.attention.choose import choose_device_backend
from sps_runtime.attention.flashinfer.backend import FlashInferBackend
from sps_runtime.attention.torch_sdpa import TorchBackend
from sps_runtime.ops import reference
from sps_runtime.ops.cuda_graphs import GraphRecorder

SLOTS, PAGE, HEADS, KV_HEADS, DIM = 256, 128, 32, 8, 128
SCALE = DIM**-0.5


class Rows:
    """Single tokens; `groups` says how many stand behind a prefix of how many pages."""

    def __init__(self, device: torch.device, seed: int, groups: list[tuple[int, int]]) -> None:
        self.device, self.rng = device, random.Random(seed)
        generator = torch.Generator(device).manual_seed(seed)
        shape = (SLOTS, KV_HEADS, PAGE, DIM)
        self.k, self.v = (
            torch.randn(shape, generator=generator, device=device).bfloat16() for _ in range(2)
        )
        self.pool = PagePool([self.k], [self.v], SLOTS)
        self.deal(groups)
        rows = (len(self.lists), HEADS, DIM)
        self.q = torch.randn(rows, generator=generator, device=device).bfloat16()

    def deal(self, groups: list[tuple[int, int]]) -> None:
        free = self.rng.sample(range(SLOTS), SLOTS)
        self.lists: list[tuple[list[int], int]] = []
        for members, pages in groups:
            prefix = [free.pop() for _ in range(pages)]
            for _ in range(members):
                ids = prefix + [free.pop() for _ in range(self.rng.randint(1, 2))]
                self.lists.append((ids, len(ids) * PAGE - self.rng.randint(1, PAGE)))
        self.rng.shuffle(self.lists)

    def runs(self) -> list[QueryRun]:
        return [
            QueryRun(
                row, 1, position, torch.tensor(ids, dtype=torch.int32),
                torch.arange(len(ids), dtype=torch.int32) * PAGE, position + 1,
            )
            for row, (ids, position) in enumerate(self.lists)
        ]  # fmt: skip

    def fill(self, lists: PageLists) -> None:
        at = 0
        for row, (ids, position) in enumerate(self.lists):
            n = len(ids)
            lists.page_ids[at : at + n] = torch.tensor(ids, dtype=torch.int32)
            lists.page_positions[at : at + n] = torch.arange(n, dtype=torch.int32) * PAGE
            item = (row, 1, position, at, n, position + 1, 0, KV_HEADS)
            lists.items[row] = torch.tensor(item, dtype=torch.int32)
            at += n

    def check(self, got: Partial) -> None:
        for row, (ids, position) in enumerate(self.lists):
            table = torch.tensor(ids, dtype=torch.int32)
            k, v = (
                reference.gather_pages([side], SLOTS, table, position + 1)
                for side in (self.k, self.v)
            )
            keys = torch.arange(position + 1, device=self.device)
            o, lse = reference.attention(self.q[row : row + 1], k, v, keys[-1:], keys, scale=SCALE)
            torch.testing.assert_close(got.o[row : row + 1].float(), o, rtol=0, atol=2e-2)
            torch.testing.assert_close(got.lse[row : row + 1], lse, rtol=0, atol=2e-2)


def backend_on(device: torch.device) -> FlashInferBackend:
    try:
        found = choose_device_backend("flashinfer", device, dtype=torch.bfloat16, head_dim=DIM)
    except Exception as error:
        pytest.skip(f"flashinfer: {error}")
    assert isinstance(found, FlashInferBackend)
    return FlashInferBackend(found._library, TorchBackend(), device, least_bytes=0)


@pytest.mark.parametrize("groups", [[(7, 12)], [(2, 1), (3, 20), (2, 0)], [(16, 9), (16, 3)]])
def test_runs(groups: list[tuple[int, int]], device: torch.device) -> None:
    rows, backend = Rows(device, 1, groups), backend_on(device)
    rows.check(backend.partial(rows.q, rows.runs(), rows.pool, scale=SCALE))
    assert any(
        call.kind == "shared" for step in backend._steps.values() for call, _ in step.planned
    )


def test_a_graph_of_each_form(device: torch.device) -> None:
    """Groups change under the graph that holds them, come and go."""
    rows, backend = Rows(device, 2, [(16, 6)]), backend_on(device)
    recorder, graphs = GraphRecorder(device), {}
    sizes = ((len(rows.lists), 8), (SLOTS,), (SLOTS,))
    lists = PageLists(*(torch.zeros(n, dtype=torch.int32) for n in sizes), True, True)
    lse = torch.empty(16, HEADS, device=device)

    def attend() -> Tensor:
        partial = backend.partial_lists(rows.q, lists, rows.pool, scale=SCALE)
        lse.copy_(partial.lse)
        return partial.o

    dealt = [[(16, 6)], [(16, 0)], [(9, 4), (7, 5)], [(1, 3)] * 16, [(3, 7), (13, 1)], [(16, 2)]]
    for groups in dealt:
        rows.deal(groups)
        rows.fill(lists)
        if graphs:
            assert backend.refresh(lists)
        form = backend.form(lists)
        if form in graphs:
            o = graphs[form].replay()
        else:
            o, graph = recorder.record(attend)
            assert not isinstance(graph, str), graph
            graphs[backend.form(lists)] = graph
        rows.check(Partial(o, lse))
    assert set(graphs) == {"decode", "decode+shared"}
