"""The daemon against a server in memory: what it sends, keeps, survives and says."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk import EdgeDevice
from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec, add
from edge_sdk.agent import (
    ADAPTER,
    CHECKPOINT,
    HIDDEN,
    MAX_FEED,
    MAX_FEED_LINES,
    PAGE,
    SPEED,
    START,
    Agent,
    Models,
    bundle_folder,
    kept_adapter,
)
from edge_sdk.codec import Encoding
from edge_sdk.eligibility import Conditions, Policy
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.files import held
from edge_sdk.protocol import (
    PROTOCOL,
    Evaluate,
    Evaluation,
    Finished,
    Judgment,
    Line,
    Manifest,
    Mix,
    Predict,
    Sample,
    Text,
    Train,
    Trained,
    Update,
    Withdrawal,
)
from edge_sdk.session import PAUSE_AFTER_FAILED_WORK
from edge_sdk.softlabels import SoftLabels
from edge_sdk.store import CURSOR, WORK, Parcel, Store
from edge_sdk.testing import ServerSimulator
from edge_sdk.training.batches import Training
from edge_sdk.training.depth import Limits
from edge_sdk.wire import JSON_TYPE, encode, pack_adapter, pack_lines, unpack, unpack_adapter, unpack_judgment, update_shapes
from tests import factories, strategies


class Enough(Exception):
    """Ends an agent that would wait for ever."""


class PowerCut(BaseException):
    """Ends an agent at once, as nothing that it catches would."""


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

    def agent(self, **options: Any) -> Agent:
        return Agent(self.store, self.server, self.cache, "device", say=self.lines.append, sleep=self.sleep, **options)

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


async def test_a_line_too_slow_for_the_server_costs_no_training(world: World) -> None:
    """408 says nothing of the update: what was learned stays in the outbox, and the same bytes arrive later."""
    fill(world.store)
    adapter = start(world)
    world.server.work += [train(adapter), Finished(0, adapter)]
    world.server.refusals += [WireError("too-slow", "the body did not arrive", 408)] * 2
    await world.agent().run()

    assert [type(result) for result in world.server.results] == [Update]
    assert len(world.slept) == 2
    assert not world.said("dropped")


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


# Small steps ----------------------------------------------------------------------------------------------------------
SMALL = Limits(step_seconds=1e-9, micro_tokens=1)  # one text at a time


def many(store: Store) -> None:
    """Eighteen labelled texts: more than one chunk of hidden states."""
    store.set_fact("device", "same")
    for i, word in enumerate([*factories.GOOD, *factories.BAD, *factories.GOOD]):
        store.add(f"the {('film', 'phone', 'day')[i // 6]} was {word}", "negative" if i // 6 == 1 else "positive")


def cut_at(calls: int, state: Conditions = Conditions()) -> Callable[[], Conditions]:  # noqa: B008  # frozen
    """Looks at the device as often, and then the power is gone."""
    left = iter(range(calls - 1))

    def look() -> Conditions:
        if next(left, None) is None:
            raise PowerCut
        return state

    return look


def private_work(adapter: str, version: int = 0) -> Train:
    """Three steps of three texts, without soft labels."""
    return Train(version, adapter, Training(steps=3, batch_size=3, dropout=0.1), None, seed=1)


async def undisturbed(world: World, tmp_path: Path, work: Train, micro_tokens: int = 1) -> bytes:
    """What a device delivers that trains in one long step."""
    store = Store(tmp_path / "undisturbed")
    many(store)
    server = ServerSimulator(world.server.manifest, [work], world.server.blobs)
    limits = Limits(step_seconds=1000, micro_tokens=micro_tokens)
    lines: list[str] = []
    await Agent(store, server, world.cache, "device", limits=limits, look=Conditions, say=lines.append).run(updates=1)
    store.close()
    assert not any("step" in line for line in lines)
    return server.bodies[0]


async def test_small_steps_are_told_and_end_at_the_same_bytes(world: World, tmp_path: Path) -> None:
    """One text at a time: every stop is one line, and what is sent is what one long step sends."""
    many(world.store)
    work = private_work(start(world), 4)
    world.server.work += [work]
    await world.agent(limits=SMALL, look=Conditions).run(updates=1)
    told = [line for line in world.lines if line.startswith("version 4: ") and "trained" not in line]

    assert world.server.bodies == [await undisturbed(world, tmp_path, work)]
    assert told == [
        "version 4: 2 texts to read",
        *(f"version 4: step {step} of 3" for step in (0, 0, 1, 1, 1, 2, 2, 2)),
    ]
    assert world.store.fact(WORK) is None
    assert not (world.store.home / CHECKPOINT).exists()


async def test_conditions_are_waited_for_and_said_once(world: World, tmp_path: Path) -> None:
    """A flat battery, then heat: each is one line however long it lasts, and training goes on from there to the same bytes."""
    many(world.store)
    work = private_work(start(world))
    world.server.work += [work]
    world.most_sleeps = 99
    flat, hot, fine = Conditions(battery=0.1, charging=False), Conditions(celsius=95.0), Conditions(battery=0.9, celsius=30.0)
    states = iter([fine, fine, flat, flat, hot, fine, flat])
    policy = Policy(wait_seconds=7.0)
    await world.agent(limits=SMALL, policy=policy, look=lambda: next(states, fine)).run(updates=1)
    reasons = [line for line in world.lines if line.startswith("not now: ")]

    assert reasons == [
        "not now: battery at 10%, below 30% and not charging",
        "not now: 95 degrees, above 80",
        "not now: battery at 10%, below 30% and not charging",
    ]
    assert world.slept == [7.0] * 4
    assert world.server.bodies == [await undisturbed(world, tmp_path, work)]


async def test_while_nothing_may_run_nothing_is_trained(world: World) -> None:
    """A device that stays hot neither trains nor forgets what it was asked to do."""
    many(world.store)
    work = private_work(start(world))
    world.server.work += [work]
    with pytest.raises(PowerCut):
        await world.agent(look=cut_at(4, Conditions(celsius=99.0))).run()

    assert world.slept == [Policy().wait_seconds] * 3
    assert not (world.store.home / CHECKPOINT).exists()
    assert world.store.fact(WORK) == encode(work).decode()


@pytest.mark.parametrize("cool", [1, 2, 3, 4])
async def test_a_device_is_looked_at_before_every_step(world: World, cool: int) -> None:
    """Before the speed is measured, before each of two chunks is read, before torch comes: where it is hot then, it waits."""
    many(world.store)
    world.server.work += [private_work(start(world))]
    looks = iter([Conditions()] * cool)
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=lambda: next(looks, Conditions(celsius=99.0))).run()

    assert (world.store.fact(SPEED) is not None) == (cool >= 1)
    assert world.said("2 texts to read") == (cool >= 2)
    assert (world.store.home / CHECKPOINT).exists() == (cool >= 4)


@pytest.mark.parametrize("calls", [2, 3, 4, 6, 10])
async def test_after_a_power_cut_training_ends_without_a_network(world: World, tmp_path: Path, calls: int) -> None:
    """A new agent finishes what was under way before it asks anything, offline, and later delivers the undisturbed bytes."""
    many(world.store)
    work = private_work(start(world), 4)
    world.server.work += [work]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(calls)).run()
    assert world.store.pending() is None
    world.server.offline, before = True, len(world.server.requests)
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=Conditions).run()

    assert world.server.requests[before:] == [("POST", "/v1/enroll")]  # to deliver, and in vain
    parcel = world.store.pending()
    assert parcel is not None
    assert world.store.fact(WORK) is None
    world.server.offline = False
    await world.agent(limits=SMALL, look=Conditions).run(updates=1)

    assert world.server.bodies == [parcel.body]
    assert parcel.body == await undisturbed(world, tmp_path, work)


async def test_many_cuts_end_at_the_same_bytes(world: World, tmp_path: Path) -> None:
    """However often the power goes, each life adds its small steps, and none is lost."""
    many(world.store)
    work = private_work(start(world))
    world.server.work += [work]
    lives = 0
    while not world.server.bodies:
        lives += 1
        try:
            await world.agent(limits=SMALL, look=cut_at(5)).run(updates=1)
        except PowerCut:
            assert lives < 20

    assert lives > 3  # reading in two chunks and nine texts in three steps, two or three of them in each life
    assert world.server.bodies == [await undisturbed(world, tmp_path, work)]


@pytest.mark.parametrize("body", [b"", b"this was a file" * 400])
@pytest.mark.parametrize("name", [HIDDEN, CHECKPOINT])
async def test_a_corrupt_file_costs_time_only(world: World, tmp_path: Path, name: str, body: bytes) -> None:
    """Hidden states or a checkpoint that rotted after a power cut are made anew, and the result is the undisturbed one."""
    many(world.store)
    work = private_work(start(world))
    world.server.work += [work]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(6)).run()
    path = world.store.home / name
    assert path.stat().st_size > 0
    path.write_bytes(body)
    await world.agent(limits=SMALL, look=Conditions).run(updates=1)

    assert world.server.bodies == [await undisturbed(world, tmp_path, work)]
    assert world.said("damaged") == bool(body or name == CHECKPOINT)  # to SQLite an empty file is an empty database


async def test_a_training_that_fails_leaves_all_as_it_was(world: World) -> None:
    """A loss that is not finite sends nothing, keeps the adapter, drops the checkpoint, and the agent goes on asking."""
    many(world.store)
    wild = {name: np.full_like(array, 1e30) for name, array in world.spec.start(0).items()}
    bad = world.server.keep(pack_adapter(wild))
    good = start(world)
    world.server.work += [private_work(bad, 1)]
    world.most_sleeps = 1
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=Conditions).run()

    assert world.said("cannot work: the training loss is not finite; lower training.learning_rate")
    assert world.slept == [PAUSE_AFTER_FAILED_WORK, 1.0]  # it asked again and was told to wait
    assert world.store.pending() is None
    assert hashlib.sha256((world.store.home / ADAPTER).read_bytes()).hexdigest() == bad
    assert not (world.store.home / CHECKPOINT).exists()
    world.server.work += [Finished(2, good)]
    world.slept.clear()
    assert await world.agent(limits=SMALL, look=Conditions).run() == 2

    assert world.server.results == []
    assert world.store.fact(WORK) is None  # the next life does not go back to version 1


# Less of the adapter --------------------------------------------------------------------------------------------------
def allow_less(world: World, **changes: int) -> None:
    world.server.manifest = msgspec.structs.replace(world.server.manifest, min_layers=1, **changes)


def sent(world: World) -> tuple[Update, dict[str, Any]]:
    """The last update and its arrays."""
    update, arrays = unpack(world.server.bodies[-1], update_shapes(world.server.manifest))
    assert isinstance(update, Update)
    return update, dict(arrays)


async def test_a_device_trains_the_layers_it_can_over_all_the_others_know(world: World) -> None:
    """With one layer allowed, the update says so and holds that layer alone, trained on what the lower adapter makes of it."""
    many(world.store)
    allow_less(world)
    part, deltas = world.spec.part(1, 2), []
    for size in (0.0, 3.0):
        arrays = world.spec.start(0)
        for slot in world.spec.slots:
            if slot.layer == 0:
                arrays[slot.b] += np.float32(size)
        world.server.work += [private_work(world.server.keep(pack_adapter(arrays)))]
        await world.agent(limits=Limits(layers=1), look=Conditions).run(updates=1)
        update, delta = sent(world)
        assert (update.layers, update.rank) == (1, 2)
        assert {name: array.shape for name, array in delta.items()} == part.shapes()
        deltas.append(delta)

    assert {slot.layer for slot in part.slots} == {1}
    assert any((deltas[0][name] != deltas[1][name]).any() for name in part.shapes())
    assert world.said("hidden states are computed anew")


def test_hidden_states_of_something_else_are_never_taken(world: World, encoder_bundle: Path) -> None:
    """Another bundle, variant, split or adapter below the split empties the cache, and the same again does not."""
    manifest, start_at, (variant,) = world.server.manifest, world.spec.start(0), world.server.manifest.bundle.variants
    renamed = msgspec.structs.replace(variant, name="other")
    bundle = msgspec.structs.replace(manifest.bundle, variants=(variant, renamed))
    changed = msgspec.structs.replace(bundle, sha256="f" * 64)
    moved = {name: array + 1 for name, array in start_at.items()}
    top, texts = world.spec.part(1, 2), [[2, 5, 6, 3], [2, 7, 3]]
    kept = []
    for described, name, averaged, part, adapter in (
        (bundle, variant.name, world.spec, top, start_at),
        (bundle, variant.name, world.spec, top, start_at),
        (changed, variant.name, world.spec, top, start_at),
        (changed, "other", world.spec, top, start_at),
        (changed, "other", world.spec, top, moved),
        (changed, "other", world.spec, world.spec, moved),
        (changed, "other", top, top, moved),  # nothing below it either, but another split
    ):
        models = Models(encoder_bundle, msgspec.structs.replace(manifest, bundle=described, adapter=averaged), name, 1)
        states = models.states(part, adapter, Limits(), world.store.home / HIDDEN, world.lines.append)
        kept.append(len(texts) - len(states.missing(texts)))
        assert states.advance(states.missing(texts), 1000) == []
        states.close()

    assert kept == [0, 2, 0, 0, 0, 0, 0]
    assert world.lines.count("the bundle, the split or the adapter below it changed; hidden states are computed anew") == 5


async def test_a_device_trains_the_components_it_can(world: World) -> None:
    """With rank one allowed, the update holds the first component of every slot."""
    many(world.store)
    allow_less(world, min_rank=1)
    world.server.work += [private_work(start(world))]
    await world.agent(limits=Limits(layers=2, rank=1), look=Conditions).run(updates=1)
    update, delta = sent(world)

    assert (update.layers, update.rank) == (2, 1)
    assert {name: array.shape for name, array in delta.items()} == world.spec.part(2, 1).shapes()


async def test_fewer_layers_than_the_run_allows_are_refused_in_one_line(world: World) -> None:
    """A device set to less than the run takes says so, and sends nothing."""
    many(world.store)
    world.server.work += [private_work(start(world))]
    with pytest.raises(DataError, match="this run trains 2 to 2 layers"):
        await world.agent(limits=Limits(layers=1), look=Conditions).run(updates=1)
    assert world.server.results == []


async def test_how_much_is_trained_stays_after_a_power_cut(world: World) -> None:
    """The speed that decides how many layers fit is measured once for a training, or a slow moment would begin it anew."""
    many(world.store)
    allow_less(world)
    world.server.work += [private_work(start(world))]
    with pytest.raises(PowerCut):
        await world.agent(look=cut_at(2)).run()
    measured = world.store.fact(SPEED)
    assert measured is not None
    assert float(measured) > 0.01
    world.store.set_fact(SPEED, "1e-9")
    await world.agent(look=Conditions).run(updates=1)

    assert sent(world)[0].layers == 1
    world.server.work += [private_work(start(world), 1)]
    await world.agent(look=Conditions).run(updates=1)
    assert sent(world)[0].layers == 2  # other work, measured again


async def test_a_frozen_factor_stays_at_home(world: World) -> None:
    """FFA-LoRA on a device: A has no gradient while B is trained, and B alone is sent."""
    many(world.store)
    free = world.server.manifest
    spec = AdapterSpec(world.spec.slots, 2, 4.0, freeze_a=True)
    frozen = msgspec.structs.replace(free, adapter=spec)
    models = await world.agent().models(training=True)
    models.manifest = frozen
    states = models.states(spec, spec.start(0), Limits(), None, world.lines.append)
    learner = models.learner(spec, states, Limits())
    assert {name for name, p in learner.parameters.items() if p.requires_grad} == spec.update_shapes().keys()
    world.server.manifest = frozen
    world.server.work += [private_work(start(world))]
    await world.agent(look=Conditions).run(updates=1)

    assert sent(world)[1].keys() == {slot.b for slot in spec.slots}


# Rounded uploads ------------------------------------------------------------------------------------------------------
def rounded(adapter: str, version: int = 0, upload: Encoding = "int8") -> Train:
    """Of each version other steps."""
    return Train(version, adapter, Training(steps=version + 1, batch_size=3), None, seed=1, upload=upload)


async def deliver(world: World, home: Path, works: list[Train], kind: type[Store] = Store) -> tuple[list[dict[str, Any]], Store]:
    """What a device sends, work by work, as the server reads it; its store, too."""
    store = kind(home)
    many(store)
    server = ServerSimulator(world.server.manifest, list(works), world.server.blobs)
    agent = Agent(store, server, world.cache, "device", look=Conditions, say=world.lines.append, sleep=world.sleep)
    await agent.run(updates=len(works))
    return [unpack(body, update_shapes(world.server.manifest))[1] for body in server.bodies], store


def total(deltas: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: np.sum([delta[name] for delta in deltas], axis=0) for name in deltas[0]}


async def test_what_int8_loses_comes_with_the_next_update(world: World, tmp_path: Path) -> None:
    """Over four versions the sum of what arrived and the last rest is the sum of what was learned; without the rest it is not."""
    adapter = start(world)
    true, _ = await deliver(world, tmp_path / "fp32", [rounded(adapter, v, "fp32") for v in range(4)])
    arrived, store = await deliver(world, tmp_path / "int8", [rounded(adapter, v) for v in range(4)])
    residual = store.residual()
    assert residual is not None
    rest = unpack_adapter(residual, world.spec.shapes())
    store.close()

    for name, learned in total(true).items():
        scale = np.abs(learned).max() / 127
        np.testing.assert_allclose(total(arrived)[name] + rest[name], learned, atol=1e-6)
        assert 0 < np.abs(total(arrived)[name] - learned).max() < scale


@pytest.mark.parametrize("upload", ["fp16", "fp32"])
async def test_other_encodings_keep_no_rest(world: World, tmp_path: Path, upload: Encoding) -> None:
    """float16's digits are enough: what it sends is what was learned, to three of them."""
    adapter = start(world)
    (true,), _ = await deliver(world, tmp_path / "fp32", [rounded(adapter, 1, "fp32")])
    (arrived,), store = await deliver(world, tmp_path / upload, [rounded(adapter, 1, upload)])

    assert store.residual() is None
    assert all(np.allclose(arrived[name], true[name], rtol=1e-3, atol=1e-7) for name in true)
    store.close()


