"""`/metrics`, `/readyz` and `/healthz`: what an operator's machines read, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client.parser import text_string_to_metric_families
from yarl import URL

from edge_sdk import wire
from edge_sdk.cohort import Masked
from edge_sdk.protocol import Ask
from edge_server import ledger as ledgers
from edge_server.app import create_app
from edge_server.coordinator import Accepted, Answered, Dropped, Published, State
from edge_server.metrics import Metrics
from tests import server_helpers as helpers
from tests import test_guard as guarded
from tests.databases import Postgres
from tests.server_helpers import Running, upload

Samples = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Running]:
    async with helpers.running(tmp_path) as found:
        yield found


def samples(text: bytes) -> Samples:
    """Numbers by their names and the values of their labels."""
    families = text_string_to_metric_families(text.decode())
    return {(s.name, tuple(s.labels[name] for name in sorted(s.labels))): s.value for family in families for s in family.samples}


async def scrape(client: TestClient[Any, Any], **headers: str) -> Samples:
    answer = await client.get("/metrics", headers=headers)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    return samples(await answer.read())


def routes(found: Samples) -> set[str]:
    return {labels[0] for name, labels in found if name == "edge_requests_total"}


# The numbers ----------------------------------------------------------------------------------------------------------
def test_what_is_counted() -> None:
    """Exactly what was told, where the run stands when it is asked, and masked updates as updates."""
    state = State()
    metrics = Metrics(lambda: state, lambda: 7)
    metrics.answered("/v1/work", 200, 30, 0.002)
    metrics.answered("/v1/work", 200, 12, 0.3)
    metrics.answered("none", 404, 0, 0.0)
    metrics.refused("too-stale")
    state = State(version=5)
    metrics.committed(Accepted("id", "d1", 3, "blob", 9, 1, {}), 0.004)
    metrics.committed(Answered(Masked("c1", "d1"), "blob", 9, 0.0), 0.004)
    metrics.committed(Published(5, "blob", 2), 0.2)
    metrics.committed(Dropped(("blob", "other"), "too-stale"), 0.004)
    metrics.made(70.0)

    found = samples(metrics.exposition())

    expected = {
        ("edge_requests_total", ("/v1/work", "200")): 2,
        ("edge_requests_total", ("none", "404")): 1,
        ("edge_received_bytes_total", ("/v1/work",)): 42,
        ("edge_request_seconds_bucket", ("0.0025", "/v1/work")): 1,
        ("edge_request_seconds_bucket", ("+Inf", "/v1/work")): 2,
        ("edge_request_seconds_sum", ("/v1/work",)): 0.302,
        ("edge_updates_accepted_total", ()): 2,
        ("edge_updates_refused_total", ("too-stale",)): 1,
        ("edge_updates_dropped_total", ("too-stale",)): 2,
        ("edge_update_staleness_count", ()): 1,
        ("edge_update_staleness_sum", ()): 2,
        ("edge_commit_seconds_count", ()): 4,
        ("edge_version_seconds_sum", ()): 70,
        ("edge_version", ()): 5,
        ("edge_buffered_updates", ()): 0,
        ("edge_devices", ()): 0,
        ("edge_leases", ()): 7,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


async def test_a_run_is_told_as_it_happens(server: Running) -> None:
    """Requests, bytes, updates by what became of them, commits, versions: each is there once, a repeated upload included."""
    await server.enroll("d1", "d2", "d3")
    bodies = [upload(device, 0) for device in ("d1", "d2", "d2")]
    for body in bodies:
        await server.send(body)
    await server.reaches(1)
    await server.send(late := upload("d3", 0))
    refused = await server.client.post("/v1/results", data=b"none", headers={"Content-Type": wire.TENSORS_TYPE})
    assert refused.status == 400
    await server.client.post("/v1/results", data=b"none", headers={"Content-Type": wire.JSON_TYPE})  # no update

    found = await scrape(server.client)

    expected = {
        ("edge_requests_total", ("/v1/enroll", "200")): 3,
        ("edge_requests_total", ("/v1/results", "200")): 4,
        ("edge_requests_total", ("/v1/results", "400")): 2,
        ("edge_received_bytes_total", ("/v1/results",)): sum(map(len, bodies)) + len(late) + 8,
        ("edge_request_seconds_count", ("/v1/results",)): 6,
        ("edge_updates_accepted_total", ()): 3,
        ("edge_updates_refused_total", ("bad-tensors",)): 1,
        ("edge_update_staleness_bucket", ("0.0",)): 2,
        ("edge_update_staleness_sum", ()): 1,
        ("edge_version", ()): 1,
        ("edge_buffered_updates", ()): 1,
        ("edge_devices", ()): 3,
        ("edge_version_seconds_count", ()): 1,
        ("edge_commit_seconds_count", ()): len(helpers.events(server.data)),
    }
    assert {key: found[key] for key in expected} == expected
    assert {labels for name, labels in found if name == "edge_updates_refused_total"} == {("bad-tensors",)}


async def test_devices_that_train_are_counted_until_they_answer_or_their_leases_end(tmp_path: Path) -> None:
    """Three begin; one answers, and the leases of the others end an hour later, though nobody asks."""
    clock = [1000.0]
    ledger = helpers.open_ledger(tmp_path, helpers.settings(buffer_size=9, lease_seconds=3600.0), now=lambda: clock[0])
    async with TestClient(TestServer(create_app(ledger))) as client:
        server = Running(client, ledger, tmp_path)
        await server.enroll("d1", "d2", "d3")
        counts = [(await scrape(client))["edge_leases", ()]]
        for device in ("d1", "d2", "d3"):
            await client.post("/v1/work", data=wire.encode(Ask(device, True)))
        counts.append((await scrape(client))["edge_leases", ()])
        await server.send(upload("d1", 0))
        for clock[0] in (4599.0, 4600.0):
            counts.append((await scrape(client))["edge_leases", ()])

    assert counts == [0, 3, 2, 0]


async def test_a_path_makes_no_label(server: Running) -> None:
    """Whatever is asked for, the routes are those that exist and one more."""
    for path in ("/nothing", "/v1/blobs/" + "0" * 64, "/v1/blobs/a%0Ab", '/"}%20evil', "/v1/%62lobs/x"):
        await server.client.get(URL(path, encoded=True))
    await server.client.request("BREW", "/healthz")

    assert routes(await scrape(server.client)) == {"/v1/blobs/{sha256}", "none"}


async def test_a_part_of_a_file_is_counted_as_what_was_sent(server: Running) -> None:
    """206 and not 200: the status is the one on the line."""
    path = f"/v1/blobs/{server.ledger.state.adapter}"
    assert (await server.client.get(path, headers={"Range": "bytes=5-"})).status == 206

    assert {key for key in await scrape(server.client) if key[0] == "edge_requests_total"} == {
        ("edge_requests_total", ("/v1/blobs/{sha256}", "206"))
    }


async def test_two_servers_in_one_process_count_apart(server: Running, tmp_path: Path) -> None:
    """There is no registry that they share."""
    await server.enroll("d1")
    async with helpers.running(tmp_path / "other") as other:
        assert (await scrape(other.client))["edge_devices", ()] == 0
        assert routes(await scrape(other.client)) == {"/metrics"}


async def test_where_devices_are_known_metrics_are_the_operators(tmp_path: Path) -> None:
    """The admin token opens them, a device's signature does not; readiness and the description of the interface are open."""
    async with guarded.opened(tmp_path) as world:
        member = await world.member()
        await world.refuses("not-admin", "GET", "/metrics")
        await world.refuses("not-admin", "GET", "/metrics", headers=world.headers(member, "GET", "/metrics"))
        await world.refuses("unsigned", "GET", "/nothing")

        found = await scrape(world.client, Authorization=f"Bearer {guarded.ADMIN}")

        assert (found["edge_devices", ()], routes(found)) == (1, {"/v1/enroll", "/metrics", "none"})
        for path in ("/healthz", "/readyz", "/openapi.json"):
            assert (await world.client.get(path)).status == 200


