"""FedMKT's server over a whole run: two kinds of models, what each is told, restarts, deadlines, and what it does not take."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer

from edge_sdk import wire
from edge_sdk.adapters import Slot
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import PROTOCOL, Enroll, Finished, Manifest, Predict, Problem, Sample, Train, Trained, Wait
from edge_sdk.tasks import Example
from edge_server import ledger as ledgers
from edge_server import settings as run_settings
from edge_server.app import create_app
from edge_server.compute import JobFailed
from edge_server.coordinator import Decided, Enrolled, Judged, Kept, Published, Tuned, Written
from edge_server.ledger import Ledger
from edge_server.llm.jobs import Label, Tune
from tests import factories, strategies
from tests import server_helpers as helpers
from tests.server_helpers import PUBLIC, Client, Pupil, Simulator, judgment, open_ledger, sheet, take, train, upload, with_public
from tests.test_ledger import adapter, replayed

MODELS = {"d1": "small", "d2": "other"}
OTHER_SLOTS = (Slot("model.layers.0.q_proj", 8, 8), Slot("model.layers.1.q_proj", 8, 8))


def others(run: Any = None) -> dict[str, Manifest]:
    """Two kinds of models: the first one's layers have other names and sizes than the second one's."""
    bundles = {"small": factories.bundle(), "other": factories.bundle("decoder", OTHER_SLOTS)}
    return {name: run_settings.manifest(run or with_public(), bundle) for name, bundle in bundles.items()}


@contextlib.asynccontextmanager
async def learning(data: Path, llm: Simulator | None = None, run: Any = None, **more: Any) -> AsyncIterator[Ledger]:
    """An open ledger that knows a device of each kind and takes its steps by itself; ended as a server ends it."""
    ledger = open_ledger(data, run or with_public(), compute=llm or Pupil(), others=others(), **more)
    await ledger.open()
    for device, model in MODELS.items():
        await ledger.enroll(device, device, model)
    maker = asyncio.create_task(ledger.make_versions())
    try:
        yield ledger
    finally:
        maker.cancel()
        await asyncio.wait([maker])
        await ledger.rest()
        ledger.close()


KINDS = {"d1": "honest", "d2": "inverted"}


async def do_next(ledger: Ledger, device: str) -> bool:
    """A device does what it is told; whether there is nothing left for it."""
    match ledger.plan(device, can_train=True):
        case Train(version):
            await train(ledger, device, version)
        case Predict(number):
            await ledger.take_judgment(judgment(device, number, sheet(ledger, number), KINDS[device]))
        case Wait():
            await asyncio.sleep(0.002)
        case Finished():
            return True
    return False


async def learn(ledger: Ledger) -> None:
    """Both devices do what they are told until the run is over."""
    over: set[str] = set()
    while len(over) < 2:
        over = {device for device in MODELS if await do_next(ledger, device)}
    await helpers.until(lambda: ledger.status().finished)


async def until_asked(ledger: Ledger, number: int) -> None:
    await helpers.until(lambda: len(ledger.state.sheets) > number)


# A run ----------------------------------------------------------------------------------------------------------------
async def test_a_run_goes_to_its_end(tmp_path: Path) -> None:
    """Devices of both kinds answer and learn, the LLM learns and answers; all is on disk, told, and its process is ended."""
    llm, said = Pupil(), list[str]()
    async with learning(tmp_path, llm, say=said.append) as ledger:
        await learn(ledger)
        state, status = ledger.state, ledger.status()

    log = helpers.events(tmp_path)
    steps = [type(event) for event in log if not isinstance(event, Enrolled | Kept | Judged)]
    assert steps == [Published, *[Written, Tuned, Decided] * 2]
    assert sorted((e.version, e.device) for e in log if isinstance(e, Kept)) == [(v, d) for v in range(3) for d in MODELS]
    assert sorted((e.sheet, e.device) for e in log if isinstance(e, Judged)) == [(v, d) for v in range(2) for d in MODELS]
    assert state == replayed(tmp_path)
    assert [type(job) for job in llm.jobs] == [Label, Tune, Label] * 2
    assert [Pupil.lessons(tmp_path / "blobs" / name).tolist() for name in state.tuned] == [[3], [3, 4]]
    assert (status.system, status.version, status.finished, status.buffered) == ("fedmkt", 2, True, 0)
    assert [(s.written, s.judges, s.accepted, s.acceptance) for s in status.sheets] == [(5, 2, 0, 0.8)] * 2
    assert {device.updates for device in status.devices} == {0}
    assert all(device.uploaded_bytes > 0 for device in status.devices)
    assert llm.closed
    assert said == [
        "version 0: devices are asked what they make of 5 public texts",
        "the LLM learned from 2 devices, loss 0.500",
        "version 1: the LLM gets 80% of the public texts right",
        "version 1: devices are asked what they make of 5 public texts",
        "the LLM learned from 2 devices, loss 0.500",
        "version 2: the LLM gets 80% of the public texts right",
    ]
    assert not any(name.startswith("incoming") for name in helpers.blobs(tmp_path))


async def test_each_kind_is_told_of_its_own_model(tmp_path: Path) -> None:
    """Bundle, task and adapter are those of the model a device named, or of the first; the run is one."""
    async with learning(tmp_path) as ledger:
        small, other, none = [await ledger.enroll(f"e{i}", "x", model) for i, model in enumerate(("small", "other", ""))]

    assert small == none == ledger.manifest
    assert (other.bundle, other.task) == (factories.bundle("decoder", OTHER_SLOTS), factories.DECODER_TASK)
    assert (small.bundle, small.task) == (factories.bundle(), factories.ENCODER_TASK)
    assert (other.adapter.slots, small.adapter.slots) == (OTHER_SLOTS, factories.SLOTS)
    assert (other.adapter.rank, other.adapter.alpha) == (small.adapter.rank, small.adapter.alpha) == (2, 4.0)
    assert small.run == other.run != ""
    assert small.system == other.system == "fedmkt"


async def test_each_kind_starts_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    """Of its model's layers, drawn from the run's seed, in every work; a device that named no model has the first one's."""
    async with learning(tmp_path) as ledger:
        await ledger.enroll("d3", "d3")
        await until_asked(ledger, 0)
        works = {device: ledger.plan(device, can_train=True) for device in ("d1", "d2", "d3")}
        asked = {device: ledger.plan(device, can_train=False) for device in works}
        specs = {"d1": factories.SPEC, "d2": others()["other"].adapter, "d3": factories.SPEC}
        for device, spec in specs.items():
            work, question = works[device], asked[device]
            assert isinstance(work, Train)
            assert isinstance(question, Predict)
            assert work.adapter == question.adapter
            start = wire.unpack_adapter(ledger.blobs.get(work.adapter), spec.shapes())
            assert strategies.same(start, spec.start(3))
        first, second, third = (work.adapter for work in works.values() if isinstance(work, Train))

    assert first == third != second


