"""The calls of the protocol on both transports, and what HTTP does when the other side misbehaves.

The simulator is a verified fake: the same tests run against it directly and behind a real server on the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from edge_sdk import wire
from edge_sdk.bundle import File
from edge_sdk.errors import AssetError, Refused, SettingsError, Unreachable, WireError
from edge_sdk.protocol import (
    Evaluate,
    Evaluation,
    Finished,
    Measurement,
    Problem,
    Sample,
    Status,
    Train,
    Update,
    Wait,
    Withdraw,
    Withdrawal,
    Work,
)
from edge_sdk.testing import ServerSimulator
from edge_sdk.training.batches import Training
from edge_sdk.transport import Api, HttpTransport, Response
from edge_sdk.wire import JSON_TYPE, MAX_JSON, PROBLEM_TYPE, TENSORS_TYPE
from tests import factories

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

BODY = bytes(range(256)) * 400
HALF = len(BODY) // 2
FILE = File(hashlib.sha256(BODY).hexdigest(), len(BODY))
UPDATE = Update("device", 0, 16, {"loss": 0.5})
UPDATE_BODY = wire.pack(UPDATE, factories.SPEC.start(1))
WORK: list[Work] = [Train(0, "ab" * 32, Training(), None, 1), Evaluate(1, "cd" * 32), Finished(2, "ef" * 32)]


@asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Api]:
    """A real server on the loopback that answers everything with `handler`, and the way to it."""
    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", handler)
    async with TestServer(app) as server, HttpTransport(str(server.make_url("/"))) as transport:
        yield Api(transport)


@asynccontextmanager
async def talking(talk: Talk, patience: float = 60.0) -> AsyncIterator[Api]:
    """A server below HTTP that holds one conversation, and the way to it."""
    over = asyncio.Event()

    async def once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(reader, writer)
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        over.set()

    server = await asyncio.start_server(once, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        async with HttpTransport(f"127.0.0.1:{port}", patience) as transport:
            yield Api(transport)
        await over.wait()


def always(response: Callable[[], web.StreamResponse]) -> Handler:
    async def handle(_: web.Request) -> web.StreamResponse:
        return response()

    return handle


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def in_front_of(simulator: ServerSimulator) -> Handler:
    """The simulator as a web server."""

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": request.headers.get("Content-Type", "")}
        found = await simulator.request(request.method, request.path_qs, await request.read(), headers, limit=1 << 30)
        return web.Response(status=found.status, body=found.body, headers=dict(found.headers))

    return handle


@pytest.fixture
def simulator() -> ServerSimulator:
    return ServerSimulator(factories.manifest(), WORK)


@pytest.fixture(params=["memory", "http"])
async def api(request: pytest.FixtureRequest, simulator: ServerSimulator) -> AsyncIterator[Api]:
    """The protocol's calls, on the simulator itself and through HTTP."""
    if request.param == "memory":
        yield Api(simulator)
    else:
        async with serving(in_front_of(simulator)) as through_http:
            yield through_http


# The calls, on both transports ----------------------------------------------------------------------------------------
async def test_enrolling_gives_the_manifest(api: Api, simulator: ServerSimulator) -> None:
    """The manifest comes back as the value the server holds."""
    assert await api.enroll("device", "kitchen") == simulator.manifest
    assert simulator.requests == [("POST", "/v1/enroll")]


async def test_work_is_handed_out_in_order_and_then_there_is_none(api: Api) -> None:
    """Each question gets the next item; when nothing is left the answer is Wait."""
    assert [await api.ask("device", True) for _ in range(4)] == [*WORK, Wait(1.0)]


async def test_a_device_that_cannot_train_is_not_asked_to(api: Api) -> None:
    """Without torch the first item, a Train, is not handed out."""
    assert await api.ask("device", False) == Wait(1.0)


async def test_results_arrive_as_they_were_sent(api: Api, simulator: ServerSimulator) -> None:
    """Updates and evaluations reach the server as equal values, and each is answered by a receipt of its bytes."""
    evaluation = Evaluation("device", 1, 3, {"accuracy": 0.75})
    first = await api.send(TENSORS_TYPE, UPDATE_BODY)
    second = await api.send(JSON_TYPE, wire.encode(evaluation))

    assert simulator.results == [UPDATE, evaluation]
    assert first.id == hashlib.sha256(UPDATE_BODY).hexdigest()
    assert (first.version, second.version) == (0, 1)