# Ready ----------------------------------------------------------------------------------------------------------------
async def test_a_database_that_takes_no_writes_is_not_ready(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """503 with the reason, though the process is alive; ready again once it takes them, and no event was made for it."""
    monkeypatch.setattr(ledgers, "CHECK_SECONDS", 0.0)
    before = helpers.events(server.data)
    assert (await server.client.get("/readyz")).status == 200
    db = sqlite3.connect(server.data / "events.sqlite", isolation_level=None)
    db.execute("ALTER TABLE run RENAME TO away")

    answer = await server.client.get("/readyz")

    assert answer.status == 503
    assert "events.sqlite cannot be used: no such table: run" in await answer.text()
    assert (await server.client.get("/healthz")).status == 200
    db.execute("ALTER TABLE away RENAME TO run")
    db.close()
    answer = await server.client.get("/readyz")
    assert (answer.status, await answer.text()) == (200, "ok\n")
    assert helpers.events(server.data) == before


async def test_a_lost_connection_to_the_database_is_told_and_ends_the_server(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL hangs up: the next question finds out, and `lost` is what `edge-server` ends by; nothing mends it."""
    monkeypatch.setattr(ledgers, "CHECK_SECONDS", 0.0)
    ledger = helpers.open_ledger(tmp_path, state=postgres.create())
    async with TestClient(TestServer(create_app(ledger))) as client:
        assert (await client.get("/readyz")).status == 200
        assert not ledger.lost.is_set()
        await asyncio.to_thread(postgres.hang_up)

        found = [await client.get("/readyz") for _ in range(2)]
        assert [answer.status for answer in found] == [503, 503]
        assert "is lost or closed; start the server again" in await found[1].text()
        assert ledger.lost.is_set()
        assert (await client.get("/healthz")).status == 200


async def test_why_a_server_is_not_ready_is_the_operators(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason may name files, hosts and users: where devices are known it is told to the admin token alone."""
    monkeypatch.setattr(ledgers, "CHECK_SECONDS", 0.0)
    async with guarded.opened(tmp_path) as world:
        with contextlib.closing(sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None)) as db:
            db.execute("ALTER TABLE run RENAME TO away")
            told = {}
            for token in ("", "wrong", guarded.ADMIN):
                answer = await world.client.get("/readyz", headers={"Authorization": f"Bearer {token}"} if token else {})
                told[token] = answer.status, "events.sqlite" in await answer.text()
            db.execute("ALTER TABLE away RENAME TO run")

    assert told == {"": (503, False), "wrong": (503, False), guarded.ADMIN: (503, True)}


async def test_strangers_cannot_make_the_database_work(server: Running) -> None:
    """What was found is told again for some seconds: many questions are one write."""
    assert (await server.client.get("/readyz")).status == 200
    with sqlite3.connect(server.data / "events.sqlite", isolation_level=None) as db:
        db.execute("ALTER TABLE run RENAME TO away")
        assert {(await server.client.get("/readyz")).status for _ in range(20)} == {200}
        db.execute("ALTER TABLE away RENAME TO run")
    db.close()


async def test_a_run_without_a_version_is_not_ready(tmp_path: Path) -> None:
    """Before it is open there is nothing to give to a device."""
    ledger = helpers.open_ledger(tmp_path)

    assert await ledger.ready() == "there is no version yet"
    await ledger.open()
    assert await ledger.ready() == ""
    ledger.close()
