"""Attention on GPUs by FlashInfer: `backend` is the `attention.backend.AttentionBackend`.

It turns a step's segments into `items`, these into `calls` of FlashInfer's `wrappers` over pages as
`layout` has them, and `merges` what the calls found; `shared` finds prefixes that many requests
read. FlashInfer's own package comes in from outside (`attention.choose`), so all of this runs and
is tested without it.
"""
