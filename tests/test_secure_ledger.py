"""Secure averaging on disk: the mean is the plain one, whoever is late, missing, lying, or killed, and no update is ever seen."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import shutil
import sqlite3
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk import masking, wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays, Slot, read_peft
from edge_sdk.cohort import Advertise, Answer, Join, Mask, Masked, Request, Reveal, SealShares, Shares, Terms, Unmask
from edge_sdk.errors import WireError
from edge_sdk.masking import Member, Ring
from edge_sdk.protocol import Evaluate, Evaluation, Finished, Receipt, Train, Trained, Update, Wait, Work
from edge_server import cohorts, coordinator
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution
from edge_server.cohorts import Secure
from edge_server.coordinator import Answered, Event, Kept, Lost, Opened, Published, State, Ticked
from edge_server.ledger import Ledger
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl
from edge_server.unmasking import Cohort, Failed
from tests import factories
from tests import server_helpers as helpers
from tests.server_helpers import open_ledger, upload

SPEC = factories.SPEC
WEIGHTS = (41, 7, 100, 23, 3, 5)  # of d1, d2, ...; 100 counts as 64


def settings(devices: int = 4, threshold: int = 3, **lpfl: Any) -> RunSettings:
    """Versions of `devices` updates; phases are short, but only a test's clock can end them."""
    secure = Secure(threshold, join_seconds=0.02, phase_seconds=0.01)
    system = LpFl(**{"versions": 1, "buffer_size": devices, "evaluate_every": 0, "wait_seconds": 0.25, "secure": secure, **lpfl})
    return RunSettings(factories.ENCODER_TASK, "lpfl", AdapterSettings(SPEC.rank, SPEC.alpha), system)


# Devices in this process ---------------------------------------------------------------------------------------------
@dataclass
class Device:
    """A device with a disk: what it has said it says again, and for each cohort it has other keys.

    Args:
        size: of the numbers it learns.
        refuses: what it leaves unanswered, as if it were switched off: for the number of a cohort and a request.
        twist: what it says instead.
        asked: what it was told to do, and did.
    """

    id: str
    spec: AdapterSpec = SPEC
    size: float = 0.1
    refuses: Callable[[int, Work], bool] = lambda _, __: False
    twist: Callable[[Answer], Answer] = lambda answer: answer
    members: dict[str, Member] = field(default_factory=dict)
    asked: list[Work] = field(default_factory=list)

    @property
    def num_examples(self) -> int:
        return WEIGHTS[int(self.id[1:]) - 1]

    def learned(self, version: int) -> dict[str, Array]:
        rng = np.random.default_rng([version, int(self.id[1:])])
        return {name: rng.normal(0, self.size, shape).astype(np.float32) for name, shape in self.spec.update_shapes().items()}

    async def act(self, ledger: Ledger) -> bool:
        """Asks for work and does it; whether there was anything."""
        work = ledger.plan(self.id, can_train=True)
        if isinstance(work, Wait | Finished) or self.refuses(ledger.state.cohorts - 1, work):
            return False
        self.asked.append(work)
        await self.do(ledger, work)
        return True

    async def do(self, ledger: Ledger, work: Work) -> Receipt:
        match work:
            case Train(version):
                report = Trained(self.id, version, 1, {})
                return await ledger.take_trained(report, hashlib.sha256(wire.encode(report)).hexdigest())
            case Evaluate(version):
                return await ledger.take_evaluation(Evaluation(self.id, version, 5, {"accuracy": 0.5}), self.id)
            case Join() | SealShares() | Mask() | Unmask():
                answer, vector = self.say(work)
                return await tell(ledger, self.twist(answer), vector)
        raise AssertionError(f"nobody asks for {work}")

    def say(self, request: Request) -> tuple[Answer, Ring | None]:
        """The answer, and a masked vector beside it."""
        match request:
            case Join(_, terms):
                secret = hashlib.sha256(f"{self.id} in {terms.cohort}".encode()).digest()
                member, keys = masking.join(terms, self.id, secret)
                self.members.setdefault(terms.cohort, member)
                return keys, None
            case SealShares(_, roster):
                name = roster.terms.cohort
                self.members[name], shares = masking.share(self.members[name], roster)
                return shares, None
            case Mask(version, delivery):
                learned, name = self.learned(version), delivery.cohort
                values = np.concatenate([learned[key].ravel() for key in sorted(learned)])
                opened = masking.receive(self.members[name], delivery)
                self.members[name], vector = masking.masked(opened, values, self.num_examples)
                return Masked(name, self.id), vector
            case Unmask(_, survivors):
                name = survivors.cohort
                self.members[name], shown = masking.unmask_shares(self.members[name], survivors)
                return shown, None


