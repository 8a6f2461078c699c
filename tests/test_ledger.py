"""The ledger between the reducer and the disk: acknowledged is kept, refused leaves nothing, and a restart goes on."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import os
import random
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk import wire
from edge_sdk.adapters import ADAPTER_FILE, CONFIG_FILE, Arrays, read_peft
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import Evaluate, Evaluation, Finished, Predict, Receipt, Sample, Train, Trained, Update, Wait, Withdrawal
from edge_server import coordinator
from edge_server import ledger as ledgers
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, fedbuff
from edge_server.compute import JobFailed
from edge_server.coordinator import (
    Accepted,
    Ballot,
    Decided,
    Dropped,
    Enrolled,
    Evaluated,
    Judged,
    Kept,
    Published,
    State,
    Tuned,
    Written,
)
from edge_server.ledger import Ledger
from edge_server.llm.jobs import Label, Texts, Tune, Write
from edge_server.llm.jobs import Tuned as Learned
from edge_server.robust import Krum, Median, Rule, TrimmedMean
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.systems.lpfl import LpFl
from tests import factories
from tests import server_helpers as helpers
from tests.server_helpers import (
    Hang,
    Simulator,
    judgment,
    open_ledger,
    settings,
    sheet,
    take,
    train,
    upload,
    with_llm,
    work_through,
)


async def with_devices(data: Path, run: RunSettings | None = None, devices: int = 2, **more: Any) -> Ledger:
    """An open ledger at version 0 that knows `d1`, `d2`, ... and makes no versions of its own."""
    ledger = open_ledger(data, run, **more)
    await ledger.open()
    for i in range(1, devices + 1):
        await ledger.enroll(f"d{i}", f"name {i}")
    return ledger


async def run_of(data: Path, versions: int, run: RunSettings | None = None) -> Ledger:
    """Two devices take part until `versions` versions are made; the run is left closed, its ledger readable."""
    ledger = await with_devices(data, run)
    for version in range(versions):
        await take(ledger, upload("d1", version, seed=2 * version, num_examples=10))
        await take(ledger, upload("d2", version, seed=2 * version + 1, num_examples=30))
        await work_through(ledger, version + 1)
    ledger.close()
    return ledger


def replayed(data: Path) -> State:
    return functools.reduce(coordinator.apply, helpers.events(data), State())


def folder(data: Path, version: int) -> Path:
    return data / "versions" / f"{version:04d}"


def files(data: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in data.rglob("*") if path.is_file()}


def adapter(data: Path, sha256: str) -> Arrays:
    """The published adapter as a device would decode it."""
    return wire.unpack_adapter((data / "blobs" / sha256).read_bytes(), helpers.SHAPES)


def equal(a: Arrays, b: Arrays) -> bool:
    return a.keys() == b.keys() and all((a[name] == b[name]).all() for name in a)


async def test_a_fresh_folder_starts_at_version_0(tmp_path: Path) -> None:
    """Opening publishes the adapter that changes nothing, as an event, a blob and a folder."""
    ledger = await with_devices(tmp_path, devices=0)

    assert helpers.events(tmp_path) == [Published(0, ledger.state.adapter, 0)]
    assert equal(adapter(tmp_path, ledger.state.adapter), factories.SPEC.start(0))
    ledger.close()


async def test_opening_twice_publishes_once(tmp_path: Path) -> None:
    """A restart of an untouched run changes nothing on disk."""
    (await with_devices(tmp_path, devices=0)).close()
    (await with_devices(tmp_path, devices=0)).close()

    assert len(helpers.events(tmp_path)) == 1


async def test_a_receipt_means_it_is_on_disk(tmp_path: Path) -> None:
    """Once an update is answered, another process finds its event, with the time it came at, and its bytes."""
    ledger = await with_devices(tmp_path, now=lambda: 99.5)
    body = upload("d1", 0, num_examples=7)
    receipt = await take(ledger, body)
    sha256 = hashlib.sha256(body).hexdigest()

    assert receipt == Receipt(wire.update_id("d1", 0, sha256), 0)
    assert helpers.events(tmp_path)[-1] == Accepted(receipt.id, "d1", 0, sha256, len(body), 7, {"loss": 0.5}, at=99.5)
    assert (tmp_path / "blobs" / sha256).read_bytes() == body
    ledger.close()


async def test_an_evaluation_is_on_disk_once_answered(tmp_path: Path) -> None:
    """Numbers are events as well, and a repeat is answered alike without a second one."""
    ledger = await with_devices(tmp_path)
    message = Evaluation("d1", 0, 12, {"accuracy": 0.75})
    receipts = [await ledger.take_evaluation(message, "0" * 64) for _ in range(3)]

    assert receipts == [Receipt(wire.update_id("d1", 0, "0" * 64), 0)] * 3
    assert helpers.events(tmp_path)[3:] == [Evaluated(receipts[0].id, "d1", 0, 12, {"accuracy": 0.75})]
    ledger.close()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (upload("stranger", 0), "unknown-device"),
        (upload("d1", 5), "unknown-version"),
        (upload("d1", 0, num_examples=0), "bad-message"),
        (upload("d1", 0)[:-1], "bad-tensors"),
        (b"", "bad-tensors"),
    ],
)
async def test_a_refused_update_leaves_nothing(tmp_path: Path, body: bytes, code: str) -> None:
    """No blob, no event, no change of state."""
    ledger = await with_devices(tmp_path)
    before = (ledger.state, helpers.blobs(tmp_path), helpers.events(tmp_path))
    with pytest.raises(WireError) as refused:
        await take(ledger, body)

    assert refused.value.code == code
    assert before == (ledger.state, helpers.blobs(tmp_path), helpers.events(tmp_path))
    ledger.close()


async def test_one_update_sent_five_times_at_once_counts_once(tmp_path: Path) -> None:
    """Retries that race each other get one receipt."""
    ledger = await with_devices(tmp_path)
    receipts = await asyncio.gather(*(take(ledger, upload("d1", 0)) for _ in range(5)))

    assert receipts == [receipts[0]] * 5
    assert len(ledger.state.buffer) == 1
    assert sum(isinstance(event, Accepted) for event in helpers.events(tmp_path)) == 1
    ledger.close()


async def test_of_five_different_updates_at_once_one_counts(tmp_path: Path) -> None:
    """A device cannot outrun the rule of one update per version, and the refused ones leave no blobs."""
    ledger = await with_devices(tmp_path)
    before = helpers.blobs(tmp_path)
    bodies = [upload("d1", 0, seed) for seed in range(5)]
    answers = await asyncio.gather(*(take(ledger, body) for body in bodies), return_exceptions=True)
    [winner] = [body for body, answer in zip(bodies, answers, strict=True) if isinstance(answer, Receipt)]

    assert sorted(answer.code for answer in answers if isinstance(answer, WireError)) == ["already-answered"] * 4
    assert helpers.blobs(tmp_path) - before == {hashlib.sha256(winner).hexdigest()}
    assert ledger.state.devices["d1"].updates == 1
    ledger.close()


async def test_a_request_cancelled_while_its_event_is_written_is_not_lost(tmp_path: Path) -> None:
    """Memory follows the disk also when the device hangs up in between, so its retry is recognised."""
    ledger = await with_devices(tmp_path)
    message = Evaluation("d1", 0, 12, {"accuracy": 0.75})
    other = sqlite3.connect(tmp_path / "events.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # the disk is slow: the append waits for this
    request = asyncio.create_task(ledger.take_evaluation(message, "0" * 64))
    await asyncio.sleep(0)  # runs it up to the append
    request.cancel()
    await asyncio.sleep(0)
    other.execute("ROLLBACK")
    await asyncio.wait([request])

    assert request.cancelled()
    assert isinstance(helpers.events(tmp_path)[-1], Evaluated)
    assert ledger.state == replayed(tmp_path)
    assert await ledger.take_evaluation(message, "0" * 64) == ledger.state.receipts[wire.update_id("d1", 0, "0" * 64)]
    ledger.close()
    other.close()


async def test_versions_are_the_fold_of_their_updates(tmp_path: Path) -> None:
    """What is published equals FedBuff computed in memory over the same updates."""
    run = settings(server_lr=0.5, max_examples=20)
    ledger = await run_of(tmp_path, 3, run)
    seeds = iter(range(6))

    assert ledger.state.version == 3
    assert equal(
        adapter(tmp_path, ledger.state.adapter), helpers.fold(helpers.events(tmp_path), lambda _: helpers.delta(next(seeds)), run)
    )


async def test_a_stale_update_counts_less(tmp_path: Path) -> None:
    """A device 3 versions behind weighs half: version 4 is version 3 plus (30 d + 10 / 2 s) / 35."""
    ledger = await with_devices(tmp_path, devices=3)
    for version in range(3):
        await take(ledger, upload("d1", version))
        await take(ledger, upload("d2", version))
        await work_through(ledger, version + 1)
    third = adapter(tmp_path, ledger.state.adapter)
    await take(ledger, upload("d3", 0, seed=8, num_examples=10))
    await take(ledger, upload("d1", 3, seed=9, num_examples=30))
    await work_through(ledger, 4)
    fourth = adapter(tmp_path, ledger.state.adapter)

    for name, array in third.items():
        stale, fresh = (helpers.delta(seed)[name].astype(np.float64) for seed in (8, 9))
        np.testing.assert_allclose(fourth[name], array + (30 * fresh + 5 * stale) / 35, rtol=1e-6, atol=1e-7)
    ledger.close()


def constant(device: str, version: int, value: float) -> bytes:
    """An update that moves every number of the adapter by `value`."""
    return wire.pack(Update(device, version, 10, {}), {name: np.full(s, value, np.float32) for name, s in helpers.SHAPES.items()})


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(1), Krum(1, 1)])
async def test_one_device_cannot_fill_a_buffer(tmp_path: Path, rule: Rule) -> None:
    """Five updates of one device, for five versions, count once in each version: it moves no farther than honest ones do."""
    honest = [f"d{i}" for i in range(1, 5)]
    ledger = await with_devices(tmp_path, settings(buffer_size=5, rule=rule), devices=6)
    for version in range(4):
        for device in (*honest, "d5"):
            await take(ledger, constant(device, version, 1e-3))
        await work_through(ledger, version + 1)
    for version in range(5):
        await take(ledger, constant("d6", version, -1e3))
    maker = asyncio.create_task(ledger.make_versions())
    for version in (4, 5):
        for device in honest:
            await take(ledger, constant(device, version, 1e-3))
        await helpers.until(lambda: ledger.state.version == version + 1)  # noqa: B023  # waited for in here
    maker.cancel()
    await asyncio.wait([maker])
    before, *_, after = (adapter(tmp_path, sha256) for sha256 in ledger.state.adapters[4:])

    assert [(waiting.device, waiting.version) for waiting in ledger.state.buffer] == [("d6", version) for version in (2, 3, 4)]
    for name, array in before.items():
        np.testing.assert_allclose(after[name] - array, 2e-3, rtol=1e-3)
    ledger.close()


async def test_a_backlog_is_averaged_by_the_age_it_has_by_then(tmp_path: Path) -> None:
    """Six updates of version 0 come at once: two are a version old when version 2 is made, and two too old for version 3."""
    said: list[str] = []
    ledger = await with_devices(tmp_path, settings(max_staleness=1, clip_norm=0.0), devices=7, say=said.append)
    first = [await take(ledger, constant(f"d{i}", 0, float(i))) for i in range(1, 7)]
    maker = asyncio.create_task(ledger.make_versions())
    await helpers.until(lambda: len(said) == 3)
    await take(ledger, constant("d7", 2, 7.0))
    await take(ledger, constant("d1", 2, 1.0))
    await helpers.until(lambda: len(said) == 4)
    maker.cancel()
    await asyncio.wait([maker])
    log = helpers.events(tmp_path)
    blobs = {event.blob: event.device for event in log if isinstance(event, Accepted)}

    assert said == [
        "version 1 from 2 updates (staleness 0, 0)",
        "version 2 from 2 updates (staleness 1, 1)",
        "dropped as too-stale, of the updates that waited: 2",
        "version 3 from 2 updates (staleness 0, 0)",
    ]
    dropped = [event for event in log if isinstance(event, Dropped)]
    assert [[blobs[blob] for blob in event.blobs] for event in dropped] == [["d5", "d6"]]
    assert (ledger.state, ledger.state.buffer) == (replayed(tmp_path), ())
    assert await take(ledger, constant("d6", 0, 6.0)) == first[-1]
    ledger.close()


async def test_an_update_that_waited_counts_less(tmp_path: Path) -> None:
    """Version 2 is version 1 plus (10 f + 10 / sqrt(2) s) / (10 + 10 / sqrt(2)): `s` waited through version 1."""
    ledger = await with_devices(tmp_path, settings(clip_norm=0.0), devices=4)
    for i in (1, 2, 3):
        await take(ledger, constant(f"d{i}", 0, float(i)))
    await work_through(ledger, 1)
    await take(ledger, constant("d4", 1, 9.0))
    await work_through(ledger, 2)
    first, second = (adapter(tmp_path, sha256) for sha256 in ledger.state.adapters[1:])

    for name, array in first.items():
        np.testing.assert_allclose(second[name] - array, (9 + 3 * 0.5**0.5) / (1 + 0.5**0.5), rtol=1e-5)
    ledger.close()


async def test_what_a_revoked_device_has_sent_makes_no_version(tmp_path: Path) -> None:
    """It leaves the buffer, and the version waits for another device; also after a restart that knows of no revocation."""
    said: list[str] = []
    ledger = await with_devices(tmp_path, devices=3, say=said.append)
    ledger.revoked = lambda: {"d2"}
    for i in (1, 2):
        await take(ledger, constant(f"d{i}", 0, float(i)))
    maker = asyncio.create_task(ledger.make_versions())
    await helpers.until(lambda: bool(said))
    maker.cancel()
    await asyncio.wait([maker])
    ledger.close()
    again = open_ledger(tmp_path)
    await take(again, constant("d3", 0, 3.0))
    await work_through(again, 1)
    start, after = (adapter(tmp_path, sha256) for sha256 in again.state.adapters)

    assert said == ["dropped as revoked, of the updates that waited: 1"]
    for name, array in start.items():
        np.testing.assert_allclose(after[name] - array, 2.0, rtol=1e-6)
    again.close()


async def test_every_version_is_a_folder_peft_can_load(tmp_path: Path) -> None:
    """Each version's folder holds the published adapter with the run's rank and alpha."""
    await run_of(tmp_path, 3)
    published = [event.adapter for event in helpers.events(tmp_path) if isinstance(event, Published)]

    assert sorted(path.name for path in (tmp_path / "versions").iterdir()) == ["0000", "0001", "0002", "0003"]
    for version, sha256 in enumerate(published):
        arrays, spec = read_peft(folder(tmp_path, version), factories.SLOTS)
        assert spec == factories.SPEC
        assert equal(arrays, adapter(tmp_path, sha256))


async def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    """The state after a restart is the state before, with a half-full buffer and all receipts."""
    ledger = await run_of(tmp_path, 2)
    ledger = open_ledger(tmp_path)
    receipt = await take(ledger, upload("d1", 2, seed=9))
    ledger.close()
    again = open_ledger(tmp_path)
    await again.open()

    assert again.state == ledger.state == replayed(tmp_path)
    assert (again.state.version, len(again.state.buffer), len(again.state.receipts)) == (2, 1, 5)
    assert await take(again, upload("d1", 2, seed=9)) == receipt
    assert len(again.state.buffer) == 1
    again.close()


def leave_nothing(_: Path) -> None:
    """The crash came before the first byte of the version."""


def leave_a_broken_folder(data: Path) -> None:
    """The crash came while the version's folder was written."""
    folder(data, 1).mkdir()
    (folder(data, 1) / "adapter_model.safetensors").write_bytes(b"half of an adap")