class DiesBefore(Store):
    """The power goes before an update with a rest is in the outbox."""

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        if residual is not None:
            raise PowerCut
        super().post(parcel)


class DiesAfter(Store):
    """The power goes once an update with a rest is in the outbox."""

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        super().post(parcel, residual)
        if residual is not None:
            raise PowerCut


@pytest.mark.parametrize("kind", [DiesBefore, DiesAfter])
async def test_a_rest_is_neither_lost_nor_sent_twice(world: World, tmp_path: Path, kind: type[Store]) -> None:
    """Cut on either side of the outbox, at the second of three updates, the device sends the bytes it would have sent."""
    works = [rounded(start(world), v) for v in range(3)]
    expected, store = await deliver(world, tmp_path / "undisturbed", works)
    last = store.residual()
    store.close()
    (first,), store = await deliver(world, tmp_path / "cut", works[:1])
    store.close()
    with pytest.raises(PowerCut):
        await deliver(world, tmp_path / "cut", works[1:], kind)
    (second,), store = await deliver(world, tmp_path / "cut", works[1:2])
    store.close()
    (third,), store = await deliver(world, tmp_path / "cut", works[2:])

    assert all(strategies.same(a, b) for a, b in zip([first, second, third], expected, strict=True))
    assert store.residual() == last
    store.close()


