"""What ranks measure at start, on ranks that are threads."""

from __future__ import annotations

from collections.abc import Callable
from mmap import mmap
from threading import Thread

import pytest
import torch
from test.dist.helpers.exact_models import exact_model

from sps_runtime.distributed.communicator import Traffic
from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.native_links import NativeMailroom
from sps_runtime.distributed.regions import link_bytes
from sps_runtime.distributed.shared_memory import RING_BYTES
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.loader import build_model
from sps_runtime.ops.dispatch import choose_ops
from sps_runtime.ops.operators import TORCH
from sps_runtime.ops.recording import Recorder, Recording
from sps_runtime.runner.measure import DECODE_ROWS, linear_part, measure_decode, measure_flops
from sps_runtime.types.messages import DecodeCost


def models(tp: int) -> list[Decoder]:
    model = exact_model("llama")
    arena = model.arena(tp, ops="torch")
    return [build_model(model.config, arena, tp_rank) for tp_rank in range(tp)]


def links_of(world: ThreadWorld, sp: int, tp: int, rank: int) -> GroupLinks:
    mesh, group = Mesh(sp, tp, rank), world.mailroom(rank).group
    return GroupLinks(
        sp=group(mesh.sp_peers(tuple(range(sp)))),
        tp=group(mesh.tp_peers()),
        world=group(tuple(range(sp * tp))),
    )


@pytest.mark.parametrize(("sp", "tp"), [(2, 1), (2, 2), (3, 1)])
def test_all_ranks_have_one_table(sp: int, tp: int) -> None:
    torch.set_num_threads(1)
    world, parts = ThreadWorld(sp * tp, timeout_s=30), models(tp)

    def measure(rank: int) -> DecodeCost:
        return measure_decode(parts[rank % tp], links_of(world, sp, tp, rank), TORCH)

    table, *others = world.run(measure)
    assert all(other == table for other in others)
    assert table.rows == DECODE_ROWS and table.ranks == sp
    assert len(table.sharded_s) == len(table.replicated_s) == len(DECODE_ROWS)
    assert min(table.sharded_s + table.replicated_s) > 0


def test_what_is_timed_is_the_same_product_in_both_placements() -> None:
    """So that their seconds can be compared: with all rows on all ranks the outputs agree."""
    world, (model,) = ThreadWorld(2, timeout_s=30), models(1)
    x_TD = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(1))

    def compute(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        links, layer = links_of(world, 2, 1, rank), model.layers[1]
        sharded = linear_part(layer, x_TD, place("sharded", "ntp", links, (4, 4), TORCH))
        return sharded, linear_part(layer, x_TD, place("replicated", "ntp", links, (4, 4), TORCH))

    for sharded, replicated in world.run(compute):
        torch.testing.assert_close(replicated, sharded, rtol=1e-4, atol=1e-5)


def test_a_rate_of_products_is_positive() -> None:
    world, (model,) = ThreadWorld(1, timeout_s=30), models(1)
    gate_up, links = model.layers[0].mlp.gate_up, links_of(world, 1, 1, 0)
    assert 1e6 < measure_flops(gate_up, torch.float32, links, TORCH) < 1e15


@pytest.mark.skipif(choose_ops().kernels is None, reason="replays need the kernels")
def test_replicated_layers_are_timed_as_they_are_replayed() -> None:
    """Over native links the recorder is used, on all ranks; the table is one all the same."""
    kernels = choose_ops().kernels
    assert kernels is not None
    model, ops = exact_model("llama"), choose_ops().operators
    parts = build_model(model.config, model.arena(1), ops=ops)
    memory = mmap(-1, link_bytes(2, RING_BYTES))
    recorders = [CountingRecorder(kernels) for _ in range(2)]
    tables: list[DecodeCost | None] = [None, None]

    def measure(rank: int) -> None:
        mailroom = NativeMailroom(kernels, memory, rank, 2, Traffic(), timeout_s=30)
        group = mailroom.group
        links = GroupLinks(sp=group((0, 1)), tp=group((rank,)), world=group((0, 1)))
        tables[rank] = measure_decode(parts, links, ops, recorders[rank])

    ranks = [Thread(target=measure, args=(rank,)) for rank in range(2)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join(60)
    assert tables[0] is not None and tables[0] == tables[1]
    assert [recorder.made for recorder in recorders] == [len(DECODE_ROWS)] * 2


class CountingRecorder(Recorder):
    """How many recordings were made."""

    made = 0

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, Recording | str]:
        result, recording = super().record(work)
        assert isinstance(recording, Recording), recording
        self.made += 1
        return result, recording
