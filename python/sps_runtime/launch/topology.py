"""The logical CPUs that this process may use, and where they lie."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SYSTEM = Path("/sys/devices/system")
CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Topology:
    """Usable logical CPUs.

    Attributes:
        cores: physical cores, each with its usable logical CPUs, ordered by NUMA node.
        nodes: the NUMA node of each entry of `cores`.
        quota: CPUs' worth of time that the control group grants, or None.
    """

    cores: tuple[tuple[int, ...], ...]
    nodes: tuple[int, ...]
    quota: float | None = None

    @property
    def cpus(self) -> tuple[int, ...]:
        """All usable logical CPUs, ascending."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))

    @property
    def compute(self) -> int:
        """Threads that compute at full speed: one a physical core, and no more than the quota."""
        limit = len(self.cores) if self.quota is None else int(self.quota)
        return max(1, min(len(self.cores), limit))

    def without(self, cpus: Iterable[int]) -> Topology:
        """What is left when the physical cores of `cpus` are somebody else's."""
        gone = set(cpus)
        pairs = zip(self.cores, self.nodes, strict=True)
        left = [(core, node) for core, node in pairs if gone.isdisjoint(core)]
        cores, nodes = tuple(core for core, _ in left), tuple(node for _, node in left)
        return Topology(cores, nodes, self.quota)

    @property
    def throttled(self) -> bool:
        """Whether the quota grants less time than there are cores: others use these cores too."""
        return self.quota is not None and self.quota < len(self.cpus)


def read_topology(usable: Iterable[int] | None = None, system: Path = SYSTEM) -> Topology:
    """Look at this machine; what sysfs does not tell is taken to be flat.

    Args:
        usable: logical CPUs; this process's affinity mask (its cpuset) unless told.
    """
    cpus = sorted(os.sched_getaffinity(0) if usable is None else usable)
    node_of = _node_of(system)
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in cpus:
        cores.setdefault(_siblings(cpu, system), []).append(cpu)
    placed = sorted((node_of.get(core[0], 0), tuple(core)) for core in cores.values())
    return Topology(
        cores=tuple(core for _, core in placed),
        nodes=tuple(node for node, _ in placed),
        quota=cpu_quota(),
    )


def cpu_quota(groups: Path = CGROUPS, own: str | None = None) -> float | None:
    """CPUs' worth of time that this process's control groups grant (v2, then v1), or None.

    Args:
        own: content of ``/proc/self/cgroup``.
    """
    if own is None:
        own = _read(Path("/proc/self/cgroup"))
    limits = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        place = Path(path.lstrip("/"))
        for group in (place, *place.parents):  # inside a container the own path may not exist
            if controllers:
                limits.append(_quota_v1(groups / "cpu" / group))
            else:
                limits.append(_quota_v2(groups / group))
    return min((limit for limit in limits if limit is not None), default=None)


def parse_cpus(text: str) -> tuple[int, ...]:
    """``0-3,8`` -> (0, 1, 2, 3, 8), as sysfs and taskset write lists.

    Raises:
        ValueError: for anything else.
    """
    cpus: list[int] = []
    for part in text.strip().split(","):
        low, dash, high = part.partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise ValueError(f"{text!r} is no list of CPUs such as 0-3,8")
        cpus += range(int(low), int(high or low) + 1)
    return tuple(cpus)


def format_cpus(cpus: Sequence[int]) -> str:
    """The inverse of `parse_cpus`, with ranges where they are."""
    runs: list[list[int]] = []
    for cpu in sorted(cpus):
        if runs and cpu == runs[-1][1] + 1:
            runs[-1][1] = cpu
        else:
            runs.append([cpu, cpu])
    return ",".join(f"{low}" if low == high else f"{low}-{high}" for low, high in runs)


def _node_of(system: Path) -> dict[int, int]:
    nodes = {}
    for entry in system.glob("node/node[0-9]*"):
        listed = _read(entry / "cpulist").strip()
        for cpu in parse_cpus(listed) if listed else ():
            nodes[cpu] = int(entry.name.removeprefix("node"))
    return nodes


def _siblings(cpu: int, system: Path) -> tuple[int, ...]:
    listed = _read(system / f"cpu/cpu{cpu}/topology/thread_siblings_list").strip()
    return parse_cpus(listed) if listed else (cpu,)


def _quota_v2(group: Path) -> float | None:
    quota, _, period = _read(group / "cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdecimal() else None


def _quota_v1(group: Path) -> float | None:
    quota, period = _read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota.strip().isdecimal() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