async def test_the_feed_is_read_page_by_page(api: Api, simulator: ServerSimulator) -> None:
    """A page has at most as many lines as asked for, after the one named; both kinds of line come back, and then none."""
    sample = Sample(1, "a", "a great film", "good", (0.25, 0.75), 0.75, 0, "llm", "")
    simulator.feed = [sample, Withdrawal(2, "a"), Withdrawal(3, "b")]

    assert await api.synthetic(0, 2) == [sample, Withdrawal(2, "a")]
    assert await api.synthetic(2, 2) == [Withdrawal(3, "b")]
    assert await api.synthetic(3, 2) == []
    assert simulator.requests[0] == ("GET", "/v1/synthetic?since=0&limit=2")


async def test_a_sample_is_withdrawn_by_its_id() -> None:
    """The operator's word is one message with the id; an id nobody knows is a refusal."""
    seen: list[tuple[str, str, Withdraw]] = []
    unknown = wire.encode(Problem("urn:x", "x", 404, "unknown-sample", "no such sample"))

    async def handle(request: web.Request) -> web.Response:
        seen.append((request.method, request.path, wire.decode(await request.read(), Withdraw)))
        return web.Response(status=404, body=unknown, content_type=PROBLEM_TYPE) if seen[1:] else web.Response(status=200)

    async with serving(handle) as api:
        await api.withdraw("a")
        with pytest.raises(Refused, match="unknown-sample"):
            await api.withdraw("b")

    assert seen == [("POST", "/v1/synthetic/withdraw", Withdraw(id)) for id in ("a", "b")]


async def test_a_refusal_has_code_sentence_and_status(api: Api, simulator: ServerSimulator) -> None:
    """What the server refuses arrives as Refused with everything the server said, and once only."""
    simulator.refusals.append(WireError("too-stale", "ask for work", 409))
    with pytest.raises(Refused) as caught:
        await api.send(TENSORS_TYPE, UPDATE_BODY)
    refused = caught.value

    assert (refused.code, refused.detail, refused.status, refused.retry_after) == ("too-stale", "ask for work", 409, None)
    assert simulator.results == []
    assert (await api.send(TENSORS_TYPE, UPDATE_BODY)).version == 0


async def test_bytes_that_are_no_update_are_refused(api: Api, simulator: ServerSimulator) -> None:
    """A server checks what it gets with the same reader, and its reason arrives."""
    with pytest.raises(Refused) as caught:
        await api.send(TENSORS_TYPE, b"no tensors at all")
    assert caught.value.code == "bad-tensors"
    assert simulator.results == []


async def test_a_blob_is_fetched_whole(api: Api, simulator: ServerSimulator, tmp_path: Path) -> None:
    """A blob lands under its name with its bytes, and nothing half-done lies beside it."""
    assert simulator.keep(BODY) == FILE.sha256
    await api.blob(FILE, tmp_path / "model.onnx")

    assert names(tmp_path) == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == BODY
    assert await api.blob_bytes(FILE.sha256, len(BODY)) == BODY


async def test_an_empty_blob_is_fetched_too(api: Api, simulator: ServerSimulator, tmp_path: Path) -> None:
    """A file of no bytes is a file."""
    await api.blob(File(simulator.keep(b""), 0), tmp_path / "empty")

    assert (tmp_path / "empty").read_bytes() == b""


async def test_a_blob_the_server_does_not_have_is_refused(api: Api, tmp_path: Path) -> None:
    """A name nobody knows is Refused, in memory and on disk, and leaves no file."""
    with pytest.raises(Refused, match="http-404"):
        await api.blob(FILE, tmp_path / "model.onnx")
    with pytest.raises(Refused, match="http-404"):
        await api.blob_bytes(FILE.sha256, len(BODY))
    assert names(tmp_path) == []


