"""Attention as a reduction over segments of KV: partials, merges, plans of who computes what."""
