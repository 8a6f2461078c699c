"""What an operator types and reads: log lines, `devices`, `versions`, `export`, `config show`, and the environment."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk import wire
from edge_sdk.adapters import read_peft
from edge_sdk.errors import DataError, Refused, SettingsError
from edge_sdk.transport import Api, HttpTransport
from edge_server import cli, logs, storage
from edge_server import settings as run_settings
from edge_server.failpoints import nothing
from tests import server_helpers as helpers
from tests.server_helpers import SPEC, settings, upload
from tests.test_server_process import Site, says, work_once

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.toml"))
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def no_settings_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the environment of the tests says is not for these servers."""
    for name in [name for name in os.environ if name.startswith("EDGE_SERVER_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture
async def made(tmp_path: Path) -> AsyncIterator[Path]:
    """The data folder of a run with versions 0 and 1, two updates in the latter, and one that waits."""
    async with helpers.running(tmp_path / "data") as server:
        await server.enroll("d1", "d2", "d3")
        for number, device in enumerate(("d1", "d2")):
            await server.send(upload(device, 0, number))
        await server.reaches(1)
        await server.send(upload("d3", 0, metrics={"accuracy": 0.75}))
        yield server.data


def printed(capsys: Capture, *arguments: str) -> list[str]:
    assert cli.main(list(arguments)) == 0
    return capsys.readouterr().out.splitlines()


def refusal(capsys: Capture, *arguments: str) -> str:
    assert cli.main(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def record(message: str, fields: logs.Fields, error: Exception | None = None) -> logging.LogRecord:
    trace = None if error is None else (type(error), error, None)
    found = logging.LogRecord("edge_server.x", logging.INFO, "x.py", 1, "%s", (message,), trace)
    found.created = 1.5
    found.fields = fields
    return found


# Lines of the log -----------------------------------------------------------------------------------------------------
def test_how_a_line_looks() -> None:
    """Time, level, where, what, and the fields."""
    some = record("upload", {"device": "d1", "seconds": 0.25})

    assert logs.AsText().format(some) == "1970-01-01T00:00:01.500+00:00 INFO edge_server.x: upload device=d1 seconds=0.25"
    assert logs.AsJson().format(some) == (
        '{"time": "1970-01-01T00:00:01.500+00:00", "level": "INFO", "logger": "edge_server.x", "event": "upload",'
        ' "device": "d1", "seconds": 0.25}'
    )


@given(st.text(), st.text(), st.text())
def test_nothing_that_was_sent_makes_a_line_of_its_own(message: str, value: str, error: str) -> None:
    """JSON is one line; in text only the first line begins at its edge, and nothing in it moves a terminal."""
    some = record(message, {"name": value}, ValueError(error))

    (line,) = logs.AsJson().format(some).splitlines()
    first, *rest = logs.AsText().format(some).split("\n")

    assert {"event": message, "name": value}.items() <= json.loads(line).items()
    assert first.startswith("1970-01-01T")
    assert all(row.startswith("    ") for row in rest)
    assert all(row.isprintable() for row in (first, *rest))


def test_an_upload_is_one_line_and_so_is_a_refusal(site: Site) -> None:
    """With --log json stderr has a JSON object for each, with these fields and nothing of a body."""
    body, repeated = upload("d1", 0, metrics={"secret": 1.0}), "0123456789" * 3

    async def use(url: str) -> None:
        async with HttpTransport(url, bearer="never to be told") as transport:
            api = Api(transport)
            await api.enroll("d1", "a name", token="not to be told either")  # noqa: S106
            await api.enroll(repeated, "another name")
            for sent in (body, body, upload(repeated, 0)):
                await api.send(wire.TENSORS_TYPE, sent)
            for path in ("/v1/blobs/%0Aevent", "/nothing"):
                await transport.request("GET", path)
            with pytest.raises(Refused):
                await api.send(wire.TENSORS_TYPE, b"to be refused")

    with site.serve("--log", "json") as server:
        asyncio.run(use(server.url))
        server.stop(signal.SIGTERM)
    lines = [json.loads(line) for line in site.said.splitlines()]

    assert all(line.pop("time").endswith("+00:00") and line.pop("seconds") >= 0 for line in lines)
    sent = {"level": "INFO", "logger": "edge_server.watch", "route": "/v1/results", "bytes": len(body)}
    taken = {**sent, "event": "upload", "status": 200, "result": "update", "device": "d1", "version": 0, "staleness": 0}
    gone = {"level": "INFO", "logger": "edge_server.watch", "event": "refused", "bytes": 0}
    assert lines == [
        taken,
        {**sent, "event": "repeated", "status": 200},
        {**taken, "device": repeated[:12], "bytes": len(upload(repeated, 0))},
        {**gone, "route": "/v1/blobs/{sha256}", "status": 404, "code": "unknown-blob"},
        {**gone, "route": "none", "status": 404, "code": "http-404"},
        {**gone, "route": "/v1/results", "status": 400, "code": "bad-tensors", "bytes": 13},
    ]
    assert not [word for word in ("to be", "secret", "name") if word in site.said]


# Devices, versions ----------------------------------------------------------------------------------------------------
def test_devices_of_a_server(site: Site, capsys: Capture) -> None:
    """A row a device with what it sent, for people and as JSON."""
    with site.serve() as server:
        asyncio.run(work_once(server.url, "d1", 0))
        rows = printed(capsys, "devices", server.url)
        (line,) = printed(capsys, "devices", server.url, "--json")
        (version,) = printed(capsys, "versions", server.url, "--json")
        table = printed(capsys, "versions", server.url)

    size = len(upload("d1", 0))
    assert [row.split() for row in rows] == [
        ["id", "name", "updates", "uploaded_bytes"],
        ["d1", "name", "of", "d1", "1", str(size)],
    ]
    assert json.loads(line) == {"id": "d1", "name": "name of d1", "updates": 1, "uploaded_bytes": size}
    assert json.loads(version)["version"] == 0
    assert [row.split() for row in table] == [["version", "adapter"], ["0", json.loads(version)["adapter"][:12]]]


async def test_versions_of_a_folder(made: Path, capsys: Capture) -> None:
    """Also while its server runs: number, adapter, when, of how many updates, and where PEFT finds it."""
    rows = [json.loads(line) for line in printed(capsys, "versions", str(made), "--json")]
    table = printed(capsys, "versions", str(made))

    assert [(row["version"], row["updates"], row["folder"]) for row in rows] == [
        (0, 0, str(made / "versions/0000")),
        (1, 2, str(made / "versions/0001")),
    ]
    assert {row["adapter"] for row in rows} <= helpers.blobs(made)
    assert all(row["made"].endswith(" UTC") for row in rows)
    assert table[0].split() == ["version", "adapter", "made", "updates", "folder"]
    assert table[2].split()[:2] == ["1", rows[1]["adapter"][:12]]
    assert len(table) == 3


async def test_versions_are_listed_without_their_events(made: Path, capsys: Capture) -> None:
    """Where these are in PostgreSQL, only how many updates there were is missing."""
    (made / "events.sqlite").rename(made / "away")

    rows = [json.loads(line) for line in printed(capsys, "versions", str(made), "--json")]

    assert [row.keys() for row in rows] == [{"version", "adapter", "made", "folder"}] * 2


def test_events_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    """One error of ours names the file, also one with signs that a URL would take for its own."""
    path = tmp_path / "a?b#c%20.sqlite"
    path.write_bytes(b"no database at all" * 100)

    with pytest.raises(DataError, match=r"a\?b#c%20\.sqlite cannot be read: file is not a database"):
        list(storage.bodies(path))


# Export ---------------------------------------------------------------------------------------------------------------
async def test_an_exported_version_is_the_one_of_the_run(made: Path, tmp_path: Path, capsys: Capture) -> None:
    """The folder has the same files, and PEFT's reader takes it."""
    out = tmp_path / "out"

    assert printed(capsys, "export", str(made), "1", str(out)) == [f"version 1 is now in {out}"]

    source = made / "versions/0001"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}
    assert read_peft(out, SPEC.slots).arrays.keys() == SPEC.shapes().keys()
    assert "out.part" not in os.listdir(tmp_path)


async def test_an_export_takes_nobodys_place(made: Path, tmp_path: Path, capsys: Capture) -> None:
    """What is there stays, be it a folder, a file, or a link that leads nowhere."""
    places = [tmp_path / name for name in ("folder", "file", "link")]
    places[0].mkdir()
    places[1].write_text("mine")
    places[2].symlink_to(tmp_path / "gone")

    for out in places:
        assert f"{out} is there already" in refusal(capsys, "export", str(made), "1", str(out))

    assert (list(places[0].iterdir()), places[1].read_text(), places[2].is_symlink()) == ([], "mine", True)


@pytest.mark.parametrize(
    ("spoil", "version", "said"),
    [
        (lambda data: None, "7", "has no folder of version 7; there is 0, 1"),
        (lambda data: (data / "run.json").unlink(), "1", "is not the data folder of a server"),
        (lambda data: (data / "versions/0001/adapter_model.safetensors").write_bytes(b"torn"), "1", "being made or damaged"),
        (lambda data: (data / "versions/0001/adapter_model.safetensors").unlink(), "1", "being made or damaged"),
        (lambda data: (data / "versions/0001/adapter_config.json").write_bytes(b""), "1", "being made or damaged"),
        (lambda data: (data / "versions/0001/adapter_config.json").unlink(), "1", "being made or damaged"),
        (lambda data: (data / "run.json").write_bytes(b"{"), "1", "run.json is damaged"),
        (lambda data: (data / "run.json").write_bytes(b"[]"), "1", "run.json is damaged"),
        (lambda data: (data / "run.json").write_bytes(b'{"manifest": 3}'), "1", "run.json is damaged"),
    ],
)
async def test_what_cannot_be_exported_is_said(
    made: Path, tmp_path: Path, capsys: Capture, spoil: Callable[[Path], Any], version: str, said: str
) -> None:
    """And leaves nothing behind."""
    spoil(made)

    assert said in refusal(capsys, "export", str(made), version, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["data"]


NO_TOKENS = [
    b"\xff\xfeno UTF-8 at all",
    "as Windows has it".encode("utf-16"),
    b"first line\nand a second one",
    b"with a \0 in it all",
]


@pytest.mark.parametrize("body", NO_TOKENS)
def test_an_admin_token_that_is_no_text_is_said(tmp_path: Path, capsys: Capture, body: bytes) -> None:
    """By the verbs that call a server, and by the server when it starts: which file, and what to do."""
    path = tmp_path / "admin.token"
    path.write_bytes(body)

    assert f"{path} holds no admin token" in refusal(capsys, "status", "http://127.0.0.1:1", "--admin-token-file", str(path))
    with pytest.raises(SettingsError, match=r"holds no admin token, .* or delete it"):
        cli._guard(argparse.Namespace(host="127.0.0.1", require_tokens=True, data=tmp_path, admin_token_file=path), nothing)


# Settings from file, environment and flags ----------------------------------------------------------------------------
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_the_settings_that_are_shown_are_a_file_with_the_same(example: Path, tmp_path: Path, capsys: Capture) -> None:
    """What `config show` prints is TOML, and loads as the settings that it shows."""
    shown = tmp_path / "shown.toml"
    shown.write_text("\n".join(printed(capsys, "config", "show", "--config", str(example))))

    assert run_settings.load(shown) == run_settings.load(example)
    assert "# --port 8440  (EDGE_SERVER_PORT)" in shown.read_text()


def test_a_flag_wins_over_the_environment_and_that_over_the_default(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """For numbers, files, words without a value, and what may be given several times."""
    config = str(site.folder / "run.toml")
    said = {"CONFIG": config, "PORT": "9000", "HOST": "localhost", "BUNDLE": "a:b", "PLAIN_HTTP": "1", "REQUIRE_TOKENS": "no"}
    for name, value in said.items():
        monkeypatch.setenv(f"EDGE_SERVER_{name}", value)

    shown = printed(capsys, "config", "show", "--port", "9001", "--snapshot-every", "7")
    bundles = printed(capsys, "config", "show", "--bundle", "c", "--bundle", "d")

    assert {
        "# --port 9001  (EDGE_SERVER_PORT)",
        '# --host "localhost"  (EDGE_SERVER_HOST)',
        "# --snapshot-every 7  (EDGE_SERVER_SNAPSHOT_EVERY)",
        '# --bundle ["a", "b"]  (EDGE_SERVER_BUNDLE)',
        "# --plain-http true  (EDGE_SERVER_PLAIN_HTTP)",
        "# --require-tokens false  (EDGE_SERVER_REQUIRE_TOKENS)",
        f"# --config {json.dumps(config)}  (EDGE_SERVER_CONFIG)",
    } <= set(shown)
    assert '# --bundle ["c", "d"]  (EDGE_SERVER_BUNDLE)' in bundles


def test_a_server_needs_no_flags(site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    """All that `serve` must be told can be said by the environment: a real process starts, and takes an update."""
    files = {"CONFIG": site.folder / "run.toml", "BUNDLE": site.folder / "bundle", "DATA": site.data}
    for name, value in {**files, "PORT": "0", "LOG": "json", "SYSTEM": "lpfl"}.items():
        monkeypatch.setenv(f"EDGE_SERVER_{name}", str(value))

    with site.start("serve") as server:
        asyncio.run(work_once(server.url, "d1", 0))
        asyncio.run(says(server.url, lambda status: status.buffered == 1))
        server.stop(signal.SIGTERM)

    assert [json.loads(line)["event"] for line in site.said.splitlines()] == ["upload"]
    monkeypatch.setenv("EDGE_SERVER_HOST", "0.0.0.0")  # noqa: S104
    assert "0.0.0.0 is reachable from other machines" in refusal(capsys, "serve")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PROT", "1", "there is no setting EDGE_SERVER_PROT; those are EDGE_SERVER_ADMIN_TOKEN_FILE, EDGE_SERVER_BUNDLE"),
        ("PORT", "84400x", "EDGE_SERVER_PORT cannot be used as --port; mend it, or unset it"),
        ("PORT", "tcp://10.0.0.1:8440", "EDGE_SERVER_PORT cannot be used as --port; it looks like one that Kubernetes sets"),
        ("SERVICE_HOST", "10.0.0.1", "set enableServiceLinks: false"),
        ("SERVICE_PORT", "8440", "set enableServiceLinks: false"),
        ("SERVICE_PORT_HTTPS", "8440", "set enableServiceLinks: false"),
        ("PORT_8440_TCP", "tcp://10.0.0.1:8440", "set enableServiceLinks: false"),
        ("PORT_8440_TCP_ADDR", "10.0.0.1", "set enableServiceLinks: false"),
        ("METRICS_SERVICE_HOST", "10.0.0.1", "set enableServiceLinks: false"),
        ("LOG", "xml", "EDGE_SERVER_LOG is one of text, json"),
        ("PLAIN_HTTP", "maybe", "EDGE_SERVER_PLAIN_HTTP is one of 1, true, yes, 0, false, no"),
    ],
)
def test_what_the_environment_says_wrongly_is_said(
    site: Site, monkeypatch: pytest.MonkeyPatch, capsys: Capture, name: str, value: str, said: str
) -> None:
    """In one line that does not repeat the value; verbs that only ask a server do not mind."""
    monkeypatch.setenv(f"EDGE_SERVER_{name}", value)

    for verb in (["serve"], ["config", "show", "--config", str(site.folder / "run.toml")]):
        err = refusal(capsys, *verb)
        assert said in err
        assert value == "1" or value not in err
    assert cli.main(["devices", "127.0.0.1:1"]) == 1
    assert "EDGE_SERVER" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("postgresql://me:hunter2@host:5/db?x=1", "postgresql://me:***@host:5/db?x=1"),
        ("postgresql://me@host/db?password=hunter2&sslpassword=hunter2", "postgresql://me@host/db?password=***&sslpassword=***"),
        ("postgresql://me:a@hunter2@host/db", "postgresql://me:***@host/db"),
        ("postgresql://me:hunter2@[::1/db", "***"),
    ],
)
def test_a_password_is_not_shown(site: Site, capsys: Capture, state: str, shown: str) -> None:
    """Wherever in the database's URL it stands."""
    lines = printed(capsys, "config", "show", "--config", str(site.folder / "run.toml"), "--state", state)

    assert f'# --state "{shown}"  (EDGE_SERVER_STATE)' in lines
    assert "hunter2" not in "\n".join(lines)


def test_settings_of_the_file_are_among_those_shown(site: Site, capsys: Capture) -> None:
    """Defaults too."""
    lines = printed(capsys, "config", "show", "--config", str(site.folder / "run.toml"))

    assert {"lpfl.buffer_size = 2", 'system = "lpfl"', "adapter.freeze_a = false"} <= set(lines)
    assert settings().lpfl.buffer_size == 2
