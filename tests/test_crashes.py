"""SIGKILL at every write of a real server under load, on both databases: nothing acknowledged is lost, nothing counts twice."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from edge_sdk import identity, wire
from edge_sdk.errors import Refused, SettingsError, Unreachable
from edge_sdk.protocol import Evaluation
from edge_sdk.signed import Signed
from edge_sdk.transport import Api, HttpTransport, Transport
from edge_server import cli, coordinator, failpoints, snapshots, storage
from edge_server.admission import Admission
from edge_server.coordinator import Accepted, Enrolled, Event, Published, State
from edge_server.failpoints import GUARDED, POINTS
from edge_server.storage import EventLog
from tests import server_helpers as helpers
from tests.databases import Postgres
from tests.server_helpers import settings, upload
from tests.test_server_process import Site

DEVICES = 3
COUNTS = (1, 2, 4)
ONCE = ("run-named", "run-written")  # in a run
KILLS = [(point, count) for point in POINTS if point not in GUARDED for count in (COUNTS if point not in ONCE else (1,))]
GUARDED_KILLS = [(point, 1) for point in POINTS]
OFTEN = ["--snapshot-every", "5", "--port", "0"]


@dataclass
class Devices:
    """Three that send in turn, so that every run averages the same; others measure and ask all the while.

    Args:
        names: their ids.
        version: which they learn from. receipts: of the updates that were acknowledged.
        tokens: of each, where the server wants one; then they sign what they send, and `admin` is the operator's file.
    """

    names: tuple[str, ...] = tuple(f"d{i}" for i in range(DEVICES))
    tokens: tuple[str, ...] = ("",) * DEVICES
    admin: Path | None = None
    version: int = 0
    receipts: set[str] = field(default_factory=set)
    stop_at: int = 1000

    async def run(self, url: str) -> None:
        """Goes on until the server is gone, or version `stop_at` is there; what was not acknowledged is sent again."""
        bearer = self.admin.read_text() if self.admin else ""
        async with HttpTransport(url) as transport, HttpTransport(url, bearer=bearer) as operator:
            apis = [Api(self._signing(transport, device)) for device in range(DEVICES)]
            learning = asyncio.create_task(self._learn(apis, Api(operator)))
            noise = [asyncio.create_task(self._measure(*each)) for each in zip(apis, self.names, strict=True)]
            await asyncio.wait([learning, *noise], return_when=asyncio.FIRST_COMPLETED)
            for task in (learning, *noise):
                task.cancel()
            for result in await asyncio.gather(learning, *noise, return_exceptions=True):
                if isinstance(result, Exception) and not isinstance(result, Unreachable):
                    raise result

    def _signing(self, transport: Transport, device: int) -> Transport:
        return Signed(transport, seed(device)) if self.tokens[device] else transport

    async def _learn(self, apis: list[Api], operator: Api) -> None:
        for device, api in enumerate(apis):
            await api.enroll(self.names[device], f"name {device}", token=self.tokens[device])
        while self.version < self.stop_at:
            for device, api in enumerate(apis):
                number = DEVICES * self.version + device
                body = upload(self.names[device], self.version, number, num_examples=10 + 7 * device)
                for _ in range(2):  # the second is a repeat
                    self.receipts.add((await api.send(wire.TENSORS_TYPE, body)).id)
            while (await operator.status()).version <= self.version:
                pass
            self.version += 1

    async def _measure(self, api: Api, device: str) -> None:
        while True:
            try:
                await api.ask(device, True)
                await api.send(wire.JSON_TYPE, wire.encode(Evaluation(device, self.version, 12, {"accuracy": 0.75})))
            except Refused as error:
                if error.code not in ("unknown-device", "already-answered", "unknown-version"):
                    raise


def seed(device: int) -> bytes:
    """A device's private key."""
    return hashlib.sha256(b"%d" % device).digest()


