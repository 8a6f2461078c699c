"""A server that knows its devices, on real sockets: who is let in, who is not, and that a refusal leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import secrets
import sqlite3
import ssl
import stat
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from yarl import URL

from edge_sdk import cli as agent_cli
from edge_sdk import identity, wire
from edge_sdk.agent import Agent
from edge_sdk.cohort import Advertise, Masked
from edge_sdk.errors import MissingRuntime, Refused, SettingsError, Unreachable
from edge_sdk.identity import Clock
from edge_sdk.protocol import PROTOCOL, Ask, Enroll, Evaluation, Problem, Trained
from edge_sdk.signed import KEY, Signed, signing
from edge_sdk.store import Parcel, Store
from edge_sdk.transport import Api, HttpTransport, Response
from edge_server import admission as admissions
from edge_server import cli, cohorts
from edge_server.admission import NAME, Admission
from edge_server.app import create_app
from edge_server.compute import Compute
from edge_server.coordinator import Accepted, Dropped
from edge_server.gate import SKEW, Gate
from edge_server.guard import Guard
from edge_server.handlers import INTAKE
from edge_server.settings import RunSettings
from tests import server_helpers as helpers
from tests.server_helpers import upload
from tests.test_server_process import Site

ADMIN = "the operator's token"
Capture = pytest.CaptureFixture[str]


@dataclass
class Recorded:
    """The way to a server, and what went over it."""

    transport: HttpTransport
    sent: list[tuple[str, str, bytes, dict[str, str]]] = field(default_factory=list)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        into: Path | None = None,
        limit: int = wire.MAX_JSON,
    ) -> Response:
        self.sent.append((method, path, body, dict(headers or {})))
        return await self.transport.request(method, path, body, headers, into, limit)


@dataclass
class Device:
    """One that signs, and has been admitted."""

    seed: bytes
    way: Recorded
    signed: Signed
    api: Api

    @property
    def id(self) -> str:
        return identity.device_id(self.seed)


@dataclass
class World:
    """A server that knows its devices, and how a test reaches it."""

    client: TestClient[Any, Any]
    ledger: Any
    admission: Admission
    gate: Gate
    data: Path
    bare: HttpTransport

    def device(self, seed: bytes | None = None, now: Callable[[], float] = time.time) -> Device:
        """A stranger with a key."""
        seed = seed or secrets.token_bytes(32)
        way = Recorded(self.bare)
        signed = Signed(way, seed, now)
        return Device(seed, way, signed, Api(signed))

    async def member(self) -> Device:
        found = self.device()
        await found.api.enroll(found.id, "a device", token=self.token())
        return found

    def token(self, seconds: float = 60) -> str:
        return self.admission.mint("", time.time() + seconds, time.time())[1]

    def headers(self, device: Device, method: str, path: str, body: bytes = b"", **more: str) -> dict[str, str]:
        """A signature of this moment, made by hand."""
        clock = Clock(self.gate.epoch, int(time.time()))
        name, _, query = path.partition("?")
        return {
            **identity.sign(device.seed, method, name, query, identity.claim(device.seed, body, clock, secrets.token_hex(8))),
            **more,
        }

    async def refuses(
        self, code: str, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> Problem:
        answer = await self.client.request(method, URL(path, encoded=True), data=body or None, headers=headers)
        problem = wire.decode(await answer.read(), Problem)
        assert (problem.code, problem.status) == (code, answer.status), problem
        assert (answer.status == 401) == ("WWW-Authenticate" in answer.headers)
        return problem


@asynccontextmanager
async def opened(data: Path, run: RunSettings | None = None, compute: Compute | None = None) -> AsyncIterator[World]:
    ledger, admission, gate = helpers.open_ledger(data, run, compute=compute), Admission(data), Gate(secrets.token_hex(8))
    guard = Guard(admission, gate, ADMIN, time.time)
    async with TestClient(TestServer(create_app(ledger, guard))) as client, HttpTransport(str(client.make_url("/"))) as bare:
        yield World(client, ledger, admission, gate, data, bare)
    admission.close()


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with opened(tmp_path / "data") as found:
        yield found


def refused(code: str) -> Any:
    return pytest.raises(Refused, match=f"^{code}: ")


def kept(world: World) -> tuple[int, set[str]]:
    """What a request could have left behind: events and blobs."""
    return len(helpers.events(world.data)), helpers.blobs(world.data)


# Devices --------------------------------------------------------------------------------------------------------------
async def test_a_member_takes_part(world: World) -> None:
    """Enrols by a token, asks, reads blobs, sends an update; the first request brings the server's epoch and is repeated."""
    device = world.device()
    manifest = await device.api.enroll(device.id, "a device", token=world.token())
    work = await device.api.ask(device.id, True)
    adapter = await device.api.blob_bytes(world.ledger.state.adapter, 1 << 20)
    receipt = await device.api.send(wire.TENSORS_TYPE, upload(device.id, 0))
    again = await device.api.enroll(device.id, "a new name")

    assert manifest == again == world.ledger.manifest
    assert work.version == receipt.version == 0  # type: ignore[union-attr]
    assert hashlib.sha256(adapter).hexdigest() == world.ledger.state.adapter
    assert world.ledger.state.devices[device.id].name == "a new name"
    assert [path for _, path, _, _ in device.way.sent] == [
        *("/v1/enroll", "/v1/enroll", "/v1/work", f"/v1/blobs/{world.ledger.state.adapter}"),
        *("/v1/results", "/v1/enroll"),
    ]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/enroll"),
        ("POST", "/v1/work"),
        ("POST", "/v1/results"),
        ("GET", "/v1/synthetic"),
        ("GET", "/v1/blobs/" + "0" * 64),
        ("GET", "/v1/%62lobs/" + "0" * 64),
        ("GET", "/v1/nothing"),
    ],
)
async def test_what_is_not_signed_is_refused(world: World, method: str, path: str) -> None:
    """Every call but the operator's and those that are open to all, those that do not exist included."""
    problem = await world.refuses("unsigned", method, path, b"{}")

    assert "edge-agent join" in problem.detail
    assert (await world.client.get("/healthz")).status == 200