async def test_a_blob_over_its_limit_is_not_read(api: Api, simulator: ServerSimulator) -> None:
    """One byte over the limit is Unreachable, the limit itself is fine."""
    sha256 = simulator.keep(BODY)

    assert await api.blob_bytes(sha256, limit=len(BODY)) == BODY
    with pytest.raises(Unreachable, match=f"longer than {len(BODY) - 1} bytes"):
        await api.blob_bytes(sha256, limit=len(BODY) - 1)


@pytest.mark.parametrize("body", [b"", BODY[:-1], BODY[:-1] + b"\0", BODY + b"\0"], ids=["none", "short", "changed", "long"])
async def test_a_damaged_blob_is_refused_and_fetched_again(
    api: Api, simulator: ServerSimulator, tmp_path: Path, body: bytes
) -> None:
    """Bytes that are not those of the hash never get the file's name, and the next try brings the right ones."""
    simulator.blobs[FILE.sha256] = body
    with pytest.raises((AssetError, Unreachable), match=r"damaged|longer than"):
        await api.blob(FILE, tmp_path / "model.onnx")
    with pytest.raises((AssetError, Unreachable), match=r"damaged|longer than"):
        await api.blob_bytes(FILE.sha256, len(BODY))
    assert not (tmp_path / "model.onnx").exists()
    simulator.blobs[FILE.sha256] = BODY
    await api.blob(FILE, tmp_path / "model.onnx")

    assert (tmp_path / "model.onnx").read_bytes() == BODY


async def test_a_simulator_that_is_offline_is_unreachable(simulator: ServerSimulator) -> None:
    """Offline the simulator does nothing but count the tries; back online it goes on where it was."""
    simulator.offline = True
    with pytest.raises(Unreachable):
        await Api(simulator).ask("device", True)
    simulator.offline = False

    assert await Api(simulator).ask("device", True) == WORK[0]
    assert len(simulator.requests) == 2


# Resuming a download --------------------------------------------------------------------------------------------------
async def test_a_cut_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """After a lost connection the next try asks for the missing bytes only, and the file is whole."""
    to, part = tmp_path / "model.onnx", tmp_path / "model.onnx.part"
    ranges: list[str | None] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        ranges.append(request.headers.get("Range"))
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206 if start else 200, headers={"Content-Length": str(len(BODY) - start)})
        await response.prepare(request)
        await response.write(BODY[start:HALF] if start < HALF else BODY[start:])
        if start < HALF:
            await written(part, HALF)
            assert request.transport is not None
            request.transport.abort()
        return response

    async with serving(handle) as api:
        with pytest.raises(Unreachable):
            await api.blob(FILE, to)
        assert part.read_bytes() == BODY[:HALF]
        assert not to.exists()
        await api.blob(FILE, to)

    assert ranges == [None, f"bytes={HALF}-"]
    assert to.read_bytes() == BODY
    assert not part.exists()


async def written(path: Path, size: int) -> None:
    """Returns when the file has `size` bytes."""
    while not path.exists() or path.stat().st_size < size:  # noqa: ASYNC110, ASYNC240  # another library writes it
        await asyncio.sleep(0)


async def test_a_server_that_cannot_resume_sends_everything(tmp_path: Path) -> None:
    """A whole answer to a question for the rest replaces what was there, instead of being added to it."""
    to = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.part").write_bytes(b"x" * HALF)
    async with serving(always(lambda: web.Response(body=BODY))) as api:
        await api.blob(FILE, to)

    assert to.read_bytes() == BODY


async def test_a_rest_that_does_not_fit_is_thrown_away(tmp_path: Path) -> None:
    """A part of another file makes the whole wrong: it is removed, so that the next try starts at the beginning."""
    to, part = tmp_path / "model.onnx", tmp_path / "model.onnx.part"
    part.write_bytes(b"x" * HALF)
    (tmp_path / "served").write_bytes(BODY)
    async with serving(always(lambda: web.FileResponse(tmp_path / "served"))) as api:
        with pytest.raises(AssetError, match=r"model.onnx arrived damaged .* it is fetched again"):
            await api.blob(FILE, to)
        assert not part.exists()
        await api.blob(FILE, to)

    assert to.read_bytes() == BODY


