from __future__ import annotations

import hashlib
import hmac
import inspect

import pytest
from starlette.requests import Request

from sps_runtime.server import auth
from sps_runtime.server.app import ROUTES
from sps_runtime.server.auth import Access, Keys
from sps_runtime.types.errors import InvalidRequest


def digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def request(**headers: str) -> Request:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "headers": raw})


def status(keys: Keys, access: Access, **headers: str) -> int:
    try:
        keys.identify(request(**headers), access)
    except InvalidRequest as error:
        return error.status
    return 200


def test_no_keys_no_questions() -> None:
    identity = Keys().identify(request(), Access.ADMIN)
    assert identity.admin
    assert identity.tenant == ""


@pytest.mark.parametrize(
    ("key", "user", "admin"), [("u", 200, 403), ("a", 200, 200), ("x", 401, 401), ("", 401, 401)]
)
def test_who_may_what(key: str, user: int, admin: int) -> None:
    keys = Keys([digest("u"), digest("v")], [digest("a")])
    for headers in ({"authorization": f"Bearer {key}"}, {"x_api_key": key}):
        assert status(keys, Access.USER, **headers) == user
        assert status(keys, Access.ADMIN, **headers) == admin
        assert status(keys, Access.PUBLIC, **headers) == 200


def test_a_single_key_is_the_administrators() -> None:
    assert status(Keys([digest("u")]), Access.ADMIN, authorization="bearer u") == 200
    two = Keys([digest("u"), digest("v")])
    assert status(two, Access.ADMIN, authorization="bearer u") == 403


def test_tenants_are_the_servers_choice() -> None:
    def tenant(secret: bytes, key: str) -> str:
        keys = Keys([digest("u"), digest("v")], secret=secret)
        return keys.identify(request(authorization=f"Bearer {key}"), Access.USER).tenant

    names = [tenant(b"1", "u"), tenant(b"1", "v"), tenant(b"2", "u")]
    assert len(set(names)) == 3
    assert tenant(b"1", "u") == names[0]
    assert digest("u") not in names


def test_keys_are_compared_in_constant_time() -> None:
    assert "hmac.compare_digest" in inspect.getsource(auth._among)
    assert auth.hmac is hmac


def test_few_routes_are_public() -> None:
    public = {spec.path for spec in ROUTES if spec.access is Access.PUBLIC}
    probes = {"/livez", "/readyz", "/ready", "/health", "/ping", "/health_generate", "/metrics"}
    assert public == probes
