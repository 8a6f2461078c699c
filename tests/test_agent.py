"""The daemon against a server in memory: what it sends, keeps, survives and says."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec
from edge_sdk.agent import ADAPTER, Agent, bundle_folder, kept_adapter
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.files import held
from edge_sdk.protocol import PROTOCOL, Evaluate, Evaluation, Finished, Manifest, Train, Update
from edge_sdk.session import PAUSE_AFTER_FAILED_WORK
from edge_sdk.softlabels import SoftLabels
from edge_sdk.store import Parcel, Store
from edge_sdk.testing import ServerSimulator
from edge_sdk.training.batches import Training
from edge_sdk.wire import JSON_TYPE, encode, pack_adapter
from tests import factories


class Enough(Exception):
    """Ends an agent that would wait for ever."""


@dataclass
class World:
    """An agent, its server, and everything it said and slept."""

    store: Store
    server: ServerSimulator
    cache: Path
    spec: AdapterSpec
    lines: list[str] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    most_sleeps: int = 3

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if len(self.slept) > self.most_sleeps:
            raise Enough

    def agent(self) -> Agent:
        return Agent(self.store, self.server, self.cache, "device", say=self.lines.append, sleep=self.sleep)

    def said(self, words: str) -> bool:
        return any(words in line for line in self.lines)


@pytest.fixture
def world(tmp_path: Path, encoder_bundle: Path) -> Iterator[World]:
    bundle = bundles.read(encoder_bundle)
    spec = AdapterSpec(bundle.slots, rank=2, alpha=4.0)
    server = ServerSimulator(Manifest(PROTOCOL, "lpfl", factories.ENCODER_TASK, spec, bundle))
    for name in bundle.files:
        server.keep((encoder_bundle / name).read_bytes())
    store = Store(tmp_path / "home")
    yield World(store, server, tmp_path / "cache", spec)
    store.close()


def fill(store: Store) -> None:
    store.add("a great film", "positive")
    store.add("a grim day", "negative")
    for text in ("the story was fine", "it was so dull", "very nice", "the phone was broken"):
        store.add(text)
    store.add("a superb story", "positive", held_out=True)


def start(world: World) -> str:
    return world.server.keep(pack_adapter(world.spec.start(0)))


def train(adapter: str, version: int = 0) -> Train:
    return Train(version, adapter, Training(steps=2, batch_size=2), SoftLabels(growth=2, batch_size=2), seed=1)


async def test_it_trains_measures_and_keeps_the_result(world: World) -> None:
    """Evaluate, train and finished in a row: one evaluation and one update arrive, the last adapter stays on the device."""
    fill(world.store)
    adapter = start(world)
    last = world.server.keep(pack_adapter(world.spec.start(7)))
    world.server.work += [Evaluate(0, adapter), train(adapter), Finished(1, last)]

    assert await world.agent().run() == 1
    evaluation, update = world.server.results
    assert isinstance(evaluation, Evaluation)
    assert evaluation.num_examples == 1
    assert isinstance(update, Update)
    assert update.num_examples == 2 + update.metrics["soft_examples"] > 2  # labels and soft labels
    kept = kept_adapter(world.store, world.server.manifest)
    assert kept is not None
    assert all((kept[name] == array).all() for name, array in world.spec.start(7).items())


async def test_an_adapter_is_downloaded_once_a_version(world: World) -> None:
    """Measuring a version and training from it share one download."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [Evaluate(0, adapter), train(adapter), Finished(0, adapter)]
    await world.agent().run()

    assert world.server.requests.count(("GET", f"/v1/blobs/{adapter}")) == 1


async def test_the_outbox_goes_first(world: World) -> None:
    """A result from before a power cut is delivered before new work is asked for."""
    message = Evaluation(world.store.device_id, 0, 0, {})
    world.store.post(Parcel(JSON_TYPE, encode(message)))
    world.server.work += [Finished(0, start(world))]
    await world.agent().run()

    assert [path for _, path in world.server.requests if path != "/v1/enroll"][:2] == ["/v1/results", "/v1/work"]
    assert world.server.results == [message]
    assert world.store.pending() is None


async def test_offline_it_keeps_the_result_and_doubles_its_pauses(world: World) -> None:
    """Without a network nothing is lost, and the agent pauses instead of failing."""
    world.store.post(Parcel(JSON_TYPE, encode(Evaluation(world.store.device_id, 0, 0, {}))))
    world.server.offline = True
    with pytest.raises(Enough):
        await world.agent().run()

    assert world.store.pending() is not None
    assert all(pause <= 2.0**i for i, pause in enumerate(world.slept))
    assert world.said("offline")


async def test_a_refused_result_is_dropped_and_the_agent_goes_on(world: World) -> None:
    """An update that the server will never take does not block the device."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [train(adapter), Evaluate(0, adapter), Finished(0, adapter)]
    world.server.refusals.append(WireError("too-stale", "too late", 409))
    await world.agent().run()

    assert [type(result) for result in world.server.results] == [Evaluation]
    assert world.said("too-stale")


async def test_a_busy_server_is_tried_again_with_the_same_bytes(world: World) -> None:
    """A failure of the server is not a refusal: the result stays in the outbox and arrives later."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    world.server.refusals.append(WireError("internal", "the server failed", 500))
    await world.agent().run()

    assert len(world.server.results) == 1
    assert world.slept