@pytest.mark.parametrize("surplus", [b"", b"surplus"])
async def test_a_part_that_is_long_enough_is_checked_without_asking(tmp_path: Path, surplus: bytes) -> None:
    """A download whose process died before the rename needs no network; a part that is too long is removed."""
    to, part = tmp_path / "model.onnx", tmp_path / "model.onnx.part"
    part.write_bytes(BODY + surplus)
    simulator = ServerSimulator(factories.manifest())
    if surplus:
        with pytest.raises(AssetError, match="damaged"):
            await Api(simulator).blob(FILE, to)
    else:
        await Api(simulator).blob(FILE, to)

    assert simulator.requests == []
    assert not part.exists()
    assert to.exists() == (not surplus)


async def test_a_refused_download_does_not_touch_the_part(tmp_path: Path) -> None:
    """An error's own body is never mistaken for the file's."""
    part = tmp_path / "model.onnx.part"
    part.write_bytes(BODY[:HALF])
    problem = Problem("urn:x", "x", 404, "unknown-blob", "there is no blob of this name")
    async with serving(always(lambda: web.Response(status=404, body=wire.encode(problem), content_type=PROBLEM_TYPE))) as api:
        with pytest.raises(Refused, match="unknown-blob"):
            await api.blob(FILE, tmp_path / "model.onnx")

    assert part.read_bytes() == BODY[:HALF]


# Problem documents ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("status", "header", "retry_after"),
    [
        (409, None, None),
        (429, "7", 7.0),
        (503, "120", 120.0),
        (503, None, 0.0),
        (500, None, 0.0),
        (503, "Wed, 21 Oct 2026 07:28:00 GMT", 0.0),
        (409, "-5", None),
        (409, "1.5", None),
        (409, "", None),
        (409, "²", None),
    ],
)
async def test_a_problem_says_when_to_return(status: int, header: str | None, retry_after: float | None) -> None:
    """`Retry-After` in seconds counts; without it a server's own failure may be tried again, and a refusal never."""
    problem = Problem("urn:x", "x", status, "some-code", "some sentence")
    headers = {"Content-Type": f"{PROBLEM_TYPE}; charset=utf-8"} | ({"Retry-After": header} if header is not None else {})
    async with serving(always(lambda: web.Response(status=status, body=wire.encode(problem), headers=headers))) as api:
        with pytest.raises(Refused) as caught:
            await api.ask("device", True)

    refused = caught.value
    assert (refused.code, refused.detail, refused.status) == ("some-code", "some sentence", status)
    assert refused.retry_after == retry_after


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"\xff" * 100, b'{"type":1}'])
async def test_a_problem_that_cannot_be_read_is_no_refusal(body: bytes) -> None:
    """A garbled problem document decides nothing: it is Unreachable, so that no result is dropped for it."""
    async with serving(always(lambda: web.Response(status=409, body=body, content_type=PROBLEM_TYPE))) as api:
        with pytest.raises(Unreachable, match="error could not be read"):
            await api.send(TENSORS_TYPE, UPDATE_BODY)


# Something else answers -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("status", [204, 302, 400, 401, 404, 409, 416, 500, 502])
async def test_an_answer_without_a_problem_is_not_our_server(status: int) -> None:
    """A captive portal or a wrong port is Unreachable whatever its status: it must not make a device drop its result."""
    async with serving(always(lambda: web.Response(status=status, headers={"Location": "/elsewhere"}))) as api:
        with pytest.raises(Unreachable, match=f"HTTP {status} without a problem document: is this an edge-server"):
            await api.send(TENSORS_TYPE, UPDATE_BODY)


