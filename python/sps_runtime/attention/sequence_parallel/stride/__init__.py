"""Stride attention as CSPS published it: the baseline that block-sparse attention must beat.

`prefill` is the strategy and `level` one of its levels, with keys put together by `keys`; `counts`
says what was left out.
"""
