"""Requests made up from the server's own table of routes, and signed ones: no 5xx, no growth, and work goes on afterwards."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from edge_sdk import identity, wire
from edge_sdk.adapters import shapes_of
from edge_sdk.identity import Clock
from edge_sdk.protocol import Problem, Train, Update
from edge_sdk.signed import Signed
from edge_sdk.transport import Api, HttpTransport
from edge_server import cli
from edge_server.openapi import CODES, ROUTES, Route
from tests import server_helpers as helpers
from tests.server_helpers import delta, tensors, upload
from tests.strategies import SHARP_NUMBERS, any_text, damaged, header_bytes, headers, json_values
from tests.test_server_process import Server, Site

MB = 1 << 20
REQUESTS, SIGNED = 2000, 300
METHODS = ["GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
KNOWN = [f"d{number}" for number in range(24)]  # devices that are enrolled
STRANGER = "d-none"
UPDATES = [Update(device, version, 10, {}) for device in [*KNOWN, STRANGER] for version in (0, 1)]
shown = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_categories=["C"]), max_size=30)  # of a header


@dataclass(frozen=True)
class Asked:
    """One request; a body always has its true length."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes

    @property
    def sent(self) -> bytes:
        rows = [f"{self.method} {self.target} HTTP/1.1", "Host: x", f"Content-Length: {len(self.body)}", "Connection: close"]
        rows += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*rows, "", ""]).encode("latin-1") + self.body


@dataclass(frozen=True)
class Answered:
    status: int
    kind: str
    body: bytes