@pytest.mark.parametrize("damage", ["wrong bytes", "wrong shapes", "not finite"])
async def test_a_bad_adapter_never_replaces_a_good_one(world: World, damage: str) -> None:
    """An adapter whose hash, shapes or values are wrong is refused; the one kept before stays."""
    fill(world.store)
    good = start(world)
    arrays = world.spec.start(1)
    if damage == "wrong shapes":
        arrays = AdapterSpec(world.spec.slots, 3, 1.0).start(1)
    if damage == "not finite":
        next(iter(arrays.values()))[0, 0] = np.nan
    body = pack_adapter(arrays)
    bad = world.server.keep(body)
    if damage == "wrong bytes":
        world.server.blobs[bad] = body[:-1] + b"\1"
    world.server.work += [Evaluate(0, good), Evaluate(1, bad)]
    with pytest.raises(Enough):
        await world.agent().run()

    kept = (world.store.home / ADAPTER).read_bytes()
    assert hashlib.sha256(kept).hexdigest() == good
    assert len(world.server.results) == 1


async def test_a_device_without_labels_waits_and_says_what_to_do(world: World) -> None:
    """Work that cannot be done is said in one line, and the agent tries again after a minute."""
    adapter = start(world)
    world.server.work += [train(adapter)]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent().run()

    assert world.said("edge-agent add")
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]


async def test_asked_for_updates_a_failure_is_raised(world: World) -> None:
    """A script that wants one update gets an error, not an endless wait."""
    world.server.work += [train(start(world))]
    with pytest.raises(DataError, match="no labelled text"):
        await world.agent().run(updates=1)


async def test_another_protocol_is_an_error_at_once(world: World) -> None:
    """A server that speaks another protocol is not worked with."""
    old = world.server.manifest
    world.server.manifest = Manifest(PROTOCOL + 1, old.system, old.task, old.adapter, old.bundle)
    with pytest.raises(SettingsError, match="update the older one"):
        await world.agent().run()


async def test_the_same_work_gives_the_same_bytes(world: World, tmp_path: Path) -> None:
    """A device that repeats a training after a power cut sends the same update, so it is counted once."""
    adapter = start(world)
    servers = []
    for attempt in range(2):
        store = Store(tmp_path / f"copy-{attempt}")
        store.set_fact("device", "same")
        fill(store)
        server = ServerSimulator(world.server.manifest, [train(adapter, version=1)], world.server.blobs)
        await Agent(store, server, world.cache, "device", say=world.lines.append, sleep=world.sleep).run(updates=1)
        store.close()
        servers.append(server)

    assert servers[0].bodies == servers[1].bodies
    assert len(servers[0].bodies) == 1


async def test_what_belongs_to_another_run_is_dropped(world: World) -> None:
    """A server with a new run under the old address gets nothing of the old one, and the device forgets its adapter."""
    world.store.set_fact("run", "the old one")
    world.store.post(Parcel(JSON_TYPE, encode(Evaluation(world.store.device_id, 0, 0, {}))))
    (world.store.home / ADAPTER).write_bytes(b"of the old run")
    adapter = start(world)
    world.server.work += [Finished(0, adapter)]
    await world.agent().run()

    assert world.server.results == []
    assert world.said("another run")
    assert hashlib.sha256((world.store.home / ADAPTER).read_bytes()).hexdigest() == adapter


async def test_a_server_that_forgot_the_device_is_met_again(world: World) -> None:
    """`unknown-device` leads to a new enrolment, and then the same result is sent again."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    world.server.refusals.append(WireError("unknown-device", "enroll this device first", 403))
    await world.agent().run()

    assert len(world.server.results) == 1
    assert world.server.requests.count(("POST", "/v1/enroll")) == 2


async def test_a_model_that_does_not_load_does_not_end_the_agent(world: World) -> None:
    """What nobody expected of a model is said, and the device stays with its fleet."""
    fill(world.store)
    files = {**world.server.manifest.bundle.files}
    body = b"not a graph"
    files["model.fp32.onnx"] = bundles.File(world.server.keep(body), len(body))
    bundle = msgspec.structs.replace(world.server.manifest.bundle, files=files)
    world.server.manifest = msgspec.structs.replace(world.server.manifest, bundle=bundle)
    world.server.work += [Evaluate(0, start(world)), Finished(0, start(world))]
    world.most_sleeps = 1

    assert await world.agent().run() == 0
    assert world.said("cannot work: ")
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]


async def test_only_the_files_of_the_variant_are_fetched(world: World) -> None:
    """A device on a phone line downloads the tokenizer and the one model it runs."""
    adapter = start(world)
    fill(world.store)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    await world.agent().run()
    bundle = world.server.manifest.bundle

    kept = {p.name for p in bundle_folder(world.cache, world.server.manifest).iterdir()} - {".lock"}
    assert kept == {"tokenizer.json", "model.fp32.onnx"} < set(bundle.files)


async def test_a_damaged_file_of_the_bundle_is_fetched_again(world: World) -> None:
    """A byte that rotted in the cache is found by its hash, and only that file is loaded anew."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    await world.agent().run()
    model = bundle_folder(world.cache, world.server.manifest) / "model.fp32.onnx"
    whole = model.read_bytes()
    model.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    before = len(world.server.requests)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    await world.agent().run()

    assert model.read_bytes() == whole
    fetched = [path for _, path in world.server.requests[before:] if "/blobs/" in path]
    assert fetched == [f"/v1/blobs/{world.server.manifest.bundle.files['model.fp32.onnx'].sha256}"]


async def test_one_home_has_one_agent(world: World) -> None:
    """A second process on the same home would overwrite the first one's result; it is refused, and told so."""
    with held(world.store.home, "edge-agent"), pytest.raises(SettingsError, match="another edge-agent already uses"):
        await world.agent().run()
