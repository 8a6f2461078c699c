"""Devices without a model that push to a real server: enrolled, signed, delivered by the SDK's own session and transport.

What they have learned is 1e-3 everywhere; all else is a device's life: enrol, ask, fetch the version, send, ask again.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import numpy as np

from edge_sdk import codec, identity, session, wire
from edge_sdk.adapters import Array, add
from edge_sdk.errors import Refused, Unreachable
from edge_sdk.protocol import Evaluate, Evaluation, Finished, Manifest, Train, Update, Wait
from edge_sdk.session import Session
from edge_sdk.signed import Signed
from edge_sdk.transport import Api, HttpTransport, Response, Transport
from edge_sdk.wire import MAX_JSON, TENSORS_TYPE

STEP = 1e-3
EXAMPLES = 32
SECONDS = 240.0  # after which a device gives up, and the bench with it


@dataclass(frozen=True)
class Place:
    """Where a device finds its server, and what it was given for it.

    Args:
        ca: file of the server's certificate; None for plain HTTP. token: "" where the server admits everybody.
        counted: count the bytes on the wire.
    """

    url: str
    name: str
    ca: Path | None = None
    token: str = ""
    counted: bool = False

    @property
    def seed(self) -> bytes:
        """The device's private key: the same for the same name, since nobody else is to be kept out."""
        return hashlib.sha256(self.name.encode()).digest()

    @property
    def device(self) -> str:
        return identity.device_id(self.seed) if self.token else self.name

    def signing(self, transport: Transport) -> Transport:
        return Signed(transport, self.seed) if self.token else transport


@dataclass
class Bytes:
    """On the wire, TLS and headers and all: from a device and to it."""

    up: int = 0
    down: int = 0


def push(place: Place) -> Bytes:
    """Takes part until the run is over. Raises: TimeoutError, Refused: it does not come to an end."""
    return asyncio.run(_push(place))


async def _push(place: Place) -> Bytes:
    async with asyncio.timeout(SECONDS), _relayed(place) as (url, counted), HttpTransport(url, ca=place.ca) as http:
        api = Api(place.signing(http))
        manifest = await api.enroll(place.device, place.name, token=place.token)
        pusher = Pusher(api, place.device, manifest)
        state, action = session.step(Session(session.AskForWork()), session.Started(pending=False), 0.0)
        while not isinstance(action, session.Stop):
            state, action = session.step(state, await pusher.carry_out(action), random.random())  # noqa: S311  # spreads retries
        return counted


@dataclass
class Pusher:
    """Carries out what the SDK's session decides, as `edge_sdk/agent.py` does, but for a model and a disk."""

    api: Api
    device: str
    manifest: Manifest
    outbox: tuple[str, bytes] = ("", b"")
    residual: Mapping[str, Array] = field(default_factory=dict)

    async def carry_out(self, action: session.Action) -> session.Event:
        try:
            match action:
                case session.AskForWork():
                    return session.Assigned(await self.api.ask(self.device, can_train=True))
                case session.Do(work):
                    await self._do(work)
                    return session.Worked()
                case session.Send():
                    await self.api.send(*self.outbox)
                    return session.Delivered()
                case session.Sleep(seconds):
                    await asyncio.sleep(seconds)
                    return session.Woke()
                case _:
                    raise RuntimeError(f"the server refused what a device must be able to do: {action}")
        except Unreachable:
            return session.NoAnswer()
        except Refused as error:
            if error.retry_after is not None or error.status in (401, 429):
                return session.NoAnswer(error.retry_after or 0.0)
            return session.Rejected(error.code)

    async def _do(self, work: object) -> None:
        if isinstance(work, Evaluate):
            self.outbox = wire.JSON_TYPE, wire.encode(Evaluation(self.device, work.version, 0, {}))
            return
        if not isinstance(work, Train | Finished):
            raise RuntimeError(f"a run that only averages asks for {type(work).__name__}")
        shapes = self.manifest.adapter.shapes()
        wire.unpack_adapter(await self.api.blob_bytes(work.adapter, wire.size_limit(shapes)), shapes)
        if isinstance(work, Train):
            delta = learned(self.manifest)
            delta = add(delta, self.residual) if self.residual else delta
            update = Update(self.device, work.version, EXAMPLES, {}, encoding=work.upload)
            self.outbox = TENSORS_TYPE, await asyncio.to_thread(wire.pack, update, delta)
            self.residual = codec.lost(delta, "int8") if work.upload == "int8" else {}


