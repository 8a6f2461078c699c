"""The HTTP interface as an OpenAPI 3.1 document: one table of routes; the bodies are the message Structs themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from edge_sdk.cohort import Advertise, Masked, Reveal, Shares
from edge_sdk.protocol import (
    PROTOCOL,
    Ask,
    Enroll,
    Evaluation,
    Judgment,
    Line,
    Manifest,
    Problem,
    Receipt,
    Status,
    Trained,
    Update,
    Withdraw,
    Work,
)
from edge_sdk.wire import JSON_TYPE, JUDGMENT_TYPE, LINES_TYPE, MASKED_TYPE, PROBLEM_TYPE, TENSORS_TYPE
from edge_server.guard import ADMIN, BOTH, OPEN

Json = dict[str, Any]
REF = "#/components/schemas/{name}"
BYTES = "application/octet-stream"
TEXT = "text/plain"


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An empty object."""


@dataclass(frozen=True)
class Route:
    """What one method of one path takes and gives.

    Args:
        takes, gives: by content type, what a JSON body is, or what stands in `__metadata__.message` of safetensors; None for
            bytes or text.
        others: statuses it answers with beside 200 and problems, without a body of their own.
    """

    method: str
    path: str
    says: str
    takes: Mapping[str, Any]
    gives: Mapping[str, Any]
    parameters: tuple[Json, ...] = ()
    others: tuple[int, ...] = ()


def _query(name: str, says: str, **schema: Any) -> Json:
    return {"name": name, "in": "query", "description": says, "schema": schema}


def _header(name: str, says: str) -> Json:
    return {"name": name, "in": "header", "description": says, "schema": {"type": "string"}}


_SHA256: Json = {"name": "sha256", "in": "path", "required": True, "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"}}
_PAGE = (
    _query("since", "Lines of the feed that are known already.", type="integer", minimum=0, maximum=1 << 40, default=0),
    _query("limit", "Lines at most.", type="integer", minimum=0, maximum=1000, default=1000),
    _query("task", "Which task the feed shall be of.", type="string"),
    _header("If-None-Match", "An ETag that is known already."),
)
_RESULTS = {
    JSON_TYPE: Evaluation | Trained | Advertise | Shares | Reveal,
    TENSORS_TYPE: Update,
    MASKED_TYPE: Masked,
    JUDGMENT_TYPE: Judgment,
}
ROUTES = (
    Route("POST", "/v1/enroll", "Takes part in the run.", {JSON_TYPE: Enroll}, {JSON_TYPE: Manifest}),
    Route("POST", "/v1/work", "Asks what to do.", {JSON_TYPE: Ask}, {JSON_TYPE: Work}),
    Route("POST", "/v1/results", "Tells what came of it.", _RESULTS, {JSON_TYPE: Receipt}),
    Route(
        *("GET", "/v1/blobs/{sha256}", "A blob.", {}, {BYTES: None}),
        parameters=(_SHA256, _header("Range", "Which bytes of it.")),
        others=(206, 304, 416),
    ),
    Route("GET", "/v1/synthetic", "The feed of synthetic data.", {}, {LINES_TYPE: Line}, parameters=_PAGE, others=(304,)),
    Route("POST", "/v1/synthetic/withdraw", "Takes a sample out of use.", {JSON_TYPE: Withdraw}, {JSON_TYPE: Nothing}),
    Route("GET", "/v1/status", "Where the run stands.", {}, {JSON_TYPE: Status}),
    Route("GET", "/metrics", "Numbers for Prometheus.", {}, {TEXT: None}),
    Route("GET", "/healthz", "Whether the server is alive.", {}, {TEXT: None}),
    Route("GET", "/readyz", "Whether it takes updates and makes versions; 503 and why not.", {}, {TEXT: None}, others=(503,)),
    Route("GET", "/openapi.json", "This document.", {}, {JSON_TYPE: None}),
)
# every `code` of a problem document, with its status; docs/protocol.md says what a device should do
CODES = {
    **dict.fromkeys(("bad-message", "bad-tensors", "wrong-protocol", "bad-device", "bad-digest", "bad-query"), 400),
    **dict.fromkeys(("unsigned", "bad-signature", "wrong-time", "replayed", "not-admin"), 401),
    **dict.fromkeys(("unknown-device", "token-needed", "bad-token", "revoked", "wrong-device", "not-in-cohort"), 403),
    **dict.fromkeys(("unknown-blob", "unknown-task", "unknown-model", "unknown-sample", "wrong-system"), 404),
    "too-slow": 408,
    **dict.fromkeys(("no-cohort", "wrong-cohort", "cohort-full", "cohort-failed", "too-early", "too-late"), 409),
    **dict.fromkeys(("unknown-version", "unknown-sheet", "already-answered", "too-stale"), 409),
    "too-large": 413,
    "wrong-type": 415,
    **dict.fromkeys(("bad-keys", "bad-list", "bad-shares", "bad-codes", "not-finite"), 422),
    **dict.fromkeys(("wrong-shape", "wrong-knowledge", "wrong-part"), 422),
    **dict.fromkeys(("too-many", "too-often"), 429),
    "internal": 500,
    "busy": 503,
}
routes = web.RouteTableDef()


