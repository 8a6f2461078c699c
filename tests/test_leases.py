"""Who may train now, who is told to come again and when, and who asks too often."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.agent import Agent
from edge_sdk.errors import Refused, WireError
from edge_sdk.protocol import Train, Wait
from edge_sdk.store import Store
from edge_sdk.transport import Api, HttpTransport
from edge_server import pacing
from edge_server.app import create_app
from edge_server.cohorts import Secure
from edge_server.coordinator import Published
from edge_server.leases import Leases
from edge_server.settings import RunSettings
from edge_server.systems.lpfl import LpFl
from tests import server_helpers as helpers
from tests import strategies
from tests.server_helpers import Simulator, settings, upload, with_auxiliary, with_llm


# Leases ---------------------------------------------------------------------------------------------------------------
def test_a_place_is_free_when_the_first_lease_ends() -> None:
    """Two may train: the third is told the rest of the first one's lease, and gets its place when that is over."""
    leases = Leases(seconds=100.0, concurrency=2)

    assert [leases.take(device, 0, 0, now) for device, now in (("a", 0.0), ("b", 30.0), ("c", 60.0))] == [0.0, 0.0, 40.0]
    assert leases.take("c", 0, 0, 99.5) == 0.5
    assert leases.take("c", 0, 0, 100.0) == 0.0
    assert leases.take("a", 0, 0, 100.0) == 30.0


def test_who_asks_again_keeps_its_lease() -> None:
    """A device that was killed goes on under the lease it had, which does not become longer."""
    leases = Leases(seconds=100.0, concurrency=1)

    assert [leases.take("a", 0, 0, now) for now in (0.0, 50.0, 99.0)] == [0.0, 0.0, 0.0]
    assert leases.take("b", 0, 0, 99.0) == 1.0
    assert len(leases) == 1


def test_an_answer_makes_room() -> None:
    """One device's answer ends its lease and nobody else's, and a late one of an older version does not end a newer lease."""
    leases = Leases(seconds=100.0, concurrency=2)
    assert leases.take("a", 4, 0, 0.0) == leases.take("b", 5, 0, 0.0) == 0.0

    leases.end("b", 4)
    leases.end("c", 9)
    assert leases.take("d", 5, 0, 1.0) == 99.0
    leases.end("b", 5)
    assert leases.take("d", 5, 0, 1.0) == 0.0


def test_work_on_a_newer_version_takes_the_place_of_the_old() -> None:
    """A device trains one version at a time: it needs no second place, and its time begins anew."""
    leases = Leases(seconds=100.0, concurrency=1)

    assert leases.take("a", 0, 0, 0.0) == leases.take("a", 1, 0, 90.0) == 0.0
    assert len(leases) == 1
    assert leases.take("b", 1, 0, 150.0) == 40.0


def test_what_would_come_too_late_holds_no_place() -> None:
    """A lease on version 3 ends when versions before 4 are refused."""
    leases = Leases(seconds=100.0, concurrency=1)

    assert leases.take("a", 3, 1, 0.0) == 0.0
    assert leases.take("b", 5, 3, 1.0) == 99.0
    assert leases.take("b", 6, 4, 1.0) == 0.0


def test_without_a_limit_everybody_may_train() -> None:
    leases = Leases(seconds=100.0)

    assert {leases.take(str(i), 0, 0, 0.0) for i in range(1000)} == {0.0}
    assert len(leases) == 1000


@strategies.fuzzing
@given(
    st.integers(1, 4),
    st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans(), st.floats(0.0, 9.0), st.integers(0, 1)), max_size=60),
)
def test_no_life_gives_more_places_than_there_are(concurrency: int, life: list[tuple[str, bool, float, int]]) -> None:
    """Against a plain dictionary: a device may work if it holds a lease or a place is free, and waits for the first that ends."""
    leases, held, now, version = Leases(10.0, concurrency), dict[str, tuple[int, float]](), 0.0, 0
    for device, answers, pause, newer in life:
        now, version = now + pause, version + newer
        if answers:
            leases.end(device, version)
            held.pop(device, None)
            continue
        held = {d: (v, until) for d, (v, until) in held.items() if until > now and v >= version - 1}
        may = device in held or len(held) < concurrency
        seconds = leases.take(device, version, version - 1, now)
        assert (seconds == 0.0) == may
        if may and held.get(device, (-1, 0.0))[0] != version:
            held[device] = version, now + 10.0
        assert seconds == (0.0 if may else min(until for _, until in held.values()) - now)
        assert len(leases) == len(held) <= concurrency


