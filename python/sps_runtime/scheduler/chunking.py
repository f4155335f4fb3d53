"""How many tokens of a prompt go into one step."""

from __future__ import annotations

from sps_runtime.types.attention import SparseSettings


def chunk_end(
    start: int, target: int, page_size: int, limit: int | None, room_pages: int | None = None
) -> int:
    """Where the chunk that begins at `start` ends.

    A chunk that is not the prompt's last ends at a page boundary if it can: a page is then filled
    in one step, by one rank.

    Args:
        target: where the prompt ends.
        limit: tokens of the chunk at most, None for all.
        room_pages: pages the sequence has or can get, None for enough.

    Returns:
        A position in [start, target]; `start` when there is no room for a single token.
    """
    end = target if limit is None else min(target, start + limit)
    if room_pages is not None:
        end = min(end, room_pages * page_size)
    if end < target:
        aligned = end - end % page_size
        if aligned > start:
            end = aligned
    return max(start, end)


def chunk_limit(per_rank: int, ranks: int) -> int | None:
    """Tokens of one sequence in one step of a group; None for whole prompts (`per_rank` -1)."""
    return None if per_rank < 0 else max(1, per_rank) * ranks


def sparse_chunk_end(settings: SparseSettings, start: int, target: int, limit: int | None) -> int:
    """Where the chunk that begins at `start`, a superblock's first position, ends under csa.

    A superblock is computed in one step, so a chunk is cut to whole ones, and is one superblock
    where the limit is less.

    Args:
        target: where csa ends; the last superblock may be cut short by it.
        limit: tokens of the chunk at most, None for all.
    """
    if limit is None or start + limit >= target:
        return target
    first = min(target, settings.superblock_end(start))
    return max(first, settings.align(start + limit))


def superblock_pages(settings: SparseSettings, start: int, end: int, page_size: int) -> list[int]:
    """Pages of each superblock in [start, end), which begins at one; none where end <= start."""
    pages: list[int] = []
    while start < end:
        stop = min(end, settings.superblock_end(start))
        pages.append(-(-stop // page_size) - start // page_size)
        start = stop
    return pages