def leave_the_whole_folder(data: Path) -> None:
    """The crash came after the folder was written, before its event was."""
    folder(data, 1).mkdir()
    adapter = helpers.fold([], lambda _: {}, settings())
    (folder(data, 1) / "adapter_model.safetensors").write_bytes(wire.pack_adapter(adapter))
    (data / "blobs" / "incoming-leftover").write_bytes(b"half a blob")


@pytest.mark.parametrize("crash", [leave_nothing, leave_a_broken_folder, leave_the_whole_folder])
async def test_a_version_that_a_crash_interrupted_is_made_on_restart(tmp_path: Path, crash: Callable[[Path], None]) -> None:
    """Accepted updates of a full buffer become the version they would have become, to the last byte."""
    undisturbed = await run_of(tmp_path / "undisturbed", 1)
    crashed = await with_devices(tmp_path / "crashed")
    await take(crashed, upload("d1", 0, seed=0, num_examples=10))
    await take(crashed, upload("d2", 0, seed=1, num_examples=30))
    crashed.close()
    crash(tmp_path / "crashed")
    healed = open_ledger(tmp_path / "crashed")
    assert healed.state.version == 0
    await work_through(healed, 1)

    assert healed.state == undisturbed.state == replayed(tmp_path / "crashed")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder(tmp_path / "crashed", 1) / name).read_bytes() == (folder(tmp_path / "undisturbed", 1) / name).read_bytes()
    assert helpers.blobs(tmp_path / "crashed") == helpers.blobs(tmp_path / "undisturbed")
    healed.close()