async def test_an_unknown_model_is_refused_with_those_there_are(tmp_path: Path) -> None:
    """By name and status, and nothing is written down; a run with one bundle has no models to choose from."""
    async with learning(tmp_path / "two") as ledger:
        for _ in range(2):
            with pytest.raises(WireError) as refused:
                await ledger.enroll("d9", "x", "big")
        assert (refused.value.code, refused.value.status) == ("unknown-model", 404)
        assert refused.value.detail == "this run has small, other"
        assert "d9" not in ledger.state.devices
        with pytest.raises(WireError, match="enroll this device first"):
            ledger.plan("d9", can_train=True)
    one = open_ledger(tmp_path / "one", with_public(), compute=Pupil())
    with pytest.raises(WireError, match="one model only; leave it out"):
        await one.enroll("d9", "x", "small")
    one.close()


async def test_a_device_may_change_its_model(tmp_path: Path) -> None:
    """Enrolling anew with another is one event, and what comes next is about that; the same again changes nothing."""
    async with learning(tmp_path) as ledger:
        await until_asked(ledger, 0)  # or that may happen in between
        mine = ledger.plan("d1", can_train=True)
        yours = ledger.plan("d2", can_train=True)
        for _ in range(2):
            told = await ledger.enroll("d1", "d1", "other")
        assert isinstance(mine, Train)
        assert isinstance(yours, Train)
        assert told.bundle.kind == "decoder"
        assert ledger.plan("d1", can_train=True) == yours != mine
        back = await ledger.enroll("d1", "d1")
        assert back == ledger.manifest
        assert ledger.plan("d1", can_train=True) == mine
        state = ledger.state

    enrolled = [(event.device, event.model) for event in helpers.events(tmp_path) if isinstance(event, Enrolled)]
    assert enrolled == [("d1", "small"), ("d2", "other"), ("d1", "other"), ("d1", "")]
    assert state == replayed(tmp_path)