def document() -> Json:
    """The whole interface; the same at every call."""
    kinds = {kind for route in ROUTES for kind in (*route.takes.values(), *route.gives.values()) if kind is not None}
    listed = [*sorted(kinds, key=str), Problem]
    schemas, named = msgspec.json.schema_components(listed, ref_template=REF)
    by_kind = dict(zip(listed, schemas, strict=True))
    codes = [*CODES, "http-404", "http-405"]
    named["Problem"]["properties"]["code"] = {"type": "string", "anyOf": [{"enum": codes}, {"pattern": "^http-[45][0-9]{2}$"}]}
    paths: dict[str, Json] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, by_kind)
        if route.method == "GET":
            paths[route.path]["head"] = _operation(route, by_kind, head=True)
    table = "\n".join(f"- `{code}`: {status} {HTTPStatus(status).phrase}" for code, status in CODES.items())
    later = {"description": "Seconds after which the same may be taken.", "schema": {"type": "integer", "minimum": 0}}
    problem = {
        "description": f"RFC 9457; `code` is stable:\n\n{table}",
        "headers": {"Retry-After": later},
        "content": {PROBLEM_TYPE: {"schema": by_kind[Problem]}},
    }
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {"title": "tandem-edge server", "version": str(PROTOCOL), "description": "See docs/protocol.md."},
        "paths": paths,
        "components": {
            "schemas": _anchored(named),
            "responses": {"Problem": problem},
            "securitySchemes": {
                "device": {
                    "type": "apiKey",
                    "in": "header",
                    "name": "Signature",
                    "description": "RFC 9421, with Signature-Input and Content-Digest; on a server that knows its devices",
                },
                "operator": {"type": "http", "scheme": "bearer", "description": "admin.token, on such a server"},
            },
        },
    }


_NO_BRACES = str.maketrans("", "", "{}")


def _operation(route: Route, by_kind: Mapping[Any, Json], head: bool = False) -> Json:
    given = {} if head else {"content": {kind: _body(kind, of, by_kind) for kind, of in route.gives.items()}}
    found: Json = {
        "operationId": f"{'head' if head else route.method.lower()}{route.path.replace('/', '-').translate(_NO_BRACES)}",
        "summary": route.says,
        "parameters": list(route.parameters),
        "responses": {
            "200": {"description": "OK", **given},
            **{str(status): {"description": HTTPStatus(status).phrase} for status in route.others},
            "default": {"$ref": "#/components/responses/Problem"},
        },
        "security": _security(route.path),
    }
    if route.takes:
        content = {kind: _body(kind, of, by_kind) for kind, of in route.takes.items()}
        found["requestBody"] = {"required": True, "content": content}
    return found


def _body(kind: str, of: Any, by_kind: Mapping[Any, Json]) -> Json:
    """A body of this content type; bytes have no schema, but the message inside them has."""
    if kind == JSON_TYPE and of is not None:
        return {"schema": by_kind[of]}
    if kind == LINES_TYPE:
        return {"schema": {"type": "string", "description": "JSON lines"}, "x-line": by_kind[of]}
    return {} if of is None else {"x-message": by_kind[of]}


def _security(path: str) -> list[Json]:
    """Who may call: one of these; nobody needs anything where the server does not know its devices."""
    if path in OPEN:
        return []
    return [{}, *([] if path in ADMIN else [{"device": []}]), *([{"operator": []}] if path in ADMIN | BOTH else [])]


def _anchored(schema: Any) -> Any:
    r"""With patterns as ECMA-262 writes them: \A and \Z are ^ and $."""
    if isinstance(schema, dict):
        return {
            key: value.replace("\\A", "^").replace("\\Z", "$")
            if key == "pattern" and isinstance(value, str)
            else _anchored(value)
            for key, value in schema.items()
        }
    return [_anchored(each) for each in schema] if isinstance(schema, list) else schema


DOCUMENT = json.dumps(document()).encode()


@routes.get("/openapi.json")
async def openapi(_: web.Request) -> web.Response:
    return web.Response(body=DOCUMENT, content_type=JSON_TYPE)
