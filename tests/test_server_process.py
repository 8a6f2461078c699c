"""The real `edge-server` process: what it says and returns, and that SIGKILL at any moment loses and doubles nothing."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from edge_sdk import wire
from edge_sdk.adapters import read_peft
from edge_sdk.errors import Refused, Unreachable
from edge_sdk.protocol import Status, Train
from edge_sdk.transport import Api, HttpTransport
from edge_server import cli
from edge_server.coordinator import Accepted, Dropped, Published, State, apply
from edge_server.settings import RunSettings
from tests import factories
from tests import server_helpers as helpers
from tests.server_helpers import events, settings, upload

UNCUT = "versions may be made of fewer than 3 updates, of which none is cut: one device can then destroy the adapter"


@dataclass
class Site:
    """What an operator has: a configuration, a bundle and a data folder."""

    folder: Path
    run: RunSettings = field(default_factory=settings)

    def __post_init__(self) -> None:
        helpers.write_config(self.folder / "run.toml", self.run)
        helpers.write_bundle(self.folder / "bundle")

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def said(self) -> str:
        """Everything the processes wrote to stderr."""
        return (self.folder / "stderr").read_text()

    def arguments(self, *more: str) -> list[str]:
        files = ["--config", str(self.folder / "run.toml"), "--bundle", str(self.folder / "bundle"), "--data", str(self.data)]
        return ["serve", *files, *more]

    def serve(self, *more: str) -> AbstractContextManager[Server]:
        """A process that listens on a free port; killed at the end if it still runs."""
        return self.start(*self.arguments("--port", "0", *more))

    @contextlib.contextmanager
    def start(self, *arguments: str) -> Iterator[Server]:
        """The same with these arguments only."""
        command = [sys.executable, "-m", "edge_server.cli", *arguments]
        with (
            (self.folder / "stderr").open("a") as stderr,
            # unbuffered: what is said right after the first line is not taken from `communicate`
            subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=stderr) as process,
        ):
            try:
                assert process.stdout is not None
                first = process.stdout.readline().decode()
                assert re.match("listening on https?://127.0.0.1:", first), f"it said {first!r} and {self.said!r}"
                yield Server(process, first.removeprefix("listening on ").split(",")[0], first.strip())
            finally:
                process.kill()


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    url: str
    first_line: str

    def stop(self, number: int) -> tuple[int, list[str]]:
        """Sends a signal; the exit code and the lines said since the first."""
        self.process.send_signal(number)
        said, _ = self.process.communicate(timeout=60)
        return self.process.returncode, said.decode().splitlines()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def cli_status(url: str, capsys: pytest.CaptureFixture[str]) -> Status:
    assert cli.main(["status", url, "--json"]) == 0
    return wire.decode(capsys.readouterr().out.encode(), Status)


async def work_once(url: str, device: str, version: int, seed: int = 0) -> None:
    async with HttpTransport(url) as transport:
        api = Api(transport)
        await api.enroll(device, f"name of {device}")
        await api.send(wire.TENSORS_TYPE, upload(device, version, seed))


async def says(url: str, condition: Callable[[Status], bool]) -> None:
    """Returns once the server's status fulfils `condition`."""
    deadline = time.monotonic() + 60
    async with HttpTransport(url) as transport:
        while not condition(await Api(transport).status()):
            assert time.monotonic() < deadline, "the condition never came true"


# What it refuses to start with ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org", ""])  # noqa: S104
def test_other_machines_are_not_let_in_by_accident(site: Site, capsys: pytest.CaptureFixture[str], host: str) -> None:
    """Listening beyond this machine takes a certificate, or the word that a proxy has one, and nothing is made before."""
    assert cli.main(site.arguments("--host", host)) == 2

    assert "give --tls-cert and --tls-key, or, behind a proxy, --plain-http" in capsys.readouterr().err
    assert not site.data.exists()


