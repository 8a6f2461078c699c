"""Whatever the network does, every acknowledged update counts once, none twice, and the run ends as over a good network.

Devices work through a proxy that cuts, delays, crumbles and doubles what passes; where they sign, it changes bits too. Only what
comes from a device is ever changed: answers are not signed, and TLS is what keeps those whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar, get_args

import pytest

from edge_sdk import identity, wire
from edge_sdk.errors import Refused, Unreachable
from edge_sdk.protocol import Evaluation, Finished
from edge_sdk.signed import Signed
from edge_sdk.transport import Api, HttpTransport
from edge_server import cli
from edge_server.coordinator import Accepted, Event, Published
from tests.proxy import Faults, Kind, Proxy, chance
from tests.server_helpers import events, settings, upload
from tests.test_crashes import adapters
from tests.test_server_process import Site

T = TypeVar("T")
VERSIONS, PATIENCE = 6, 2.0
SEEDS = (1, 2, 3, 4)
UNCHANGED: tuple[Kind | None, ...] = ("cut up", "cut down", "half-close", "late", "crumbs", "twice", None)
# what a server makes of a request that arrived changed, without its end, or without some headers
DAMAGED = {"bad-digest", "bad-message", "bad-signature", "unsigned", "wrong-type", "wrong-time", "too-large", "http-405"}


async def insist(call: Callable[[], Awaitable[T]]) -> T:
    """What a device does: it repeats until the server has understood it."""
    for _ in range(300):
        try:
            return await call()
        except Unreachable:
            pass
        except Refused as error:
            if error.code not in DAMAGED:
                raise
    raise AssertionError("300 times nothing came through")


@dataclass
class Devices:
    """Three that send in turn, so that every run averages the same; beside that each asks, and measures what there is.

    Args:
        keys: their private keys, where they sign. tokens: that admit them.
        receipts: ids of the updates that were acknowledged.
    """

    keys: Sequence[bytes] = ()
    tokens: Sequence[str] = ("", "", "")
    receipts: set[str] = field(default_factory=set)
    _version: int = 0
    _news: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def names(self) -> list[str]:
        return [identity.device_id(key) for key in self.keys] or ["d0", "d1", "d2"]

    async def run(self, url: str) -> None:
        """Goes on until the server says that the run is over, and told each of them."""
        async with HttpTransport(url, timeout=PATIENCE) as transport:
            apis = [Api(Signed(transport, key)) for key in self.keys] or [Api(transport)] * 3
            for device, api, token in zip(self.names, apis, self.tokens, strict=True):
                await insist(partial(api.enroll, device, "name", token=token))
            async with asyncio.TaskGroup() as group:
                group.create_task(self._learn(apis))
                for each in zip(self.names, apis, strict=True):
                    group.create_task(self._measure(*each))
            for device, api in zip(self.names, apis, strict=True):
                assert isinstance(await insist(partial(api.ask, device, True)), Finished)

    async def _learn(self, apis: Sequence[Api]) -> None:
        while self._version < VERSIONS:
            for number, (device, api) in enumerate(zip(self.names, apis, strict=True)):
                body = upload(device, self._version, seed=3 * self._version + number, num_examples=10 + 7 * number)
                for _ in range(2):  # the second is a repeat
                    self.receipts.add((await insist(partial(api.send, wire.TENSORS_TYPE, body))).id)
            while getattr(await insist(partial(apis[0].ask, self.names[0], True)), "version", -1) <= self._version:
                pass
            async with self._news:
                self._version += 1
                self._news.notify_all()

    async def _measure(self, device: str, api: Api) -> None:
        for version in range(VERSIONS + 1):
            async with self._news:
                await self._news.wait_for(lambda: self._version >= version)  # noqa: B023  # waited for at once
            report = wire.encode(Evaluation(device, version, 12, {"accuracy": 0.75}))
            await insist(partial(api.ask, device, True))
            await insist(partial(api.send, wire.JSON_TYPE, report))


@dataclass(frozen=True)
class Run:
    """What is left of a run: its log, the files of its versions, and what its server had to say."""

    log: list[Event]
    versions: dict[str, bytes]
    said: str

    @property
    def accepted(self) -> list[Accepted]:
        return [event for event in self.log if isinstance(event, Accepted)]

    @property
    def published(self) -> list[tuple[int, str, int]]:
        """Versions, but for when they were made."""
        return [(event.version, event.adapter, event.folded) for event in self.log if isinstance(event, Published)]


def ended(site: Site) -> Run:
    return Run(events(site.data), adapters(site), site.said)


def made(folder: Path) -> Site:
    folder.mkdir()
    return Site(folder, settings(versions=VERSIONS, buffer_size=3))


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same work over a good network."""
    site, devices = made(tmp_path_factory.mktemp("calm") / "site"), Devices()
    with site.serve() as server:
        asyncio.run(devices.run(server.url))
    return ended(site)