async def test_a_crash_before_version_0_is_healed(tmp_path: Path) -> None:
    """A folder that only knows its run starts as a fresh one does."""
    open_ledger(tmp_path).close()
    ledger = await with_devices(tmp_path)

    assert helpers.events(tmp_path)[0] == Published(0, ledger.state.adapter, 0)
    ledger.close()


async def test_a_run_ends_at_its_last_version(tmp_path: Path) -> None:
    """Late updates are taken and answered, but no version comes after the one everybody was told is the last."""
    ledger = await with_devices(tmp_path, settings(versions=1, buffer_size=1), devices=3)
    await take(ledger, upload("d1", 0))
    await work_through(ledger, 1)
    late = [await take(ledger, upload(device, 0)) for device in ("d2", "d3")]
    maker = asyncio.create_task(ledger.make_versions())
    await asyncio.sleep(0)  # runs it up to where it would start to aggregate
    maker.cancel()
    await asyncio.get_running_loop().shutdown_default_executor()  # what it would have written is there now

    assert [receipt.version for receipt in late] == [1, 1]
    assert (ledger.state.version, len(ledger.state.buffer)) == (1, 2)
    assert not folder(tmp_path, 2).exists()
    ledger.close()


async def test_updates_of_hostile_size_do_not_end_the_run(tmp_path: Path) -> None:
    """Finite numbers whose sum is not leave the adapter as it is; the versions after it are made."""
    ledger = await with_devices(tmp_path, settings(buffer_size=1))
    huge = {name: np.full(shape, 3e38, np.float32) for name, shape in helpers.SHAPES.items()}
    for version in range(3):
        await take(ledger, wire.pack(Update("d1", version, 1, {}), huge))
        await work_through(ledger, version + 1)
    published = [event.adapter for event in helpers.events(tmp_path) if isinstance(event, Published)]

    assert published[1] == published[2] == published[3]
    assert all(np.isfinite(array).all() for array in adapter(tmp_path, published[3]).values())
    ledger.close()


