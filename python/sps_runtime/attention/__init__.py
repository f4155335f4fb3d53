"""Attention as a reduction over segments of KV: partials, merges, plans of who computes what.

backend                       the primitive, a protocol; `choose` takes one of those below
cpu, torch_sdpa, triton       it by `sps_kernel`, by torch, by Triton's kernels
flashinfer*, shared_prefix    it by FlashInfer: calls from lists, planned once a step
context                       what attention needs of a rank, the same for every step
shard_layout, page_reads      from a plan to integers: who computes which token, who reads what
decode_inputs, run_lists      the same in arrays, for recordings and for all layers of a step
sparse_*, strided_layout      what sparse steps choose, and what of it is measured
sequence_parallel             strategies: who computes which segment, and what crosses
"""