async def tell(ledger: Ledger, answer: Answer, vector: Ring | None = None) -> Receipt:
    """What the handler does with an answer."""
    if vector is None or not isinstance(answer, Masked):
        return await ledger.take_answer(answer)
    body = wire.pack_masked(answer, vector)
    incoming = ledger.blobs.incoming()
    try:
        incoming.write_bytes(body)
        return await ledger.take_masked(incoming, hashlib.sha256(body).hexdigest())
    finally:
        incoming.unlink(missing_ok=True)


@dataclass
class House:
    """A server that takes its steps by itself, its devices, a clock that stands still, and what the server said."""

    ledger: Ledger
    devices: list[Device]
    clock: list[float]
    said: list[str]

    def __getitem__(self, id: str) -> Device:
        return next(device for device in self.devices if device.id == id)

    @property
    def cohort(self) -> Cohort:
        assert isinstance(self.ledger.state.cohort, Cohort)
        return self.ledger.state.cohort

    async def live(self, until: Callable[[], bool] | None = None) -> None:
        """Everybody does what it is told until all is done; where all wait for one that is off, the deadline passes."""
        over = until or (lambda: self.ledger.status().finished)
        ends = time.monotonic() + 60
        while not over():
            assert time.monotonic() < ends, "the run does not go on"
            busy = [await device.act(self.ledger) for device in self.devices]
            cohort = self.ledger.state.cohort
            if not any(busy) and isinstance(cohort, Cohort) and cohort.phase != "done":
                self.clock[0] = max(self.clock[0], cohort.deadline)
            await asyncio.sleep(0.002)

    async def reach(self, phase: str) -> None:
        """Lets devices answer, one after the other, until the cohort is in this phase and nobody has answered it."""
        for _ in range(100):
            for device in self.devices:
                if isinstance(self.ledger.state.cohort, Cohort) and self.cohort.phase == phase:
                    return
                await device.act(self.ledger)
        raise AssertionError(f"the cohort never came to {phase}")


@asynccontextmanager
async def house(data: Path, run: RunSettings | None = None, *devices: Device) -> AsyncIterator[House]:
    """Four devices, if no others are given; ended as a server ends it."""
    clock, said = [1000.0], list[str]()
    ledger = open_ledger(data, run or settings(), said.append, now=lambda: clock[0])
    await ledger.open()
    there = list(devices) or [Device(f"d{i}") for i in (1, 2, 3, 4)]
    for device in there:
        await ledger.enroll(device.id, device.id)
    maker = asyncio.create_task(ledger.make_versions())
    try:
        yield House(ledger, there, clock, said)
    finally:
        maker.cancel()
        await asyncio.wait([maker])
        ledger.close()


def expected(run: RunSettings, *versions: Sequence[Device]) -> Arrays:
    """The adapter after plain averages of what these devices have learned, clipped by no size; one of nobody was passed by."""
    plain = msgspec.structs.replace(run.lpfl, secure=None, clip_norm=0.0, max_examples=min(run.lpfl.max_examples, 64))
    spec = versions[-1][0].spec
    adapter = spec.start(plain.seed)
    for version, devices in enumerate(versions):
        buffer = [Contribution(device.learned(version), device.num_examples, 0) for device in devices]
        adapter = lpfl.step(plain, spec, adapter, buffer) if buffer else adapter
    return adapter


def close(data: Path, version: int, wanted: Arrays) -> None:
    """The published folder holds these numbers, to a hundredth of what is promised."""
    found, _ = read_peft(data / "versions" / f"{version:04d}", factories.SLOTS)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-6, rtol=0)


def replayed(data: Path) -> State:
    return functools.reduce(coordinator.apply, helpers.events(data), State())


def kinds(events: Sequence[Event]) -> list[str]:
    """Events in a word each; an answer is called by what it says."""
    return [type(e.answer if isinstance(e, Answered) else e).__name__ for e in events]


def did(device: Device) -> str:
    return " ".join(type(work).__name__ for work in device.asked)


def missing(request: type, *cohorts: int) -> Callable[[int, Work], bool]:
    """Switched off when asked for this in these cohorts."""
    return lambda number, work: isinstance(work, request) and number in cohorts