async def test_a_damaged_update_is_named_and_nothing_is_published(tmp_path: Path) -> None:
    """A blob that rotted on disk makes no wrong version but trouble the operator hears of; once mended, the version comes."""
    ledger = await with_devices(tmp_path, devices=3)
    await take(ledger, upload("d1", 0))
    body = upload("d2", 0)
    await take(ledger, body)
    sha256 = hashlib.sha256(body).hexdigest()
    (tmp_path / "blobs" / sha256).write_bytes(body[:-1])
    await ledger.open()
    maker = asyncio.create_task(ledger.make_versions())
    await helpers.until(lambda: bool(ledger.trouble))

    assert f"version 1 cannot be made: blob {sha256} is missing or damaged" in ledger.trouble
    assert ledger.state.version == 0
    (tmp_path / "blobs" / sha256).write_bytes(body)
    await take(ledger, upload("d3", 0))  # the next update wakes it
    await helpers.until(lambda: ledger.state.version == 1 and not ledger.trouble)
    maker.cancel()
    await asyncio.wait([maker])
    ledger.close()


@pytest.mark.parametrize(
    "other",
    [
        settings(versions=999),
        msgspec.structs.replace(settings(), adapter=AdapterSettings(rank=3, alpha=4.0)),
        msgspec.structs.replace(settings(), task=factories.DECODER_TASK),
    ],
)
async def test_a_folder_of_another_run_is_refused(tmp_path: Path, other: RunSettings) -> None:
    """Other settings on an old folder would mix two runs: nothing in it is touched, not even a running upload."""
    await run_of(tmp_path, 1)
    (tmp_path / "blobs" / "incoming-running").write_bytes(b"half")
    before = files(tmp_path)
    with pytest.raises(SettingsError, match="use another --data folder"):
        open_ledger(tmp_path, other)

    assert files(tmp_path) == before


async def test_a_folder_of_another_bundle_is_refused(tmp_path: Path) -> None:
    """The same settings on another model are another run."""
    await run_of(tmp_path, 1)
    manifest = run_settings.manifest(settings(), factories.bundle("decoder"))
    with pytest.raises(SettingsError, match="another bundle"):
        Ledger(settings(), manifest, tmp_path)


async def test_versions_are_announced(tmp_path: Path) -> None:
    """An operator reads one line per version, with the staleness of what it was made from."""
    said: list[str] = []
    ledger = open_ledger(tmp_path, say=said.append)
    await ledger.open()
    for device in ("d1", "d2"):
        await ledger.enroll(device, device)
        await take(ledger, upload(device, 0))
    maker = asyncio.create_task(ledger.make_versions())
    await helpers.until(lambda: len(said) > 0)
    maker.cancel()

    assert said == ["version 1 from 2 updates (staleness 0, 0)"]
    ledger.close()


async def test_a_name_is_an_event_only_when_it_is_new(tmp_path: Path) -> None:
    """A device that enrols at every start does not fill the log."""
    ledger = await with_devices(tmp_path, devices=1)
    for name in ("name 1", "name 1", "another"):
        assert await ledger.enroll("d1", name) == ledger.manifest

    assert helpers.events(tmp_path)[1:] == [Enrolled("d1", "name 1"), Enrolled("d1", "another")]
    ledger.close()


async def test_an_interleaved_run_equals_its_replay(tmp_path: Path) -> None:
    """Six devices send at once, again and again, while versions are made: memory, disk and fold agree at the end."""
    run = settings(buffer_size=3, max_staleness=2)
    ledger = await with_devices(tmp_path, run, devices=6)
    maker = asyncio.create_task(ledger.make_versions())
    shuffle = random.Random(3)
    sent: dict[str, int] = {}

    async def send(device: str, seed: int) -> None:
        version = max(0, ledger.state.version - shuffle.randint(0, 3))
        try:
            receipt = await take(ledger, upload(device, version, seed, num_examples=seed + 1))
        except WireError as error:
            if error.code not in ("already-answered", "too-stale"):
                raise
        else:
            sent[receipt.id] = seed

    for i in range(12):
        await asyncio.gather(*(send(f"d{j}", 10 * i + j) for j in range(1, 7)))
    await helpers.until(lambda: len({waiting.device for waiting in ledger.state.buffer}) < 3)
    maker.cancel()
    await asyncio.wait([maker])
    log = helpers.events(tmp_path)

    assert ledger.state == replayed(tmp_path)
    assert ledger.state.version >= 4
    assert {event.id for event in log if isinstance(event, Accepted)} == set(sent)
    folded = helpers.fold(log, lambda event: helpers.delta(sent[event.id]), run)
    assert equal(adapter(tmp_path, ledger.state.adapter), folded)
    ledger.close()


