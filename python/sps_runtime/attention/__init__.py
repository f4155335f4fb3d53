"""Attention as a reduction over segments of KV: partials, merges, and plans of who computes what."""
