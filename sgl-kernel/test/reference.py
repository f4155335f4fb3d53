"""The float64 truth that the kernels are tested against, written for clarity."""

from __future__ import annotations

import torch


def attention_ref(q, k_pools, v_pools, items, page_ids, page_pos, scale, causal, window):
    """out [T, Hq, d] and lse [T, Hq] in float64; NaN where no item names the row."""
    tokens, heads, d = q.shape
    slots, kv_heads, page, _ = k_pools[0].shape
    group = heads // kv_heads
    out = torch.full((tokens, heads, d), float("nan"), dtype=torch.float64)
    lse = torch.full((tokens, heads), float("nan"), dtype=torch.float64)
    for q0, nq, qpos, l0, nl, kv_len, h0, nh in items.tolist():
        if nq == 0:
            continue
        ids, pos = page_ids[l0 : l0 + nl].tolist(), page_pos[l0 : l0 + nl].tolist()
        key_pos = torch.tensor([p + i for p in pos for i in range(page)], dtype=torch.int64)
        q_pos = qpos + torch.arange(nq)
        seen = (key_pos < kv_len)[None].expand(nq, -1).clone()
        if causal:
            seen &= key_pos[None] <= q_pos[:, None]
        if window:
            seen &= key_pos[None] > q_pos[:, None] - window
        for h in range(h0, h0 + nh):
            ks = [k_pools[i // slots][i % slots, h] for i in ids]
            vs = [v_pools[i // slots][i % slots, h] for i in ids]
            k = torch.cat(ks).double() if ks else torch.zeros(0, d, dtype=torch.float64)
            v = torch.cat(vs).double() if vs else torch.zeros(0, d, dtype=torch.float64)
            v = torch.where(seen.any(0)[:, None], v, 0.0)
            k = torch.where(seen.any(0)[:, None], k, 0.0)
            for g in range(group):
                head = h * group + g
                s = q[q0 : q0 + nq, head].double() @ k.T * scale
                s = torch.where(seen, s, -torch.inf)
                total = torch.logsumexp(s, 1) if s.shape[1] else torch.full((nq,), -torch.inf)
                p = torch.exp(s - torch.where(total == -torch.inf, 0.0, total)[:, None])
                out[q0 : q0 + nq, head] = p @ v
                lse[q0 : q0 + nq, head] = total
    return out, lse


def merge_ref(os, lses):
    """The merged state of several, in float64."""
    lse = torch.logsumexp(torch.stack([x.double() for x in lses]), 0)
    out = torch.zeros(os[0].shape, dtype=torch.float64)
    for o, part in zip(os, lses, strict=True):
        w = torch.exp(part.double() - torch.where(lse == -torch.inf, 0.0, lse))
        out += torch.where(w[..., None] > 0, w[..., None] * o.double(), 0.0)
    return out, lse
