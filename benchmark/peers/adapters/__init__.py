"""One file a peer; each runs in its peer's own environment, inside `peers.worker`.

An adapter needs nothing but the standard library and its peer. `API` says how it is driven.
"""