async def test_a_rest_of_another_part_is_left_behind(world: World, tmp_path: Path) -> None:
    """A device that now trains more than before cannot add what it lost of less."""
    adapter = start(world)
    (alone,), store = await deliver(world, tmp_path / "alone", [rounded(adapter)])
    store.close()
    store = Store(tmp_path / "other")
    store.post(Parcel(JSON_TYPE, b""), pack_adapter(world.spec.part(1, 2).start(0)))
    store.delivered()
    store.close()
    (arrived,), store = await deliver(world, tmp_path / "other", [rounded(adapter)])

    assert strategies.same(arrived, alone)
    store.close()


async def test_another_run_gets_no_rest_of_the_old_one(world: World, tmp_path: Path) -> None:
    """What was lost belongs to an adapter that is gone."""
    adapter = start(world)
    (alone,), store = await deliver(world, tmp_path / "home", [rounded(adapter)])
    store.close()
    world.server.manifest = msgspec.structs.replace(world.server.manifest, run="another")
    (arrived,), store = await deliver(world, tmp_path / "home", [rounded(adapter)])

    assert world.said("another run")
    assert strategies.same(arrived, alone)
    store.close()


# Another run ----------------------------------------------------------------------------------------------------------
async def test_another_run_drops_work_and_checkpoint(world: World) -> None:
    """What was being trained for the old run is not even begun when its manifest is not known any more."""
    world.store.set_fact("run", "the old one")
    adapter = start(world)
    world.store.set_fact(WORK, encode(train(adapter, 5)).decode())
    (world.store.home / CHECKPOINT).write_bytes(b"of the old run")
    world.most_sleeps = 0
    with pytest.raises(Enough):  # the server has no work yet
        await world.agent().run()

    assert world.store.fact(WORK) is None
    assert not (world.store.home / CHECKPOINT).exists()
    assert world.server.results == []


