"""Which logical CPUs each process of a host gets.

A rank that waits for another makes that one's delay its own, so ranks get cores of their own, all
threads of a rank the same ones. The other processes (HTTP, scheduler, supervisor) get what is left;
where nothing is, they run anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from sps_runtime.launch.topology import Topology, parse_cpus
from sps_runtime.types.errors import ConfigError

SPIN_S = 100e-6
"""How long a rank with a core of its own polls before it sleeps: about what waking costs."""


@dataclass(frozen=True)
class Binding:
    """CPUs of one host's processes.

    Attributes:
        ranks: of each local rank; empty: not bound.
        services: of the processes that are no ranks; empty: not bound.
        threads: compute threads of a rank.
        spin_s: how long ranks poll before they sleep; 0 where they outnumber cores.
        why: one line for logs and `sps doctor`.
    """

    ranks: tuple[tuple[int, ...], ...]
    services: tuple[int, ...]
    threads: int
    spin_s: float
    why: str


def bind(
    told: str,
    ranks: int,
    threads: int | None,
    topology: Topology,
    claimed: Collection[int] = (),
) -> Binding:
    """Give CPUs to ranks.

    Args:
        told: ``auto``, ``none``, or a list of CPUs for each rank: ``0-3|4-7``.
        threads: per rank, if told.
        claimed: CPUs of other servers' ranks; ``auto`` leaves them alone.

    Raises:
        ConfigError: a list that cannot be.
    """
    if told not in ("auto", "none"):
        return _listed(told, ranks, threads, topology)
    if told == "auto" and not topology.throttled and not set(claimed).isdisjoint(topology.cpus):
        free = topology.without(claimed)
        if len(free.cores) < ranks * (threads or 1):
            per_rank = threads or max(1, topology.compute // ranks)
            why = "not bound: ranks of other servers are bound to the cores that are needed"
            return Binding((), (), per_rank, 0.0, why)
        topology = free
    per_rank = threads or max(1, topology.compute // ranks)
    crowded = ranks * per_rank > topology.compute
    spin_s = 0.0 if crowded else SPIN_S
    if told == "none":
        return Binding((), (), per_rank, spin_s, "not bound, as told")
    if crowded:
        why = f"not bound: {ranks} ranks x {per_rank} threads outnumber {topology.compute} cores"
        return Binding((), (), per_rank, spin_s, why)
    if topology.throttled:
        why = f"not bound: a quota of {topology.quota:g} CPUs shares its cores with others"
        return Binding((), (), per_rank, spin_s, why)
    given = _consecutive(ranks, per_rank, topology)
    return _bound(given, per_rank, topology)


def _listed(told: str, ranks: int, threads: int | None, topology: Topology) -> Binding:
    try:
        given = tuple(parse_cpus(part) for part in told.split("|"))
    except ValueError as error:
        raise ConfigError(f"--cpu-bind {told}: {error}") from None
    if len(given) != ranks:
        raise ConfigError(f"--cpu-bind {told} names {len(given)} ranks, this host has {ranks}")
    everything = [cpu for cpus in given for cpu in cpus]
    if missing := set(everything) - set(topology.cpus):
        raise ConfigError(f"--cpu-bind {told}: CPUs {sorted(missing)} may not be used here")
    per_rank = threads or min(map(len, given))
    binding = _bound(given, per_rank, topology)
    if len(set(everything)) == len(everything) and per_rank <= min(map(len, given)):
        return binding
    return Binding(binding.ranks, binding.services, per_rank, 0.0, "bound as told, cores shared")


def _bound(given: tuple[tuple[int, ...], ...], threads: int, topology: Topology) -> Binding:
    taken = {cpu for cpus in given for cpu in cpus}
    left = tuple(cpu for cpu in topology.cpus if cpu not in taken)
    why = "ranks bound, nothing left over" if not left else "ranks bound, others on the rest"
    return Binding(given, left, threads, SPIN_S, why)


def _consecutive(ranks: int, threads: int, topology: Topology) -> tuple[tuple[int, ...], ...]:
    """One CPU of each of `threads` cores per rank, all in the node with most room; over several
    nodes only where none has enough."""
    free = [(node, core[0]) for node, core in zip(topology.nodes, topology.cores, strict=True)]
    given = []
    for _ in range(ranks):
        room = Counter(node for node, _ in free)
        node, count = max(room.items(), key=lambda item: (item[1], -item[0]))
        mine = [entry for entry in free if count < threads or entry[0] == node][:threads]
        free = [entry for entry in free if entry not in mine]
        given.append(tuple(cpu for _, cpu in mine))
    return tuple(given)
