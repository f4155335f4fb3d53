"""What paged attention refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sps_kernel
from attention_case import NAN, Case
from sps_kernel import KVPools, paged_attention

BAD_ITEMS = {
    "q rows": (0, -1),
    "too many q rows": (1, 100),
    "negative q rows": (1, -2),
    "q_pos": (2, -5),
    "q_pos overflow": (2, 2**31 - 2),
    "list begin": (3, -1),
    "list count": (4, 1000),
    "negative list": (4, -1),
    "kv_len": (5, -1),
    "head": (6, 2),
    "heads": (7, 3),
    "head begin": (6, -1),
}


@pytest.mark.parametrize("name", BAD_ITEMS)
def test_bad_items(name):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    column, value = BAD_ITEMS[name]
    case.items[0, column] = value
    with pytest.raises(ValueError, match="item 0"):
        case.check()


@pytest.mark.parametrize("bad", [-1, 10**6])
def test_bad_pages(bad):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    case.page_ids[1] = bad
    with pytest.raises(ValueError, match="page id"):
        case.check()


def call(case, **changes):
    args = {
        "q": case.q,
        "kv": KVPools(case.k, case.v),
        "items": case.items,
        "page_ids": case.page_ids,
        "page_pos": case.page_pos,
        **changes,
    }
    return paged_attention(
        args.pop("q"),
        args.pop("kv"),
        args.pop("items"),
        args.pop("page_ids"),
        args.pop("page_pos"),
        **args,
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"q": torch.zeros(5, 4, 32, dtype=torch.bfloat16)},
        {"q": torch.zeros(5, 4, 32, dtype=torch.float64)},
        {"q": torch.zeros(5, 4, 16)},
        {"q": torch.zeros(5, 3, 32)},
        {"q": torch.zeros(4, 32)},
        {"q": torch.zeros(5, 4, 64)[:, :, ::2]},
        {"items": torch.zeros(1, 7, dtype=torch.int32)},
        {"items": torch.zeros(1, 8, dtype=torch.int64)},
        {"items": torch.zeros(8, 1, dtype=torch.int32).T.expand(2, 8)},
        {"page_ids": torch.zeros(2, dtype=torch.int32)},
        {"page_pos": torch.zeros(3, dtype=torch.int64)},
        {"page_pos": [0, 16, 32]},
        {"out": torch.zeros(5, 4, 16)},
        {"out": torch.zeros(5, 4, 32, dtype=torch.float16)},
        {"lse": torch.zeros(5, 3)},
        {"lse": torch.zeros(5, 4, dtype=torch.bfloat16)},
        {"scale": 0.0},
        {"scale": NAN},
        {"scale": -1.0},
        {"window": -1},
        {"threads": 0},
        {"accumulate": True},
    ],
    ids=str,
)
def test_bad_arguments(changes):
    case = Case(torch.float32, 32, lengths=((5, 40),))
    with pytest.raises(ValueError):
        call(case, **changes)


def test_read_only_output():
    case = Case(torch.float32, 32, lengths=((5, 40),))
    out = np.zeros((5, 4, 32), np.float32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out"):
        call(case, out=out)


@pytest.mark.parametrize(
    "shapes",
    [
        ((4, 2, 16, 32), (4, 2, 16, 40)),
        ((4, 2, 20, 32),) * 2,
        ((4, 2, 8, 32),) * 2,
        ((4, 2, 16, 12),) * 2,
        ((4, 2, 16, 520),) * 2,
        ((2, 16, 32),) * 2,
        ((0, 2, 16, 32),) * 2,
    ],
    ids=str,
)
def test_bad_pools(shapes):
    with pytest.raises(ValueError):
        KVPools([torch.zeros(shapes[0])], [torch.zeros(shapes[1])])
    with pytest.raises(ValueError):
        KVPools([], [])


def test_pools_describe_themselves():
    kv = KVPools([torch.zeros(4, 2, 16, 32)] * 3, [torch.zeros(4, 2, 16, 32)] * 3)
    assert (kv.pools, kv.slots, kv.kv_heads, kv.page_size, kv.head_dim) == (3, 4, 2, 16, 32)
    assert kv.dtype == "float32"


def test_isa_is_checked():
    with pytest.raises(ValueError):
        sps_kernel.set_isa("mmx")
