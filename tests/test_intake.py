"""Bytes on their way into the server: a bound, 503 over it, and everything given back, however a request ends."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import wire
from edge_sdk.cohort import MAX_MEMBERS, SEALED, SHARE, Advertise, Reveal, Shares
from edge_sdk.errors import Refused, SettingsError, WireError
from edge_sdk.protocol import PROTOCOL, Ask, Enroll, Evaluation, Trained, Withdraw
from edge_sdk.transport import Api, HttpTransport
from edge_sdk.wire import JSON_TYPE, MAX_EXAMPLES, MAX_JSON, MAX_METRICS, TENSORS_TYPE, encode
from edge_server import cli, handlers
from edge_server.app import create_app
from edge_server.handlers import MAX_CALL, MAX_REPORT
from edge_server.intake import RETRY_SECONDS, Intake
from tests import server_helpers as helpers
from tests.server_helpers import Running, upload

BODY = upload("d1", 0)


# The rule -------------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=20))
def test_what_is_held_never_exceeds_the_limit_and_is_given_back(parts: list[tuple[int, int]]) -> None:
    """Each part of each of four bodies gets in exactly if it fits beside what is there; in the end nothing is held."""
    intake = Intake(100)
    with contextlib.ExitStack() as inside:
        bodies = [inside.enter_context(intake.room(0)) for _ in range(4)]
        for body, size in parts:
            before = intake.held
            if before + size <= 100:
                bodies[body](size)
                assert intake.held == before + size
            else:
                with pytest.raises(WireError) as refused:
                    bodies[body](size)
                assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("busy", 503, RETRY_SECONDS)
                assert intake.held == before
    assert intake.held == 0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=20), st.integers(0, 60))
def test_what_a_device_has_there_never_exceeds_its_part(parts: list[tuple[int, int]], promised: int) -> None:
    """Two bodies are one device's, which may have 50 of 100 bytes, one another's, one nobody's: only what its own hold counts."""
    intake, senders, own = Intake(100), ("a", "a", "b", None), dict.fromkeys(("a", "b", None), 0)
    with contextlib.ExitStack() as inside:
        bodies = [inside.enter_context(intake.room(0, sender, 50)) for sender in senders]
        for body, size in parts:
            sender = senders[body]
            if sender is not None and own[sender] + size > 50:
                with pytest.raises(WireError) as refused:
                    bodies[body](size)
                assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("too-many", 429, RETRY_SECONDS)
            elif sum(own.values()) + size > 100:
                with pytest.raises(WireError, match=r"^busy: "):
                    bodies[body](size)
            else:
                bodies[body](size)
                own[sender] += size
            assert intake.held == sum(own.values())
        if own["a"] + promised > 50:
            with pytest.raises(WireError, match=r"^too-many: "), intake.room(promised, "a", 50):
                pass
    assert intake == Intake(100)


@given(st.integers(0, 100), st.integers(0, 150))
def test_a_promise_is_refused_where_it_cannot_fit_and_takes_no_room(held: int, promised: int) -> None:
    """However large: who promises and sends nothing keeps nobody out."""
    intake = Intake(100, held)
    if held + promised > 100:
        with pytest.raises(WireError, match="as much as it can hold"), intake.room(promised):
            pass
    else:
        with intake.room(promised):
            assert intake.held == held
    assert intake.held == held


def test_a_failure_gives_back_too() -> None:
    intake = Intake(100)
    with contextlib.suppress(ValueError), intake.room(100) as take:
        take(100)
        raise ValueError

    assert intake.held == 0


def test_a_bound_below_the_largest_body_is_a_setting_to_mend() -> None:
    """Such an upload would be refused for ever; the message names the smallest bound there is."""
    for megabytes in (2.0, float("nan"), float("inf")):
        with pytest.raises(SettingsError, match="--max-in-flight-mb must be at least 3"):
            cli._intake(megabytes, 2_100_000)
    assert cli._intake(2.1, 2_100_000) == Intake(2_100_000)