def test_wrong_settings_are_exit_code_2(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A misspelt key is said in one line that names it."""
    with (site.folder / "run.toml").open("a") as file:
        file.write("verions = 3\n")

    assert cli.main(site.arguments()) == 2
    assert "unknown field `verions`" in capsys.readouterr().err


def test_a_data_folder_of_another_run_is_exit_code_2(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Two runs are never mixed."""
    helpers.open_ledger(site.data, settings(seed=1)).close()

    assert cli.main(site.arguments()) == 2
    assert "use another --data folder" in capsys.readouterr().err


def test_a_damaged_bundle_is_exit_code_1(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A model file that is not what bundle.json says is found before the server listens."""
    (site.folder / "bundle" / "dummy.bin").write_bytes(b"changed")

    assert cli.main(site.arguments()) == 1
    assert "dummy.bin is missing or damaged" in capsys.readouterr().err


def test_a_port_in_use_is_exit_code_1(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a traceback, but one line with the address."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]

        assert cli.main(site.arguments("--port", str(port))) == 1
    assert str(port) in capsys.readouterr().err


@pytest.mark.parametrize("json", [[], ["--json"]])
def test_the_status_of_a_server_that_is_down_is_exit_code_1(capsys: pytest.CaptureFixture[str], json: list[str]) -> None:
    """The message has the address and asks the right question."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    assert cli.main(["status", url, *json]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"edge-server: no answer from {url} ")
    assert said.err.endswith("is the server running?\n")


@pytest.mark.parametrize("url", ["ftp://x", "nonsense"])
@pytest.mark.parametrize("verb", [["status"], ["synthetic", "list"]])
def test_a_url_that_is_none_is_exit_code_2(capsys: pytest.CaptureFixture[str], verb: list[str], url: str) -> None:
    """It is named, with an example of one."""
    assert cli.main([*verb, url]) == 2
    assert capsys.readouterr().err == f"edge-server: '{url}' is not a server's URL, e.g. http://192.168.1.5:8440\n"


def test_the_status_of_something_else_is_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not ours, or hangs up, is no status."""

    async def ask() -> int:
        async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as other:
            return await asyncio.to_thread(cli.main, ["status", f"127.0.0.1:{other.sockets[0].getsockname()[1]}"])

    assert asyncio.run(ask()) == 1
    assert "no answer" in capsys.readouterr().err


# The process ----------------------------------------------------------------------------------------------------------
def test_it_serves_until_it_is_told_to_stop(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGTERM is answered with `stopped` and exit code 0; everything before it is on disk."""
    with site.serve() as server:
        for device in ("d1", "d2", "d3"):
            asyncio.run(work_once(server.url, device, 0))
        asyncio.run(says(server.url, lambda status: status.version == 1))
        status = cli_status(server.url, capsys)
        assert cli.main(["status", server.url]) == 0
        printed = capsys.readouterr().out
        code, said = server.stop(signal.SIGTERM)

    assert server.first_line.endswith(", lpfl at version 0")
    assert (code, said) == (0, [UNCUT, "version 1 from 2 updates (staleness 0, 0)", "stopped"])
    assert printed.splitlines()[:2] == [
        "lpfl: version 1, 1 updates waiting",
        f"  name of d1: 1 updates, {status.devices[0].uploaded_bytes:,} bytes",
    ]
    assert [device.updates for device in status.devices] == [1, 1, 1]
    assert [line.split()[1:4] for line in site.said.splitlines()] == [["INFO", "edge_server.watch:", "upload"]] * 3


def test_a_new_process_goes_on_where_the_old_one_stopped(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """Also when the bundle has moved meanwhile: same version, same adapter, and the model is still served."""
    with site.serve() as server:
        for device in ("d1", "d2"):
            asyncio.run(work_once(server.url, device, 0))
        asyncio.run(says(server.url, lambda status: status.version == 1))
        before = cli_status(server.url, capsys)
        assert server.stop(signal.SIGINT)[0] == 0
    (site.folder / "bundle").rename(site.folder / "elsewhere")
    helpers.write_bundle(site.folder / "bundle")
    for path in (site.folder / "elsewhere").iterdir():
        path.unlink()
    with site.serve() as again:
        after = cli_status(again.url, capsys)
        body = asyncio.run(download(again.url, site.folder / "bundle" / "dummy.bin"))

    assert again.first_line.endswith(", lpfl at version 1")
    assert after == before
    assert body == b"not a model" * 100


async def download(url: str, model: Path) -> bytes:
    """A bundle file as a device gets it."""
    from edge_sdk import bundle as bundles

    file = bundles.digest(model)
    async with HttpTransport(url) as transport:
        return await Api(transport).blob_bytes(file.sha256, file.size)


def test_devices_that_hang_up_leave_nothing_and_say_nothing(site: Site, capsys: pytest.CaptureFixture[str]) -> None:
    """A broken upload is everyday: no file stays, nothing is logged, and the server stops as politely as ever."""
    with site.serve() as server:
        at = urlsplit(server.url)
        for _ in range(3):
            with socket.create_connection((at.hostname, at.port)) as device:
                head = f"POST /v1/results HTTP/1.1\r\nHost: x\r\nContent-Type: {wire.TENSORS_TYPE}\r\nContent-Length: 999"
                device.sendall(head.encode() + b"\r\n\r\n" + b"x" * 500)
                asyncio.run(helpers.until(lambda: bool(leftovers(site.data))))
            asyncio.run(helpers.until(lambda: not leftovers(site.data)))
        status = cli_status(server.url, capsys)
        code, said = server.stop(signal.SIGTERM)

    assert (status.version, status.buffered, status.devices) == (0, 0, ())
    assert (code, said, site.said) == (0, [UNCUT, "stopped"], "")


def leftovers(data: Path) -> list[Path]:
    return list((data / "blobs").glob("incoming-*"))


def waiting(data: Path) -> set[str]:
    """Devices of which an update waits for a version."""
    return {update.device for update in functools.reduce(apply, events(data), State()).buffer}


# SIGKILL --------------------------------------------------------------------------------------------------------------
@dataclass
class Fleet:
    """Devices that upload as fast as they can, keep what was not answered, and send it again, as agents do."""

    size: int
    receipts: dict[str, int] = field(default_factory=dict)  # update id -> seed of its tensors
    pending: dict[str, tuple[bytes, int]] = field(default_factory=dict)  # device -> body and seed in its outbox
    happened: int = 0  # uploads begun and receipts received
    repeated: int = 0  # uploads sent again after a crash

    async def run(self, url: str, stop: Callable[[], bool]) -> None:
        """All devices take part until the server is gone, or `stop()` and all outboxes are empty."""
        async with HttpTransport(url) as transport:
            api = Api(transport)
            await asyncio.gather(*(self._device(api, f"device-{i}", stop) for i in range(self.size)))

    async def _device(self, api: Api, name: str, stop: Callable[[], bool]) -> None:
        try:
            if name in self.pending:
                self.repeated += 1
                await self._send(api, name)
            await api.enroll(name, name)
            while not stop():
                work = await api.ask(name, True)
                if isinstance(work, Train):
                    seed = self.happened
                    body = upload(name, work.version, seed, num_examples=seed % 90 + 10)
                    self.pending[name] = (body, seed)
                    await self._send(api, name)
        except Unreachable:
            pass  # the server was killed; what is pending waits for the next one

    async def _send(self, api: Api, name: str) -> None:
        body, seed = self.pending[name]
        self.happened += 1
        try:
            receipt = await api.send(wire.TENSORS_TYPE, body)
        except Refused as error:
            if error.code != "too-stale":
                raise
        else:
            self.happened += 1
            self.receipts[receipt.id] = seed
        del self.pending[name]


@pytest.mark.slow
def test_sigkill_loses_and_doubles_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Killed five times under load: every receipted update counts once, and the adapter is the fold of the log."""
    site = Site(tmp_path, settings(buffer_size=3, max_staleness=4))
    moment = random.Random(5)
    fleet = Fleet(size=8)

    for _ in range(5):
        with site.serve() as server:
            asyncio.run(until_killed(fleet, server, fleet.happened + moment.randint(20, 120), moment.random() * 0.01))
            known = {event.id for event in events(site.data) if isinstance(event, Accepted)}
            assert fleet.receipts.keys() <= known
    with site.serve() as server:
        enough = fleet.happened + 30
        asyncio.run(fleet.run(server.url, lambda: fleet.happened >= enough))
        asyncio.run(says(server.url, lambda _: len(waiting(site.data)) < 3))
        status = cli_status(server.url, capsys)
        assert server.stop(signal.SIGTERM)[0] == 0

    log = events(site.data)
    accepted = [event for event in log if isinstance(event, Accepted)]
    published = [event for event in log if isinstance(event, Published)]
    adapter, _ = read_peft(site.data / "versions" / f"{published[-1].version:04d}", factories.SLOTS)
    folded = helpers.fold(log, lambda event: helpers.delta(fleet.receipts[event.id]), site.run)
    counted = {device.id: device.updates for device in status.devices}
    assert fleet.repeated > 0
    assert len(accepted) == len({event.id for event in accepted}) == len({(event.device, event.version) for event in accepted})
    assert {event.id for event in accepted} == fleet.receipts.keys()
    assert counted == Counter(event.device for event in accepted)
    assert [event.version for event in published] == list(range(len(published)))
    assert sum(event.folded for event in published) == 3 * (len(published) - 1)
    dropped = sum(len(event.blobs) for event in log if isinstance(event, Dropped))
    assert len(accepted) - sum(event.folded for event in published) - dropped == status.buffered
    assert all((adapter[name] == folded[name]).all() for name in folded)
    assert wire.unpack_adapter((site.data / "blobs" / published[-1].adapter).read_bytes(), helpers.SHAPES).keys() == folded.keys()
    assert not leftovers(site.data)
    assert [line for line in site.said.splitlines() if " INFO edge_server.watch: " not in line] == []


async def until_killed(fleet: Fleet, server: Server, at: int, after: float) -> None:
    """Runs the fleet and kills the server `after` seconds after `at` things have happened."""
    devices = asyncio.create_task(fleet.run(server.url, lambda: False))
    await helpers.until(lambda: fleet.happened >= at)
    asyncio.get_running_loop().call_later(after, server.process.kill)
    await devices
    server.process.wait()


def test_a_second_server_on_the_same_folder_is_refused(site: Site) -> None:
    """Two processes on one event log would tear the run apart; the second ends with exit code 2 and says why."""
    with site.serve() as server:
        second = subprocess.run(
            [sys.executable, "-m", "edge_server.cli", *site.arguments("--port", "0")],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert second.returncode == 2
        assert "another edge-server already uses" in second.stderr
        assert server.process.poll() is None
