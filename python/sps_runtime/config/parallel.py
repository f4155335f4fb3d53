"""Degrees: how many ranks, and how they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sps_runtime.types.errors import ConfigError

Arch = Literal["ntp", "tp"]
StrategyChoice = Literal["auto", "pass_kv", "pass_q", "ulysses"]


@dataclass(frozen=True)
class ParallelConfig:
    """The (sp, tp) mesh and where it runs.

    Attributes:
        sp_size: SP ranks; a prompt's tokens are spread over them.
        tp_size: TP peers of each SP rank; heads and weights are spread over them.
        arch: ``ntp``: every SP rank has full weights (its TP slice of them), linear layers compute
            only their rank's tokens; ``tp``: weights are sharded over SP too, tokens are gathered
            before and scattered after (SP-TP).
        strategy: how attention crosses SP ranks; ``auto`` lets the measured cost choose.
        nnodes, node_rank: hosts, and this one's number; ranks are dealt to hosts in equal,
            consecutive blocks of SP ranks.
        pipeline: between hosts, compute one part of a long prefill while pages for another travel.
        dist_init_addr: ``host:port`` of node 0, where nnodes > 1.
    """

    sp_size: int = 1
    tp_size: int = 1
    arch: Arch = "ntp"
    strategy: StrategyChoice = "auto"
    nnodes: int = 1
    node_rank: int = 0
    dist_init_addr: str | None = None
    pipeline: bool = True

    def __post_init__(self) -> None:
        for name, least in (("sp_size", 1), ("tp_size", 1), ("nnodes", 1), ("node_rank", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.sp_size % self.nnodes:
            raise ConfigError(f"sp_size {self.sp_size} does not divide over {self.nnodes} nodes")
        if self.node_rank >= self.nnodes:
            raise ConfigError(f"node_rank {self.node_rank} is not below nnodes {self.nnodes}")
        if self.nnodes > 1 and not self.dist_init_addr:
            raise ConfigError("nnodes > 1 needs dist_init_addr (host:port of node 0)")

    @property
    def world_size(self) -> int:
        return self.sp_size * self.tp_size