# Pauses ---------------------------------------------------------------------------------------------------------------
@given(st.floats(0.1, 1000.0), st.floats(0.0, 1.0, exclude_max=True))
def test_a_pause_is_spread_around_what_was_asked(seconds: float, jitter: float) -> None:
    """Half as long at least, one and a half times as long at most."""
    assert 0.5 * seconds <= pacing.spread(seconds, jitter) <= 1.5 * seconds


def test_those_that_were_told_at_once_do_not_come_at_once() -> None:
    """1,000 devices come back evenly: over 30 seconds, and at most 34 of them in any one of these."""
    times = [pacing.spread(30.0, i / 1000) for i in range(1000)]

    assert sum(times) / 1000 == pytest.approx(30.0, abs=0.02)
    assert max(sum(second <= at < second + 1 for at in times) for second in range(15, 45)) <= 34


def test_the_pause_before_a_place_is_bounded() -> None:
    """A lease may hold for an hour, and be over in a minute: whoever waits for its place looks at the run's own pace."""
    assert [pacing.until_free(seconds, 30.0) for seconds in (0.001, 12.0, 3600.0)] == [1.0, 12.0, 30.0]
    assert pacing.until_free(3600.0, 0.05) == 0.05


# Quotas ---------------------------------------------------------------------------------------------------------------
def asked(times: list[float], a_minute: float = 60.0) -> list[float]:
    """0 for each question that was taken, else the seconds after which it may be asked again."""
    full, found = 0.0, list[float]()
    for now in times:
        try:
            full, early = pacing.ask(full, a_minute, now), 0.0
        except WireError as error:
            early = error.retry_after or math.inf
        found.append(early)
    return found


def test_a_minutes_questions_may_come_at_once_and_no_more() -> None:
    """60 at one moment are taken, the next is a second too early; a second later one is, and the minute after 60 again."""
    assert asked([1000.0] * 61) == [0.0] * 60 + [pytest.approx(1.0)]
    assert asked([1000.0] * 62 + [1001.0] * 2)[-2:] == [0.0, pytest.approx(1.0)]
    assert asked([1000.0] * 60 + [1060.0] * 60) == [0.0] * 120


def test_a_refusal_says_when_to_come_again() -> None:
    """`Retry-After` is the time until a token is back, whatever the pace of the run."""
    with pytest.raises(WireError) as refused:
        pacing.ask(1060.0, pacing.quota(0.25), 1000.0)

    assert (refused.value.code, refused.value.status) == ("too-often", 429)
    assert refused.value.retry_after == pytest.approx(1 / 16)
    assert "960 times a minute" in refused.value.detail


def test_a_refused_question_costs_nothing() -> None:
    """Whoever asks all the time is let in once a second, as if it had only asked then."""
    found = asked([1000.0] * 60 + [1000.0 + i / 8 for i in range(1, 81)])

    assert [i for i, early in enumerate(found[60:], 1) if not early] == [8 * i for i in range(1, 11)]


@given(st.floats(0.02, 1000.0), st.lists(st.floats(0.0, 1.0, exclude_max=True), min_size=100, max_size=150))
def test_who_comes_when_it_was_told_is_never_too_early(wait_seconds: float, jitters: list[float]) -> None:
    """Whatever the run's pace, and however chance spreads its waits."""
    now, full = 1e6, 0.0
    for jitter in jitters:
        full = pacing.ask(full, pacing.quota(wait_seconds), now)
        now += pacing.spread(wait_seconds, jitter)


def test_a_clock_that_is_set_back_shuts_nobody_out() -> None:
    """An hour back: what is remembered of the future counts for nothing, and a bucket is as large as ever."""
    assert asked([5000.0] * 60 + [1400.0] * 61) == [0.0] * 120 + [pytest.approx(1.0)]


# On a server ----------------------------------------------------------------------------------------------------------
def secure(**lpfl: Any) -> RunSettings:
    return settings(secure=Secure(threshold=3), **lpfl)


@pytest.mark.parametrize("run", [settings, with_auxiliary, secure], ids=["lpfl", "fedcollm", "secure"])
async def test_a_server_lets_only_so_many_train(tmp_path: Path, run: Callable[..., RunSettings]) -> None:
    """One place: the second device waits no longer than the run's pace, and trains once the first has answered."""
    ledger = helpers.open_ledger(tmp_path, run(concurrency=1, buffer_size=3, wait_seconds=7.0), compute=Simulator())
    await ledger.open()
    for device in ("d1", "d2"):
        await ledger.enroll(device, device)

    assert [type(ledger.plan("d1", can_train=True)) for _ in range(2)] == [Train, Train]
    assert ledger.plan("d2", can_train=True) == Wait(7.0)
    await (helpers.train(ledger, "d1", 0) if run is secure else helpers.take(ledger, upload("d1", 0)))
    assert isinstance(ledger.plan("d2", can_train=True), Train)
    ledger.close()


