"""Which CPUs ranks and other processes get, and what a machine tells of its CPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from sps_runtime.launch.binding import SPIN_S, bind
from sps_runtime.launch.claims import claimed_cpus
from sps_runtime.launch.topology import (
    Topology,
    cpu_quota,
    format_cpus,
    parse_cpus,
    read_topology,
)
from sps_runtime.types.errors import ConfigError


def flat(cores: int, quota: float | None = None) -> Topology:
    return Topology(tuple((cpu,) for cpu in range(cores)), (0,) * cores, quota)


TWO_NODES = Topology(tuple((cpu, cpu + 8) for cpu in range(8)), (0,) * 4 + (1,) * 4)
"""Two nodes of four cores, each core with two hardware threads."""


@pytest.mark.parametrize(
    ("ranks", "threads", "given", "left"),
    [
        (1, None, ((0, 1, 2, 3),), ()),
        (2, None, ((0, 1), (2, 3)), ()),
        (3, None, ((0,), (1,), (2,)), (3,)),
        (2, 1, ((0,), (1,)), (2, 3)),
    ],
)
def test_ranks_get_cores_and_others_what_is_left(
    ranks: int, threads: int | None, given: object, left: object
) -> None:
    binding = bind("auto", ranks, threads, flat(4))
    assert (binding.ranks, binding.services) == (given, left)
    assert binding.spin_s == SPIN_S
    assert all(len(cpus) == binding.threads for cpus in binding.ranks)


@pytest.mark.parametrize(("ranks", "threads"), [(5, None), (2, 3), (1, 5)])
def test_ranks_that_outnumber_cores_are_not_bound_and_never_spin(
    ranks: int, threads: int | None
) -> None:
    binding = bind("auto", ranks, threads, flat(4))
    assert binding.ranks == () and binding.services == () and binding.spin_s == 0.0
    assert "outnumber" in binding.why


def test_a_rank_stays_in_one_node_and_leaves_hardware_threads_to_others() -> None:
    binding = bind("auto", 2, 3, TWO_NODES)
    assert binding.ranks == ((0, 1, 2), (4, 5, 6))
    assert binding.services == (3, 7, *range(8, 16))
    assert bind("auto", 2, None, TWO_NODES).threads == 4  # physical cores, not hardware threads
    (wide,) = bind("auto", 1, 6, TWO_NODES).ranks
    assert len(set(wide)) == 6  # fits no node


def test_a_quota_limits_threads_and_forbids_binding() -> None:
    binding = bind("auto", 2, None, flat(64, quota=4.5))
    assert binding.threads == 2 and binding.ranks == () and "quota" in binding.why
    assert bind("auto", 1, None, flat(8, quota=0.5)).threads == 1


def test_none_binds_nothing() -> None:
    binding = bind("none", 2, None, flat(4))
    assert (binding.ranks, binding.services, binding.threads) == ((), (), 2)


def test_a_list_says_it_all() -> None:
    binding = bind("0-1|4,6", 2, None, flat(8))
    assert binding.ranks == ((0, 1), (4, 6)) and binding.services == (2, 3, 5, 7)
    assert binding.threads == 2 and binding.spin_s == SPIN_S
    assert bind("0|0", 2, None, flat(2)).spin_s == 0.0  # they share a core
    assert bind("0|1", 2, 2, flat(2)).spin_s == 0.0


@pytest.mark.parametrize(
    ("told", "message"),
    [("0-1", "names 1 ranks"), ("0|9", "may not be used"), ("0|x", "no list"), ("|", "no list")],
)
def test_a_list_that_cannot_be_is_refused(told: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bind(told, 2, None, flat(4))


def test_lists_of_cpus_read_as_they_are_written() -> None:
    assert parse_cpus("0-3,8\n") == (0, 1, 2, 3, 8)
    assert format_cpus((8, 0, 1, 2, 3)) == "0-3,8"


def test_a_machine_is_read_from_sysfs(tmp_path: Path) -> None:
    for node, listed in ((0, "0-1,4-5"), (1, "2-3,6-7")):
        place = tmp_path / f"node/node{node}"
        place.mkdir(parents=True)
        (place / "cpulist").write_text(listed + "\n")
    for cpu in range(8):
        place = tmp_path / f"cpu/cpu{cpu}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    found = read_topology([0, 1, 2, 4, 6], tmp_path)
    assert found.cores == ((0, 4), (1,), (2, 6)) and found.nodes == (0, 0, 1)
    assert read_topology([3, 5], tmp_path / "nothing").cores == ((3,), (5,))


def test_the_tightest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/cpu.max").write_text("150000 100000\n")
    (tmp_path / "a/b/cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path, "0::/a/b\n") == 1.5
    (tmp_path / "cpu/job").mkdir(parents=True)
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu/job/cpu.cfs_period_us").write_text("100000\n")
    assert cpu_quota(tmp_path, "3:cpu,cpuacct:/job\n") is None
    (tmp_path / "cpu/job/cpu.cfs_quota_us").write_text("300000\n")
    assert cpu_quota(tmp_path, "3:cpu,cpuacct:/job\n2:memory:/job\n") == 3.0
    assert cpu_quota(tmp_path / "none", "0::/a\n") is None


def test_cores_of_other_servers_are_left_alone() -> None:
    binding = bind("auto", 2, 1, flat(6), claimed={0, 1, 9})
    assert binding.ranks == ((2,), (3,)) and binding.services == (4, 5)
    assert bind("auto", 2, None, flat(6), claimed={0, 1}).ranks == ((2, 3), (4, 5))
    halves = bind("auto", 1, None, TWO_NODES, claimed={1})  # 9 is the other half of core 1
    assert halves.ranks == ((0, 2, 3, 4, 5, 6, 7),)
    assert bind("0|1", 2, None, flat(6), claimed={0, 1}).ranks == ((0,), (1,))


@pytest.mark.parametrize("claimed", [{0}, {0, 1}])
def test_too_few_free_cores_bind_nothing_and_never_spin(claimed: set[int]) -> None:
    binding = bind("auto", 2, None, flat(2), claimed=claimed)
    assert (binding.ranks, binding.services, binding.spin_s) == ((), (), 0.0)
    assert "other servers" in binding.why


def test_claims_are_read_off_ranks_command_lines(tmp_path: Path) -> None:
    def process(pid: str, *words: str) -> None:
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes(b"".join(w.encode() + b"\0" for w in words))

    rank = ("python", "-P", "-m", "sps_runtime.runner.process")
    process("10", *rank, '{"name":"rank-0","cores":[2,3]}')
    process("11", *rank, '{"name":"rank-1","cores":[4]}')
    process("12", *rank, '{"name":"rank-0","cores":[]}')
    process("13", "cat", '{"cores":[7]}')
    process("14", *rank)
    process("15", *rank, "no json")
    process("16", *rank, '{"cores":"all"}')
    (tmp_path / "17").mkdir()
    assert claimed_cpus(tmp_path) == {2, 3, 4}
    assert claimed_cpus(tmp_path / "nowhere") == frozenset()
