"""A rank's two links: plans in, results out, on its own host or to the scheduler's."""

from __future__ import annotations

import zmq

from sps_runtime.config.process import RankConfig
from sps_runtime.ipc.curve import Curve
from sps_runtime.ipc.links import Receiver, Sender
from sps_runtime.types.messages import FromRank, ToRank


def open_links(
    context: zmq.Context[zmq.Socket[bytes]], config: RankConfig
) -> tuple[Receiver[ToRank], Sender[FromRank]]:
    """Open both. Between hosts the rank connects, and sees when the scheduler is gone."""
    endpoints = config.endpoints
    address, keys = endpoints.ranks[config.rank], endpoints.keys
    remote = address.startswith("tcp://")
    curve = Curve.from_text(keys.public, keys.secret, keys.peer) if remote and keys else None
    plans: Receiver[ToRank] = Receiver(context, address, ToRank, bind=not remote, curve=curve)
    results: Sender[FromRank] = Sender(context, endpoints.results, curve=curve)
    return plans, results