# The mean ------------------------------------------------------------------------------------------------------------
async def test_a_version_is_the_weighted_mean(tmp_path: Path) -> None:
    """Each device's numbers count by its examples, up to 64, and the mean is published once, as a blob and a folder."""
    run = settings(server_lr=0.5)
    async with house(tmp_path, run) as home:
        await home.live()
        state, status = home.ledger.state, home.ledger.status()

    log = helpers.events(tmp_path)
    assert kinds(log) == (
        ["Published"] + ["Enrolled"] * 4 + ["Kept", "Opened", "Kept", "Kept", "Kept"] + ["Advertise"] * 4 + ["Shares"] * 4
        + ["Masked"] * 4 + ["Reveal"] * 3 + ["Published"] + ["Evaluated"] * 4
    )  # fmt: skip
    assert [e for e in log if isinstance(e, Published)][1] == Published(1, state.adapter, 0)
    close(tmp_path, 1, expected(run, home.devices))
    assert home.said == ["version 1 from the sum of 4 masked updates"]
    assert state == replayed(tmp_path)
    assert (state.cohort, state.buffer, status.finished) == (None, (), True)
    assert [d.updates for d in status.devices] == [1, 1, 1, 1]
    assert [d.uploaded_bytes for d in status.devices] == [e.size for e in log if isinstance(e, Answered) and e.size]


async def test_no_update_is_clipped_by_its_size(tmp_path: Path) -> None:
    """One three times as large as the others counts as it is, whatever `clip_norm` says; each for `max_examples` at most."""
    run = settings(clip_norm=1.25, max_examples=20)
    devices = [Device("d1"), Device("d2"), Device("d3", size=0.3), Device("d4")]
    async with house(tmp_path, run, *devices) as home:
        await home.live()

    close(tmp_path, 1, expected(run, devices))


