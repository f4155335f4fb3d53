"""How many tokens of a prompt go into one step."""

from __future__ import annotations


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