def versions(data: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in (data / "versions").rglob("*") if path.is_file()}


@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize(
    "tear",
    [
        lambda folder: os.truncate(folder / ADAPTER_FILE, 0),
        lambda folder: os.truncate(folder / ADAPTER_FILE, 10),
        lambda folder: (folder / ADAPTER_FILE).unlink(),
        lambda folder: os.truncate(folder / CONFIG_FILE, 0),
        lambda folder: (folder / CONFIG_FILE).write_bytes(bytes((folder / CONFIG_FILE).stat().st_size)),
        shutil.rmtree,
    ],
    ids=["adapter-empty", "adapter-short", "adapter-gone", "config-empty", "config-zeros", "folder-gone"],
)
async def test_a_version_folder_torn_by_a_power_cut_is_mended(tmp_path: Path, tear: Callable[[Path], Any], version: int) -> None:
    """Also that of an old version: what reached the disk is anybody's guess, and all of it can be made from blobs."""
    await run_of(tmp_path, 2)
    whole = versions(tmp_path)
    tear(folder(tmp_path, version))
    ledger = open_ledger(tmp_path)
    await ledger.open()

    assert versions(tmp_path) == whole
    ledger.close()


async def test_the_newest_adapter_is_mended_where_only_its_size_is_right(tmp_path: Path) -> None:
    """Whoever reads the old file meanwhile keeps it: the new one takes its place whole."""
    await run_of(tmp_path, 1)
    whole, file = versions(tmp_path), folder(tmp_path, 1) / ADAPTER_FILE
    file.write_bytes(zeros := bytes(file.stat().st_size))
    ledger = open_ledger(tmp_path)
    with file.open("rb") as reading:
        await ledger.open()
        assert reading.read() == zeros

    assert versions(tmp_path) == whole
    ledger.close()


@pytest.mark.parametrize("spoil", [lambda blob: blob.unlink(), lambda blob: blob.write_bytes(b"rotten")], ids=["lost", "rotten"])
async def test_an_old_version_whose_blob_is_no_more_stays_as_it_is(tmp_path: Path, spoil: Callable[[Path], Any]) -> None:
    """It is no reason not to start, and nothing else takes its place."""
    ledger = await run_of(tmp_path, 2)
    spoil(tmp_path / "blobs" / ledger.state.adapters[1])
    os.truncate(folder(tmp_path, 1) / ADAPTER_FILE, 10)
    torn = versions(tmp_path)
    again = open_ledger(tmp_path)
    await again.open()

    assert versions(tmp_path) == torn
    again.close()


async def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    """The same folder is the same run after a restart; another folder is another run, with the same settings too."""
    first = open_ledger(tmp_path / "a")
    run = first.manifest.run
    first.close()
    again, other = open_ledger(tmp_path / "a"), open_ledger(tmp_path / "b")

    assert run == again.manifest.run != other.manifest.run
    again.close()
    other.close()


# A run with an LLM ----------------------------------------------------------------------------------------------------
@contextlib.asynccontextmanager
async def learning(
    data: Path, llm: Simulator | None = None, run: RunSettings | None = None, **more: Any
) -> AsyncIterator[Ledger]:
    """An open ledger that knows `d1` and `d2` and takes its steps by itself; ended as a server ends it."""
    ledger = open_ledger(data, run or with_llm(), compute=llm or Simulator(), **more)
    await ledger.open()
    for device in ("d1", "d2"):
        await ledger.enroll(device, device)
    maker = asyncio.create_task(ledger.make_versions())
    try:
        yield ledger
    finally:
        maker.cancel()
        await asyncio.wait([maker])
        await ledger.rest()
        ledger.close()


async def has_sheet(ledger: Ledger, number: int) -> None:
    await helpers.until(lambda: len(ledger.state.sheets) > number)


async def learn(ledger: Ledger) -> None:
    """Both devices do what they are told until there is nothing left for them."""
    over: set[str] = set()
    while len(over) < 2:
        for device in ("d1", "d2"):
            match ledger.plan(device, can_train=True):
                case Train(version):
                    await train(ledger, device, version)
                case Predict(number):
                    await ledger.take_judgment(judgment(device, number, sheet(ledger, number)))
                case Wait():
                    await asyncio.sleep(0.002)
                case Finished():
                    over.add(device)
    await helpers.until(lambda: ledger.status().finished)


async def test_a_run_with_an_llm_goes_to_its_end(tmp_path: Path) -> None:
    """Two sheets are written, judged, decided and learned from; everything is on disk, and the LLM is closed with the server."""
    llm, said = Simulator(), list[str]()
    async with learning(tmp_path, llm, say=said.append) as ledger:
        await learn(ledger)
        feed = await ledger.synthetic(0, 100)
        state = ledger.state

    kinds = [type(event) for event in helpers.events(tmp_path) if not isinstance(event, Enrolled | Kept | Judged)]
    assert kinds == [Published, Written, Decided, Tuned, Written, Decided, Tuned]
    assert state == replayed(tmp_path)
    assert (state.version, [len(s.ballots) for s in state.sheets], [s.samples for s in state.sheets]) == (2, [2, 2], [6, 6])
    assert [line.seq for line in feed] == list(range(1, 13))
    assert [type(job) for job in llm.jobs] == [Write, Write, Tune, Write, Label, Write, Tune]
    assert llm.closed
    assert said == [
        "sheet 0: 8 texts written in 0 s, dropped: none",
        "sheet 0: 6 accepted (75%); version 1",
        "the LLM learned from sheet 0, loss 0.500",
        "sheet 1: 8 texts written in 0 s, dropped: none",
        "sheet 1: 6 accepted (75%); version 2",
        "the LLM learned from sheet 1, loss 0.500",
    ]