async def test_a_stranger_gets_no_further_than_enrolling(world: World) -> None:
    """A key alone is not enough."""
    device = world.device()

    with refused("unknown-device"):
        await device.api.ask(device.id, True)
    with refused("token-needed"):
        await device.api.enroll(device.id, "a device")
    with refused("unknown-device"):
        await device.api.blob_bytes(world.ledger.state.adapter, 1 << 20)
    assert not world.ledger.state.devices
    assert len(world.gate) == 0  # strangers do not fill the server's memory


@pytest.mark.parametrize("what", ["used", "expired", "revoked", "never minted"])
async def test_a_token_that_is_not_open_is_refused(world: World, what: str) -> None:
    """And leaves no device behind."""
    text = world.token(seconds=-1 if what == "expired" else 60)
    if what == "used":
        first = world.device()
        await first.api.enroll(first.id, "the first", token=text)
    if what == "revoked":
        world.admission.revoke_token(text.partition("-")[0])
    before, device = kept(world), world.device()

    with refused("bad-token"):
        await device.api.enroll(device.id, "a device", token="0-0" if what == "never minted" else text)
    assert kept(world) == before
    assert device.id not in world.admission.devices()


async def test_an_enrolment_refused_for_its_name_may_be_mended(world: World) -> None:
    """The token is used by then, but the device is the one it admits."""
    device, text = world.device(), world.token()

    with refused("bad-device"):
        await device.api.enroll(device.id, "", token=text)
    await device.api.enroll(device.id, "a device", token=text)


async def test_a_device_that_is_shut_out_is_refused_from_then_on(world: World) -> None:
    """Also where it enrols again, and the others are not."""
    device, other = await world.member(), await world.member()
    world.admission.revoke_device(device.id)

    for call in (device.api.ask(device.id, True), device.api.enroll(device.id, "a device", token=world.token())):
        with refused("revoked"):
            await call
    await other.api.ask(other.id, True)


async def test_what_a_device_sent_before_it_was_shut_out_does_not_count(world: World) -> None:
    """Its update waits for a second one; once that is there it is dropped, and the version made of two others."""
    device, *others = [await world.member() for _ in range(3)]
    await device.api.send(wire.TENSORS_TYPE, helpers.upload(device.id, 0, seed=1))
    world.admission.revoke_device(device.id)
    for seed, other in enumerate(others):
        await other.api.send(wire.TENSORS_TYPE, helpers.upload(other.id, 0, seed))
    await helpers.until(lambda: world.ledger.state.version == 1)
    log = helpers.events(world.data)
    mine = [event.blob for event in log if isinstance(event, Accepted) and event.device == device.id]

    assert [event for event in log if isinstance(event, Dropped)] == [Dropped(tuple(mine), "revoked")]
    assert world.ledger.state.buffer == ()


