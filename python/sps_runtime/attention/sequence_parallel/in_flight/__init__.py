"""One long prefill cut into blocks between hosts: some wait for messages while others compute.

`flight` runs the blocks, cut by `cut`, and `baton` lets one compute at a time; `parcels` and
`far_answers` carry pages. Strategies have the names they have outside: `pass_kv`, `csa`, ...
"""