async def test_a_restart_forgets_leases(tmp_path: Path) -> None:
    """A device that goes on after a restart is given the same work; so may another one be, for which there was no place."""
    for device in ("d1", "d2"):
        ledger = helpers.open_ledger(tmp_path, settings(concurrency=1))
        await ledger.open()
        await ledger.enroll(device, device)
        assert isinstance(ledger.plan(device, can_train=True), Train)
        ledger.close()


async def test_what_devices_keep_to_themselves_needs_no_lease(tmp_path: Path) -> None:
    """CrossLM's devices train alone at first, as many as like; the limit is for what is averaged afterwards."""
    ledger = helpers.open_ledger(tmp_path, with_llm(federated=LpFl(concurrency=1)), compute=Simulator())
    await ledger.open()
    for device in ("d1", "d2", "d3"):
        await ledger.enroll(device, device)
        work = ledger.plan(device, can_train=True)
        assert isinstance(work, Train)
        assert not work.share
    ledger.close()


async def test_a_version_is_made_at_its_deadline(tmp_path: Path) -> None:
    """Two updates of three, and nobody else comes: a fifth of a second after the first there is a version of both."""
    run = settings(buffer_size=3, max_staleness=0, deadline_seconds=0.2, least=2)
    async with helpers.running(tmp_path, run) as server:
        await server.enroll("d1", "d2")
        for device in ("d1", "d2"):
            await server.send(upload(device, 0))
        began = server.ledger.state.buffer[0].at
        await server.reaches(1)
        assert time.time() - began >= 0.2
        assert server.ledger.state.buffer == ()


async def test_a_deadline_counts_through_a_restart(tmp_path: Path) -> None:
    """When the first update came is on disk: a server that was down until after the deadline makes the version at once."""
    run = settings(buffer_size=3, deadline_seconds=3600.0, least=1)
    ledger = helpers.open_ledger(tmp_path, run, now=lambda: 1000.0)
    await ledger.open()
    await ledger.enroll("d1", "d1")
    await helpers.take(ledger, upload("d1", 0))
    ledger.close()
    again = helpers.open_ledger(tmp_path, run, now=lambda: 4600.0)
    await helpers.work_through(again, 1)
    again.close()

    assert [e.folded for e in helpers.events(tmp_path) if isinstance(e, Published)] == [0, 1]


async def test_a_device_that_had_its_turn_waits_for_a_deadline_of_its_own(tmp_path: Path) -> None:
    """When a version was made is on disk: of two updates that came together, the second one waits from then on."""
    clock = [1000.0]
    run = settings(buffer_size=3, deadline_seconds=10.0, least=1, clip_norm=0.0)
    ledger = helpers.open_ledger(tmp_path, run, now=lambda: clock[0])
    await ledger.open()
    for device in ("d1", "d2"):
        await ledger.enroll(device, device)
    await helpers.take(ledger, upload("d2", 0))
    clock[0] = 1010.0
    await helpers.work_through(ledger, 1)
    for version in (0, 1):
        await helpers.take(ledger, upload("d1", version))
    clock[0] = 1020.0
    await helpers.work_through(ledger, 2)
    ledger.close()
    log = helpers.events(tmp_path)

    assert [(e.folded, e.at) for e in log if isinstance(e, Published)] == [(0, 0.0), (1, 1010.0), (1, 1020.0)]
    assert [(waiting.version, waiting.at) for waiting in ledger.state.buffer] == [(1, 1020.0)]


async def test_a_device_that_asks_too_often_is_told_when_and_waits_so_long(tmp_path: Path) -> None:
    """The device's own client and daemon: after a minute's questions at once it sleeps for the whole second it is told to."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 5:
            raise asyncio.CancelledError

    ledger = helpers.open_ledger(tmp_path / "server", settings(wait_seconds=30.0), now=lambda: 1000.0)
    with contextlib.closing(Store(tmp_path / "home")) as store:
        async with TestClient(TestServer(create_app(ledger))) as server, HttpTransport(str(server.make_url("/"))) as transport:
            api = Api(transport)
            await api.enroll(store.device_id, "device")
            await api.enroll("another", "another")
            for _ in range(60):
                await api.ask(store.device_id, can_train=True)
            with pytest.raises(Refused) as refused:
                await api.ask(store.device_id, can_train=True)
            with pytest.raises(asyncio.CancelledError):
                await Agent(store, transport, tmp_path / "cache", "device", say=lambda _: None, sleep=sleep).run()
            assert isinstance(await api.ask("another", can_train=True), Train)

    assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("too-often", 429, 1.0)
    assert slept[0] == 1.0
    assert min(slept) >= 1.0