async def test_a_device_gets_its_manifest_over_http(tmp_path: Path) -> None:
    """The model's name travels with the first word, and a wrong one is answered by a problem that devices can read."""
    ledger = open_ledger(tmp_path, with_public(), compute=Pupil(), others=others())
    async with TestClient(TestServer(create_app(ledger))) as made:
        client: Client = made
        answer = await client.post("/v1/enroll", data=wire.encode(Enroll(PROTOCOL, "d1", "x", "other")))
        told = wire.decode(await answer.read(), Manifest)
        refused = await client.post("/v1/enroll", data=wire.encode(Enroll(PROTOCOL, "d1", "x", "big")))
        problem = wire.decode(await refused.read(), Problem)

    assert (told.bundle.kind, told.run) == ("decoder", ledger.manifest.run)
    assert (refused.status, problem.code, problem.detail) == (404, "unknown-model", "this run has small, other")


async def test_what_the_llm_says_is_the_next_lesson(tmp_path: Path) -> None:
    """Devices of both kinds get the same lines, which a device can read; a newcomer gets the newest at once."""
    async with learning(tmp_path, run=with_public(versions=1)) as ledger:
        for device in MODELS:
            while ledger.state.devices[device].judged < 0:
                await do_next(ledger, device)
        await helpers.until(lambda: ledger.state.version == 1)
        await ledger.enroll("d3", "d3", "other")
        works = [ledger.plan(device, can_train=True) for device in ("d1", "d2", "d3")]
        lessons = {work.lesson for work in works if isinstance(work, Train)}
        (lesson,) = lessons
        assert lesson is not None
        lines = wire.unpack_lines(ledger.blobs.get(lesson.blob), Sample)

    assert [work.version for work in works if isinstance(work, Train)] == [1, 1, 1]
    assert (len(lines), lesson.count, lesson.label_weight, lesson.batch_size) == (5, 5, 0.9, 8)
    assert [line.text for line in lines] == [example.text for example in PUBLIC]


# Restarts and time ----------------------------------------------------------------------------------------------------
EVENTS = 1 + 2 + 2 * (1 + 1 + 1) + 2 * 3 + 2 * 2  # version 0, devices; of each version three steps; trainings; answers


@pytest.mark.parametrize("after", range(1, EVENTS))
async def test_a_restart_at_any_event_goes_on(tmp_path: Path, after: int) -> None:
    """Whatever was on disk when the server died, the run ends with the same adapters, lessons and files."""
    async with learning(tmp_path / "undisturbed") as ledger:
        await learn(ledger)
        state = ledger.state
    log = helpers.events(tmp_path / "undisturbed")
    assert len(log) == EVENTS
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [after])
    async with learning(tmp_path / "died") as again:
        await learn(again)

        assert (again.state.tuned, again.state.adapters) == (state.tuned, state.adapters)
        assert [(s.texts, s.judged, s.acceptance) for s in again.state.sheets] == [
            (s.texts, s.judged, s.acceptance) for s in state.sheets
        ]
        assert again.state == replayed(tmp_path / "died")
    assert helpers.blobs(tmp_path / "died") == helpers.blobs(tmp_path / "undisturbed")


