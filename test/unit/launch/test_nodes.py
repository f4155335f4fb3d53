"""Who has which ranks, and where the links between hosts lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from sps_runtime.config.environment import dist_key
from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.launch.nodes import first_node_endpoints, local_ranks, other_node_endpoints
from sps_runtime.types.errors import ConfigError

SECRET = b"0123456789abcdef"


def parallel(node: int, address: str = "127.0.0.1:29500") -> ParallelConfig:
    return ParallelConfig(sp_size=4, tp_size=2, nnodes=2, node_rank=node, dist_init_addr=address)


def test_both_sides_of_every_link_agree() -> None:
    first = first_node_endpoints(parallel(0), Path("/run"), SECRET)
    other = other_node_endpoints(parallel(1), SECRET)
    assert list(local_ranks(parallel(0))) == [0, 1, 2, 3]
    assert list(local_ranks(parallel(1))) == [4, 5, 6, 7]
    assert all(first.ranks[rank].startswith("ipc://") for rank in local_ranks(parallel(0)))
    for rank in local_ranks(parallel(1)):
        assert first.ranks[rank] == other.ranks[rank] == f"tcp://127.0.0.1:{29502 + rank - 4}"
    assert first.remote_results == other.results == "tcp://127.0.0.1:29501"
    assert first.keys and other.keys
    assert (first.keys.public, first.keys.peer) == (other.keys.peer, other.keys.public)
    assert first.keys.secret != other.keys.secret


def test_one_host_has_no_address_but_its_directory() -> None:
    alone = first_node_endpoints(ParallelConfig(sp_size=2), Path("/run"), b"")
    assert alone.keys is None and not alone.remote_results
    assert all(endpoint.startswith("ipc:///run/") for endpoint in alone.ranks)


@pytest.mark.parametrize("address", ["", "host", ":29500", "127.0.0.1:0", "127.0.0.1:x", "a b:1"])
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError):
        other_node_endpoints(parallel(1, address), SECRET)


def test_the_secret_comes_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPS_DIST_KEY", raising=False)
    with pytest.raises(ConfigError, match="shared secret"):
        dist_key("")
    file = tmp_path / "key"
    file.write_bytes(b"short\n")
    with pytest.raises(ConfigError, match="16 bytes"):
        dist_key(str(file))
    file.write_bytes(SECRET + b"\n")
    assert dist_key(str(file)) == SECRET
    monkeypatch.setenv("SPS_DIST_KEY", "f" * 32)
    assert dist_key("") == b"f" * 32