@contextmanager
def serve(site: Site, more: list[str], failpoint: str = "") -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server, and its URL; "" where it is killed before it listens."""
    command = [sys.executable, "-m", "edge_server.cli", *site.arguments(*OFTEN, *more)]
    world = {**os.environ, "EDGE_FAILPOINT": failpoint} if failpoint else dict(os.environ)
    with (
        (site.folder / "stderr").open("a") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=world) as process,
    ):
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            assert said.startswith("listening on ") or (not said and failpoint), f"it said {said!r} and {site.said!r}"
            yield process, said.removeprefix("listening on ").split(",")[0]
        finally:
            process.kill()


def finish(site: Site, more: list[str], devices: Devices) -> None:
    with serve(site, more) as (process, url):
        asyncio.run(devices.run(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def logged(site: Site, state: str) -> list[Event]:
    with closing(opened(site, state)) as log:
        return [msgspec.json.decode(body, type=Event) for body in log.read()]


def opened(site: Site, state: str) -> EventLog:
    return EventLog(storage.postgresql(state) if state else storage.sqlite(site.data / "events.sqlite"))


def made(folder: Path) -> Site:
    folder.mkdir()
    return Site(folder, settings(buffer_size=DEVICES))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_every_write_loses_and_doubles_nothing(tmp_path: Path, state: str, capsys: pytest.CaptureFixture[str]) -> None:
    """However often and wherever it was killed, the run has the updates and the bytes of one that nobody disturbed."""
    site = made(tmp_path / "killed")
    survive(site, Devices(), KILLS, state, ["--state", state] if state else [], capsys)

    log = logged(site, state)
    with closing(opened(site, state)) as left:
        assert list(left.snapshots(snapshots.PROGRAM)) != []
        assert snapshots.replay(left, 10**6) == functools.reduce(coordinator.apply, log, State())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sigkill_at_every_write_of_a_guarded_server_leaves_nobody_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every device that brought its token is in, also where the server was killed between admitting and enrolling it; once."""
    site = made(tmp_path / "killed")
    names = tuple(identity.device_id(seed(device)) for device in range(DEVICES))
    with closing(Admission(site.data)) as admission:
        tokens = tuple(admission.mint("", time.time() + 3600, time.time())[1] for _ in names)
    devices = Devices(names, tokens, site.data / "admin.token")
    survive(site, devices, GUARDED_KILLS, "", ["--require-tokens"], capsys)

    with closing(Admission(site.data)) as admission:
        assert admission.devices() == dict.fromkeys(names, False)
        assert {(token.id, token.device) for token in admission.tokens()} == {
            (text.partition("-")[0], name) for text, name in zip(tokens, names, strict=True)
        }
    assert [event.device for event in logged(site, "") if isinstance(event, Enrolled)] == list(names)