async def test_redirects_are_not_followed() -> None:
    """A device sends its result nowhere but to the server it was given."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        raise web.HTTPTemporaryRedirect("/elsewhere")

    async with serving(handle) as api:
        with pytest.raises(Unreachable, match="HTTP 307"):
            await api.send(TENSORS_TYPE, UPDATE_BODY)

    assert asked == ["/v1/results"]


@pytest.mark.parametrize(
    "body", [b"<html>log in first</html>", b"", b"{}", b'{"verb":"dance"}', b'{"verb":"wait","seconds":"1"}']
)
async def test_a_good_status_with_a_strange_body_is_a_wire_error(body: bytes) -> None:
    """A page that says 200 is still no work."""
    async with serving(always(lambda: web.Response(body=body, content_type="text/html"))) as api:
        with pytest.raises(WireError, match="bad-message"):
            await api.ask("device", True)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
    ids=["silence", "ssh", "short", "bad chunk", "bad gzip", "negative length"],
)
async def test_bytes_that_are_no_whole_http_answer_are_unreachable(answer: bytes) -> None:
    """Whatever another program says on the port, the device hears `Unreachable` and may try again."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(answer)

    async with talking(talk) as api:
        with pytest.raises(Unreachable, match=r"no answer from http://127\.0\.0\.1:\d+ .*is the server running"):
            await api.ask("device", True)


# Limits and reach -----------------------------------------------------------------------------------------------------
async def test_an_answer_over_the_limit_is_not_read_to_its_end() -> None:
    """A control answer may have MAX_JSON bytes; a server that never stops talking is left, not listened to."""
    sent = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:  # until the client hangs up
            await response.write(bytes(1 << 16))
            sent += 1 << 16

    async with serving(handle) as api:
        with pytest.raises(Unreachable, match=f"longer than {MAX_JSON} bytes"):
            await api.ask("device", True)

    assert sent < 1 << 26


async def test_a_closed_port_is_unreachable() -> None:
    """Where nobody listens, the address is named and a hint given."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with HttpTransport(f"http://127.0.0.1:{port}/") as transport:
        with pytest.raises(Unreachable, match=rf"no answer from http://127\.0\.0\.1:{port} .*is the server running"):
            await Api(transport).ask("device", True)


@pytest.mark.parametrize(
    "server",
    ["", "http://", "http://[::1", "http://:8440", "http://127.0.0.1:99999", "ftp://127.0.0.1", "127.0.0.1:x", "nonsense", "a/b"],
)
def test_an_address_that_is_none_is_a_setting_to_mend(server: str) -> None:
    """Waiting for such a server would be waiting for ever."""
    with pytest.raises(SettingsError, match=r"is not a server's URL, e\.g\."):
        HttpTransport(server)


async def test_a_server_that_says_nothing_is_given_up() -> None:
    """After the time allowed for a read the server is Unreachable."""

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()  # until the client hangs up

    async with talking(silent, patience=0.05) as api:
        with pytest.raises(Unreachable, match="no answer from"):
            await api.ask("device", True)


async def test_requests_carry_their_type_and_body() -> None:
    """What is sent arrives byte for byte, with its type, below the server's own path."""
    seen: list[tuple[str, str, str, bytes]] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append((request.method, request.path, request.content_type, await request.read()))
        return web.json_response({"id": "x", "version": 3})

    app = web.Application(client_max_size=1 << 24)
    app.router.add_route("*", "/{path:.*}", handle)
    async with TestServer(app) as server, HttpTransport(f"127.0.0.1:{server.port}/below/") as transport:
        receipt = await Api(transport).send(TENSORS_TYPE, UPDATE_BODY)

    assert seen == [("POST", "/below/v1/results", TENSORS_TYPE, UPDATE_BODY)]
    assert receipt.version == 3


async def test_status_may_be_long() -> None:
    """An operator's view of a long run is larger than any control message, and still read."""
    measured = Measurement("update", "d" * 32, 1, 16, {"loss": 0.5})
    status = Status("lpfl", 3, "ab" * 32, 1, False, (), (measured,) * 15_000)
    body = wire.encode(status)
    assert len(body) > MAX_JSON
    async with serving(always(lambda: web.Response(body=body, content_type=JSON_TYPE))) as api:
        assert await api.status() == status


async def test_a_transport_is_a_context_manager() -> None:
    """Used without `async with`, the transport says so; and an answer's parts are what the server sent."""
    with pytest.raises(AssertionError, match="use `async with"):
        await HttpTransport("127.0.0.1").request("GET", "/")
    async with TestServer(web.Application()) as server, HttpTransport(str(server.make_url("/"))) as transport:
        response = await transport.request("GET", "/")

    assert (response.status, response.body) == (404, b"404: Not Found")
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert Response(200) == Response(200, b"", {})
