"""Which KV a query needs: page summaries, estimators, selection, tail, cover, audit.

Everything here is the reference in plain torch: what kernels compute, they compute the same.
Notation of shapes: N pages, B tokens of a page, K KV heads, G query heads of a KV head, R query
rows, T tokens, d head dim, M keys kept of a page.
"""
