"""The OpenAPI document: valid, complete, current, and true of what the server does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator
from test.kit.bad_input import CASES

from sps_runtime.server.app import ROUTES
from sps_runtime.server.auth import Access
from sps_runtime.server.error_handlers import error_body
from sps_runtime.server.openapi import document, encoded

DOCUMENT = document(ROUTES)
WRITTEN = Path(__file__).parents[3] / "docs" / "openapi.json"
MATCHES: list[tuple[str, dict[str, Any]]] = [
    ("CompletionBody", {"prompt": "x", "logit_bias": {"5": 1.5}, "stop": ["a"]}),
    ("CompletionBody", {"prompt": [[1, 2], [3]], "max_tokens": None, "unknown": 1}),
    ("ChatBody", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}),
    ("GenerateBody", {"text": ["a"], "sampling_params": [{"stop_regex": "a"}]}),
    ("GenerateBody", {"input_ids": [1], "token_ids_logprob": [[1], None]}),
    ("EmbeddingsBody", {"input": [1, 2], "encoding_format": "base64"}),
    ("ScoreBody", {"query": "a", "items": ["b"], "label_token_ids": [1]}),
    ("MessagesBody", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}),
    ("ResponsesBody", {"input": "a"}),
]
MISMATCHES: list[tuple[str, dict[str, Any]]] = [
    ("CompletionBody", {"prompt": 5}),
    ("CompletionBody", {"prompt": "x", "temperature": "hot"}),
    ("ChatBody", {"messages": "a"}),
    ("ChatBody", {}),
    ("GenerateBody", {"text": "a", "sampling_params": {"wibble": 1}}),
    ("EmbeddingsBody", {"input": "a", "encoding_format": "int8"}),
    ("MessagesBody", {"messages": [{"role": "user", "content": "a"}]}),
]


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(schema)


def test_it_is_valid_openapi() -> None:
    OpenAPIV31SpecValidator(DOCUMENT).validate()


def test_what_is_written_down_is_current() -> None:
    assert WRITTEN.read_bytes() == encoded(ROUTES), (
        "run: python -m sps_runtime.server.routes > docs/openapi.json"
    )


def test_every_route_is_there_with_its_type_and_its_errors() -> None:
    operations = []
    for route in ROUTES:
        assert route.summary, route.path
        for method in route.methods:
            path = route.path.replace(":path", "")
            operation = DOCUMENT["paths"][path][method.lower()]
            operations.append(operation)
            assert operation["summary"] == route.summary
            assert bool(operation["security"]) == (route.access is not Access.PUBLIC)
            assert ("requestBody" in operation) == (route.accepts is not None)
            assert {"500", "503"} <= operation["responses"].keys()
            if route.accepts is not None:
                (media,) = operation["requestBody"]["content"].values()
                assert media["schema"]["$ref"].endswith("/" + route.accepts.kind.__name__)
                assert operation.get("x-sps-refused", []) == sorted(route.accepts.unsupported)
    assert len({operation["operationId"] for operation in operations}) == len(operations)
    assert sum(map(len, DOCUMENT["paths"].values())) == len(operations)


@pytest.mark.parametrize(("name", "body"), MATCHES)
def test_what_the_server_takes_fits(name: str, body: dict[str, Any]) -> None:
    validator(name).validate(body)


@pytest.mark.parametrize(("name", "body"), MISMATCHES)
def test_what_has_another_type_does_not(name: str, body: dict[str, Any]) -> None:
    assert not validator(name).is_valid(body)


def test_errors_have_the_form_that_is_documented() -> None:
    for param in (None, "a.b"):
        validator("ErrorAnswer").validate(error_body("why", 400, param=param, code="x"))
    assert not validator("ErrorAnswer").is_valid({"error": "why"})


def test_much_of_what_the_server_refuses_does_not_fit() -> None:
    """All of these bodies get a 4xx: for their types, which the document tells, or their values."""
    kinds = {route.path: route.accepts.kind.__name__ for route in ROUTES if route.accepts}
    bodies = [(path, body) for path, body, _ in CASES if isinstance(body, dict)]
    misfits = [body for path, body in bodies if not validator(kinds[path]).is_valid(body)]
    assert 20 < len(misfits) < len(bodies)
