"""`/openapi.json` is valid, and says of every route what its handler does."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator

from edge_sdk import wire
from edge_sdk.protocol import Problem
from edge_server import handlers
from edge_server.openapi import CODES, ROUTES
from tests import server_helpers as helpers
from tests.server_helpers import Running

ROOT = Path(__file__).parent.parent
HANDLERS = {node.name: node for node in ast.parse(inspect.getsource(handlers)).body if isinstance(node, ast.AsyncFunctionDef)}
NEVER_SENT = {"too-few", "not-secure", "bad-sum"}  # a device's own, and one that only fails a cohort


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with helpers.running(tmp_path) as found:
        yield found


def called(name: str) -> Iterator[ast.Call]:
    """Every call in a handler, and in the functions of its module that it calls."""
    for node in ast.walk(HANDLERS[name]):
        if isinstance(node, ast.Call):
            yield node
            if isinstance(node.func, ast.Name) and node.func.id in HANDLERS and node.func.id != name:
                yield from called(node.func.id)


def decoded(name: str) -> set[Any]:
    """The kinds of message that a handler decodes a body as."""
    calls = [call for call in called(name) if isinstance(call.func, ast.Name) and call.func.id == "decode"]
    kinds = [eval(ast.unparse(call.args[1]), vars(handlers)) for call in calls]  # noqa: S307  # our own source
    return {each for kind in kinds for each in get_args(kind) or (kind,)}


async def get(server: Running) -> dict[str, Any]:
    answer = await server.client.get("/openapi.json")
    assert (answer.status, answer.content_type) == (200, wire.JSON_TYPE)
    return json.loads(await answer.read())  # type: ignore[no-any-return]


async def test_the_document_is_valid(server: Running) -> None:
    """By the OpenAPI 3.1 schema, each reference and each pattern included."""
    document = await get(server)

    assert document["openapi"] == "3.1.0"
    OpenAPIV31SpecValidator(document).validate()
    names = set(re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)))
    assert names <= document["components"]["schemas"].keys()
    assert not re.search(r'"pattern": "[^"]*\\\\[AZ]', json.dumps(document))


async def test_every_route_is_in_it_and_nothing_else(server: Running) -> None:
    """Methods and paths are those that the server answers."""
    app = server.client.app
    assert app is not None
    answered = {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource is not None}

    said = {(method.upper(), path) for path, methods in (await get(server))["paths"].items() for method in methods}

    assert said == answered
    assert len(said) == len({o["operationId"] for path in (await get(server))["paths"].values() for o in path.values()})


async def test_bodies_are_what_the_handlers_decode(server: Running) -> None:
    """The Struct of a JSON body is the one that the handler of this route reads, and none where it reads none."""
    app = server.client.app
    assert app is not None
    by_route = {
        (route.method, route.resource.canonical): route.handler.__name__
        for route in app.router.routes()
        if route.resource is not None and route.handler.__name__ in HANDLERS
    }

    assert {"enroll", "work", "results", "withdraw"} <= {name for name in by_route.values() if decoded(name)}
    for route in ROUTES:
        told = route.takes.get(wire.JSON_TYPE)
        name = by_route.get((route.method, route.path))
        assert (set() if told is None else set(get_args(told) or (told,))) == (decoded(name) if name else set()), route.path


async def test_results_take_the_content_types_that_are_listed(server: Running) -> None:
    """Each of them gets past `wrong-type`, and no other does."""
    (results,) = (route for route in ROUTES if route.path == "/v1/results")

    for kind in (wire.JSON_TYPE, wire.TENSORS_TYPE, wire.MASKED_TYPE, wire.JUDGMENT_TYPE, wire.LINES_TYPE, "text/plain"):
        answer = await server.client.post("/v1/results", data=b"{}", headers={"Content-Type": kind})
        refused = wire.decode(await answer.read(), Problem).code == "wrong-type"
        assert refused == (kind not in results.takes), kind


async def test_the_message_beside_tensors_is_the_one_that_is_read() -> None:
    """What stands in the metadata of each kind of safetensors body is what the SDK unpacks there."""
    (results,) = (route for route in ROUTES if route.path == "/v1/results")
    readers: dict[str, Callable[..., Any]] = {
        wire.TENSORS_TYPE: wire.unpack,
        wire.MASKED_TYPE: wire.unpack_masked,
        wire.JUDGMENT_TYPE: wire.unpack_judgment,
    }

    for kind, reader in readers.items():
        returned = inspect.signature(reader, eval_str=True).return_annotation
        assert results.takes[kind] is get_args(returned)[0]


async def test_answers_are_as_described(server: Running) -> None:
    """Each GET answers with a listed content type, JSON of its Struct; whatever is wrong is a problem document."""
    await server.enroll("d1")
    paths = (await get(server))["paths"]
    for route in ROUTES:
        path = route.path.replace("{sha256}", server.ledger.state.adapter)
        responses = paths[route.path][route.method.lower()]["responses"]
        assert responses["default"] == {"$ref": "#/components/responses/Problem"}
        if route.method == "GET":
            answer = await server.client.get(path)
            code = str(answer.status)
            if path == "/v1/synthetic":  # this run has none
                assert wire.decode(await answer.read(), Problem).status == 404
                continue
            assert code == "200"
            assert answer.content_type in responses[code]["content"]
            if (kind := route.gives.get(wire.JSON_TYPE)) is not None:
                msgspec.json.decode(await answer.read(), type=kind)
        else:
            answer = await server.client.post(path, data=b"[", headers={"Content-Type": wire.JSON_TYPE})
            assert answer.content_type == wire.PROBLEM_TYPE
            assert wire.decode(await answer.read(), Problem).code == "bad-message"


async def test_problem_codes_are_listed_with_their_statuses(server: Running) -> None:
    """As docs/protocol.md has them, and so every one that the source raises; all are in the schema of `code`."""
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", (ROOT / "docs/protocol.md").read_text(), re.MULTILINE)
    document = await get(server)
    listed, pattern = document["components"]["schemas"]["Problem"]["properties"]["code"]["anyOf"]

    assert {code: int(status) for code, status in rows if code not in NEVER_SENT} == CODES
    assert set(listed["enum"]) == {*CODES, "http-404", "http-405"}
    assert re.fullmatch(pattern["pattern"], wire.decode(await (await server.client.get("/nothing")).read(), Problem).code)
    for code, status in CODES.items():
        assert f"- `{code}`: {status} " in document["components"]["responses"]["Problem"]["description"]
