"""The ledger between the reducer and the disk: acknowledged is kept, refused leaves nothing, and a restart goes on."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_sdk import wire
from edge_sdk.adapters import Arrays, read_peft
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import Evaluation, Receipt, Update
from edge_server import coordinator
from edge_server import settings as run_settings
from edge_server.coordinator import Accepted, Enrolled, Evaluated, Published, State
from edge_server.ledger import Ledger
from edge_server.settings import AdapterSettings, RunSettings
from tests import factories
from tests import server_helpers as helpers
from tests.server_helpers import open_ledger, settings, take, upload, work_through


async def with_devices(data: Path, run: RunSettings | None = None, devices: int = 2) -> Ledger:
    """An open ledger at version 0 that knows `d1`, `d2`, ... and makes no versions of its own."""
    ledger = open_ledger(data, run)
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
    """Once an update is answered, another process finds its event and its bytes."""
    ledger = await with_devices(tmp_path)
    body = upload("d1", 0, num_examples=7)
    receipt = await take(ledger, body)
    sha256 = hashlib.sha256(body).hexdigest()

    assert receipt == Receipt(wire.update_id("d1", 0, sha256), 0)
    assert helpers.events(tmp_path)[-1] == Accepted(receipt.id, "d1", 0, sha256, len(body), 7, {"loss": 0.5})
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
    await helpers.until(lambda: len(ledger.state.buffer) < 3)
    maker.cancel()
    await asyncio.wait([maker])
    log = helpers.events(tmp_path)

    assert ledger.state == replayed(tmp_path)
    assert ledger.state.version >= 4
    assert {event.id for event in log if isinstance(event, Accepted)} == set(sent)
    folded = helpers.fold(log, lambda event: helpers.delta(sent[event.id]), run)
    assert equal(adapter(tmp_path, ledger.state.adapter), folded)
    ledger.close()


async def test_a_version_folder_torn_by_a_power_cut_is_mended(tmp_path: Path) -> None:
    """The newest version's folder is made anew from the blob, which is what counts."""
    await run_of(tmp_path, 1)
    file = tmp_path / "versions" / "0001" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:10])
    ledger = open_ledger(tmp_path)
    await ledger.open()

    assert file.read_bytes() == whole
    ledger.close()


async def test_a_run_keeps_its_id(tmp_path: Path) -> None:
    """The same folder is the same run after a restart; another folder is another run, with the same settings too."""
    first = open_ledger(tmp_path / "a")
    run = first.manifest.run
    first.close()
    again, other = open_ledger(tmp_path / "a"), open_ledger(tmp_path / "b")

    assert run == again.manifest.run != other.manifest.run
    again.close()
    other.close()