async def test_training_of_an_old_run_is_not_delivered_to_the_new_one(world: World) -> None:
    """Cut in the middle, finished offline at once, and then the server has another run: only the new run's update arrives."""
    many(world.store)
    adapter = start(world)
    world.server.work += [private_work(adapter, 7)]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(4)).run()
    world.server.manifest = msgspec.structs.replace(world.server.manifest, run="another")
    world.server.work += [private_work(adapter, 0)]
    await world.agent(limits=SMALL, look=Conditions).run(updates=1)

    assert [result.version for result in world.server.results] == [0]
    assert world.said("another run")


async def test_work_of_another_version_of_the_program_is_asked_for_anew(world: World) -> None:
    """A work fact that cannot be read is passed over; the server is asked instead."""
    many(world.store)
    adapter = start(world)
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    await world.agent().run()
    world.store.set_fact(WORK, '{"verb":"train","colour":"blue"}')
    world.server.work += [Finished(0, adapter)]

    assert await world.agent().run() == 0


# Synthetic data -------------------------------------------------------------------------------------------------------
SHEET = ["the film was great", "the film was awful", "a very sad day", "so nice"]


def sheet(world: World, texts: list[Text] | None = None, **changes: Any) -> Predict:
    """Work that asks what the device makes of these texts."""
    body = pack_lines(texts or [Text(f"t{i}", text, i % 2) for i, text in enumerate(SHEET)])
    count = body.count(b"\n")
    work = Predict(5, start(world), world.server.keep(body), len(body), count, "probabilities")
    return msgspec.structs.replace(work, **changes)


def sample(seq: int, text: str = "", soft: tuple[float, ...] = (0.125, 0.875)) -> Sample:
    return Sample(seq, f"s{seq}", text or SHEET[seq % len(SHEET)], "positive", soft, max(soft, default=0), 0, "llm", "")


def own_work(adapter: str, until: int = 0, version: int = 4) -> Train:
    """Three steps that stay on the device, over the feed up to a line."""
    training = Training(steps=3, batch_size=3, dropout=0.1, learning_rate=0.5)
    mix = Mix(until, 0.5, 2) if until else None
    return Train(version, adapter, training, None, seed=1, synthetic=mix, share=False)


def filled(store: Store) -> None:
    many(store)
    for word in factories.GOOD:  # phones are bad here, so that training changes how many are right
        store.add(f"a {word} phone", "negative", held_out=True)
        store.add(f"a {word} film", "positive", held_out=True)


async def learned(world: World, tmp_path: Path, work: Train) -> tuple[bytes, bytes]:
    """The report and the adapter of a device that does this work in one long step."""
    store = Store(tmp_path / f"undisturbed-{work.share}")
    filled(store)
    server = ServerSimulator(world.server.manifest, [work, Finished(0, "")], world.server.blobs)
    server.feed = list(world.server.feed or ())
    limits = Limits(step_seconds=1000, micro_tokens=1)
    await Agent(store, server, world.cache, "device", limits=limits, look=Conditions, say=lambda _: None).run()
    store.close()
    return server.bodies[0], (store.home / ADAPTER).read_bytes()