async def test_a_deadline_passes_with_one_answer(tmp_path: Path) -> None:
    """Nobody waits for ever for a second device: once time is up, what was said counts, with what the absent one said before."""
    clock, said = [1000.0], list[str]()
    run = with_public(deadline_seconds=0.3, versions=2)
    async with learning(tmp_path, run=run, now=lambda: clock[0], say=said.append) as ledger:
        for device in MODELS:
            while ledger.state.devices[device].judged < 0:
                await do_next(ledger, device)
        await until_asked(ledger, 1)
        while ledger.state.devices["d1"].judged < 1:
            await do_next(ledger, "d1")
        await asyncio.sleep(0.02)
        assert len(ledger.state.tuned) == 1
        clock[0] = 1000.4
        await helpers.until(lambda: ledger.state.version == 2)

        assert [len(asked.ballots) for asked in ledger.state.sheets] == [2, 1]
    assert said.count("the LLM learned from 2 devices, loss 0.500") == 2


async def test_a_revoked_device_is_not_heard_any_more(tmp_path: Path) -> None:
    """Neither what it says of this version nor what it said of the last; the deadline waits for somebody else's answer."""
    clock, said, gone = [1000.0], list[str](), set[str]()
    run = with_public(deadline_seconds=0.3, versions=2)
    async with learning(tmp_path, run=run, now=lambda: clock[0], say=said.append) as ledger:
        ledger.revoked = lambda: gone
        for device in MODELS:
            while ledger.state.devices[device].judged < 0:
                await do_next(ledger, device)
        await until_asked(ledger, 1)
        gone.add("d2")
        while ledger.state.devices["d2"].judged < 1:
            await do_next(ledger, "d2")
        clock[0] = 1000.4
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(helpers.until(lambda: len(ledger.state.tuned) > 1), 0.05)
        assert ledger._patience() is None  # only news can change anything
        while ledger.state.devices["d1"].judged < 1:
            await do_next(ledger, "d1")
        await helpers.until(lambda: ledger.state.version == 2)

        assert {len(asked.ballots) for asked in ledger.state.sheets} == {2}
    learned = [line for line in said if line.startswith("the LLM learned")]
    assert learned == [f"the LLM learned from {count}, loss 0.500" for count in ("2 devices", "1 devices")]


async def test_an_answer_after_the_llm_has_said_its_own_is_too_late(tmp_path: Path) -> None:
    """It is refused by name, and the device is asked about the next version."""
    async with learning(tmp_path, run=with_public(answers=1)) as ledger:
        for device in MODELS:
            await do_next(ledger, device)
        await until_asked(ledger, 0)
        late = judgment("d2", 0, sheet(ledger, 0))
        await do_next(ledger, "d1")
        await until_asked(ledger, 1)
        with pytest.raises(WireError, match="sheet 0 is decided already") as refused:
            await ledger.take_judgment(late)
        await do_next(ledger, "d2")  # learns
        work = ledger.plan("d2", can_train=True)

    assert refused.value.code == "too-stale"
    assert isinstance(work, Predict)
    assert work.version == 1


async def test_of_five_answers_at_once_one_counts(tmp_path: Path) -> None:
    """The same bytes five times at once are one event, and get one receipt."""
    async with learning(tmp_path) as ledger:
        await until_asked(ledger, 0)
        said = judgment("d1", 0, sheet(ledger, 0))
        receipts = await asyncio.gather(*(ledger.take_judgment(said) for _ in range(5)))

        assert len({receipt.id for receipt in receipts}) == len(ledger.state.sheets[0].ballots) == 1


async def test_an_llm_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, devices are served meanwhile, and the run ends as it would have."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    llm = Pupil()
    async with learning(tmp_path, llm) as ledger:
        for device in MODELS:
            await do_next(ledger, device)
        await until_asked(ledger, 0)
        llm.troubles += [JobFailed("out of memory")] * 10**5
        for device in MODELS:
            await do_next(ledger, device)
        await helpers.until(lambda: len(llm.jobs) > 2)
        assert ledger.trouble == "version 1 cannot be made: out of memory"
        assert ledger.plan("d1", can_train=True) == Wait(0.25)
        llm.troubles.clear()
        await learn(ledger)

        assert ledger.trouble == ""
        assert [Pupil.lessons(tmp_path / "blobs" / name).tolist() for name in ledger.state.tuned] == [[3], [3, 4]]


