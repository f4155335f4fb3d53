"""Constrained decoding: which tokens may come next under a grammar.

The HTTP side prepares what a client sent (in a worker process with limits), ranks match tokens
against what was prepared; both use the same backend. Nothing here imports torch.
"""
