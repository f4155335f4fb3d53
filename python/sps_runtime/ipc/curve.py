"""Keys of the links between hosts, derived from one secret that all hosts of an engine share.

CurveZMQ never sends the server's public key; here it follows from the secret. So only who knows the
secret can complete a handshake with the server, and only who knows it can be the server.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass

import zmq
from zmq.utils import z85


@dataclass(frozen=True)
class Curve:
    """CurveZMQ keys of one side of a TCP link, as Z85 text.

    Attributes:
        public, secret: this side's pair.
        peer: the other side's public key; a connecting side refuses any other server.
    """

    public: bytes
    secret: bytes
    peer: bytes

    @classmethod
    def from_text(cls, public: str, secret: str, peer: str) -> Curve:
        return cls(public.encode(), secret.encode(), peer.encode())


def derive_keys(secret: bytes) -> tuple[Curve, Curve]:
    """Return (the binding side's keys, the connecting side's keys)."""
    server, client = _pair(secret, b"sps-runtime link server"), _pair(secret, b"sps-runtime link")
    return Curve(*server, peer=client[0]), Curve(*client, peer=server[0])


def _pair(secret: bytes, purpose: bytes) -> tuple[bytes, bytes]:
    key = z85.encode(hmac.digest(secret, purpose, "sha256"))
    return zmq.curve_public(key), key