async def test_a_judgment_is_on_disk_before_its_receipt(tmp_path: Path) -> None:
    """Another process finds event and bytes; after a restart the same judgment gets the same receipt and counts once."""
    async with learning(tmp_path) as ledger:
        await has_sheet(ledger, 0)
        body = judgment("d1", 0, sheet(ledger))
        receipt = await ledger.take_judgment(body)
        sha256 = hashlib.sha256(body).hexdigest()
        assert receipt == Receipt(wire.update_id("d1", 0, sha256), 0)
        assert helpers.events(tmp_path)[-1] == Judged(receipt.id, "d1", 0, sha256, len(body), 10, {"accuracy": 0.9})
        assert (tmp_path / "blobs" / sha256).read_bytes() == body
    async with learning(tmp_path) as again:
        assert await again.take_judgment(body) == receipt
        assert again.state.sheets[0].ballots == (Ballot("d1", sha256),)


async def test_of_five_judgments_at_once_one_counts(tmp_path: Path) -> None:
    """A device has one vote for a sheet, and the refused ones leave no blobs."""
    async with learning(tmp_path) as ledger:
        await has_sheet(ledger, 0)
        before = helpers.blobs(tmp_path)
        bodies = [judgment("d1", 0, sheet(ledger), num_examples=10 + i) for i in range(5)]
        answers = await asyncio.gather(*map(ledger.take_judgment, bodies), return_exceptions=True)

        assert sorted(answer.code for answer in answers if isinstance(answer, WireError)) == ["already-answered"] * 4
        assert len(helpers.blobs(tmp_path) - before) == len(ledger.state.sheets[0].ballots) == 1


@pytest.mark.parametrize("after", range(1, 19))
async def test_a_restart_at_any_event_goes_on(tmp_path: Path, after: int) -> None:
    """Whatever was on disk when the server died, the run ends as an undisturbed one: same blobs, same feed."""
    async with learning(tmp_path / "undisturbed") as ledger:
        await learn(ledger)
        feed, state = await ledger.synthetic(0, 100), ledger.state
    log = helpers.events(tmp_path / "undisturbed")
    assert len(log) == 1 + 2 + 2 * (1 + 2 + 2 + 2) + 2  # start, devices; of each version its sheet, judgments, steps, trainings
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [after])
    async with learning(tmp_path / "died") as again:
        await learn(again)

        assert await again.synthetic(0, 100) == feed
        assert again.state.tuned == state.tuned
        assert [s.judged for s in again.state.sheets] == [s.judged for s in state.sheets]
        assert again.state == replayed(tmp_path / "died")


async def test_an_llm_that_fails_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is told, devices are served all the while, and the next try may succeed."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    llm = Simulator([JobFailed("the LLM cannot write: out of memory")] * 10**6)
    async with learning(tmp_path, llm) as ledger:
        await helpers.until(lambda: len(llm.jobs) > 2)
        assert ledger.trouble == "version 1 cannot be made: the LLM cannot write: out of memory"
        assert isinstance(ledger.plan("d1", can_train=True), Train)
        assert (await train(ledger, "d1", 0)).version == 0
        assert ledger.plan("d1", can_train=True) == Wait(0.25)
        llm.troubles.clear()
        await has_sheet(ledger, 0)
        await helpers.until(lambda: not ledger.trouble)


async def test_trouble_ends_with_the_step_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the next sheet is written, which may take hours, nobody is told of a lesson that failed before."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    llm = Simulator()
    async with learning(tmp_path, llm) as ledger:
        await has_sheet(ledger, 0)
        llm.troubles += [JobFailed("the LLM cannot tune")] * 10**6
        for device in ("d1", "d2"):
            await ledger.take_judgment(judgment(device, 0, sheet(ledger)))
        await helpers.until(lambda: bool(ledger.trouble))
        llm.troubles[:] = []
        llm.troubles += [Texts((("x",),) * 5, 0.0), Learned(0.5, 0.0), Hang()]
        await helpers.until(lambda: len(ledger.state.tuned) == 1)
        await helpers.until(lambda: not llm.troubles)
        assert ledger.trouble == ""
        assert len(ledger.state.sheets) == 1


async def test_devices_are_served_while_the_llm_hangs(tmp_path: Path) -> None:
    """Reports are answered, and the server can be stopped; on restart the job is asked again."""
    async with learning(tmp_path, Simulator([Hang()])) as ledger:
        assert (await train(ledger, "d1", 0)).version == 0
        assert ledger.plan("d1", can_train=True) == Wait(0.25)
        assert ledger.trouble == ""
    async with learning(tmp_path) as again:
        await has_sheet(again, 0)


async def test_a_deadline_decides_with_one_answer(tmp_path: Path) -> None:
    """Nobody waits for ever for a second judge: once time is up, the one there is counts."""
    hours = [1000.0]
    run = with_llm(deadline_seconds=0.3, judges=2, versions=1)
    async with learning(tmp_path, run=run, now=lambda: hours[0]) as ledger:
        await has_sheet(ledger, 0)
        await ledger.take_judgment(judgment("d1", 0, sheet(ledger)))
        await asyncio.sleep(0.02)
        assert ledger.state.version == 0
        hours[0] = 1000.4
        await helpers.until(lambda: len(ledger.state.tuned) == 1)

        assert len(ledger.state.sheets[0].ballots) == 1


async def test_a_withdrawn_sample_stays_withdrawn(tmp_path: Path) -> None:
    """One line of the feed, however often it is asked for, also after a restart; an unknown sample is refused."""
    async with learning(tmp_path) as ledger:
        await learn(ledger)
        first = (await ledger.synthetic(0, 1))[0]
        for _ in range(3):
            await ledger.withdraw(first.id)
        with pytest.raises(WireError) as refused:
            await ledger.withdraw("nobody")
        feed = await ledger.synthetic(0, 100)
    async with learning(tmp_path) as again:
        assert await again.synthetic(0, 100) == feed
        await again.withdraw(first.id)
        assert again.state.lines == 13

    assert (refused.value.code, refused.value.status) == ("unknown-sample", 404)
    assert isinstance(first, Sample)
    assert feed[12:] == [Withdrawal(13, first.id)]
    assert feed[0] == Withdrawal(1, first.id)  # its text is served to nobody any more