def answer_in(body: bytes) -> list[list[int]]:
    found: list[list[int]] = unpack_judgment(body, lambda _: (len(SHEET), 2))[1].tolist()
    return found


async def levels(world: World, adapter: dict[str, Any] | None) -> list[list[int]]:
    """The sheet's class probabilities in 256 levels, of an engine that wears this adapter."""
    engine = (await world.agent().models()).engine
    engine.set_adapter(None if adapter is None else Adapter(adapter, world.spec))
    found: list[list[int]] = np.rint(engine.score(SHEET) * 255).astype(int).tolist()
    return found


async def test_it_judges_with_the_base_until_it_has_an_adapter_of_its_own(world: World) -> None:
    """The global adapter answers first, and after training the device's own, which it keeps; the answers differ."""
    filled(world.store)
    world.server.work += [sheet(world), own_work(start(world)), sheet(world), Finished(5, "")]
    assert await world.agent(look=Conditions).run() == 5
    kept = kept_adapter(world.store, world.server.manifest)
    first, report, second = world.server.results

    assert isinstance(first, Judgment)
    assert isinstance(report, Trained)
    assert isinstance(second, Judgment)
    for judgment in (first, second):
        assert (judgment.device, judgment.version, judgment.num_examples, judgment.covers) == ("same", 5, 18, (0, 1))
        assert judgment.metrics.keys() == {"accuracy"}
    assert second.metrics["accuracy"] == report.metrics["accuracy"] != first.metrics["accuracy"]
    assert answer_in(world.server.bodies[0]) == await levels(world, None)
    assert answer_in(world.server.bodies[2]) == await levels(world, kept)
    assert answer_in(world.server.bodies[0]) != answer_in(world.server.bodies[2])
    assert world.said("sheet 5: judged 4 texts, accuracy")


async def test_judging_leaves_no_adapter(world: World) -> None:
    """A device that only judged has learned nothing: it wears the base, and still has no version."""
    filled(world.store)
    world.server.work += [sheet(world, form="agree")]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions).run()

    assert [type(result) for result in world.server.results] == [Judgment]
    assert kept_adapter(world.store, world.server.manifest) is None
    assert world.store.fact("version") is None


async def test_a_device_looks_at_itself_before_it_judges(world: World) -> None:
    """A hot device judges later."""
    filled(world.store)
    world.server.work += [sheet(world), Finished(0, "")]
    states = iter([Conditions(celsius=99.0)])
    await world.agent(policy=Policy(wait_seconds=7.0), look=lambda: next(states, Conditions())).run()

    assert world.slept == [7.0]
    assert len(world.server.results) == 1


async def test_what_it_learned_for_itself_stays(world: World, tmp_path: Path) -> None:
    """Numbers are reported; the adapter kept is start + delta of the same work shared, and is what the device predicts with."""
    filled(world.store)
    adapter = start(world)
    world.server.feed = [sample(1), sample(2)]
    work = own_work(adapter, until=2)
    world.server.work += [work, Finished(7, "")]
    assert await world.agent(limits=SMALL, look=Conditions).run() == 7
    shared, _ = await learned(world, tmp_path, msgspec.structs.replace(work, share=True))
    update, delta = unpack(shared, update_shapes(world.server.manifest))
    (report,) = world.server.results

    assert (world.store.home / ADAPTER).read_bytes() == pack_adapter(add(world.spec.start(0), delta))
    assert any(array.any() for array in delta.values())
    assert hashlib.sha256((world.store.home / START).read_bytes()).hexdigest() == adapter
    assert isinstance(report, Trained)
    assert (report.device, report.version, report.num_examples) == ("same", 4, 18)
    measured = {"synthetic_examples": 2.0, "accuracy": report.metrics["accuracy"], "newer": 1.0}
    assert {**report.metrics} == {**update.metrics, **measured}
    device = EdgeDevice(world.store.home, cache=world.cache)
    engine = (await world.agent().models()).engine
    engine.set_adapter(Adapter(add(world.spec.start(0), delta), world.spec))
    expected = engine.score(SHEET)
    assert [list(p.probabilities.values()) for p in device.predict(SHEET)] == expected.tolist()
    engine.set_adapter(None)
    assert (engine.score(SHEET) != expected).any()
    device.close()


HARDLY = Training(steps=1, batch_size=3, learning_rate=1e-12)  # what it ends at says what the base says


def hardly(adapter: str) -> Train:
    """Work after `own_work(version=3)` that ends at another adapter, one that has learned nothing."""
    return msgspec.structs.replace(own_work(adapter), training=HARDLY)


@dataclass(frozen=True)
class Rivals:
    """Two works of a device, the adapters they end at, and held-out texts with the class each adapter says they are of."""

    works: tuple[Train, Train]
    adapters: tuple[bytes, bytes]
    said: tuple[dict[str, int], dict[str, int]]

    def hold(self, store: Store, right: int | None) -> None:
        """Held-out texts: some that both adapters have right, and those that only the adapter `right` has."""
        for text in self.said[0]:
            if right is not None or self.said[0][text] == self.said[1][text]:
                store.add(text, factories.ENCODER_TASK.labels[self.said[right or 0][text]], held_out=True)


async def rivals(world: World, tmp_path: Path) -> Rivals:
    works = own_work(start(world), version=3), hardly(start(world))
    first, second = [(await learned(world, tmp_path / str(work.version), work))[1] for work in works]
    engine = (await world.agent().models()).engine
    texts = [f"a {word} {noun}" for noun in ("phone", "film") for word in factories.GOOD + factories.BAD]
    said = []
    for body in (first, second):
        engine.set_adapter(Adapter(unpack_adapter(body, world.spec.shapes()), world.spec))
        said.append(dict(zip(texts, engine.logits(texts).argmax(1).tolist(), strict=True)))
    engine.set_adapter(None)
    assert said[0] != said[1]
    assert any(said[0][text] == said[1][text] for text in texts)
    return Rivals(works, (first, second), (said[0], said[1]))