# Over sockets ---------------------------------------------------------------------------------------------------------
@asynccontextmanager
async def running(data: Path, intake: Intake) -> AsyncIterator[Running]:
    """A server with this bound that knows the devices d1 and d2."""
    ledger = helpers.open_ledger(data)
    async with TestClient(TestServer(create_app(ledger, intake=intake))) as client:
        made = Running(client, ledger, data)
        await made.enroll("d1", "d2")
        yield made


async def begin(
    server: Running, head: str, body: bytes = b"", path: str = "/v1/results"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A request that is not over."""
    reader, writer = await asyncio.open_connection(server.client.host, server.client.port)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\n{head}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_over_the_bound_a_body_is_not_read(tmp_path: Path) -> None:
    """One upload stands still; the next hears 503 and when to return before it has sent a byte, and is taken later."""
    intake = Intake(len(BODY) + 9)
    async with running(tmp_path, intake) as server:
        length = f"Content-Type: {TENSORS_TYPE}\r\nContent-Length: {len(BODY)}"
        first, writer = await begin(server, length, BODY[:10])
        await helpers.until(lambda: intake.held == 10)

        second, late = await begin(server, length)
        head = await second.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 ")
        assert b"\r\nRetry-After: 1\r\n" in head
        assert b'"code":"busy"' in await second.readuntil(b"}")
        assert intake.held == 10

        writer.write(BODY[10:])
        assert (await first.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
        await helpers.until(lambda: intake.held == 0)
        await server.send(upload("d2", 0))
        writer.close()
        late.close()


SMALL = [*((path, MAX_CALL) for path in ("/v1/enroll", "/v1/work", "/v1/synthetic/withdraw")), ("/v1/results", MAX_REPORT)]


@pytest.mark.parametrize(("path", "limit"), SMALL)
async def test_no_message_holds_more_than_one_of_its_kind_needs(tmp_path: Path, path: str, limit: int) -> None:
    """A longer one is refused for what it claims, or at the byte that is too much; as long a one is read."""
    intake = Intake()
    async with running(tmp_path, intake) as server:
        kind, chunk = f"Content-Type: {JSON_TYPE}\r\n", b"%x\r\n" % (limit + 1) + bytes(limit + 1)
        for head, body in ((f"Content-Length: {limit + 1}", b""), ("Transfer-Encoding: chunked", chunk)):
            reader, writer = await begin(server, kind + head, body, path)
            async with asyncio.timeout(30):
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 413 ")
            assert intake.held <= limit
            writer.close()
        reader, writer = await begin(server, f"{kind}Content-Length: {limit}", b" " * limit, path)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        writer.close()


def test_the_longest_messages_are_let_in() -> None:
    """With every character of every name escaped, as some clients write JSON."""
    id, face = "a" * 64, "\N{GRINNING FACE}"
    ids = [f"{number:064}" for number in range(MAX_MEMBERS)]
    metrics = {chr(ord(face) + number) + face * (MAX_METRICS - 1): -sys.float_info.min for number in range(MAX_METRICS)}
    shares = dict.fromkeys(ids, bytes(SHARE))
    calls = [Enroll(PROTOCOL, id, face * 64, "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 85, "0" * 41), Ask(id, False), Withdraw(id)]
    reports = [
        *(kind(id, 2**62, MAX_EXAMPLES, metrics) for kind in (Evaluation, Trained)),
        Advertise(id, id, bytes(32), bytes(32)),
        Shares(id, id, dict.fromkeys(ids, bytes(SEALED))),
        Reveal(id, id, shares, shares),
    ]

    def longest(messages: Sequence[msgspec.Struct]) -> int:
        return max(len(json.dumps(msgspec.to_builtins(message))) for message in messages)

    assert longest(calls) <= MAX_CALL
    assert longest(reports) <= MAX_REPORT


async def test_silent_promises_keep_nobody_out(tmp_path: Path) -> None:
    """Thirty connections that promise a whole upload, or as much as a chunked one may have, and send nothing."""
    intake = Intake(len(BODY))
    async with running(tmp_path, intake) as server:
        heads = ("Transfer-Encoding: chunked", "Content-Encoding: gzip\r\nContent-Length: 40", f"Content-Length: {len(BODY)}")
        silent = [await begin(server, f"Content-Type: {TENSORS_TYPE}\r\n{head}") for head in heads * 10]

        await server.send(BODY)

        for _, writer in silent:
            writer.close()


async def test_what_a_compressed_body_becomes_is_what_counts(tmp_path: Path) -> None:
    """Some hundred bytes on the wire, of which more come out than there is room for."""
    intake = Intake(4000)
    async with running(tmp_path, intake) as server:
        body, headers = gzip.compress(bytes(5000)), {"Content-Type": TENSORS_TYPE, "Content-Encoding": "gzip"}
        assert len(body) < 4000 < 5000 < server.ledger.body_limit
        answer = await server.client.post("/v1/results", data=body, headers=headers)

        assert (answer.status, (await answer.json(content_type=None))["code"], intake.held) == (503, "busy", 0)


@pytest.mark.parametrize("sent", [10, 100])
async def test_a_device_that_hangs_up_gives_back(tmp_path: Path, sent: int) -> None:
    """In the middle."""
    intake = Intake()
    async with running(tmp_path, intake) as server:
        _, writer = await begin(server, f"Content-Type: {TENSORS_TYPE}\r\nContent-Length: {len(BODY)}", BODY[:sent])
        await helpers.until(lambda: intake.held == sent)
        writer.transport.abort()
        await helpers.until(lambda: intake.held == 0)
        assert not list((tmp_path / "blobs").glob("incoming-*"))


async def test_every_answer_gives_back(tmp_path: Path) -> None:
    """Taken, taken again, refused for what it holds, for its size, for its type, and a question."""
    intake = Intake()
    async with running(tmp_path, intake) as server:
        sent = (
            (BODY, TENSORS_TYPE),
            (BODY, TENSORS_TYPE),
            (b"junk", TENSORS_TYPE),
            (bytes(MAX_JSON + 1), JSON_TYPE),
            (b"", "x/y"),
        )
        found = []
        for body, kind in sent:
            answer = await server.client.post("/v1/results", data=body, headers={"Content-Type": kind})
            found.append(answer.status)
            assert intake.held == 0
        assert found == [200, 200, 400, 413, 415]
        await server.client.post("/v1/work", data=encode(Ask("d1", True)))
        assert intake.held == 0


async def test_a_body_that_stops_is_given_up_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes are for slow lines; from a silent one nothing comes for a minute, and that is enough."""
    monkeypatch.setattr(handlers, "IDLE_SECONDS", 0.05)
    intake = Intake()
    async with running(tmp_path, intake) as server:
        reader, writer = await begin(server, f"Content-Type: {TENSORS_TYPE}\r\nContent-Length: {len(BODY)}", BODY[:10])
        async with asyncio.timeout(30):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 408 ")
        assert intake.held == 0
        writer.close()


async def test_the_devices_client_reads_when_to_return(tmp_path: Path) -> None:
    """While the server is full even a question is too much; the refusal says so in the client's words."""
    intake = Intake(MAX_JSON)
    async with running(tmp_path, intake) as server, HttpTransport(str(server.client.make_url("/"))) as transport:
        with intake.room(MAX_JSON) as take:
            take(MAX_JSON)
            for call in (Api(transport).send(wire.TENSORS_TYPE, BODY), Api(transport).ask("d1", True)):
                with pytest.raises(Refused) as refused:
                    await call
                assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("busy", 503, 1.0)
        assert (await Api(transport).send(wire.TENSORS_TYPE, BODY)).version == 0
