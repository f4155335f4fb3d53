"""Choice of pages against a plain rendering of it, and the tail against float64."""

from __future__ import annotations

import math

import pytest
import torch

from sparse_case import NAN, Sequences
from sps_kernel import Program, choose_pages, merge_states, tail_attention

DEFAULTS = {"tau": 0.02, "budget": 0.1, "minimum": 8, "sink": 1, "window": 2}


def select(share, allowed, own, tau, budget, minimum, sink, window):
    """Which of the pages of one head are kept, by sorting them all."""
    pages = len(share)
    if tau <= 0 and budget >= 1:
        return list(allowed)
    always = [allowed[j] and (j < sink or j >= pages - window) for j in range(pages)]
    ranked = sorted(
        (j for j in range(pages) if allowed[j]), key=lambda j: (not always[j], -share[j], j)
    )
    most = max(minimum, math.ceil(budget * (pages + own))) - own
    least = max(sum(always), minimum - own)
    rest = [sum(share[j] for j in ranked[i:] if not always[j]) for i in range(len(ranked))]
    wanted = sum(r > tau for r in rest) if tau > 0 else pages
    kept = set(ranked[: max(min(wanted, most), least)])
    return [j in kept for j in range(pages)]


def choice_ref(shares, blocks, page, superblocks, block, **settings):
    """For each block and head, the pages before it that are kept."""
    found, own = [], max(1, block // page)
    for i, (_, _, position, number, *_) in enumerate(blocks):
        first = next(j for j, b in enumerate(blocks) if b[3] == number)
        same = [j for j, b in enumerate(blocks) if b[3] == number]
        before = blocks[first][2] // page
        for head in range(shares[i].shape[0]):
            allowed = [True] * (position // page)
            if [blocks[j][1] for j in same] == [1]:
                found.append(allowed)
                continue
            if superblocks and before:
                each = torch.stack([shares[j][head, :before] for j in same])
                norm = each.square().sum(0).sqrt()
                allowed[:before] = select(norm.double().tolist(), [True] * before, 0, **settings)
            share = shares[i][head].double().tolist()
            found.append(select(share, allowed, own, **settings))
    return found


def make_blocks(page, block, superblock, lengths):
    """Blocks of sequences (total, new) whose pages are numbered backwards."""
    rows, ids, row, number = [], [], 0, 0
    for total, new in lengths:
        begin, pages = len(ids), -(-total // page)
        ids += list(range(len(ids) + pages, len(ids), -1))
        for at in range(total - new, total, block):
            tokens = min(block, total - at)
            rows.append((row, tokens, at, number, begin, total))
            row += tokens
            number += (at + tokens) % superblock == 0 or at + tokens == total
    return rows, torch.tensor(ids, dtype=torch.int32)


def random_shares(blocks, page, heads, ties):
    made = []
    for block in blocks:
        share = torch.rand(heads, block[2] // page) ** 6
        made.append((share * 8).round() / 8 if ties else share)
    return made


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("superblocks", [True, False], ids=["super", "each"])
@pytest.mark.parametrize(
    "change",
    [
        {}, {"tau": 0.0}, {"tau": 0.0, "budget": 1.0}, {"tau": 0.5, "budget": 1.0},
        {"tau": 3.0, "budget": 0.5}, {"minimum": 0, "sink": 0, "window": 0, "tau": 1.0},
        {"minimum": 1000}, {"sink": 5, "window": 9, "budget": 0.01, "minimum": 2},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("page, block", [(16, 64), (32, 32)])
def test_choice(page, block, change, superblocks, ties):
    settings = DEFAULTS | change
    lengths = ((21 * block + 5, 13 * block + 5), (3 * block, 3 * block), (8 * block + 1, 1), (1, 1))
    blocks, page_ids = make_blocks(page, block, 4 * block, lengths)
    shares = random_shares(blocks, page, 3, ties)
    flat = torch.cat([s.flatten() for s in shares])
    table = torch.tensor(blocks, dtype=torch.int32)
    for threads in (1, 2):
        made = choose_pages(
            flat, table, page_ids, page_size=page, kv_heads=3, block=block,
            superblocks=superblocks, threads=threads, **settings,
        )  # fmt: skip
        want = choice_ref(shares, blocks, page, superblocks, block, **settings)
        check_lists(made, want, blocks, page_ids.tolist(), page)


def check_lists(made, want, blocks, page_ids, page):
    """Every list is what its row of `want` keeps and the block's own pages, in order."""
    ids, dropped_ids = made.page_ids.tolist(), made.dropped_ids.tolist()
    assert len(want) == len(made.items) == len(made.dropped)
    at = gone = 0
    for i, (item, (first, count)) in enumerate(
        zip(made.items.tolist(), made.dropped.tolist(), strict=True)
    ):
        row, tokens, position, _, begin, kv_len = blocks[i // 3]
        before, own = position // page, -(-tokens // page)
        kept = [j for j in range(before) if want[i][j]] + list(range(before, before + own))
        assert item == [row, tokens, position, at, len(kept), kv_len, i % 3, 1]
        assert ids[at : at + len(kept)] == [page_ids[begin + j] for j in kept]
        assert made.page_pos[at : at + len(kept)].tolist() == [j * page for j in kept]
        at += len(kept)
        lost = [page_ids[begin + j] for j in range(before) if not want[i][j]]
        assert [first, count] == [gone, len(lost)]
        assert dropped_ids[first : first + count] == lost
        gone += count
    assert (at, gone) == (len(ids), len(dropped_ids))


def test_no_blocks():
    none = torch.zeros(0, 6, dtype=torch.int32)
    made = choose_pages(
        torch.zeros(0), none, torch.zeros(0, dtype=torch.int32), page_size=16, kv_heads=2,
        block=64, **DEFAULTS,
    )  # fmt: skip
    assert len(made.items) == len(made.page_ids) == len(made.dropped_ids) == 0


def tail_truth(case, dropped, dropped_ids, scale):
    """out and lse in float64; NaN and -inf where nothing is dropped."""
    tokens, heads, d = case.q.shape
    out = torch.full((tokens, heads, d), NAN, dtype=torch.float64)
    lse = torch.full((tokens, heads), -torch.inf, dtype=torch.float64)
    for i, (first, count) in enumerate(dropped.tolist()):
        block, head = case.blocks[i // case.kv_heads].tolist(), i % case.kv_heads
        if count == 0:
            continue
        means = [case.sketch(j, head) for j in dropped_ids[first : first + count].tolist()]
        k, v = (torch.stack([m[name] for m in means]) for name in ("mean_k", "mean_v"))
        rows = slice(block[0], block[0] + block[1])
        group = slice(head * case.group, (head + 1) * case.group)
        s = case.q[rows, group].double() @ k.T * scale + math.log(case.page)
        out[rows, group] = s.softmax(-1) @ v
        lse[rows, group] = s.logsumexp(-1)
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize(
    "d, page, group, threads", [(64, 64, 7, 1), (32, 16, 1, 2), (128, 16, 8, 2)]
)
def test_tail(isa, dtype, d, page, group, threads):
    """Blocks that drop nothing, one page, and many."""
    case = Sequences(
        dtype, d, lengths=((22 * page + 5, 14 * page + 5), (page, page)), page=page,
        superblock=4 * page, group=group,
    )  # fmt: skip
    dropped, ids = [], []
    for block in case.blocks.tolist():
        for head in range(case.kv_heads):
            before = block[2] // page
            lost = [j for j in range(before) if head == 0 or j == 3]
            dropped.append((len(ids), len(lost)))
            ids += [case.ids[block[4] + j] for j in lost]
    dropped = torch.tensor(dropped, dtype=torch.int32)
    ids = torch.tensor(ids, dtype=torch.int32)
    out = torch.full(case.q.shape, NAN)
    lse = torch.full(case.q.shape[:2], -torch.inf)
    program = Program()
    with program.recording():
        tail_attention(
            case.q, case.blocks, dropped, ids, case.summaries, slots=case.slots, page_size=page,
            out=out, lse=lse, scale=d**-0.5, threads=threads,
        )  # fmt: skip
    want, want_lse = tail_truth(case, dropped, ids, d**-0.5)
    for _ in range(2):
        assert torch.equal(out.isnan(), want.isnan())
        tolerance = 1.2e-2 if dtype == torch.bfloat16 else 4e-6
        error = (out.double() - want).nan_to_num().abs().max()
        assert float(error) <= tolerance * float(want.nan_to_num().abs().max())
        assert torch.equal(lse == -torch.inf, want_lse == -torch.inf)
        assert float((lse.double() - want_lse).nan_to_num().abs().max()) <= 2e-5
        before = out.clone(), lse.clone()
        out.fill_(NAN), lse.fill_(-torch.inf)
        program.run()  # again, as recorded
        assert torch.equal(out.nan_to_num(), before[0].nan_to_num())
        assert torch.equal(lse, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_tail_merges_into_a_partial(isa, dtype):
    """As the merge of two partials does, an empty one among them."""
    case = Sequences(dtype, 32, lengths=((400, 144),), superblock=64, group=3)
    count = len(case.blocks) * case.kv_heads
    dropped = torch.tensor([(i, i % 3) for i in range(count)], dtype=torch.int32)
    ids = torch.tensor(case.ids[: count + 2], dtype=torch.int32)

    def tail(out, lse, accumulate):
        tail_attention(
            case.q, case.blocks, dropped, ids, case.summaries, slots=case.slots,
            page_size=case.page, out=out, lse=lse, scale=0.2, accumulate=accumulate,
        )  # fmt: skip

    kept, kept_lse = torch.randn(case.q.shape), torch.randn(case.q.shape[:2]) * 4
    kept_lse[3] = -torch.inf
    kept[3] = 0
    alone, alone_lse = torch.zeros_like(kept), torch.full_like(kept_lse, -torch.inf)
    tail(alone, alone_lse, False)
    want, want_lse = merge_states(kept, kept_lse, alone, alone_lse)
    tail(kept, kept_lse, True)
    torch.testing.assert_close(kept, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept_lse, want_lse, rtol=1e-5, atol=1e-5)