async def test_more_than_one_version_in_a_row(tmp_path: Path) -> None:
    """Each version has a cohort of its own, as large as devices were told, of those that trained on the one before; no key comes
    again."""
    run = settings(versions=3, evaluate_every=1)
    async with house(tmp_path, run) as home:
        await home.live()

    log = helpers.events(tmp_path)
    opened = [e.terms.cohort for e in log if isinstance(e, Opened)]
    assert opened == [f"{home.ledger.manifest.run[:16]}-{i}-{i}" for i in range(3)]
    assert {e.terms.quorum for e in log if isinstance(e, Opened)} == {home.ledger.manifest.secure}
    for version in (1, 2, 3):
        close(tmp_path, version, expected(run, *[home.devices] * version))
    assert [(e.version, e.num_examples, e.metrics) for e in log if isinstance(e, Kept)] == [
        (v, 1, {}) for v in (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    ]
    keys = Counter(k for e in log if isinstance(e, Answered) and isinstance(e.answer, Advertise)
                   for k in (e.answer.cipher_key, e.answer.mask_key))  # fmt: skip
    assert len(keys) == 3 * 4 * 2
    assert home.ledger.state.keys == keys.keys()


async def test_with_a_frozen_a_the_mean_is_of_b_alone(tmp_path: Path) -> None:
    """Half as long a vector; A is as it was."""
    spec = AdapterSpec(factories.SLOTS, SPEC.rank, SPEC.alpha, freeze_a=True)
    run = msgspec.structs.replace(settings(), adapter=AdapterSettings(SPEC.rank, SPEC.alpha, freeze_a=True))
    async with house(tmp_path, run, *(Device(f"d{i}", spec) for i in (1, 2, 3, 4))) as home:
        await home.live()

    assert [e.terms.length for e in helpers.events(tmp_path) if isinstance(e, Opened)] == [16]
    close(tmp_path, 1, expected(run, home.devices))


async def test_more_devices_than_places(tmp_path: Path) -> None:
    """Six have trained, four have places: the others wait, an uninvited one is refused, and every version is made."""
    run = settings(versions=2)
    async with house(tmp_path, run, *(Device(f"d{i}") for i in range(1, 7))) as home:
        await home.reach("share")
        for device in ("d5", "d6"):
            while isinstance(home.ledger.plan(device, True), Train):
                await home[device].act(home.ledger)
            assert home.ledger.plan(device, True) == Wait(0.25)
        with pytest.raises(WireError) as refused:
            await home["d5"].do(home.ledger, Join(0, home.cohort.terms))
        await home.live()

    assert refused.value.code == "too-late"
    assert [did(home[device]) for device in ("d4", "d5", "d6")] == [
        "Train Join SealShares Mask Train Join SealShares Mask Evaluate",
        "Train Train Evaluate",
        "Train Train Evaluate",
    ]
    close(tmp_path, 2, expected(run, home.devices[:4], home.devices[:4]))


async def test_devices_that_have_not_trained_are_asked_to_first(tmp_path: Path) -> None:
    """A cohort waits for whoever is still at its training; nobody joins that has nothing to add."""
    async with house(tmp_path) as home:
        await home["d1"].act(home.ledger)
        await home["d1"].act(home.ledger)
        assert isinstance(home.ledger.plan("d2", can_train=True), Train)
        assert home.ledger.plan("d2", can_train=False) == Wait(0.25)
        assert home.ledger.plan("d1", can_train=True) == Wait(0.25)
        assert home.cohort.adverts.keys() == {"d1"}


# Said twice, and said wrongly ----------------------------------------------------------------------------------------
async def test_an_answer_repeated_changes_nothing(tmp_path: Path) -> None:
    """Each of the four answers, sent five times at once and once more later, gets one receipt and makes one event."""
    async with house(tmp_path) as home:
        for phase in ("advertise", "share", "upload", "unmask"):
            await home.reach(phase)
            work = home.ledger.plan("d1", can_train=True)
            receipts = await asyncio.gather(*(home["d1"].do(home.ledger, work) for _ in range(5)))
            before = helpers.events(tmp_path), helpers.blobs(tmp_path), home.ledger.state
            receipts.append(await home["d1"].do(home.ledger, work))

            assert receipts == [receipts[0]] * 6
            assert (helpers.events(tmp_path), helpers.blobs(tmp_path), home.ledger.state) == before
    said = [e.answer for e in helpers.events(tmp_path) if isinstance(e, Answered) and e.answer.device == "d1"]
    assert [type(answer) for answer in said] == [Advertise, Shares, Masked, Reveal]


async def test_a_receipt_means_it_is_on_disk(tmp_path: Path) -> None:
    """A masked vector has its event and its bytes once it is answered, and the receipt names them."""
    async with house(tmp_path) as home:
        await home.reach("upload")
        receipt = await home["d1"].do(home.ledger, home.ledger.plan("d1", True))
        [event] = [e for e in helpers.events(tmp_path) if isinstance(e, Answered) and e.blob]
        body = (tmp_path / "blobs" / event.blob).read_bytes()

    assert event == Answered(Masked(event.answer.cohort, "d1"), hashlib.sha256(body).hexdigest(), len(body), 1000.0)
    assert receipt == Receipt(wire.update_id("d1", 0, event.blob), 0)
    assert len(wire.unpack_masked(body, 41)[1]) == 41


async def test_other_bytes_for_an_answered_phase_are_refused(tmp_path: Path) -> None:
    """A second vector of one device would tell the difference of the two; nothing of it is kept."""
    async with house(tmp_path) as home:
        await home.reach("upload")
        work = home.ledger.plan("d1", True)
        await home["d1"].do(home.ledger, work)
        before = helpers.events(tmp_path), helpers.blobs(tmp_path)
        with pytest.raises(WireError) as refused:
            await tell(home.ledger, Masked(home.cohort.terms.cohort, "d1"), np.ones(41, np.uint32))

        assert refused.value.code == "already-answered"
        assert (helpers.events(tmp_path), helpers.blobs(tmp_path)) == before


async def test_a_plain_update_is_refused(tmp_path: Path) -> None:
    """A device that would show its update is not let: no blob, no event, and its place in the cohort stays."""
    async with house(tmp_path) as home:
        await home["d1"].act(home.ledger)
        before = helpers.events(tmp_path), helpers.blobs(tmp_path), home.ledger.state
        with pytest.raises(WireError) as refused:
            await helpers.take(home.ledger, upload("d2", 0))

        assert (refused.value.code, refused.value.status) == ("wrong-system", 404)
        assert (helpers.events(tmp_path), helpers.blobs(tmp_path), home.ledger.state) == before


async def test_a_masked_vector_of_another_length_is_refused(tmp_path: Path) -> None:
    """One element more or less leaves no blob; with the right length the same device is taken."""
    async with house(tmp_path) as home:
        await home.reach("upload")
        before = helpers.blobs(tmp_path)
        for length in (0, 40, 42):
            with pytest.raises(WireError) as refused:
                await tell(home.ledger, Masked(home.cohort.terms.cohort, "d1"), np.zeros(length, np.uint32))
            assert (refused.value.code, refused.value.status) == ("wrong-shape", 422)

        assert helpers.blobs(tmp_path) == before
        await tell(home.ledger, Masked(home.cohort.terms.cohort, "d1"), np.zeros(41, np.uint32))


async def test_few_masked_vectors_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """Of sixteen that come at once, each of 4 MB, the others wait on disk."""
    told = run_settings.manifest(settings(), factories.bundle())
    wide = msgspec.structs.replace(told, adapter=AdapterSpec((Slot("layer.0.query", 1, 999_999),), rank=1, alpha=1.0))
    ledger = Ledger(settings(), wide, tmp_path, lambda _: None)
    paths = [ledger.blobs.incoming() for _ in range(16)]
    for i, path in enumerate(paths):
        path.write_bytes(wire.pack_masked(Masked("c", f"d{i}"), np.zeros(cohorts.length(wide.adapter) + 1, np.uint32)))
    tracemalloc.start()
    refused = await asyncio.gather(*(ledger.take_masked(path, "0" * 64) for path in paths), return_exceptions=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    ledger.close()

    assert [str(error).split(":")[0] for error in refused] == ["unknown-device"] * 16
    assert peak < 8 * paths[0].stat().st_size


async def test_without_a_cohort_nothing_is_taken(tmp_path: Path) -> None:
    """Before anybody has trained, after the last version, and in a run that averages plainly there is none."""
    stray, codes = Advertise("c", "d1", b"1" * 32, b"2" * 32), []
    plain = open_ledger(tmp_path / "plain")
    await plain.open()
    await plain.enroll("d1", "d1")
    async with house(tmp_path / "secure") as home:
        for ledger in (plain, home.ledger):
            with pytest.raises(WireError) as refused:
                await tell(ledger, stray)
            codes.append(refused.value.code)
        await home.live()
        with pytest.raises(WireError) as refused:
            await tell(home.ledger, stray)
        codes.append(refused.value.code)
        with pytest.raises(WireError) as refused:
            await tell(home.ledger, msgspec.structs.replace(stray, device="stranger"))
        codes.append(refused.value.code)
    plain.close()

    assert codes == ["no-cohort", "no-cohort", "no-cohort", "unknown-device"]


# Deadlines -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("off", "counted"),
    [(Join, "d1 d2 d4"), (SealShares, "d1 d2 d4"), (Mask, "d1 d2 d4"), (Unmask, "d1 d2 d3 d4")],
    ids=lambda x: str(x)[-12:],
)
async def test_a_deadline_goes_on_without_the_missing_one(tmp_path: Path, off: type, counted: str) -> None:
    """Whoever is off in one phase is left out from there; its masks are taken off, and its vector counts if it had come."""
    run = settings()
    devices = [Device("d1"), Device("d2"), Device("d3", refuses=missing(off, 0)), Device("d4")]
    async with house(tmp_path, run, *devices) as home:
        await home.live()

    close(tmp_path, 1, expected(run, [home[id] for id in counted.split()]))
    ticks = [e for e in helpers.events(tmp_path) if isinstance(e, Ticked)]
    assert len(ticks) == (0 if off is Unmask else 1)  # the last phase waits for no more than the threshold
    assert home.said == [f"version 1 from the sum of {len(counted.split())} masked updates"]
    assert home.ledger.state.cohorts == 1


async def test_before_the_deadline_nobody_is_left_out(tmp_path: Path) -> None:
    """While the clock stands before the deadline the cohort waits, however often the server looks."""
    devices = [Device("d1"), Device("d2"), Device("d3", refuses=missing(Mask, 0)), Device("d4")]
    async with house(tmp_path, settings(), *devices) as home:
        await home.reach("upload")
        for device in ("d1", "d2", "d4"):
            await home[device].act(home.ledger)
        home.clock[0] = np.nextafter(home.cohort.deadline, 0)
        before = helpers.events(tmp_path)
        await asyncio.sleep(0.05)  # the server looks every hundredth of a second
        assert helpers.events(tmp_path) == before
        home.clock[0] = home.cohort.deadline
        await helpers.until(lambda: home.cohort.phase == "unmask")


async def test_what_comes_after_the_deadline_is_not_kept(tmp_path: Path) -> None:
    """The late vector is refused, and no byte of it stays: with the key that the others then reveal it would be too much."""
    devices = [Device("d1"), Device("d2"), Device("d3", refuses=missing(Mask, 0)), Device("d4")]
    async with house(tmp_path, settings(), *devices) as home:
        await home.reach("upload")
        late = home.ledger.plan("d3", can_train=True)
        await home.live(lambda: isinstance(home.ledger.state.cohort, Cohort) and home.cohort.phase == "unmask")
        before = helpers.blobs(tmp_path)
        with pytest.raises(WireError) as refused:
            await home["d3"].do(home.ledger, late)

        assert isinstance(late, Mask)
        assert (refused.value.code, refused.value.status) == ("too-late", 409)
        assert helpers.blobs(tmp_path) == before


async def test_a_cohort_with_too_few_is_followed_by_another(tmp_path: Path) -> None:
    """The failure is said with its reason; nobody trains again, everybody gets fresh keys, and the next cohort succeeds."""
    run = settings()
    devices = [Device("d1"), Device("d2"), *(Device(id, refuses=missing(Mask, 0)) for id in ("d3", "d4"))]
    async with house(tmp_path, run, *devices) as home:
        await home.live(lambda: home.ledger.state.cohorts == 2)
        planned = [home.ledger.plan(device.id, can_train=True) for device in devices]
        first, second = (e.terms for e in helpers.events(tmp_path) if isinstance(e, Opened))
        await home.live()

    assert planned == [Join(0, second)] * 4
    assert second == msgspec.structs.replace(first, cohort=second.cohort)
    assert second.cohort == first.cohort[:-1] + "1"
    assert home.said == [
        f"cohort {first.cohort} has failed: only 2 devices answered in the phase `upload`, this cohort needs 3;"
        " the next one is formed",
        "version 1 from the sum of 4 masked updates",
    ]
    assert did(home["d1"]) == "Train Join SealShares Mask Join SealShares Mask Unmask Evaluate"
    adverts = [e.answer for e in helpers.events(tmp_path) if isinstance(e, Answered) and isinstance(e.answer, Advertise)]
    assert len({key for advert in adverts for key in (advert.cipher_key, advert.mask_key)}) == 2 * 4 * 2
    close(tmp_path, 1, expected(run, devices))
    assert home.ledger.state == replayed(tmp_path)


async def test_a_cohort_that_nobody_joins_ends_too(tmp_path: Path) -> None:
    """A device that trained and went away holds nobody up: at the deadline the next cohort is formed, with a new one."""
    async with house(tmp_path) as home:
        await home["d1"].act(home.ledger)
        terms = home.cohort.terms
        home.clock[0] = home.cohort.deadline
        await helpers.until(lambda: home.ledger.state.cohorts == 2)

    assert home.said == [
        f"cohort {terms.cohort} has failed: only 0 devices answered in the phase `advertise`, this cohort needs 3;"
        " the next one is formed"
    ]


async def test_what_shares_may_be_revealed_for_is_in_no_other_cohort(tmp_path: Path) -> None:
    """Two devices have revealed, two are off: of two sums, with and without one, the difference would tell its update. So the
    next version is the same adapter, everybody trains on that, and the run goes on; also where the server dies in between."""
    run = settings(versions=2)
    devices = [Device("d1"), Device("d2"), *(Device(id, refuses=missing(Unmask, 0)) for id in ("d3", "d4"))]
    async with house(tmp_path / "run", run, *devices) as home:
        await home.live()
        state, said = home.ledger.state, home.said
    log = helpers.events(tmp_path / "run")
    failed = next(number for number, event in enumerate(log, 1) if isinstance(event, Ticked))
    shutil.copytree(tmp_path / "run", tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [failed])
    async with house(tmp_path / "died", run, *devices) as again:
        await again.live()

    name = f"{home.ledger.manifest.run[:16]}-0-0"
    assert said == [
        f"cohort {name} has failed: only 2 devices answered in the phase `unmask`, this cohort needs 3;"
        " version 1 is version 0 again, and devices train anew",
        "version 2 from the sum of 4 masked updates",
    ]
    assert again.said == said
    assert [e.terms.cohort for e in log if isinstance(e, Opened)] == [name, f"{name[:-4]}-1-1"]
    assert did(home["d3"]).startswith("Train Join SealShares Mask Train Join SealShares Mask Unmask Evaluate")
    assert state.adapters[1] == state.adapters[0]
    assert again.ledger.state.adapters == state.adapters
    assert state == replayed(tmp_path / "run")
    close(tmp_path / "run", 2, expected(run, [], devices))


async def test_late_training_forms_no_cohort_where_shares_may_be_revealed(tmp_path: Path) -> None:
    """Before the version is passed by, a device may say that it has trained on it: it waits for the next one."""
    async with house(tmp_path) as home:
        how = home.ledger._unseen
    assert how is not None
    failed = State(version=0, cohort=Failed("c", "lost", revealed=True))
    early = State(version=0, cohort=Failed("c", "too few"))

    assert (how.form(failed, 0.0), how.due(failed, 0.0)) == (None, (None, ""))
    assert how.form(early, 0.0) == how.due(early, 0.0)[0] == how.form(State(version=0), 0.0)
    assert isinstance(how.form(early, 0.0), Opened)


async def test_training_on_an_old_version_forms_no_cohort(tmp_path: Path) -> None:
    """Who comes late with version 0 has nothing for version 1: it is asked to train again, and nobody is waited for."""
    run = settings(versions=2)
    devices = [Device("d1"), Device("d2"), Device("d3", refuses=lambda _, work: isinstance(work, Train) and work.version == 0)]
    devices.append(Device("d4"))
    async with house(tmp_path, run, *devices) as home:
        await home.live(lambda: home.ledger.state.version == 1)
        late = Trained("d3", 0, 1, {})
        await home.ledger.take_trained(late, "0" * 64)
        assert home.ledger.state.cohort is None
        assert home.ledger.state.cohorts == 1
        assert home.ledger.plan("d3", can_train=True) == home.ledger.plan("d1", can_train=True)
        await home.live()

    close(tmp_path, 2, expected(run, [*devices[:2], devices[3]], devices))


@pytest.mark.parametrize("published", [False, True])
async def test_keys_are_used_once(tmp_path: Path, published: bool) -> None:
    """What was a key in a cohort that failed, or made a version, is none in the next, whoever sends it, also after a restart."""
    off = missing(Mask) if published else missing(Mask, 0)
    run = settings(versions=2)
    devices = [Device("d1"), Device("d2"), *(Device(id, refuses=off) for id in ("d3", "d4"))]
    async with house(tmp_path, run, *devices) as home:
        await home.live(lambda: home.ledger.state.cohorts == 2)
    old = next(e.answer for e in helpers.events(tmp_path) if isinstance(e, Answered) and isinstance(e.answer, Advertise))
    async with house(tmp_path, run, *devices) as home:
        name, fresh = home.cohort.terms.cohort, masking.public_key(b"3" * 32)
        for device, cipher, mask in [
            ("d1", old.cipher_key, old.mask_key),
            ("d2", old.mask_key, fresh),
            ("d3", fresh, old.cipher_key),
        ]:
            with pytest.raises(WireError) as refused:
                await tell(home.ledger, Advertise(name, device, cipher, mask))
            assert (refused.value.code, refused.value.status) == ("bad-keys", 422)
        with pytest.raises(WireError) as refused:
            await tell(home.ledger, old)
        assert refused.value.code == "wrong-cohort"
        assert home.cohort.adverts == {}
        assert home.ledger.state.version == int(published)


# Lies ----------------------------------------------------------------------------------------------------------------
def wrong(shares: dict[str, Any]) -> dict[str, Any]:
    return {device: (int.from_bytes(share) ^ 1).to_bytes(len(share)) for device, share in shares.items()}


def lies(answer: Answer) -> Answer:
    """In the first cohort every share it reveals is another."""
    if not isinstance(answer, Reveal) or not answer.cohort.endswith("-0"):
        return answer
    return msgspec.structs.replace(answer, seeds=wrong(answer.seeds), keys=wrong(answer.keys))


@pytest.mark.parametrize(
    ("dropped", "reason"), [(False, "the masks do not cancel"), (True, "the shares revealed for d3 do not make its key")]
)
async def test_a_lie_in_revealed_shares_costs_a_cohort(tmp_path: Path, dropped: bool, reason: str) -> None:
    """No wrong mean is published: the server says why, and the next version is the same again; the one after it is right."""
    run = settings(versions=2)
    off = missing(Mask, 0) if dropped else missing(Mask)
    devices = [Device("d1", twist=lies), Device("d2"), Device("d3", refuses=off), Device("d4")]
    async with house(tmp_path, run, *devices) as home:
        await home.live()

    log = helpers.events(tmp_path)
    [lost] = [e for e in log if isinstance(e, Lost)]
    assert lost.reason.startswith(reason) or "make no secret" in lost.reason
    name = f"{home.ledger.manifest.run[:16]}-0-0"
    assert home.said == [
        f"cohort {name} has failed: {lost.reason}; version 1 is version 0 again, and devices train anew",
        "version 2 from the sum of 4 masked updates",
    ]
    assert [e.version for e in log if isinstance(e, Published)] == [0, 1, 2]
    assert home.ledger.state.adapters[0] == home.ledger.state.adapters[1]
    close(tmp_path, 2, expected(run, [], devices))
    assert home.ledger.trouble == ""


@pytest.mark.parametrize(
    ("part", "lie"),
    [(slice(40, 41), 1 << 20), (slice(0, 40), 3 << 29), (slice(7, 8), -(3 << 29))],
    ids=["weight", "all numbers", "one number"],
)
async def test_a_sum_that_no_honest_devices_have_costs_a_cohort(tmp_path: Path, part: slice, lie: int) -> None:
    """Nobody sees a vector, but a weight that devices cannot have together, or a mean beyond the clip, is found."""
    devices = [Device("d1"), Device("d2"), Device("d3", refuses=missing(Mask, 0)), Device("d4")]
    async with house(tmp_path, settings(), *devices) as home:
        await home.reach("upload")
        work = home.ledger.plan("d3", True)
        assert isinstance(work, Mask)
        answer, vector = home["d3"].say(work)
        assert vector is not None
        vector[part] += np.int64(lie).astype(np.uint32)
        await tell(home.ledger, answer, vector)
        await home.live(lambda: home.ledger.state.version == 1)

    assert [type(e).__name__ for e in helpers.events(tmp_path) if isinstance(e, Lost | Ticked)] == ["Lost"]


# Restarts ------------------------------------------------------------------------------------------------------------
EVENTS = 60  # of the run below


@dataclass(frozen=True)
class Past:
    """A run that is over: two versions, the first of them from a second cohort, with one device missing."""

    data: Path
    run: RunSettings
    devices: tuple[Device, ...]
    state: State


@pytest.fixture(scope="module")
def past(tmp_path_factory: pytest.TempPathFactory) -> Past:
    data, run = tmp_path_factory.mktemp("past"), settings(4, 3, versions=2)
    off = (missing(Mask, 0, 1), missing(Mask, 0))
    devices = (Device("d1"), Device("d2"), Device("d3", refuses=off[1]), Device("d4", refuses=off[0]))

    async def live() -> State:
        async with house(data, run, *devices) as home:
            await home.live()
            return home.ledger.state

    return Past(data, run, devices, asyncio.run(live()))


def test_the_run_that_is_restarted_has_everything(past: Past) -> None:
    """It has a cohort that failed, one with a device missing and one without, each event there is, and the right versions."""
    counts = Counter(kinds(helpers.events(past.data)))

    assert counts == {"Published": 3, "Enrolled": 4, "Kept": 8, "Opened": 3, "Advertise": 12, "Shares": 12, "Masked": 9,
                      "Ticked": 2, "Reveal": 6, "Evaluated": 4}  # fmt: skip
    assert counts.total() == EVENTS + 3
    close(past.data, 1, expected(past.run, past.devices[:3]))
    close(past.data, 2, expected(past.run, past.devices[:3], past.devices))


@pytest.mark.parametrize("after", range(1, EVENTS + 3))
async def test_a_restart_at_any_event_goes_on(tmp_path: Path, past: Past, after: int) -> None:
    """Whatever was on disk when the server died, devices that say again what they said end at the same adapters, to the byte."""
    shutil.copytree(past.data, tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [after])
    async with house(tmp_path / "died", past.run, *past.devices) as home:
        await home.live()

        assert home.ledger.state.adapters == past.state.adapters
        assert home.ledger.state == replayed(tmp_path / "died")
        assert home.ledger.state.cohorts == 3


async def test_a_cohort_goes_on_after_a_restart_in_every_phase(tmp_path: Path) -> None:
    """Stopped and started between any two answers, with devices that know nothing of it: one cohort, one version."""
    run, devices = settings(), tuple(Device(f"d{i}") for i in (1, 2, 3, 4))
    for _ in range(100):
        async with house(tmp_path, run, *devices) as home:
            if home.ledger.status().finished:
                break
            await helpers.until(lambda home=home: not isinstance(home.ledger.state.cohort, Cohort) or home.cohort.phase != "done")  # type: ignore[misc]
            for device in devices:
                if await device.act(home.ledger):
                    break

    assert home.ledger.state.cohorts == 1
    close(tmp_path, 1, expected(run, devices))


# What the server does not know ---------------------------------------------------------------------------------------
def secrets(device: Device, terms: Terms) -> list[bytes]:
    """What would give a device's update away: its numbers, bare and in fixed point, and how many examples they rest on."""
    learned = device.learned(0)
    values = np.concatenate([learned[name].ravel() for name in sorted(learned)])
    bare = masking.pack(masking.encode(values, device.num_examples, terms))
    return [*(array.tobytes()[:16] for array in learned.values()), bare[:16], bare[80:96],
            f'"num_examples":{device.num_examples}'.encode(), f'\\"num_examples\\":{device.num_examples}'.encode()]  # fmt: skip


def everything(data: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in data.rglob("*") if path.is_file())


async def test_no_update_can_be_found_in_the_data_folder(tmp_path: Path) -> None:
    """No file holds a device's numbers, in no form, or how many examples it has: the measurement says 1, and no metric."""
    async with house(tmp_path / "secure") as home:
        await home.reach("unmask")
        terms = home.cohort.terms
        kept = everything(tmp_path / "secure")
        await home.live()
        status = home.ledger.status()
    kept += everything(tmp_path / "secure")
    measured = [m for m in status.measurements if m.kind == "kept"]

    assert [(m.num_examples, m.metrics) for m in measured] == [(1, {})] * 4
    for device in home.devices:
        assert [secret for secret in secrets(device, terms) if secret in kept] == []
        assert not any(member.secret in kept for member in device.members.values())


async def test_a_plain_run_is_full_of_what_a_secure_one_hides(tmp_path: Path) -> None:
    """The search of the test above finds a device's numbers, and how many examples it has, where they are sent bare."""
    device, terms = Device("d1"), Terms("c", 4, 3, 40, 1.0, 64)
    ledger = open_ledger(tmp_path)
    await ledger.open()
    await ledger.enroll("d1", "d1")
    await helpers.take(ledger, wire.pack(Update("d1", 0, device.num_examples, {}), device.learned(0)))
    ledger.close()
    found = everything(tmp_path)

    assert [secret in found for secret in secrets(device, terms)] == [True] * 4 + [False] * 2 + [True] * 2