def counted_once(run: Run, devices: Devices) -> None:
    """Every update was sent, acknowledged and counted, in turn and once."""
    assert [(event.device, event.version) for event in run.accepted] == list(
        itertools.chain.from_iterable([(device, version) for device in devices.names] for version in range(VERSIONS))
    )
    assert {event.id for event in run.accepted} == devices.receipts
    assert len(devices.receipts) == len(run.accepted) == 3 * VERSIONS


async def over(server: str, plan: Callable[[int], Faults], devices: Devices) -> Proxy:
    """All the work, over a network of this plan."""
    async with Proxy(server, plan) as proxy:
        await devices.run(proxy.url)
    return proxy


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_a_bad_network_changes_nothing(seed: int, calm: Run, tmp_path: Path) -> None:
    """Connections that end, half or whole, pieces of a byte, delays, and requests that come twice."""
    site, devices = made(tmp_path / "site"), Devices()
    with site.serve() as server:
        proxy = asyncio.run(over(server.url, chance(seed, UNCHANGED), devices))
    run = ended(site)

    counted_once(run, devices)
    assert set(proxy.suffered) == set(UNCHANGED) - {None}
    assert run.published == calm.published
    assert run.versions == calm.versions
    assert not list((site.data / "blobs").glob("incoming-*"))
    assert not re.search("Traceback| ERROR | WARNING ", run.said)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS[:2])
def test_where_devices_sign_nothing_that_was_changed_or_doubled_is_taken(
    seed: int, calm: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flipped bits and repeated requests are refused; what the devices themselves send counts once, and makes the same bytes."""
    site = made(tmp_path / "site")
    with site.serve("--require-tokens") as server:
        tokens = []
        for _ in range(3):
            assert cli.main(["token", "mint", "--data", str(site.data)]) == 0
            tokens.append(capsys.readouterr().out.strip())
        devices = Devices([hashlib.sha256(bytes([seed, number])).digest() for number in range(3)], tokens)
        proxy = asyncio.run(over(server.url, chance(seed, (*UNCHANGED, "flip", "flip")), devices))
    run = ended(site)

    counted_once(run, devices)
    assert set(proxy.suffered) == set(get_args(Kind))
    assert set(proxy.again) == {401}
    assert run.versions == calm.versions
    assert not re.search("Traceback| ERROR | WARNING ", run.said)


# The proxy ------------------------------------------------------------------------------------------------------------
async def through(faults: Faults, sent: bytes, answer: bytes) -> tuple[list[bytes], bytes]:
    """What a server gets, on each connection, of `sent`, and a device of `answer`, which is said once all there is has come."""
    got: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received = b""
        while len(received) < len(sent) and (piece := await reader.read(len(sent))):
            received += piece
        got.append(received)
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with Proxy(url, lambda _: faults) as proxy, asyncio.timeout(30):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rpartition(":")[2]))
            writer.write(sent)
            heard = await reader.read()
            writer.close()
    return got, heard


SENT, ANSWER = b"0123456789", b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    ("faults", "got", "heard"),
    [
        (Faults(), [SENT], ANSWER),
        (Faults(up=4), [b"0123"], b""),
        (Faults(down=4), [SENT], ANSWER[:4]),
        (Faults(half=4), [b"0123"], ANSWER),
        (Faults(flip=8 * 3 + 1), [b"0121456789"], ANSWER),
        (Faults(late=0.001, crumbs=True), [SENT], ANSWER),
    ],
    ids=["nothing", "cut up", "cut down", "half-close", "flip", "late, in crumbs"],
)
async def test_each_fault_is_what_it_says(faults: Faults, got: list[bytes], heard: bytes) -> None:
    """Byte by byte, on both sides."""
    assert await through(faults, SENT, ANSWER) == (got, heard)


async def test_a_request_that_comes_twice_comes_whole() -> None:
    """On a connection of its own; the device hears one answer."""
    request = SENT + b"\r\n"

    assert await through(Faults(twice=True), request, ANSWER + b"\r\n") == ([request, request], ANSWER + b"\r\n")


def test_a_plan_is_the_same_every_time() -> None:
    """A seed says all, and another one says something else."""
    plans = [[chance(seed, UNCHANGED)(n) for n in range(20)] for seed in (1, 1, 2)]

    assert plans[0] == plans[1] != plans[2]
