"""Several hosts: who has which ranks, and where their links lie.

Node 0 runs HTTP, the scheduler and its ranks; other nodes run ranks alone and connect to node 0.
Of ``--dist-init-addr HOST:PORT``, PORT is where ranks find one another (torch.distributed),
PORT + 1 takes results, and PORT + 2 + i gives plans to the i-th rank of the other hosts.
"""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from sps_runtime.config.parallel import ParallelConfig
from sps_runtime.config.process import CurveKeys, Endpoints, local_endpoints
from sps_runtime.ipc.curve import Curve, derive_keys
from sps_runtime.types.errors import ConfigError


def local_ranks(parallel: ParallelConfig) -> range:
    """Global ranks of this host."""
    per_node = parallel.world_size // parallel.nnodes
    return range(parallel.node_rank * per_node, (parallel.node_rank + 1) * per_node)


def first_node_endpoints(parallel: ParallelConfig, run_dir: Path, secret: bytes) -> Endpoints:
    """The endpoints as node 0's processes use them.

    Args:
        secret: what all hosts share; not used where there is one host.

    Raises:
        ConfigError: when ``dist_init_addr`` is no address.
    """
    here = local_endpoints(run_dir, parallel.world_size)
    if parallel.nnodes == 1:
        return here
    remote = _remote_ranks(parallel)
    own = here.ranks[: len(here.ranks) - len(remote)]
    return msgspec.structs.replace(
        here,
        ranks=(*own, *remote),
        remote_results=_results(parallel),
        keys=_keys(derive_keys(secret)[0]),
    )


def other_node_endpoints(parallel: ParallelConfig, secret: bytes) -> Endpoints:
    """The endpoints as ranks of other nodes use them; what is only on node 0 is empty."""
    remote = _remote_ranks(parallel)
    on_node_0 = ("",) * (parallel.world_size - len(remote))
    return Endpoints(
        scheduler="",
        frontend="",
        results=_results(parallel),
        ranks=(*on_node_0, *remote),
        keys=_keys(derive_keys(secret)[1]),
    )


def _results(parallel: ParallelConfig) -> str:
    host, port = _address(parallel.dist_init_addr or "")
    return f"tcp://{host}:{port + 1}"


def _remote_ranks(parallel: ParallelConfig) -> tuple[str, ...]:
    host, port = _address(parallel.dist_init_addr or "")
    count = parallel.world_size - parallel.world_size // parallel.nnodes
    return tuple(f"tcp://{host}:{port + 2 + index}" for index in range(count))


def _keys(curve: Curve) -> CurveKeys:
    return CurveKeys(curve.public.decode(), curve.secret.decode(), curve.peer.decode())


def _address(told: str) -> tuple[str, int]:
    """The IP address (IPv6 in brackets) and port of ``host:port``."""
    host, _, port = told.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65000:
        raise ConfigError(f"--dist-init-addr {told!r} is not host:port")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--dist-init-addr {told}: {error.strerror}") from None
    ip = str(address[0])
    return (f"[{ip}]" if family == socket.AF_INET6 else ip), int(port)
