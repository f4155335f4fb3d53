"""Attention of one step over the ranks of its group: one protocol, one file a strategy.

`layers.step.SequenceAttention` is the protocol; `build.sequence_attention` makes the one that a
plan names.
"""