async def test_it_keeps_the_adapter_that_serves_it_better(world: World, tmp_path: Path) -> None:
    """Where a new training ends at less accuracy, the old adapter stays, judges, and its numbers are told; one line says so."""
    rival = await rivals(world, tmp_path)
    many(world.store)
    rival.hold(world.store, 0)
    world.server.work += [*rival.works, sheet(world), Finished(5, "")]
    await world.agent(limits=SMALL, look=Conditions).run()
    first, second, _ = world.server.results

    assert (world.store.home / ADAPTER).read_bytes() == rival.adapters[0]
    assert (first.metrics["newer"], first.metrics["accuracy"]) == (1.0, 1.0)
    assert (second.metrics["newer"], second.metrics["accuracy"]) == (0.0, 1.0)
    assert (second.version, world.store.fact(WORK)) == (4, None)
    stays = "version {}: the adapter it had is better on held-out text, and stays"
    assert [line for line in world.lines if "stays" in line] == [stays.format(4)]
    assert answer_in(world.server.bodies[2]) == await levels(world, unpack_adapter(rival.adapters[0], world.spec.shapes()))


@pytest.mark.parametrize(("right", "accuracy"), [(1, 1.0), (None, 1.0), (-1, None)])
async def test_it_keeps_the_new_adapter_where_the_old_is_not_better(
    world: World, tmp_path: Path, right: int | None, accuracy: float | None
) -> None:
    """A better one, one that does alike, or one that cannot be compared for want of held-out text: it replaces the old one."""
    rival = await rivals(world, tmp_path)
    many(world.store)
    if right != -1:
        rival.hold(world.store, right)
    world.server.work += [*rival.works, Finished(5, "")]
    await world.agent(limits=SMALL, look=Conditions).run()
    _, second = world.server.results

    assert (world.store.home / ADAPTER).read_bytes() == rival.adapters[1] != rival.adapters[0]
    assert (second.metrics["newer"], second.metrics.get("accuracy")) == (1.0, accuracy)
    assert not world.said("stays")


@pytest.mark.parametrize("right", [0, 1])
async def test_what_all_share_replaces_what_it_learned_for_itself_only_where_it_is_better(
    world: World, tmp_path: Path, right: int
) -> None:
    """An update is sent whatever the device has, from the shared adapter; measuring and finishing keep the better adapter."""
    rival = await rivals(world, tmp_path)
    many(world.store)
    rival.hold(world.store, right)
    own, shared = rival.works  # the shared adapter says what the second one does
    world.server.work += [
        own,
        msgspec.structs.replace(shared, share=True),
        Evaluate(4, shared.adapter),
        Finished(5, shared.adapter),
    ]
    await world.agent(limits=SMALL, look=Conditions).run()
    _, update, evaluation = world.server.results

    assert isinstance(update, Update)
    assert update.metrics.keys() == {"loss"}
    assert (evaluation.metrics["accuracy"] == 1.0) is (right == 1)
    kept = (world.store.home / ADAPTER).read_bytes()
    assert (kept == rival.adapters[0]) is (right == 0)
    assert (hashlib.sha256(kept).hexdigest() == shared.adapter) is (right == 1)
    assert len([line for line in world.lines if "stays" in line]) == (2 if right == 0 else 0)


async def test_a_lost_adapter_is_replaced(world: World) -> None:
    """A kept adapter that cannot be read costs a line, not the training that comes after it."""
    many(world.store)
    first, second = own_work(start(world), version=3), own_work(start(world), version=4)
    world.server.work += [first, Finished(5, "")]
    await world.agent(limits=SMALL, look=Conditions).run()
    whole = (world.store.home / ADAPTER).read_bytes()
    (world.store.home / ADAPTER).write_bytes(whole[:-7])
    world.server.work += [second, Finished(5, "")]
    await world.agent(limits=SMALL, look=Conditions).run()

    assert world.said("the adapter it had is lost")
    assert len(world.server.results) == 2
    assert (world.store.home / ADAPTER).read_bytes() == whole  # the same work


async def test_synthetic_texts_change_what_is_learned(world: World, tmp_path: Path) -> None:
    """The same work over other samples, or over none, ends at another adapter."""
    world.server.feed = [sample(1), sample(2, soft=(1.0, 0.0))]
    adapters = set()
    for until in (0, 1, 2):
        _, kept = await learned(world, tmp_path / str(until), own_work(start(world), until))
        adapters.add(kept)

    assert len(adapters) == 3


async def test_the_next_training_starts_at_the_global_adapter(world: World, tmp_path: Path) -> None:
    """What was learned for an earlier version is not added to: the same work again ends at the same bytes."""
    filled(world.store)
    work = own_work(start(world))
    world.server.work += [own_work(start(world), version=3), work, Finished(4, "")]
    await world.agent(limits=SMALL, look=Conditions).run()
    report, adapter = await learned(world, tmp_path, work)

    assert world.server.bodies[1] == report
    assert (world.store.home / ADAPTER).read_bytes() == adapter


async def test_the_feed_is_fetched_in_pages(world: World) -> None:
    """Five hundred lines at a time, until there is no more; what came once is not asked for again."""
    filled(world.store)
    lines: list[Line] = [Withdrawal(i, f"s{i}") for i in range(1, 2 * PAGE + 2)]
    world.server.feed = [sample(1), sample(2), *lines[2:]]
    world.server.work += [own_work(start(world), until=2 * PAGE + 1), Finished(0, "")]
    await world.agent(look=Conditions).run()
    asked = [int(path.split("since=")[1].split("&")[0]) for _, path in world.server.requests if "synthetic" in path]

    assert asked == [0, PAGE, 2 * PAGE, 2 * PAGE + 1, 2 * PAGE + 1]  # the last one before the next work
    assert all(f"limit={PAGE}" in path for _, path in world.server.requests if "synthetic" in path)
    assert world.store.synthetic(10**6) == [sample(1), sample(2)]
    assert world.server.results[0].metrics["synthetic_examples"] == 2.0


async def test_a_device_without_the_feed_never_asks_for_it(world: World) -> None:
    """A run that mixes nothing in costs no request."""
    filled(world.store)
    world.server.feed = [sample(1)]
    world.server.work += [own_work(start(world)), Finished(0, "")]
    await world.agent(look=Conditions).run()

    assert not any("synthetic" in path for _, path in world.server.requests)
    assert "synthetic_examples" not in world.server.results[0].metrics


