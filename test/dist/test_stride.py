"""Stride attention is what CSPS published: against one softmax over what its definition keeps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import pytest
import torch
from test.dist.step_case import LAYERS, StepCase
from test.dist.stride_case import StrideCase, spec

from sps_runtime.attention.context import AttentionContext
from sps_runtime.attention.cpu import KernelBackend
from sps_runtime.attention.sequence_parallel.build import sequence_attention, sparse_counters
from sps_runtime.attention.shard_layout import ShardLayout
from sps_runtime.distributed.communicator import Traffic
from sps_runtime.types.attention import AttentionSpec, SparseCounters, SparseSettings

PAGE, DIM, B = 16, 16, 4


RAGGED = [(0, 37), (50, 30), (16, 1), (0, 131), (33, 64), (130, 3)]
HEADS = [(2, 2), (4, 4), (4, 2), (8, 4), (8, 2), (4, 1), (16, 8)]
LAYS = ("contiguous", "zigzag", "random")
HOSTS = {"here": lambda sp: (0,) * sp, "apart": lambda sp: tuple(range(sp)),
         "mixed": lambda sp: tuple(rank // 2 for rank in range(sp))}  # fmt: skip


@pytest.mark.parametrize("sp", [2, 3, 4])
@pytest.mark.parametrize("hosts", HOSTS)
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_it_is_what_its_definition_says(sp: int, hosts: str, stride: int) -> None:
    draw = random.Random(f"{sp} {hosts} {stride}")
    for lay in LAYS:
        for heads, kv_heads in draw.sample(HEADS, 3):
            StrideCase(
                draw.sample(RAGGED, draw.randint(1, 3)), sp=sp, heads=heads, kv_heads=kv_heads,
                lay=lay, hosts=HOSTS[hosts](sp), specs=[spec(stride)], seed=draw.randrange(2**31),
                window=draw.choice([None, 20]),
            ).run()  # fmt: skip


@pytest.mark.parametrize("sp", [2, 4])
@pytest.mark.parametrize("hosts", ["here", "apart"])
def test_stride_one_is_exact(sp: int, hosts: str) -> None:
    for heads, kv_heads in HEADS:
        case = StrideCase(RAGGED[:4], sp=sp, heads=heads, kv_heads=kv_heads, specs=[spec(1)],
                          hosts=HOSTS[hosts](sp))  # fmt: skip
        case.truth = lambda layer, window, case=case: StepCase.truth(case, layer, window)
        case.run()


def test_a_group_of_one_is_exact() -> None:
    StrideCase(RAGGED, sp=3, group=(1,), lay="outside", specs=[spec(4)]).run()


@pytest.mark.parametrize("hosts", ["here", "apart"])
@pytest.mark.parametrize("levels", [((2, 2),), ((2, 4),), ((2, 1), (4, 8))])
@pytest.mark.parametrize("sp", [3, 6])
def test_levels_lie_in_one_another(hosts: str, levels: tuple, sp: int) -> None:
    for lay in LAYS:
        StrideCase(RAGGED[3:], sp=sp, heads=8, kv_heads=4, lay=lay, hosts=HOSTS[hosts](sp),
                   specs=[spec(8, levels)], seed=sp).run()  # fmt: skip


def test_levels_that_do_not_are_refused() -> None:
    for levels in (((2, 4), (3, 4)), ((4, 2), (2, 4)), ((2, 0),), ((1, 2),)):
        with pytest.raises(ValueError, match="multiple of the one before"):
            spec(4, levels)


def test_pages_outside_of_the_group_are_kept_by_stride_as_well() -> None:
    for group in ((0, 2), (1, 2, 3)):
        StrideCase([(50, 30), (33, 64)], sp=4, group=group, lay="outside", specs=[spec(4)]).run()


@pytest.mark.parametrize("strategy", ["pass_kv", "pass_q", "ulysses"])
def test_a_step_may_mix_strides_and_exact_sequences(strategy: str) -> None:
    for hosts in ((0, 0, 0), (0, 1, 2)):
        StrideCase(
            [(0, 70), (20, 41), (0, 64), (90, 1), (40, 30)], strategy=strategy, sp=3, hosts=hosts,
            specs=[spec(4), AttentionSpec(), spec(2), spec(4), spec(4)], window=20,
        ).run()  # fmt: skip


@pytest.mark.parametrize("kv_format", ["int8", "fp8_e4m3"])
def test_quantised_pages(kv_format: str) -> None:
    for hosts in ((0, 0), (0, 1)):
        StrideCase(RAGGED[2:4], sp=2, hosts=hosts, kv_format=kv_format).run()


def test_the_kernels_agree() -> None:
    package = pytest.importorskip("sps_kernel")
    for lay in LAYS:
        for dtype in (torch.float32, torch.bfloat16):
            StrideCase([(0, 331), (64, 70)], sp=4, heads=8, kv_heads=4, lay=lay, page=64,
                       backend=KernelBackend(package), dtype=dtype).run()  # fmt: skip


def test_a_stride_that_does_not_divide_pages_is_refused() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        StrideCase([(0, 64)], specs=[spec(3)]).run()


@pytest.mark.parametrize("hosts", ["here", "apart"])
@pytest.mark.parametrize(("sp", "kv_heads"), [(2, 4), (4, 4), (4, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_one_in_s_of_queries_keys_values_and_outputs_crosses(
    hosts: str, sp: int, kv_heads: int, stride: int
) -> None:
    heads, length = 8, 2 * sp * PAGE
    case = StrideCase([(0, length)], sp=sp, heads=heads, kv_heads=kv_heads, lay="contiguous",
                      page=PAGE, dim=DIM, hosts=HOSTS[hosts](sp), specs=[spec(stride)])  # fmt: skip
    traffic = case.run()
    share = length // stride * (sp - 1) / sp
    keys = share * 2 * max(kv_heads, sp) * DIM * B
    queries = share * heads * (2 * DIM * B + 4)
    assert sum(t.attention_bytes for t in traffic) == LAYERS * (queries + keys)
    physical = sum(t.physical_bytes for t in traffic)
    assert physical == LAYERS * (queries + keys * (hosts == "apart"))


def test_counters_say_what_was_left_out() -> None:
    """Two ranks, half of a prompt each: rank 1 reads its own triangle, and one pair in s^2 of a
    square that is twice as large."""
    case, heads = StrideCase([(0, 8 * PAGE)], lay="contiguous", specs=[spec(4)], window=20), 2
    counted: dict[int, SparseCounters] = {}

    class Asking(StrideCase):
        def check_rank(self, context: AttentionContext) -> Traffic:
            attend = sequence_attention(self.plan, self.layout, context)
            rank = context.mesh.sp_rank
            index = torch.from_numpy(self.layout.token_index(rank))
            for window in (20, None):
                q, k, v = (self._new(x, 1)[index] for x in (self.q, self.k, self.v))
                attend(1, q, k, v, scale=1.0, window=window)
            (counted[rank],) = sparse_counters(attend)
            return context.traffic

    case.__class__ = Asking
    traffic = case.run()
    triangle = 4 * (4 * PAGE + 1) / PAGE / 2
    assert counted[0].read_pairs == counted[0].causal_pairs == int(heads * triangle)
    assert counted[1].causal_pairs == int(heads * (triangle + 16))
    assert counted[1].read_pairs == int(heads * (triangle + 16 / 4**2))
    assert (counted[1].remote_units, counted[1].fetched_units) == (heads * 4, heads * 4 // 4)
    windowed = 2 * heads * DIM * B * 2 * PAGE  # of layer 0: the two pages before rank 1's first
    sent = sum(c.remote_bytes for c in counted.values())
    assert sent == sum(t.attention_bytes for t in traffic) - windowed


def test_a_sequence_on_one_rank_sends_nothing() -> None:
    traffic = StrideCase([(0, 64), (30, 20)], sp=3, lay="one").run()
    assert sum(t.attention_bytes for t in traffic) == 0