# When it is busy ------------------------------------------------------------------------------------------------------
async def test_a_locked_file_holds_up_only_those_that_are_to_be_let_in(world: World) -> None:
    """While another process changes tokens, and one device waits for it, all others are answered; then that one is let in."""
    member, device, stranger, text = await world.member(), world.device(), world.device(), world.token()
    with contextlib.closing(sqlite3.connect(world.data / NAME, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        entering = asyncio.create_task(device.api.enroll(device.id, "a device", token=text))
        await helpers.until(world.admission._lock.locked)

        assert (await world.client.get("/healthz")).status == 200
        await member.api.ask(member.id, True)
        await member.api.enroll(member.id, "a new name")
        with refused("token-needed"):
            await stranger.api.enroll(stranger.id, "a stranger")
        assert not entering.done()
        other.execute("ROLLBACK")

    await entering
    await device.api.ask(device.id, True)


async def test_a_device_that_is_to_be_let_in_is_asked_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file stays locked for longer than the server waits."""
    monkeypatch.setattr(admissions, "PATIENCE", 0.01)
    async with opened(tmp_path) as world:
        device, text = world.device(), world.token()
        with contextlib.closing(sqlite3.connect(world.data / NAME, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with refused("busy") as caught:
                await device.api.enroll(device.id, "a device", token=text)
        await device.api.enroll(device.id, "a device", token=text)

    assert (caught.value.status, caught.value.retry_after) == (503, 1.0)


async def test_one_device_cannot_take_the_others_room(world: World) -> None:
    """Two unfinished uploads of one are all that it may have; it is told when to return, and another one is served."""
    device, other = await world.member(), await world.member()
    intake, size = world.client.app[INTAKE], world.ledger.body_limit

    async def begin(sent: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.client.port)
        signature = world.headers(device, "POST", "/v1/results", b"never whole")
        fields = {"Host": "x", "Content-Type": wire.TENSORS_TYPE, "Content-Length": str(size), **signature}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        writer.write(f"POST /v1/results HTTP/1.1\r\n{head}\r\n".encode() + bytes(sent))
        return reader, writer

    begun = [await begin(size - 1), await begin(size - 1)]
    await helpers.until(lambda: intake.held == 2 * size - 2)
    reader, third = await begin(0)
    async with asyncio.timeout(30):
        head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 ")
    assert b"\r\nRetry-After: 1\r\n" in head
    assert b'"code":"too-many"' in await reader.readuntil(b"}")
    await other.api.send(wire.TENSORS_TYPE, upload(other.id, 0))

    for _, writer in begun:
        writer.transport.abort()
    await helpers.until(lambda: intake.held == 0)
    await device.api.send(wire.TENSORS_TYPE, upload(device.id, 0))
    third.close()


# Ownership ------------------------------------------------------------------------------------------------------------
LENGTH = cohorts.length(helpers.SPEC) + 1
MESSAGES: dict[str, Callable[[str, int], tuple[str, str, bytes]]] = {  # of a device; the number makes two of a kind differ
    "enroll": lambda id, n: ("/v1/enroll", wire.JSON_TYPE, wire.encode(Enroll(PROTOCOL, id, f"name {n}"))),
    "work": lambda id, n: ("/v1/work", wire.JSON_TYPE, wire.encode(Ask(id, bool(n)))),
    "update": lambda id, n: ("/v1/results", wire.TENSORS_TYPE, upload(id, 0, n)),
    "evaluation": lambda id, n: ("/v1/results", wire.JSON_TYPE, wire.encode(Evaluation(id, 0, n, {}))),
    "trained": lambda id, n: ("/v1/results", wire.JSON_TYPE, wire.encode(Trained(id, 0, 1 + n, {}))),
    "advertise": lambda id, n: ("/v1/results", wire.JSON_TYPE, wire.encode(Advertise("c", id, bytes(32), bytes([n]) * 32))),
    "masked": lambda id, n: (
        "/v1/results",
        wire.MASKED_TYPE,
        wire.pack_masked(Masked("c", id), np.full(LENGTH, n, np.uint32)),
    ),
}


@pytest.mark.parametrize("kind", MESSAGES)
async def test_nobody_speaks_for_another(world: World, kind: str) -> None:
    """A member that names another one in its message is refused, and nothing is kept."""
    device, other = await world.member(), await world.member()
    path, content_type, body = MESSAGES[kind](other.id, 1)
    before = kept(world)

    await world.refuses(
        "wrong-device", "POST", path, body, world.headers(device, "POST", path, body, **{"Content-Type": content_type})
    )
    assert kept(world) == before


async def test_nobody_judges_for_another(tmp_path: Path) -> None:
    """The same in a run with judgments; those too are served to nobody."""
    async with opened(tmp_path, helpers.with_llm(), helpers.Simulator()) as world:
        await helpers.until(lambda: bool(world.ledger.state.sheets))
        device, other = await world.member(), await world.member()
        theirs, own = (helpers.judgment(each.id, 0, helpers.sheet(world.ledger)) for each in (other, device))

        with refused("wrong-device"):
            await device.api.send(wire.JUDGMENT_TYPE, theirs)
        await device.api.send(wire.JUDGMENT_TYPE, own)
        with refused("unknown-blob"):
            await other.api.blob_bytes(hashlib.sha256(own).hexdigest(), 1 << 20)


async def test_nobody_signs_with_another_key(world: World) -> None:
    """The id in the headers is the key that must have signed."""
    device, other = await world.member(), await world.member()
    body = wire.encode(Ask(other.id, True))
    headers = world.headers(device, "POST", "/v1/work", body)
    stolen = headers["Signature-Input"].replace(device.id, other.id)

    await world.refuses("bad-signature", "POST", "/v1/work", body, {**headers, "Signature-Input": stolen})


async def test_nobody_reads_what_a_device_sent(world: World) -> None:
    """Neither another device nor itself, before it is averaged and after."""
    devices = [await world.member() for _ in range(3)]
    bodies = [upload(device.id, 0, seed) for seed, device in enumerate(devices)]
    for device, body in zip(devices, bodies, strict=True):
        await device.api.send(wire.TENSORS_TYPE, body)
    await helpers.until(lambda: world.ledger.state.version == 1)  # of two, the third waits
    names = {hashlib.sha256(body).hexdigest() for body in bodies}

    assert names <= helpers.blobs(world.data)
    for device in devices[:2]:
        for name in names:
            with refused("unknown-blob"):
                await device.api.blob_bytes(name, 1 << 20)


# Once, in time, and whole ---------------------------------------------------------------------------------------------
async def test_a_request_that_comes_again_is_refused(world: World) -> None:
    """A recorded upload, ask or enrolment, sent again to the byte."""
    device = await world.member()
    await device.api.ask(device.id, True)
    await device.api.send(wire.TENSORS_TYPE, upload(device.id, 0))
    recorded, before = device.way.sent[1:], kept(world)

    assert [path for _, path, _, _ in recorded] == ["/v1/enroll", "/v1/work", "/v1/results"]
    for method, path, body, headers in recorded:
        await world.refuses("replayed", method, path, body, headers)
    assert kept(world) == before


async def test_a_request_from_before_a_restart_is_refused(world: World, tmp_path: Path) -> None:
    """What the server remembered is gone, so it takes nothing from before; a device notices nothing."""
    device = await world.member()
    await device.api.ask(device.id, True)
    method, path, body, headers = device.way.sent[-1]
    await world.client.close()
    async with opened(world.data) as again:
        await again.refuses("wrong-time", method, path, body, headers)
        device.way.transport = again.bare
        await device.api.ask(device.id, True)


@pytest.mark.parametrize("start", [0.0, 4e9, None])
async def test_a_device_corrects_itself_by_the_servers_clock(world: World, start: float | None) -> None:
    """Without a battery for its clock it starts in 1970, or somewhere else: one request is repeated, and later ones are not."""
    seconds = time.time() + 2 * SKEW if start is None else start
    device = world.device(now=lambda: seconds)

    await device.api.enroll(device.id, "a device", token=world.token())
    await device.api.ask(device.id, True)
    assert [path for _, path, _, _ in device.way.sent] == ["/v1/enroll", "/v1/enroll", "/v1/work"]


@pytest.mark.parametrize("off", [-SKEW - 5, SKEW + 5])
async def test_an_old_or_early_signature_is_refused(world: World, off: float) -> None:
    """With the right epoch too; the answer says how far off it is, and what time it is."""
    device, body = await world.member(), b"{}"
    claim = identity.claim(device.seed, body, Clock(world.gate.epoch, int(time.time() + off)), "0" * 16)
    answer = await world.client.post("/v1/work", data=body, headers=identity.sign(device.seed, "POST", "/v1/work", "", claim))
    told = identity.clock(answer.headers["WWW-Authenticate"])

    assert wire.decode(await answer.read(), Problem).code == "wrong-time"
    assert told is not None
    assert told.epoch == world.gate.epoch
    assert abs(told.time - time.time()) < 60


@pytest.mark.parametrize("kind", MESSAGES)
async def test_a_body_that_was_changed_on_the_way_is_refused(world: World, kind: str) -> None:
    """The digest is what was signed; what arrived is another body, and nothing of it is kept."""
    device = await world.member()
    (path, content_type, body), (_, _, changed) = (MESSAGES[kind](device.id, n) for n in range(2))
    before = kept(world)

    headers = world.headers(device, "POST", path, body, **{"Content-Type": content_type})
    await world.refuses("bad-digest", "POST", path, changed, headers)
    assert kept(world) == before


async def test_a_query_that_was_changed_on_the_way_is_refused(world: World) -> None:
    device = await world.member()
    headers = world.headers(device, "GET", "/v1/synthetic?since=1")

    await world.refuses("bad-signature", "GET", "/v1/synthetic?since=2", headers=headers)
    await world.refuses("wrong-system", "GET", "/v1/synthetic?since=1", headers=headers)  # LP-FL has no feed


# The operator ---------------------------------------------------------------------------------------------------------
OPERATOR = [("GET", "/v1/status", 200), ("POST", "/v1/synthetic/withdraw", 404), ("GET", "/v1/synthetic", 404)]


@pytest.mark.parametrize(("method", "path", "status"), OPERATOR)
async def test_the_operators_calls_take_the_admin_token(world: World, method: str, path: str, status: int) -> None:
    """With it they get as far as this run lets them; 404 because LP-FL has no synthetic data."""
    answer = await world.client.request(method, path, data=b'{"id":"x"}', headers={"Authorization": f"Bearer {ADMIN}"})

    assert answer.status == status


@pytest.mark.parametrize(("method", "path", "_"), OPERATOR)
@pytest.mark.parametrize("sent", ["Bearer ", "Bearer x", f"Basic {ADMIN}", ADMIN, f"Bearer {ADMIN} "])
async def test_another_token_is_not_the_operators(world: World, method: str, path: str, _: int, sent: str) -> None:
    if sent.endswith(" ") and sent != "Bearer ":
        sent += "x"  # HTTP takes spaces at the end off

    await world.refuses("not-admin", method, path, b'{"id":"x"}', {"Authorization": sent})


async def test_bytes_that_are_no_text_are_not_the_operators_token(world: World) -> None:
    """HTTP allows them in a header."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.client.port)
    writer.write(b"GET /v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\nConnection: close\r\n\r\n")
    answer = await reader.read()
    writer.close()

    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b'"not-admin"' in answer


@pytest.mark.parametrize("path", ["/v1/status", "/v1/%73tatus"])
async def test_a_device_is_no_operator(world: World, path: str) -> None:
    """A signature does not open the operator's calls, however they are spelled."""
    device = await world.member()

    await world.refuses("not-admin", "GET", path, headers=world.headers(device, "GET", path))


# A device's home ------------------------------------------------------------------------------------------------------
class Nowhere:
    """A way that nothing may be sent over."""

    async def request(self, *_: Any, **__: Any) -> Response:
        raise AssertionError("nothing should be sent")


def test_a_key_is_made_with_the_first_token_and_used_ever_after(tmp_path: Path) -> None:
    """It is readable by its owner only, and the device's id; what waits under the old id is dropped."""
    store, way = Store(tmp_path), Nowhere()
    old = store.device_id
    store.post(Parcel(wire.JSON_TYPE, b"of the old id"))

    assert signing(store, way) is way
    assert (store.device_id, store.pending() is None) == (old, False)
    assert isinstance(signing(store, way, "token"), Signed)
    key = (tmp_path / KEY).read_bytes()
    assert (store.device_id, store.pending()) == (identity.device_id(key), None)
    store.post(Parcel(wire.JSON_TYPE, b"of this id"))
    assert isinstance(signing(store, way), Signed)
    assert isinstance(signing(store, way, "another"), Signed)
    assert (tmp_path / KEY).read_bytes() == key
    assert store.pending() is not None
    assert stat.S_IMODE((tmp_path / KEY).stat().st_mode) == 0o600


async def test_an_agent_that_is_not_let_in_says_so_and_stops(world: World, tmp_path: Path) -> None:
    """Trying again would change nothing: a person has to; what waits in the outbox stays there."""
    store = Store(tmp_path / "home")
    store.post(Parcel(wire.JSON_TYPE, b"waits"))

    with pytest.raises(SettingsError, match=r"does not let this device in: .*edge-agent join --token TOKEN"):
        await Agent(store, world.bare, tmp_path / "cache", "a device").run()
    assert store.pending() is not None


async def test_an_agent_that_is_shut_out_stops(world: World, tmp_path: Path) -> None:
    store, token = Store(tmp_path / "home"), world.token()
    agent = Agent(store, signing(store, world.bare, token), tmp_path / "cache", "a device", token=token)
    await agent.join()
    store.post(Parcel(wire.JSON_TYPE, b"waits"))
    world.admission.revoke_device(store.device_id)

    with pytest.raises(SettingsError, match="shut this device out"):
        await agent.run()
    assert store.pending() is not None


def test_without_cryptography_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with a token needs the extra; one without is not asked for it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    store, way = Store(tmp_path), Nowhere()

    assert signing(store, way) is way
    with pytest.raises(MissingRuntime, match="tandem-edge\\[secure\\]"):
        signing(store, way, "token")
    assert not (tmp_path / KEY).exists()


# The processes --------------------------------------------------------------------------------------------------------
def certificate(folder: Path, name: str = "server") -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that vouches for itself, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    cert, private = folder / f"{name}.pem", folder / f"{name}.key"
    cert.write_bytes(made.public_bytes(Encoding.PEM))
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return cert, private


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def mint(site: Site, capsys: Capture) -> str:
    assert cli.main(["token", "mint", "--data", str(site.data)]) == 0
    return capsys.readouterr().out.strip()


def test_a_deployment_with_tokens_and_tls(site: Site, tmp_path: Path, capsys: Capture) -> None:
    """Mint, join, look, shut out, all by the commands, over TLS, while the server runs; a restart changes nothing."""
    cert, key = certificate(tmp_path)
    home = str(tmp_path / "home")
    tls = ["--tls-cert", str(cert), "--tls-key", str(key)]
    admin = ["--ca", str(cert), "--admin-token-file", str(site.data / "admin.token")]

    with site.serve("--require-tokens", *tls) as server:
        assert server.url.startswith("https://127.0.0.1:")
        token = mint(site, capsys)
        join = ["join", "--home", home, "--server", server.url, "--ca", str(cert)]
        assert agent_cli.main(join) == 1
        assert "unsigned: " in capsys.readouterr().err
        assert agent_cli.main([*join, "--token", token]) == 0
        joined = capsys.readouterr().out
        assert joined.startswith(f"joined {server.url} as {Store(Path(home)).device_id}; go on with: edge-agent run")
        assert cli.main(["status", server.url, *admin, "--json"]) == 0
        assert Store(Path(home)).device_id in capsys.readouterr().out
        assert cli.main(["status", server.url, "--ca", str(cert)]) == 1
        assert "--admin-token-file" in capsys.readouterr().err
    with site.serve(*tls) as server:  # one that has minted tokens goes on to ask for them
        join = ["join", "--home", home, "--server", server.url, "--ca", str(cert)]
        assert agent_cli.main(join) == 0
        assert cli.main(["device", "revoke", Store(Path(home)).device_id, "--data", str(site.data)]) == 0
        assert agent_cli.main(join) == 1
        assert "revoked: " in capsys.readouterr().err
    assert stat.S_IMODE((site.data / "admin.token").stat().st_mode) == 0o600


class Trips(ThreadPoolExecutor):
    """Counts what is given to its threads."""

    count = 0

    def submit(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return super().submit(*args, **kwargs)


@pytest.mark.parametrize(
    ("method", "asked", "part"),
    [("GET", "bytes=0-", slice(None)), ("GET", "bytes=7-600019", slice(7, 600_020)), ("HEAD", "bytes=0-", slice(0))],
)
async def test_a_blob_over_tls_comes_as_it_is_and_with_few_trips_to_a_thread(
    tmp_path: Path, method: str, asked: str, part: slice
) -> None:
    """asyncio's own sendfile makes one for every 16 KiB; compression is none, whatever the device would take."""
    cert, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    ledger, blob = helpers.open_ledger(tmp_path / "data"), secrets.token_bytes(700_000)
    path = f"/v1/blobs/{ledger.blobs.put(blob)}"
    server = TestServer(create_app(ledger), scheme="https")
    await server.start_server(ssl=context)
    async with server, aiohttp.ClientSession() as session:
        trips = Trips()
        asyncio.get_running_loop().set_default_executor(trips)
        headers = {"Range": asked, "Accept-Encoding": "gzip, deflate"}
        url, tls = server.make_url(path), ssl.create_default_context(cafile=cert)
        async with session.request(method, url, ssl=tls, headers=headers) as answer:
            body = await answer.read()

    assert (answer.status, body) == (206, blob[part])
    assert answer.headers["Content-Length"] == str(len(blob[part]) or len(blob))
    assert "Content-Encoding" not in answer.headers
    assert trips.count < 10


def test_plain_http_and_strange_certificates_are_refused_by_tls(site: Site, tmp_path: Path) -> None:
    """Nothing is said before the server has shown the certificate that was named, for the name it was called by."""
    cert, key = certificate(tmp_path)
    strange, _ = certificate(tmp_path, "strange")

    async def ask(url: str, ca: Path | None = None) -> None:
        async with HttpTransport(url, ca=ca) as transport:
            await Api(transport).enroll("d1", "name")

    async def old(url: str) -> None:
        context = ssl.create_default_context(cafile=cert)
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        async with aiohttp.ClientSession() as session, session.get(url, ssl=context):
            pass

    with site.serve("--tls-cert", str(cert), "--tls-key", str(key)) as server:
        asyncio.run(ask(server.url, cert))
        with pytest.raises(Unreachable):
            asyncio.run(ask(server.url.replace("https", "http")))
        for trusted in (None, strange):
            with pytest.raises(Unreachable, match="--ca"):
                asyncio.run(ask(server.url, trusted))
        with pytest.raises(Unreachable, match="--ca"):
            asyncio.run(ask(server.url.replace("127.0.0.1", "localhost"), cert))
        with pytest.warns(DeprecationWarning, match="TLSv1_1"), pytest.raises(aiohttp.ClientConnectorError):
            asyncio.run(old(server.url))


@pytest.mark.parametrize("given", ["--tls-cert", "--tls-key", "both"])
def test_half_of_a_certificate_is_exit_code_2(site: Site, tmp_path: Path, capsys: Capture, given: str) -> None:
    """One of the two files, or two that do not belong together: said before anything is made."""
    (cert, key), (_, other) = certificate(tmp_path), certificate(tmp_path, "other")
    files = {"--tls-cert": [str(cert)], "--tls-key": [str(key)], "both": [str(cert), "--tls-key", str(other)]}

    assert cli.main(site.arguments("--tls-cert" if given == "both" else given, *files[given])) == 2
    assert "cert" in capsys.readouterr().err
    assert not site.data.exists()


@pytest.mark.parametrize(("server", "ca"), [("http://127.0.0.1:1", "server.pem"), ("https://127.0.0.1:1", "none.pem")])
def test_a_certificate_that_cannot_be_used_is_exit_code_2(tmp_path: Path, capsys: Capture, server: str, ca: str) -> None:
    """For plain HTTP, or a file that is not there."""
    certificate(tmp_path)

    assert agent_cli.main(["join", "--home", str(tmp_path / "home"), "--server", server, "--ca", str(tmp_path / ca)]) == 2
    assert "certificate" in capsys.readouterr().err