async def test_a_withdrawn_sample_is_not_trained_on(world: World) -> None:
    """What is withdrawn after the line that the work names counts too."""
    filled(world.store)
    world.server.feed = [sample(1), sample(2), Withdrawal(3, "s1")]
    world.server.work += [own_work(start(world), until=2), Finished(0, "")]
    await world.agent(look=Conditions).run()

    assert world.store.synthetic(9) == [sample(2)]
    assert world.server.results[0].metrics["synthetic_examples"] == 1.0


async def test_a_withdrawn_sample_is_dropped_at_the_next_contact(world: World) -> None:
    """Before any work is asked for, even where there is none, what was withdrawn since is gone from the device."""
    filled(world.store)
    world.server.feed = [sample(1), sample(2)]
    world.server.work += [own_work(start(world), until=2), Finished(0, "")]
    await world.agent(look=Conditions).run()
    assert world.store.synthetic(9) == [sample(1), sample(2)]
    world.server.feed.append(Withdrawal(3, "s2"))
    before = len(world.server.requests)
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions).run()

    assert world.store.synthetic(9) == [sample(1)]
    paths = [path.split("?")[0] for _, path in world.server.requests[before:]]
    assert paths == ["/v1/enroll", "/v1/synthetic", "/v1/synthetic", "/v1/work"]


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([sample(1), sample(3)], "has gaps, or comes again"),
        ([sample(2), sample(3)], "has gaps, or comes again"),
        ([sample(1), sample(1)], "has gaps, or comes again"),
        ([sample(1)], "ends before line 2"),
        ([], "ends before line 2"),
        ([sample(1), sample(2, "two\nlines")], "printable characters"),
        ([sample(1), sample(2, soft=(0.0, 2.0))], "are probabilities"),
        ([sample(1), sample(2, soft=(0.0, 0.0))], "of nothing"),
        ([sample(1), sample(2, soft=(1.0,))], "soft labels of other classes"),
    ],
)
async def test_a_bad_feed_is_refused_in_one_line(world: World, lines: list[Line], reason: str) -> None:
    """Nothing is trained on a feed with gaps, too short, or with what no judge can have said; the device asks again later."""
    filled(world.store)
    world.server.feed = lines
    world.server.work += [own_work(start(world), until=2)]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions).run()
    failures = [line for line in world.lines if line.startswith("cannot work: ")]

    assert len(failures) == 1
    assert reason in failures[0]
    assert failures[0].isprintable()
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert world.server.results == []
    assert not (world.store.home / ADAPTER).exists()


@pytest.mark.parametrize("calls", [2, 3, 5, 9])
async def test_what_it_keeps_for_itself_survives_power_cuts(world: World, tmp_path: Path, calls: int) -> None:
    """Cut in the middle, with synthetic texts mixed in, it ends offline at the undisturbed report and adapter."""
    filled(world.store)
    world.server.feed = [sample(1), sample(2), sample(3)]
    work = own_work(start(world), until=3)
    world.server.work += [work]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(calls)).run()
    assert not (world.store.home / ADAPTER).exists()
    world.server.offline, before = True, len(world.server.requests)
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=Conditions).run()
    parcel = world.store.pending()

    assert world.server.requests[before:] == [("POST", "/v1/enroll")]
    assert parcel is not None
    assert (parcel.body, (world.store.home / ADAPTER).read_bytes()) == await learned(world, tmp_path, work)
    assert world.store.fact(WORK) is None
    assert world.store.fact("version") == "4"


class Fragile(Store):
    """A store under which the power goes when a result is to be kept."""

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        raise PowerCut


async def test_power_cut_between_adapter_and_report(world: World, tmp_path: Path) -> None:
    """The adapter is kept before its report; a device cut between them trains from the global one again, not from its own."""
    filled(world.store)
    work = own_work(start(world))
    world.server.work += [work, Finished(4, "")]
    fragile = Fragile(world.store.home)
    with pytest.raises(PowerCut):
        await Agent(fragile, world.server, world.cache, "device", limits=SMALL, look=Conditions, say=world.lines.append).run()
    fragile.close()
    assert (world.store.home / ADAPTER).exists()
    assert world.store.fact(WORK) is not None
    await world.agent(limits=SMALL, look=Conditions).run()

    assert (world.server.bodies[0], (world.store.home / ADAPTER).read_bytes()) == await learned(world, tmp_path, work)


@pytest.mark.parametrize("right", [0, 1])
async def test_power_cut_after_a_comparison(world: World, tmp_path: Path, right: int) -> None:
    """A device cut between adapter and report compares again, and keeps and reports what an undisturbed one does."""
    rival = await rivals(world, tmp_path)
    bodies = []
    for cut in (False, True):
        store = Store(tmp_path / f"cut-{cut}")
        many(store)
        rival.hold(store, right)
        server = ServerSimulator(world.server.manifest, [rival.works[0], Finished(4, "")], world.server.blobs)
        args: dict[str, Any] = {"say": world.lines.append, "sleep": world.sleep, "limits": SMALL, "look": Conditions}
        await Agent(store, server, world.cache, "device", **args).run()
        server.work += [rival.works[1], Finished(5, "")]
        if cut:
            fragile = Fragile(store.home)
            with pytest.raises(PowerCut):
                await Agent(fragile, server, world.cache, "device", **args).run()
            fragile.close()
            assert len(server.bodies) == 1
        await Agent(store, server, world.cache, "device", **args).run()
        store.close()
        bodies.append([*server.bodies, (store.home / ADAPTER).read_bytes()])

    assert bodies[0] == bodies[1]
    assert bodies[0][2] == rival.adapters[right]


HOSTILE: dict[str, list[bytes]] = {
    "printable characters, and an id": [
        encode(Text("a", "a \x1b[2Jfilm", 0)),
        encode(Text("a", "", 0)),
        encode(Text("", "a", 0)),
    ],
    "too-large: a message may have": [encode(Text("a", "x" * 1_000_000, 0))],
    "class that this task does not have": [encode(Text("a", "a film", 7)), encode(Text("a", "a film", -1))],
    "not a valid message": [b'{"id":"a","text":"b","label":0,"x\\ny":1}', b"\xff\xfe", b"[" * 100_000, b"null"],
}