def survive(
    site: Site,
    devices: Devices,
    kills: list[tuple[str, int]],
    state: str,
    more: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Kills a server at each point, lets it go on, and compares its folder with that of one that nobody killed."""
    calm = made(site.folder.with_name("calm"))
    for point, count in kills:
        with serve(site, more, f"{point}:{count}") as (process, url):
            if url:
                asyncio.run(devices.run(url))
            assert process.wait(60) == -signal.SIGKILL, f"{point} was not reached {count} times"
    devices.stop_at = devices.version + 2
    finish(site, more, devices)
    finish(calm, [], undisturbed := Devices(devices.names, stop_at=devices.stop_at))
    log, quiet = logged(site, state), logged(calm, "")
    accepted = [event for event in log if isinstance(event, Accepted)]
    with capsys.disabled():
        points = len({point for point, _ in kills})
        print(f"\n{len(kills)} kills at {points} points, {len(accepted)} updates ({'PostgreSQL' if state else 'SQLite'})")

    sent = [(name, version) for version in range(devices.stop_at) for name in devices.names]
    assert [(event.device, event.version) for event in accepted] == sent
    assert devices.receipts == {event.id for event in accepted} == undisturbed.receipts
    assert published(log) == published(quiet)
    assert max(Counter(event.id for event in accepted).values()) == 1
    assert adapters(site) == adapters(calm)
    assert not list((site.data / "blobs").glob("incoming-*"))
    assert [line for line in site.said.splitlines() if " INFO edge_server.watch: " not in line] == []


def published(log: list[Event]) -> list[tuple[int, str, int]]:
    """All but when it was."""
    return [(event.version, event.adapter, event.folded) for event in log if isinstance(event, Published)]


def adapters(site: Site) -> dict[str, bytes]:
    """Every version's files."""
    versions = site.data / "versions"
    return {str(path.relative_to(versions)): path.read_bytes() for path in versions.rglob("*") if path.is_file()}


async def send_half(url: str, body: bytes) -> None:
    """The head of a request and half its body; returns once the server is gone."""
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    head = f"POST /v1/results HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.TENSORS_TYPE}\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body[: len(body) // 2])
    with suppress(ConnectionError):
        assert await reader.read() == b""
    writer.close()


def test_half_an_upload_is_nothing(site: Site) -> None:
    """The half is on disk when the server is killed, and gone with its next start, to which the device sends again."""
    body, devices = upload("d0", 0, num_examples=10), Devices(stop_at=1)
    with serve(site, [], "upload-arriving:1") as (process, url):
        asyncio.run(send_half(url, body))
        assert process.wait(60) == -signal.SIGKILL
    (left,) = (site.data / "blobs").glob("incoming-*")
    assert left.read_bytes() == body[: len(body) // 2]
    finish(site, [], devices)

    assert not list((site.data / "blobs").glob("incoming-*"))
    sent = [event.blob for event in logged(site, "") if isinstance(event, Accepted)]
    assert (len(sent), sent[0]) == (DEVICES, hashlib.sha256(body).hexdigest())


REVOKE = """
import sys, pathlib
from edge_server import admission, failpoints
admission.Admission(pathlib.Path(sys.argv[1]), failpoints.of(sys.argv[2])).revoke_device(sys.argv[3])
"""


@pytest.mark.parametrize(("point", "done"), [("admission-written", False), ("admission-committed", True)])
def test_a_device_is_shut_out_or_is_not(tmp_path: Path, point: str, done: bool) -> None:
    """A command that is killed before its commit has changed nothing, and can be given again."""
    with closing(Admission(tmp_path)) as admission:
        admission.admit("d0", admission.mint("", time.time() + 60, time.time())[1], time.time())
    killed = subprocess.run([sys.executable, "-c", REVOKE, str(tmp_path), f"{point}:1", "d0"], timeout=60)

    assert killed.returncode == -signal.SIGKILL
    with closing(Admission(tmp_path)) as admission:
        assert admission.devices() == {"d0": done}
        admission.revoke_device("d0")
        assert admission.devices() == {"d0": True}


# Failpoints -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text", ["", "nowhere:1", "event-written", "event-written:0", "event-written:-1", "event-written:x"])
def test_a_failpoint_that_is_none_is_refused(text: str) -> None:
    """A test that kills nothing would prove nothing."""
    with pytest.raises(SettingsError, match="EDGE_FAILPOINT is POINT:N"):
        failpoints.of(text)


def test_without_a_failpoint_nothing_is_counted() -> None:
    """The server runs with a function that does nothing."""
    assert failpoints.of(None) is failpoints.nothing


# One run, one folder, one database ------------------------------------------------------------------------------------
@pytest.fixture
def site(tmp_path: Path) -> Site:
    return made(tmp_path / "site")


def test_a_folder_and_a_database_of_two_runs_are_refused(site: Site, postgres: Postgres, tmp_path: Path) -> None:
    """Neither a run's folder with another database, nor its database with another folder."""
    other, mine = postgres.create(), postgres.create()
    helpers.open_ledger(site.data, site.run, state=mine).close()
    helpers.open_ledger(tmp_path / "other", site.run, state=other).close()
    for url in ("", other, postgres.create()):
        with pytest.raises(SettingsError, match="holds another run than its database; use the --state it was made with"):
            helpers.open_ledger(site.data, site.run, state=url)

    helpers.open_ledger(site.data, site.run, state=mine).close()


async def test_a_database_whose_folder_is_lost_is_refused(site: Site, postgres: Postgres) -> None:
    """The blobs its events speak of are elsewhere; one without events is as good as new."""
    url = postgres.create()
    helpers.open_ledger(site.folder / "first", site.run, state=url).close()
    ledger = helpers.open_ledger(site.data, site.run, state=url)
    await ledger.open()
    ledger.close()
    with pytest.raises(SettingsError, match=r"this database holds a run, .* none"):
        helpers.open_ledger(site.folder / "third", site.run, state=url)

    helpers.open_ledger(site.data, site.run, state=url).close()


def test_two_servers_on_one_database_are_refused(
    site: Site, postgres: Postgres, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although each has a folder of its own; the second ends with exit code 2."""
    monkeypatch.setattr(storage, "LOCK_SECONDS", 1)
    state = ["--state", postgres.create()]
    with serve(site, state) as (process, _):
        assert cli.main([*site.arguments(*OFTEN, *state), "--data", str(site.folder / "second")]) == 2
        assert process.poll() is None

    assert "another edge-server already uses postgresql" in capsys.readouterr().err


def test_a_server_that_loses_its_database_ends(site: Site, postgres: Postgres) -> None:
    """The update on its way is not acknowledged, the process ends with exit code 1, and the next one takes the update in."""
    state = ["--state", postgres.create()]
    body = upload("d0", 0)

    async def send(url: str) -> str:
        async with HttpTransport(url) as transport:
            return (await Api(transport).send(wire.TENSORS_TYPE, body)).id

    async def enroll(url: str) -> None:
        async with HttpTransport(url) as transport:
            await Api(transport).enroll("d0", "name")

    with serve(site, state) as (process, url):
        asyncio.run(enroll(url))
        postgres.hang_up()
        with pytest.raises(Refused, match="internal"):
            asyncio.run(send(url))
        assert process.wait(60) == 1
    assert "the connection to the database is lost; what was on its way is not acknowledged" in site.said
    with serve(site, state) as (_, url):
        receipt = asyncio.run(send(url))

    assert [event.id for event in logged(site, state[1]) if isinstance(event, Accepted)] == [receipt]


@pytest.mark.parametrize("arguments", [["--state", "mysql://host/db"], ["--snapshot-every", "0"]])
def test_wrong_options_are_exit_code_2(site: Site, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    """Said in one line, before anything is made."""
    assert cli.main(site.arguments(*arguments)) == 2

    assert capsys.readouterr().err.startswith(f"edge-server: {arguments[0]} is ")
    assert not site.data.exists()


def test_snapshots_are_taken_while_events_come(site: Site) -> None:
    """Every fifth event, so that a start reads at most four."""
    finish(site, [], Devices(stop_at=2))
    with closing(opened(site, "")) as log:
        (after, _), *_ = log.snapshots(snapshots.PROGRAM)

        assert after == log.newest - log.newest % 5
