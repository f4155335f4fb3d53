"""Paged K and V of ranks: where they lie, and how pages travel that cannot be read in place."""
