"""Block-sparse attention: pages are chosen by their summaries before anything crosses.

`prefill` chooses for query blocks and `decode` for generated tokens; `far_pages` brings what was
chosen from other hosts, `counts` and `measure` say what was read and what was dropped.
"""
