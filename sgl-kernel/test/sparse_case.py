"""Random cases of sparse attention's operators, and their truth in float64."""

from __future__ import annotations

import torch

from sps_kernel import page_shares, summarise_pages, summary_nbytes

NAN = float("nan")


class Sequences:
    """Sequences whose pages lie anywhere in some pools; all that is not theirs is NaN.

    Each sequence's last `new` tokens are cut into query blocks and superblocks.
    """

    def __init__(
        self,
        dtype,
        d,
        *,
        lengths,
        page=16,
        block=None,
        superblock=None,
        kv_heads=2,
        group=2,
        pools=2,
        offset=0,
    ):
        self.dtype, self.d, self.page = dtype, d, page
        self.kv_heads, self.group = kv_heads, group
        self.block = block or page
        superblock = superblock or 4 * self.block
        pages = [-(-total // page) for total, _ in lengths]
        self.slots = sum(pages) + 3
        self.k = [self.pool(offset) for _ in range(pools)]
        self.v = [self.pool(offset) for _ in range(pools)]
        free = torch.randperm(pools * self.slots).tolist()
        self.ids, rows, blocks, number = [], 0, [], 0
        for (total, new), count in zip(lengths, pages, strict=True):
            begin = len(self.ids)
            self.ids += [free.pop() for _ in range(count)]
            self.fill(self.ids[begin:], total)
            first = total - new
            assert first % superblock == 0
            for at in range(first, total, self.block):
                tokens = min(self.block, total - at)
                blocks.append((rows, tokens, at, number, begin, total))
                rows += tokens
                number += (at + self.block) % superblock == 0 or at + tokens == total
        self.blocks = torch.tensor(blocks, dtype=torch.int32).reshape(-1, 6)
        self.page_ids = torch.tensor(self.ids, dtype=torch.int32)
        self.q = self.array((rows, kv_heads * group, d), offset)
        self.q.copy_(torch.randn(self.q.shape) * 1.5)
        self.nbytes = summary_nbytes(page, d, self.q.element_size())
        self.summaries = [
            torch.full((self.slots, kv_heads, self.nbytes), 255, dtype=torch.uint8)
            for _ in range(pools)
        ]
        self.summarise()

    def summarise(self):
        """Of full pages alone."""
        for pool, out in enumerate(self.summaries):
            slots = [i % self.slots for i in self.full if i // self.slots == pool]
            index = torch.tensor(slots, dtype=torch.int32)
            summarise_pages(self.k[pool], self.v[pool], index, out)

    def array(self, shape, offset):
        n = torch.Size(shape).numel()
        return torch.full((n + offset,), NAN, dtype=self.dtype)[offset:].view(shape)

    def pool(self, offset):
        return self.array((self.slots, self.kv_heads, self.page, self.d), offset)

    full: list[int]

    def fill(self, ids, total):
        """Keys and values of a sequence: each page has a mean and scales of its own."""
        self.full = getattr(self, "full", []) + ids[: total // self.page]
        for at, page_id in enumerate(ids):
            pool, slot = divmod(page_id, self.slots)
            used = min(self.page, total - at * self.page)
            shape = (self.kv_heads, used, self.d)
            scale = torch.rand(self.kv_heads, 1, self.d) + 0.3
            mean = torch.randn(self.kv_heads, 1, self.d) * 0.5
            self.k[pool][slot, :, :used] = (torch.randn(shape) * scale + mean).to(self.dtype)
            self.v[pool][slot, :, :used] = torch.randn(shape).to(self.dtype)

    def shares(self, rows, scale, threads=1):
        """float32 [kv_heads, pages before] of each block."""
        flat = page_shares(
            self.q,
            self.blocks,
            self.page_ids,
            self.summaries,
            self.k,
            slots=self.slots,
            rows=rows,
            block=self.block,
            scale=scale,
            threads=threads,
        )
        before = [int(p) // self.page for p in self.blocks[:, 2]]
        parts = flat.split([self.kv_heads * n for n in before])
        return [x.view(self.kv_heads, n) for x, n in zip(parts, before, strict=True)]

    def page_of(self, pools, page_id, head):
        pool, slot = divmod(page_id, self.slots)
        return pools[pool][slot, head].double()

    def sketch(self, page_id, head):
        """Keys [page, d] as the summary has them, and its vectors."""
        pool, slot = divmod(page_id, self.slots)
        return decode(self.summaries[pool][slot, head], self.page, self.d, self.dtype)

    def log_masses(self, block, rows, scale):
        """float64 [kv_heads, group, rows, pages before] and own [kv_heads, group, rows]."""
        row, count, position, _, begin, _ = block.tolist()
        picked = scored_rows(count, rows if count == self.block else 0)
        before = position // self.page
        own_pages = -(-count // self.page)
        mass = torch.empty(self.kv_heads, self.group, len(picked), before, dtype=torch.float64)
        own = torch.empty(self.kv_heads, self.group, len(picked), dtype=torch.float64)
        seen = torch.arange(own_pages * self.page)[None] <= picked[:, None]
        for head in range(self.kv_heads):
            heads = slice(head * self.group, (head + 1) * self.group)
            q = self.q[row + picked, heads].double().transpose(0, 1) * scale
            ids = self.ids[begin : begin + before + own_pages]
            for j in range(before):
                keys = self.sketch(ids[j], head)["keys"]
                mass[head, :, :, j] = (q @ keys.T).logsumexp(-1)
            k = torch.cat([self.page_of(self.k, i, head) for i in ids[before:]]).nan_to_num()
            own[head] = (q @ k.T).masked_fill(~seen, -torch.inf).logsumexp(-1)
        return mass, own

    def truth(self, block, rows, scale):
        """The shares of a block as `page_shares` should have them."""
        mass, own = self.log_masses(block, rows, scale)
        total = torch.logaddexp(own, mass.logsumexp(-1)) if mass.shape[-1] else own
        return torch.exp(mass - total[..., None]).flatten(1, 2).square().sum(1).sqrt()


def scored_rows(count, rows):
    """Evenly spaced rows of a block, the last among them; all where `rows` is 0 or too many."""
    if rows <= 0 or rows >= count:
        return torch.arange(count)
    return torch.arange(1, rows + 1) * count // rows - 1


def decode(summary, page, d, dtype):
    """A summary's vectors, and its keys as low + code * step, in float64."""
    vectors = summary[: 4 * d * dtype.itemsize].clone().view(dtype).view(4, d).double()
    mean_k, mean_v, low, step = vectors
    packed = summary[4 * d * dtype.itemsize :].view(page, d // 4)
    codes = torch.stack([packed >> (2 * j) & 3 for j in range(4)], -1).flatten(1)
    return {
        "codes": codes,
        "low": low,
        "step": step,
        "mean_k": mean_k,
        "mean_v": mean_v,
        "keys": low + codes.double() * step,
    }
