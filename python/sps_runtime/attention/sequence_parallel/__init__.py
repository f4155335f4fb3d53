"""Attention of one step over the ranks of its group: who computes which segment, and what crosses.

`layers.step.SequenceAttention` is the protocol; `build.sequence_attention` makes the one that a
plan names, and `mixed` joins several where a step's sequences differ.

exact      every query reads all that it may see: pass-KV, pass-Q, Ulysses, replicated tokens
csa        query blocks choose pages by their summaries, and read those alone
stride     of far tokens each head keeps one in s: CSPS as published, the baseline
in_flight  the same strategies between hosts, one block's messages under others' computation
"""
