"""Every query reads all that it may see; what differs is what travels.

`pass_kv` brings K and V to the queries, `pass_q` queries to K and V, `ulysses` trades tokens for
heads, `replicated` has queries everywhere; `decode` has shapes that a recording of a step can keep.
"""