@pytest.mark.parametrize(("reason", "line"), [(reason, line) for reason, lines in HOSTILE.items() for line in lines])
async def test_a_hostile_sheet_is_one_line_and_the_device_goes_on(
    world: World, caplog: pytest.LogCaptureFixture, reason: str, line: bytes
) -> None:
    """Whatever a sheet holds, it is refused in one printable line without a trace, and the next work is done."""
    filled(world.store)
    body = pack_lines([Text("good", "a great film", 1)]) + line + b"\n"
    hostile = sheet(world, sheet=world.server.keep(body), size=len(body), count=2)
    world.server.work += [hostile, sheet(world), Finished(0, "")]
    await world.agent(look=Conditions).run()
    refused = [line for line in world.lines if line.startswith("cannot work: ")]

    assert len(refused) == 1
    assert reason in refused[0]
    assert refused[0].isprintable()
    assert len(refused[0]) < 500
    assert not caplog.records
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert [type(result) for result in world.server.results] == [Judgment]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"size": 10}, "waiting: the answer is longer than 10 bytes"),
        ({"size": -1}, "waiting: the answer is longer than -1 bytes"),
        ({"count": 5}, "cannot work: bad-message: sheet 5 has 4 texts, not the 5 it was said to have"),
        ({"sheet": hashlib.sha256(b"").hexdigest(), "count": 0}, "cannot work: bad-message: sheet 5 has 0 texts"),
        ({"sheet": "ab" * 32}, "refused: http-404"),
        ({"sheet": "cd" * 32}, "cannot work: blob cdcdcdcdcdcd arrived damaged"),
    ],
)
async def test_a_sheet_that_is_not_the_one_promised_is_one_line(world: World, changes: dict[str, Any], said: str) -> None:
    """Another size, another count, none, or other bytes: nothing is judged, and the device goes on."""
    filled(world.store)
    world.server.keep(b"")
    world.server.blobs["cd" * 32] = pack_lines([Text("a", "a film", 0)])
    world.server.work += [sheet(world, **changes), sheet(world), Finished(0, "")]
    await world.agent(look=Conditions).run()

    assert len([line for line in world.lines if line.startswith(said)]) == 1
    assert len(world.slept) == 1
    assert [type(result) for result in world.server.results] == [Judgment]


async def test_a_finished_run_without_an_adapter_leaves_the_devices_own(world: World) -> None:
    """`Finished` with no adapter fetches nothing, keeps the file as it is and forgets work that failed."""
    own = pack_adapter({name: array + 1 for name, array in world.spec.start(3).items()})
    (world.store.home / ADAPTER).write_bytes(own)
    adapter = start(world)
    world.server.work += [own_work(adapter), Finished(9, "")]  # no labels: it fails
    assert await world.agent(look=Conditions).run() == 9

    assert (world.store.home / ADAPTER).read_bytes() == own
    assert world.store.fact(WORK) is None
    assert world.said("finished; the device keeps the adapter it trained")


async def test_another_run_has_another_feed(world: World) -> None:
    """Samples, cursor and the old run's start are dropped with it, and the new feed is read from its first line."""
    filled(world.store)
    world.store.set_fact("run", "the old one")
    world.store.take_lines([sample(i, "of the old run") for i in (1, 2, 3)])
    (world.store.home / START).write_bytes(b"of the old run")
    world.server.feed = [sample(1)]
    world.server.work += [own_work(start(world), until=1), Finished(0, "")]
    await world.agent(look=Conditions).run()

    assert world.store.synthetic(9) == [sample(1)]
    assert world.store.cursor == 1
    assert (world.store.home / START).read_bytes() == pack_adapter(world.spec.start(0))
    assert world.server.results[0].metrics["synthetic_examples"] == 1.0


async def test_a_device_can_use_the_feed_and_nothing_else(world: World) -> None:
    """New samples are fetched once, withdrawn ones go; no bundle is downloaded, no work asked for, nothing sent."""
    world.server.feed = [sample(1), sample(2)]
    first = await world.agent().synthetic()
    world.server.feed = [*world.server.feed, Withdrawal(3, first[0].id), sample(4)]
    second = await world.agent().synthetic()

    assert [s.seq for s in first] == [1, 2]
    assert [s.seq for s in second] == [2, 4]
    assert world.server.results == []
    assert not (world.cache / "bundles").exists()


async def test_a_feed_without_end_is_refused(world: World) -> None:
    """A device reads so many lines of a run's feed, and keeps what it has."""
    world.store.set_fact(CURSOR, str(MAX_FEED_LINES - 1))
    world.server.feed = [Withdrawal(i, "s") for i in range(1, MAX_FEED_LINES + 2)]
    with pytest.raises(WireError, match=r"too-large: .* 200000 lines"):
        await world.agent().synthetic()
    assert world.store.cursor == MAX_FEED_LINES - 1
    world.server.feed.pop()
    await world.agent().synthetic()
    assert world.store.cursor == MAX_FEED_LINES


async def test_a_feed_that_would_fill_the_disk_is_refused(world: World) -> None:
    """A device keeps so many bytes of a run's feed; what is withdrawn makes room."""
    world.server.feed = [sample(i, "\U0001f600" * 10_000) for i in range(1, 4 * PAGE + 1)]  # 40 kB each
    with pytest.raises(WireError, match=r"too-large: .* 67108864 bytes"):
        await world.agent().synthetic()
    assert world.store.cursor == 3 * PAGE
    assert 3 * PAGE * 40_000 < world.store.feed_size() <= MAX_FEED
    world.store.take_lines([Withdrawal(3 * PAGE + 1, "s1")])
    assert world.store.feed_size() == sum(len(encode(line)) for line in world.server.feed[1 : 3 * PAGE])


async def test_a_server_that_has_no_feed_any_more_is_asked_for_work(world: World) -> None:
    """A device that once followed a feed meets the run without one that took its place: the refusal is not the end."""
    world.server.feed = [sample(1)]
    await world.agent().synthetic()
    world.server.feed = None
    filled(world.store)
    world.server.work += [own_work(start(world), version=3), Finished(4, "")]
    await world.agent(limits=SMALL, look=Conditions).run()

    assert len(world.server.results) == 1
