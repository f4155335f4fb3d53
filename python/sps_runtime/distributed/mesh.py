"""Where a rank stands in the (sp, tp) mesh."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """One global rank's place. Global rank = sp_rank * tp_size + tp_rank.

    Raises:
        ValueError: when `rank` is outside the mesh.
    """

    sp_size: int
    tp_size: int
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.sp_size * self.tp_size:
            raise ValueError(f"rank {self.rank} is outside {self.sp_size} x {self.tp_size}")

    @property
    def world_size(self) -> int:
        return self.sp_size * self.tp_size

    @property
    def sp_rank(self) -> int:
        return self.rank // self.tp_size

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp_size

    def tp_peers(self) -> tuple[int, ...]:
        """Global ranks of this SP rank's TP group, this one included, ascending."""
        first = self.sp_rank * self.tp_size
        return tuple(range(first, first + self.tp_size))

    def sp_peers(self, group: tuple[int, ...]) -> tuple[int, ...]:
        """Global ranks with this TP rank in the SP ranks of `group`, in the group's order."""
        return tuple(sp_rank * self.tp_size + self.tp_rank for sp_rank in group)


def split_evenly(total: int, parts: int) -> list[int]:
    """Sizes of `parts` consecutive shares of `total`, differing by at most one, larger first."""
    small, larger = divmod(total, parts)
    return [small + (index < larger) for index in range(parts)]


def shares(total: int, parts: int) -> list[tuple[int, int]]:
    """(begin, end) of each share of `split_evenly`."""
    bounds, begin = [], 0
    for size in split_evenly(total, parts):
        bounds.append((begin, begin + size))
        begin += size
    return bounds