# What it is not for ---------------------------------------------------------------------------------------------------
async def test_a_run_keeps_its_bundles(tmp_path: Path) -> None:
    """The folder refuses a model more, one less, another under the same name; the same ones open it."""
    made = others()
    open_ledger(tmp_path, with_public(), compute=Pupil(), others=made).close()
    more = {**made, "third": made["small"]}
    fewer = {"small": made["small"]}
    swapped = {**made, "other": made["small"]}
    for wrong in (more, fewer, swapped, {}):
        with pytest.raises(SettingsError, match=r"other settings or another bundle \(others\."):
            open_ledger(tmp_path, with_public(), compute=Pupil(), others=wrong)
    open_ledger(tmp_path, with_public(), compute=Pupil(), others=made).close()


async def test_adapters_stay_on_devices(tmp_path: Path) -> None:
    """An update is refused and leaves nothing, a word of a training is taken; there is no feed, and nothing to withdraw."""
    async with learning(tmp_path) as ledger:
        await until_asked(ledger, 0)
        before = helpers.blobs(tmp_path)
        refused = []
        for ask in (take(ledger, upload("d1", 0)), ledger.synthetic(0, 10), ledger.withdraw("p0")):
            with pytest.raises(WireError) as error:
                await ask
            refused.append((error.value.code, error.value.status, "fedmkt" in error.value.detail))
        receipt = await train(ledger, "d1", 0)

        assert (receipt.version, ledger.state.devices["d1"].trained) == (0, 0)
        with pytest.raises(WireError, match="already-answered"):
            await ledger.take_trained(msgspec.structs.replace(Trained("d1", 0, 11, {})), "another")
        assert helpers.blobs(tmp_path) == before
    assert refused == [("wrong-system", 404, True)] * 3


async def test_a_refused_answer_leaves_nothing(tmp_path: Path) -> None:
    """Of a device that nobody knows, about texts that nobody asked, of another shape: no event, no file."""
    async with learning(tmp_path) as ledger:
        await until_asked(ledger, 0)
        texts, before = sheet(ledger, 0), helpers.blobs(tmp_path)
        codes = []
        for body in (judgment("d9", 0, texts), judgment("d1", 1, texts), judgment("d1", 0, texts[:4])):
            with pytest.raises(WireError) as error:
                await ledger.take_judgment(body)
            codes.append(error.value.code)
        state = ledger.state

    assert codes == ["unknown-device", "unknown-sheet", "wrong-shape"]
    assert state.sheets[0].ballots == ()
    assert helpers.blobs(tmp_path) == before


@pytest.mark.parametrize(
    ("compute", "public", "said"),
    [
        (None, PUBLIC, r"fedmkt needs a process for its LLM"),
        (Simulator(), (), r"labelled texts in the file fedmkt\.public"),
        (Simulator(), (Example("two\nlines", 1),), r"fedmkt\.public: text 0 has a character that is not"),
    ],
)
def test_a_run_needs_an_llm_and_texts(tmp_path: Path, compute: Simulator | None, public: tuple[Example, ...], said: str) -> None:
    """Refused before anything is made, so that the same folder can be used at once."""
    run = with_public()
    manifest = run_settings.manifest(run, factories.bundle())
    with pytest.raises(SettingsError, match=said):
        Ledger(run, manifest, tmp_path / "data", compute=compute, auxiliary=public)
    assert not (tmp_path / "data").exists()
    Ledger(run, manifest, tmp_path / "data", compute=Simulator(), auxiliary=PUBLIC).close()


async def test_version_0_changes_nothing(tmp_path: Path) -> None:
    """The adapter that devices start from, and every version's after it: B is zero."""
    async with learning(tmp_path) as ledger:
        await learn(ledger)
        state = ledger.state

    assert len(state.adapters) == 3
    assert len(set(state.adapters)) == 1
    start = adapter(tmp_path, state.adapter)
    assert not any(np.any(start[slot.b]) for slot in factories.SLOTS)