def learned(manifest: Manifest) -> dict[str, Array]:
    """1e-3 for every number that is trained."""
    return {name: np.full(shape, STEP, np.float32) for name, shape in manifest.adapter.update_shapes().items()}


@asynccontextmanager
async def _relayed(place: Place) -> AsyncIterator[tuple[str, Bytes]]:
    """The server's URL, or that of a relay to it which counts what goes through."""
    counted = Bytes()
    if not place.counted:
        yield place.url, counted
        return
    server = urlsplit(place.url)

    async def hand_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: int, down: int) -> None:
        while chunk := await reader.read(1 << 18):
            counted.up, counted.down = counted.up + up * len(chunk), counted.down + down * len(chunk)
            writer.write(chunk)
            await writer.drain()
        writer.close()

    async def both_ways(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(server.hostname, server.port)
        await asyncio.gather(hand_on(reader, far_writer, 1, 0), hand_on(far_reader, writer, 0, 1))

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.create_task(both_ways(reader, writer)))

    connections: list[asyncio.Task[None]] = []
    relay = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"{server.scheme}://127.0.0.1:{relay.sockets[0].getsockname()[1]}", counted
    finally:
        relay.close()
        await asyncio.gather(*connections)  # the device has hung up


# Many devices in one process ------------------------------------------------------------------------------------------
class Halves:
    """A transport that, once it has a `barrier`, sends half an update and the rest when all parties have sent their half.

    Args:
        http: for everything else. session, url: for halves.
    """

    def __init__(self, http: Transport, session: aiohttp.ClientSession, url: str) -> None:
        self._http, self._session, self._url = http, session, url
        self.barrier: asyncio.Barrier | None = None

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = MAX_JSON,
    ) -> Response:
        if self.barrier is None or path != "/v1/results":
            return await self._http.request(method, path, body, headers, into, limit)
        headers = {**(headers or {}), "Content-Length": str(len(body))}
        data = _halves(body, self.barrier)
        async with self._session.request(method, self._url + path, data=data, headers=headers) as answer:
            return Response(answer.status, await answer.read(), dict(answer.headers))


async def _halves(body: bytes, barrier: asyncio.Barrier) -> AsyncIterator[bytes]:
    yield body[: len(body) // 2]
    await barrier.wait()
    yield body[len(body) // 2 :]


@dataclass
class Crowd:
    """Devices that share a process and its connections, and send what is packed beforehand; they fetch no versions."""

    halves: Halves
    members: list[tuple[Place, Api]] = field(default_factory=list)
    manifests: list[Manifest] = field(default_factory=list)

    async def join(self, place: Place) -> None:
        api = Api(place.signing(self.halves))
        self.manifests.append(await api.enroll(place.device, place.name, token=place.token))
        self.members.append((place, api))

    async def parcel(self, place: Place, api: Api) -> bytes:
        """The body of a device's next update, once there is a version that it has not learned from."""
        work = await api.ask(place.device, can_train=True)
        if isinstance(work, Wait):
            await asyncio.sleep(work.seconds)
            return await self.parcel(place, api)
        if not isinstance(work, Train):
            raise RuntimeError(f"a run without an end asks for {type(work).__name__}")
        update = Update(place.device, work.version, EXAMPLES, {}, encoding=work.upload)
        return wire.pack(update, learned(self.manifests[0]))

    async def send_in_turn(self, members: list[tuple[Place, Api]]) -> None:
        for place, api in members:
            await api.send(TENSORS_TYPE, await self.parcel(place, api))

    async def send_at_once(self, halted: bool = False) -> float:
        """Everybody's next update; seconds until the last receipt.

        Args:
            halted: nobody's second half before everybody's first.

        Raises:
            ExceptionGroup: one was not taken.
        """
        parcels = [await self.parcel(place, api) for place, api in self.members]
        self.halves.barrier = asyncio.Barrier(len(parcels)) if halted else None
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for (_, api), body in zip(self.members, parcels, strict=True):
                group.create_task(api.send(TENSORS_TYPE, body))
        self.halves.barrier = None
        return time.monotonic() - began


@asynccontextmanager
async def crowd(place: Place) -> AsyncIterator[Crowd]:
    """An empty one, at a server."""
    tls = ssl.create_default_context(cafile=place.ca) if place.ca else True
    connector = aiohttp.TCPConnector(limit=0, ssl=tls)
    limit, http = asyncio.timeout(SECONDS), HttpTransport(place.url, ca=place.ca)
    async with limit, http, aiohttp.ClientSession(connector=connector) as session:
        yield Crowd(Halves(http, session, place.url))
