"""Where a rank stands among ranks, hosts and GPUs."""

from __future__ import annotations

from dataclasses import dataclass

from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.distributed.mesh import Mesh


@dataclass(frozen=True)
class Place:
    """Where a rank stands among ranks and hosts.

    Attributes:
        mesh: its place in the (sp, tp) mesh.
        hosts: the host of each SP rank: equal, consecutive blocks. On GPUs a number for each set
            of SP ranks that read each other's memory in place (`runner.gpu.with_domains`).
    """

    mesh: Mesh
    hosts: tuple[int, ...]

    @classmethod
    def of(cls, rank: int, parallel: ParallelConfig) -> Place:
        per_host = parallel.sp_size // parallel.nnodes
        hosts = tuple(sp_rank // per_host for sp_rank in range(parallel.sp_size))
        return cls(Mesh(parallel.sp_size, parallel.tp_size, rank), hosts)

    @property
    def host(self) -> int:
        return self.hosts[self.mesh.sp_rank]

    def rank_hosts(self) -> tuple[int, ...]:
        """The host of each global rank."""
        return tuple(host for host in self.hosts for _ in range(self.mesh.tp_size))

    def sp_peers_here(self) -> dict[int, int]:
        """SP rank -> global rank of those with this TP rank on this host, itself included."""
        mesh = self.mesh
        return {
            sp_rank: sp_rank * mesh.tp_size + mesh.tp_rank
            for sp_rank, host in enumerate(self.hosts)
            if host == self.host
        }