async def test_a_text_that_is_being_judged_can_be_withdrawn(tmp_path: Path) -> None:
    """It never reaches the feed, though judges may find it good."""
    async with learning(tmp_path) as ledger:
        await has_sheet(ledger, 0)
        bad = sheet(ledger, 0)[0]
        await ledger.withdraw(bad.id)
        await learn(ledger)
        feed = await ledger.synthetic(0, 100)

    assert feed[0] == Withdrawal(1, bad.id)
    assert bad.text not in {line.text for line in feed if isinstance(line, Sample)}
    assert [line.seq for line in feed] == list(range(1, len(feed) + 1))


async def test_what_is_the_servers_own_is_no_devices(tmp_path: Path) -> None:
    """Sheets are there to be read; prompts, verdicts and the LLM's adapters are not, though the feed names the last."""
    async with learning(tmp_path) as ledger:
        await learn(ledger)
        state = ledger.state
        own = [*filter(None, state.tuned), *(blob for s in state.sheets for blob in (s.drafts, s.judged))]

        assert len(set(own)) == 6
        assert [blob for blob in own if ledger.public(blob) or not ledger.blobs.path(blob)] == []
        assert all(ledger.public(blob) for blob in (state.adapter, *(s.texts for s in state.sheets)))


async def test_old_sheets_leave_the_feed(tmp_path: Path) -> None:
    """With one sheet retained, the first one's samples are withdrawn once the second is decided; nobody gets their text any
    more, under their own numbers neither, and a restart repeats nothing."""
    run = with_llm(retain=1)
    async with learning(tmp_path, run=run) as ledger:
        await learn(ledger)
        await helpers.until(lambda: ledger.state.lines == 18)
        feed = await ledger.synthetic(0, 100)
    async with learning(tmp_path, run=run) as again:
        assert await again.synthetic(0, 100) == feed

    assert {line.version for line in feed if isinstance(line, Sample)} == {1}
    assert [line.id for line in feed[:6]] == [line.id for line in feed[12:]]
    assert all(isinstance(line, Withdrawal) for line in (*feed[:6], *feed[12:]))
    assert all(line.id.startswith("0-") for line in feed[:6])
    assert [line.seq for line in feed] == list(range(1, 19))


# Averaged versions after the last sheet -------------------------------------------------------------------------------
def then_averaged(**federated: Any) -> RunSettings:
    """Two sheets, and then two versions of two updates each; a table [lpfl] that nobody should read."""
    then = LpFl(**{"versions": 2, "buffer_size": 2, "evaluate_every": 0, "server_lr": 0.5, "max_examples": 20, **federated})
    strange = LpFl(versions=1, buffer_size=1, max_staleness=0, server_lr=3.0, seed=77)
    return msgspec.structs.replace(with_llm(federated=then, seed=3), lpfl=strange)


def averaged(updates: Sequence[tuple[int, int]]) -> Arrays:
    """The adapter after versions from these pairs of seeds of deltas, with the settings of `then_averaged`."""
    adapter = factories.SPEC.start(3)
    for pair in updates:
        batch = [Contribution(helpers.delta(seed), 10 * (i + 1), 0) for i, seed in enumerate(pair)]
        adapter = fedbuff(adapter, batch, 0.5, cap=20)
    return adapter


async def do_next(ledger: Ledger, device: str) -> bool:
    """What a device does that asks for work; whether it is told that all is done. `d1` has 10 examples, `d2` 20."""
    i = int(device[1:]) - 1
    match ledger.plan(device, can_train=True):
        case Train(version, share=True):
            await take(ledger, upload(device, version, seed=10 * version + i, num_examples=10 * (i + 1)))
        case Train(version):
            await train(ledger, device, version)
        case Predict(number):
            await ledger.take_judgment(judgment(device, number, sheet(ledger, number)))
        case Evaluate(version):
            await ledger.take_evaluation(Evaluation(device, version, 5, {"accuracy": 0.5}), "0" * 64)
        case Wait():
            await asyncio.sleep(0.002)
        case Finished():
            return True
    return False


async def learn_and_average(ledger: Ledger) -> None:
    """Both devices do what they are told until the run is over."""
    over: set[str] = set()
    while len(over) < 2:
        over = {device for device in ("d1", "d2") if await do_next(ledger, device)}
    await helpers.until(lambda: ledger.status().finished)


async def test_after_the_last_sheet_updates_become_versions(tmp_path: Path) -> None:
    """Uploads are averaged as `federated` says, from the start that all had; each average is an event, a folder and a line."""
    said = list[str]()
    async with learning(tmp_path, run=then_averaged(), say=said.append) as ledger:
        await learn_and_average(ledger)
        state, feed, status = ledger.state, await ledger.synthetic(0, 100), ledger.status()
        planned = ledger.plan("d1", can_train=True)

    log = helpers.events(tmp_path)
    steps = [type(event) for event in log if isinstance(event, Written | Decided | Tuned)]
    assert steps == [Written, Decided, Tuned, Written, Decided, Tuned]
    assert [event.version for event in log if isinstance(event, Published)] == [0, 3, 4]
    sent = sorted((e.version, e.device) for e in log if isinstance(e, Accepted))
    assert sent == [(2, "d1"), (2, "d2"), (3, "d1"), (3, "d2")]
    assert sorted((e.version, e.device) for e in log if isinstance(e, Evaluated)) == [(4, "d1"), (4, "d2")]
    assert state == replayed(tmp_path)
    assert (state.version, len(feed), state.buffer) == (4, 12, ())
    assert [equal(adapter(tmp_path, sha256), factories.SPEC.start(3)) for sha256 in state.adapters] == [True] * 3 + [False] * 2
    assert equal(adapter(tmp_path, state.adapters[3]), averaged([(20, 21)]))
    assert equal(adapter(tmp_path, state.adapters[4]), averaged([(20, 21), (30, 31)]))
    for version in (3, 4):
        assert equal(read_peft(folder(tmp_path, version), factories.SLOTS)[0], adapter(tmp_path, state.adapters[version]))
    lines = [line for line in said if line.startswith("version")]
    assert lines == [f"version {version} from 2 updates (staleness 0, 0)" for version in (3, 4)]
    assert planned == Finished(4, state.adapter)
    assert (status.system, status.adapter, [device.updates for device in status.devices]) == ("crosslm", state.adapter, [2, 2])


