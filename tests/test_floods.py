"""Hostile bytes on real sockets: each gets one clear refusal, none gets memory, and an honest device hardly notices."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import struct
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edge_sdk import wire
from edge_sdk.protocol import Train
from edge_sdk.transport import Api, HttpTransport
from tests.server_helpers import settings, tensors, upload, with_message
from tests.test_server_process import Server, Site

MB = 1 << 20
LITTLE = 64 * MB
CROWD = 200
SOON = 5.0  # seconds
BAD = "bad-message"
JSON, TENSORS = f"Content-Type: {wire.JSON_TYPE}", f"Content-Type: {wire.TENSORS_TYPE}"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Target:
    """A server, and the bytes of memory it had when it began."""

    server: Server
    began_with: int

    @property
    def url(self) -> str:
        return self.server.url

    def grown(self) -> int:
        """By how many bytes the process has been larger than at the start, at most."""
        return memory(self.server, "VmHWM") - self.began_with


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    site = Site(tmp_path_factory.mktemp("floods"), settings(buffer_size=1))
    with site.serve() as running:
        yield Target(running, memory(running, "VmRSS"))
    assert "Traceback" not in site.said


def memory(server: Server, kind: str) -> int:
    """Bytes that the process has now (`VmRSS`), or has had at most (`VmHWM`)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path(f"/proc/{server.process.pid}/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


async def honest(server: Target) -> None:
    """A device enrols, is told to train, sends its update, and has its receipt soon."""
    async with HttpTransport(server.url, timeout=SOON) as transport:
        api, name = Api(transport), f"honest-{time.monotonic_ns()}"
        await api.enroll(name, "name")
        work = await api.ask(name, True)
        assert isinstance(work, Train)
        receipt = await api.send(wire.TENSORS_TYPE, upload(name, work.version))
        while (await api.status()).version <= receipt.version:
            pass


async def opened(server: Target) -> Connection:
    at = urlsplit(server.url)
    return await asyncio.open_connection(at.hostname, at.port)


def request(*headers: str, path: str = "/v1/results", body: bytes = b"", length: int | None = None) -> bytes:
    """A request by hand; `length` is what it claims to be long, the truth by default, -1 for nothing said."""
    said = [] if length == -1 else [f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", *headers, *said, "", ""]).encode() + body


async def told(server: Target, sent: bytes) -> tuple[int, str]:
    """Status and code of the answer; "" where the server's HTTP library has refused it by itself."""
    reader, writer = await opened(server)
    try:
        async with asyncio.timeout(SOON):
            writer.write(sent)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            size = re.search(r"(?i)content-length: (\d+)", head)
            body = await reader.readexactly(int(size[1])) if size else b""
    finally:
        writer.close()
    status = int(head.split()[1])
    return status, json.loads(body)["code"] if wire.PROBLEM_TYPE in head else ""


# Those who come and stay ----------------------------------------------------------------------------------------------
@asynccontextmanager
async def crowd(server: Target, sent: bytes, byte_by_byte: bool) -> AsyncIterator[list[Connection]]:
    """Connections that have sent so much and no more, all at once."""
    found = [await opened(server) for _ in range(CROWD)]
    try:
        for piece in [sent[i : i + 1] for i in range(len(sent))] if byte_by_byte else [sent]:
            for _, writer in found:
                writer.write(piece)
                await writer.drain()
        yield found
    finally:
        for _, writer in found:
            writer.close()


@pytest.mark.parametrize(
    ("sent", "byte_by_byte"),
    [
        (b"", False),
        (request(TENSORS, length=700)[:-2], True),
        (request(TENSORS, length=700) + bytes(500), False),
        (request(JSON, path="/v1/work", length=1 << 20) + b'{"device": "', False),
    ],
    ids=["nothing", "headers byte by byte", "an update without its end", "a message without its end"],
)
async def test_two_hundred_that_never_finish_stop_nobody(server: Target, sent: bytes, byte_by_byte: bool) -> None:
    """An honest device has its answers within seconds while they are there, and the server takes little memory for them."""
    async with crowd(server, sent, byte_by_byte) as connections:
        began = time.monotonic()
        await honest(server)

        assert time.monotonic() - began < SOON
        assert server.grown() < LITTLE
        assert not any(reader.at_eof() for reader, _ in connections)


async def test_while_headers_trickle_others_are_answered(server: Target) -> None:
    """Two hundred send a byte of their headers in turn, all the time, until an honest device has its receipt."""
    ended = asyncio.Event()

    async def trickle() -> None:
        async with crowd(server, request(TENSORS)[:-2], False) as connections:
            for byte in b"X-Slow: " + bytes(1000 * b"a"):
                for _, writer in connections:
                    writer.write(bytes([byte]))
                await asyncio.sleep(0)  # the honest device is in the same loop
                if ended.is_set():
                    return
        raise AssertionError("the honest device took longer than all that")

    async with asyncio.TaskGroup() as group:
        group.create_task(trickle())
        await asyncio.wait_for(honest(server), SOON)
        ended.set()


# What is refused ------------------------------------------------------------------------------------------------------
def deep(depth: int) -> bytes:
    return b'{"device": ' + b"[" * depth + b"]" * depth + b', "can_train": true}'


def million() -> bytes:
    """The header of a million empty tensors."""
    return b"{" + b",".join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(10**6)) + b"}"


REFUSED: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "a header of 100 kB": (lambda: request(JSON, "X: " + "a" * 100_000, body=b"{}"), 400, ""),
    "10,000 headers": (lambda: request(JSON, *(f"X-{i}: a" for i in range(10_000)), body=b"{}"), 400, ""),
    "a path of 100 kB": (lambda: request(JSON, path="/" + "a" * 100_000, body=b"{}"), 400, ""),
    "both lengths": (lambda: request(JSON, "Transfer-Encoding: chunked", body=b"0\r\n\r\n"), 400, ""),
    "two lengths": (lambda: request(JSON, "Content-Length: 3", body=b"{}"), 400, ""),
    "a length below zero": (lambda: request(JSON, "Content-Length: -2", length=-1, body=b"{}"), 400, ""),
    "less than it says": (lambda: request(JSON, path="/v1/work", length=1, body=b'{"device": "d"}'), 400, ""),
    "a chunk of 2^72": (lambda: request(JSON, "Transfer-Encoding: chunked", length=-1, body=b"f" * 18 + b"\r\n{}"), 400, ""),
    "2^60 bytes of header": (lambda: request(TENSORS, body=struct.pack("<Q", 1 << 60) + b"{}" * 40), 400, "bad-tensors"),
    "a million tensors": (lambda: request(TENSORS, body=tensors(million())), 413, "too-large"),
    "4,097 tensors": (lambda: request(TENSORS, body=tensors({str(i): {} for i in range(4097)})), 400, "bad-tensors"),
    "depth in a message": (lambda: request(JSON, path="/v1/work", body=deep(2000)), 400, BAD),
    "depth in an update": (lambda: request(TENSORS, body=with_message(deep(10**5).decode())), 400, BAD),
    "an endless number": (lambda: message(num_examples="9" * 60_000), 400, BAD),
    "an endless version": (lambda: message(version="1" + "0" * 5000), 400, BAD),
    "a number beyond double": (lambda: message(metrics='{"a": 1e999}'), 400, BAD),
    "not a number": (lambda: message(metrics='{"a": NaN}'), 400, BAD),
    "infinity": (lambda: message(metrics='{"a": -Infinity}'), 400, BAD),
    "a gigabyte in gzip": (lambda: request(JSON, "Content-Encoding: gzip", body=packed(31)), 413, "too-large"),
    "a gigabyte in deflate": (lambda: request(TENSORS, "Content-Encoding: deflate", body=packed(15)), 413, "too-large"),
    "gzip in gzip": (lambda: request(JSON, "Content-Encoding: gzip", body=gzip.compress(gzip.compress(b"{}"))), 400, BAD),
    "no encoding there is": (lambda: request(JSON, "Content-Encoding: zip", body=b"{}"), 400, BAD),
}


def message(**fields: str) -> bytes:
    """An evaluation; `fields` are JSON in the place of what is right."""
    right = {"result": '"evaluation"', "device": '"d"', "version": "0", "num_examples": "1", "metrics": "{}", **fields}
    return request(JSON, body=("{" + ", ".join(f'"{name}": {value}' for name, value in right.items()) + "}").encode())


def packed(form: int) -> bytes:
    """A gigabyte of zeros, in less than a message may have; zlib's `wbits` says how it is packed."""
    pack = zlib.compressobj(9, wbits=form)
    found = b"".join([*(pack.compress(bytes(16 * MB)) for _ in range(64)), pack.flush()])
    assert len(found) < wire.MAX_JSON
    return found


@pytest.mark.parametrize("what", [pytest.param(what, marks=pytest.mark.slow if "gigabyte" in what else ()) for what in REFUSED])
def test_hostile_bytes_get_one_clear_refusal(server: Target, what: str) -> None:
    """A 4xx within seconds, with its code where it is HTTP at all; the server lives, and has not grown."""
    make, status, code = REFUSED[what]

    assert asyncio.run(told(server, make())) == (status, code)
    asyncio.run(honest(server))
    assert server.grown() < LITTLE