# What is asked --------------------------------------------------------------------------------------------------------
def values(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """JSON of this type; here and there something else in its place."""
    whole = st.integers(-1, 3) | st.sampled_from([number for number in SHARP_NUMBERS if isinstance(number, int)])
    right: st.SearchStrategy[Any]
    match kind:
        case inspect.StrType():
            right = st.sampled_from([*KNOWN[:3], STRANGER]) | any_text
        case inspect.IntType():
            right = whole
        case inspect.FloatType():
            right = st.floats() | whole
        case inspect.BoolType():
            right = st.booleans()
        case inspect.BytesType():
            right = st.sampled_from(["", "AA==", "A" * 44, "é"])
        case inspect.LiteralType(options):
            right = st.sampled_from(options)
        case inspect.VarTupleType(item) | inspect.ListType(item):
            right = st.lists(values(item), max_size=3)
        case inspect.DictType(key, value):
            right = st.dictionaries(values(key).map(str), values(value), max_size=3)
        case inspect.UnionType(types):
            right = st.one_of([values(each) for each in types])
        case inspect.StructType(_, fields, tag_field, tag):
            some = {field.encode_name: values(field.type) for field in fields if field.required}
            more = {field.encode_name: values(field.type) for field in fields if not field.required}
            named = {tag_field: st.just(tag)} if tag_field else {}
            right = st.fixed_dictionaries({**named, **some}, optional={**more, "more": json_values})
        case _:
            right = json_values
    return st.integers(0, 15).flatmap(lambda chance: right if chance else json_values)


messages = st.sampled_from(UPDATES).map(lambda update: wire.encode(update).decode())


def bodies(kind: str, of: Any) -> st.SearchStrategy[bytes]:
    """Bodies of this content type, right but for what is in them, or damaged, or anything."""
    said = values(inspect.type_info(of)).map(json.dumps)
    if kind == wire.JSON_TYPE:
        right = said.map(str.encode)
    else:
        data = helpers.parts(upload("d0", 0))[1]
        header = (said | messages).flatmap(lambda message: headers(shapes_of(delta()), message))
        right = header.map(lambda entries: tensors(header_bytes(entries), data)) | said.map(helpers.with_message)
    updates = st.sampled_from(UPDATES).map(lambda update: wire.pack(update, delta())).flatmap(damaged)
    return right | right.flatmap(damaged) | updates | st.binary(max_size=200)


@st.composite
def requests(draw: st.DrawFn, blobs: list[str]) -> Asked:
    """Any method, path, query, headers and body; most of them as one of the routes has them."""
    route: Route = draw(st.sampled_from(ROUTES))
    name = draw(st.sampled_from([*blobs, "0" * 64]) | st.text(max_size=70).map(lambda text: quote(text, safe="")))
    path = route.path.replace("{sha256}", name)
    if draw(st.integers(0, 9)) == 0:
        path = "/" + quote(draw(st.text(max_size=40)), safe="/.;=%")
    query = draw(st.lists(st.tuples(st.sampled_from(["since", "limit", "task", "x"]), any_query), max_size=3))
    kind = draw(st.sampled_from([*route.takes, wire.JSON_TYPE, wire.TENSORS_TYPE]))
    more = draw(st.lists(st.tuples(st.sampled_from(HEADERS), shown | st.sampled_from(SPOKEN)), max_size=3))
    told = [("Content-Type", kind if draw(st.integers(0, 9)) else draw(shown)), *more]
    told += draw(st.sampled_from([[], [], [], [("Expect", "100-continue")], [("Expect", "nothing")]]))  # aiohttp fails at others
    return Asked(
        method=route.method if draw(st.integers(0, 4)) else draw(st.sampled_from(METHODS)),
        target=path + ("?" + "&".join(f"{key}={value}" for key, value in query) if query else ""),
        headers=tuple((key, value.strip()) for key, value in told),
        body=draw(bodies(kind, route.takes.get(kind)) if route.takes.get(kind) else st.binary(max_size=60)),
    )


any_query = st.integers(-2, 1002).map(str) | st.text(max_size=12).map(lambda text: quote(text, safe="%"))
HEADERS = [
    *("Accept-Encoding", "Authorization", "Content-Digest", "Content-Encoding", "Cookie", "If-Match", "If-Range"),
    *("If-Modified-Since", "If-None-Match", "Range", "Signature", "Signature-Input", "X-Forwarded-For"),
]
SPOKEN = ["gzip", "deflate", "br", "*", "bytes=0-", "bytes=-1", "bytes=5-2", "bytes=0-0,2-3", 'W/"x"', "Bearer x"]


# What is answered -----------------------------------------------------------------------------------------------------
def answer(server: Server, asked: Asked) -> Answered:
    at = urlsplit(server.url)
    with closing(socket.create_connection((at.hostname, at.port), timeout=10)) as way:
        way.sendall(asked.sent)
        found = HTTPResponse(way, method=asked.method)
        found.begin()
        return Answered(found.status, found.headers.get_content_type(), found.read())


def check(asked: Asked, answered: Answered) -> None:
    """A good answer, or a problem document whose code is documented and of this status."""
    assert answered.status < 500 or answered.status == CODES["busy"], answered
    if answered.status < 400 or asked.method == "HEAD":
        return
    if answered.status in (412, 416) and asked.target.startswith("/v1/blobs/"):  # of a file, without a body
        assert not answered.body
        return
    if answered.kind == "text/plain":  # the HTTP library's, before any handler
        assert answered.status in (400, 417)
        assert {"Content-Encoding", "Expect"} & {name for name, _ in asked.headers}, answered
        return
    assert answered.kind == wire.PROBLEM_TYPE, answered
    problem = wire.decode(answered.body, Problem)
    assert problem.status == answered.status
    assert CODES.get(problem.code, int((re.findall("^http-(4[0-9]{2})$", problem.code) or [0])[0])) == answered.status, problem


def peak(server: Server) -> int:
    """Most bytes of memory that the process has ever had."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("fuzz"), helpers.settings(buffer_size=3, max_staleness=1000))


@pytest.fixture(scope="module")
def server(site: Site) -> Iterator[Server]:
    with site.serve() as running:
        yield running


async def take_part(server: Server) -> str:
    """All devices enrol, and those that may train send an update each: the adapter of the newest version then."""
    async with HttpTransport(server.url) as transport:
        api = Api(transport)
        before = (await api.status()).version
        for device in KNOWN:
            await api.enroll(device, "name")
        for device in KNOWN[:3]:
            if isinstance(work := await api.ask(device, True), Train):
                await api.send(wire.TENSORS_TYPE, upload(device, work.version))
        while (status := await api.status()).version == before:
            pass
        return status.adapter


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_request_is_a_server_error(server: Server, site: Site) -> None:
    """Whatever is asked, the answer is good or a problem document; then honest devices complete a version as before."""
    blobs = [asyncio.run(take_part(server)), "../admin.sqlite"]
    before, seen = peak(server), set[int]()

    @settings(max_examples=REQUESTS, suppress_health_check=list(HealthCheck))
    @given(requests(blobs))
    def holds(asked: Asked) -> None:
        answered = answer(server, asked)
        seen.add(answered.status)
        check(asked, answered)

    holds()
    assert seen >= {200, 400, 404, 405, 415}
    assert peak(server) - before < 64 * MB
    assert asyncio.run(take_part(server)) not in blobs
    assert "Traceback" not in site.said


# What members of a guarded server ask ---------------------------------------------------------------------------------
MEMBER = bytes(range(32))  # its private key


def signed(asked: Asked, clock: Clock, nonce: int) -> Asked:
    """The same in the member's name, which takes the place of `d0` in the body, and signed by it."""
    body = re.sub(rb"\bd0\b", identity.device_id(MEMBER).encode(), asked.body)
    if body != asked.body and len(body) >= 8 and body[:1] != b"{":  # the header of an update has become longer
        (length,) = struct.unpack("<Q", body[:8])
        body = struct.pack("<Q", (length + len(body) - len(asked.body)) % (1 << 64)) + body[8:]
    path, _, query = asked.target.partition("?")
    headers = identity.sign(MEMBER, asked.method, path, query, identity.claim(MEMBER, body, clock, f"{nonce:016x}"))
    return replace(asked, headers=(*headers.items(), *asked.headers), body=body)


@pytest.fixture
def guarded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[tuple[Server, Site]]:
    """A server that knows its devices; the member is one of them."""
    site = Site(tmp_path, helpers.settings(buffer_size=1, max_staleness=1000))
    with site.serve("--require-tokens") as running:
        assert cli.main(["token", "mint", "--data", str(site.data)]) == 0
        asyncio.run(member(running, capsys.readouterr().out.strip()))
        yield running, site


async def member(server: Server, token: str = "") -> None:
    """It enrols, if it has a token, and does what it is told: one update."""
    async with HttpTransport(server.url) as transport:
        api, device = Api(Signed(transport, MEMBER)), identity.device_id(MEMBER)
        if token:
            await api.enroll(device, "member", token=token)
        while not isinstance(work := await api.ask(device, True), Train):
            pass
        await api.send(wire.TENSORS_TYPE, upload(device, work.version))


async def clock_of(server: Server) -> Clock:
    """What it tells with a 401."""
    async with HttpTransport(server.url) as transport:
        refused = await transport.request("POST", "/v1/work")
    found = identity.clock(refused.headers["WWW-Authenticate"])
    assert found is not None
    return found


@pytest.mark.slow
def test_no_signed_request_is_a_server_error(guarded: tuple[Server, Site]) -> None:
    """What a device says with its own signature gets past the guard, and is answered as well as that of anybody."""
    server, site = guarded
    clock, nonces, seen, codes = asyncio.run(clock_of(server)), itertools.count(), set[int](), set[str]()
    ahead = clock.time - time.time()

    @settings(max_examples=SIGNED, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(requests(["0" * 64, "../admin.sqlite"]))
    def holds(asked: Asked) -> None:
        now = replace(clock, time=int(time.time() + ahead))
        answered = answer(server, signed(asked, now, next(nonces)))
        seen.add(answered.status)
        codes.update(re.findall('"code":"([a-z0-9-]+)"', answered.body.decode(errors="replace")))
        check(asked, answered)

    holds()
    assert seen > {200, 400, 401, 404, 405}
    assert codes > {"bad-message", "not-admin", "wrong-system"}
    assert codes.isdisjoint({"unsigned", "bad-signature", "wrong-time", "replayed", "revoked", "token-needed"})
    asyncio.run(member(server))
    assert "Traceback" not in site.said
