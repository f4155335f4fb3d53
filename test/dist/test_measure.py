"""What ranks measure at start, on ranks that are threads."""

from __future__ import annotations

import pytest
import torch
from test.dist.helpers.exact_models import exact_model

from sps_runtime.distributed.mesh import Mesh
from sps_runtime.distributed.threads import ThreadWorld
from sps_runtime.layers.placement import GroupLinks, place
from sps_runtime.models.decoder import Decoder
from sps_runtime.models.loader import build_model
from sps_runtime.ops.operators import TORCH
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