async def test_averaging_does_not_wait_for_the_last_lesson(tmp_path: Path) -> None:
    """While the LLM learns from the last sheet, devices go on to the last version; the run is over only when it has learned."""
    llm, run = Simulator(), with_llm(versions=1, federated=LpFl(versions=1, buffer_size=2, evaluate_every=0))
    async with learning(tmp_path, llm, run=run) as ledger:
        await has_sheet(ledger, 0)
        llm.troubles += [Texts((("x",),) * 5, 0.0), Hang()]  # the leash, and a lesson that never ends
        over: set[str] = set()
        while len(over) < 2:
            over = {device for device in ("d1", "d2") if await do_next(ledger, device)}
            await asyncio.sleep(0)
        assert (ledger.state.version, ledger.state.tuned, llm.troubles) == (2, (), [])
        assert not ledger.status().finished
        assert ledger.trouble == ""
    async with learning(tmp_path, run=run) as again:
        await helpers.until(lambda: again.status().finished)


@pytest.mark.parametrize("after", range(16, 25))
async def test_a_restart_at_any_event_of_averaging_goes_on(tmp_path: Path, after: int) -> None:
    """From the last decision on: whatever was on disk when the server died, the run ends at the same adapter."""
    async with learning(tmp_path / "undisturbed", run=then_averaged()) as ledger:
        await learn_and_average(ledger)
        state = ledger.state
    log = helpers.events(tmp_path / "undisturbed")
    assert len(log) == 25  # 17 with the last lesson; of each version two updates and itself; who measures the last
    assert [i for i, event in enumerate(log, 1) if isinstance(event, Decided)][-1] == 16
    shutil.copytree(tmp_path / "undisturbed", tmp_path / "died")
    with contextlib.closing(sqlite3.connect(tmp_path / "died" / "events.sqlite", isolation_level=None)) as disk:
        disk.execute("DELETE FROM events WHERE seq > ?", [after])
    async with learning(tmp_path / "died", run=then_averaged()) as again:
        await learn_and_average(again)

        assert (again.state.version, again.state.adapters) == (4, state.adapters)
        assert again.state == replayed(tmp_path / "died")


async def test_an_update_too_old_to_be_averaged_is_refused(tmp_path: Path) -> None:
    """`federated.max_staleness` counts, not that of a table [lpfl]: one version behind is taken, two are refused."""
    async with learning(tmp_path, run=then_averaged(max_staleness=1)) as ledger:
        await ledger.enroll("d3", "d3")
        await ledger.enroll("d4", "d4")
        while ledger.state.version < 4:
            for device in ("d1", "d2"):
                await do_next(ledger, device)
        with pytest.raises(WireError) as refused:
            await take(ledger, upload("d3", 2))
        receipt = await take(ledger, upload("d4", 3))

    assert refused.value.code == "too-stale"
    assert receipt.version == 4
    assert [ledger.state.version - waiting.version for waiting in ledger.state.buffer] == [1]


async def test_trouble_with_an_average_is_told_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that rotted on disk stops the version after the last sheet, not the server; once mended, the version comes."""
    monkeypatch.setattr(ledgers, "RETRY_SECONDS", 0.05)
    async with learning(tmp_path, run=then_averaged()) as ledger:
        while not ledger.state.buffer:
            match ledger.plan("d1", can_train=True), ledger.plan("d2", can_train=True):
                case Train(version, share=True), _:
                    await take(ledger, body := upload("d1", version))
                case Train(version), Train():
                    await asyncio.gather(*(train(ledger, device, version) for device in ("d1", "d2")))
                case Predict(number), Predict():
                    for device in ("d1", "d2"):
                        await ledger.take_judgment(judgment(device, number, sheet(ledger, number)))
                case _:
                    await asyncio.sleep(0.002)
        path = tmp_path / "blobs" / hashlib.sha256(body).hexdigest()
        path.write_bytes(body[:-1])
        await take(ledger, upload("d2", 2))
        await helpers.until(lambda: bool(ledger.trouble))
        assert ledger.trouble.startswith(f"version 3 cannot be made: blob {path.name} is missing or damaged")
        assert ledger.plan("d1", can_train=True) == Wait(30.0)
        path.write_bytes(body)
        await helpers.until(lambda: ledger.state.version == 3 and not ledger.trouble)


async def test_each_system_takes_its_own_results(tmp_path: Path) -> None:
    """What stays on a device cannot be uploaded to a run that does not average, nor a mere word to one that does nothing else.

    A run that averages after its last sheet takes words before it, and uploads from then on (see the tests above).
    """
    async with learning(tmp_path / "crosslm") as ledger:
        blobs = helpers.blobs(tmp_path / "crosslm")
        with pytest.raises(WireError) as upload_refused:
            await take(ledger, upload("d1", 0))
        assert ledger.state.buffer == ()
        assert not any(name.startswith("incoming") for name in helpers.blobs(tmp_path / "crosslm") - blobs)
    plain = await with_devices(tmp_path / "lpfl")
    before = plain.state
    with pytest.raises(WireError) as word_refused:
        await plain.take_trained(Trained("d1", 0, 10, {}), "0" * 64)

    async with learning(tmp_path / "both", run=then_averaged()) as both:
        await train(both, "d1", 0)
        with pytest.raises(WireError) as early_refused:
            await take(both, upload("d2", 0))
        assert [both.state.devices[device].trained for device in ("d1", "d2")] == [0, -1]
        assert both.state.buffer == ()

    refused = (upload_refused, word_refused, early_refused)
    assert [(e.value.code, e.value.status) for e in refused] == [("wrong-system", 404)] * 3
    assert plain.state == before
    plain.close()
