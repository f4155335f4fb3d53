"""Where every page of KV lies, who may read it, and when its slot may be written again.

`prefix_cache.PrefixCache` is the door; behind it are the page allocator (slots of every SP rank),
the directory (logical page -> page id), the radix tree (shared prefixes) and the fence (which plans
may still touch a freed page). One process, the scheduler's, writes all of it; no torch.
"""
