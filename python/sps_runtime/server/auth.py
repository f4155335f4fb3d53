"""Who may call what. Access is declared with each route and checked after the route has matched.

Keys are known here as SHA-256 digests only and compared in constant time against all of them.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.requests import Request

from sps_runtime.types.errors import InvalidRequest


class Access(enum.Enum):
    """What a route asks for when keys are set."""

    PUBLIC = "public"
    USER = "user"
    ADMIN = "admin"


@dataclass(frozen=True)
class Identity:
    """Who calls.

    Attributes:
        owner: whose requests these are, for aborts by label.
        tenant: the cache namespace.
        admin: may see and end what is not his own.
    """

    owner: str = ""
    tenant: str = ""
    admin: bool = False


class Keys:
    """The keys of a server.

    Args:
        user_hashes, admin_hashes: hex SHA-256 of each key. With no key at all everyone is the
            administrator (the server then listens on this machine only). With one user key and no
            admin key, who has it is the administrator.
        secret: of this run; namespaces are derived with it, so nobody can choose one.
    """

    def __init__(
        self,
        user_hashes: Sequence[str] = (),
        admin_hashes: Sequence[str] = (),
        secret: bytes | None = None,
    ) -> None:
        self._admins = tuple(bytes.fromhex(digest) for digest in admin_hashes)
        users = tuple(bytes.fromhex(digest) for digest in user_hashes)
        self._all = (*users, *self._admins)
        if not self._admins and len(users) == 1:
            self._admins = users
        self._secret = secret or secrets.token_bytes(32)

    def identify(self, request: Request, access: Access) -> Identity:
        """Return who calls.

        Raises:
            InvalidRequest: 401 without a known key, 403 with one that does not suffice.
        """
        if not self._all:
            return Identity(admin=True)
        if access is Access.PUBLIC:
            return Identity()
        digest = hashlib.sha256(_presented_key(request)).digest()
        if not _among(digest, self._all):
            raise InvalidRequest(
                "a valid API key is needed: Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
            )
        admin = _among(digest, self._admins)
        if access is Access.ADMIN and not admin:
            raise InvalidRequest("this needs the admin key", status=403, code="admin_only")
        owner = hmac.new(self._secret, digest, "sha256").hexdigest()
        return Identity(owner, owner if len(self._all) > 1 else "", admin)


def _presented_key(request: Request) -> bytes:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return key.strip().encode()
    return request.headers.get("x-api-key", "").encode()


def _among(digest: bytes, known: Sequence[bytes]) -> bool:
    """Compare with all of `known`, whichever matches."""
    found = False
    for other in known:
        found |= hmac.compare_digest(digest, other)
    return found
