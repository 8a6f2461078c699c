"""A device in FedMKT: what it makes of a lesson, to the number; where it begins, what is kept, and what a power cut costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import verbs, wire
from edge_sdk.adapters import Adapter, AdapterSpec, Array
from edge_sdk.agent import ADAPTER, BEFORE, CHECKPOINT, LESSON, START
from edge_sdk.eligibility import Conditions
from edge_sdk.engines import Engine, open_engine
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.protocol import PROTOCOL, Enroll, Finished, Lesson, Manifest, Mix, Predict, Sample, Text, Train, Trained, Work
from edge_sdk.session import PAUSE_AFTER_FAILED_WORK
from edge_sdk.store import WORK, Parcel, Store
from edge_sdk.tasks import Example, Private, softmax
from edge_sdk.testing import ServerSimulator
from edge_sdk.training.batches import Classes, Label, Training
from edge_sdk.training.depth import Limits
from edge_sdk.transport import Response
from tests import factories
from tests.test_agent import SMALL, Enough, PowerCut, World, cut_at, many

TASK = msgspec.structs.replace(factories.ENCODER_TASK, scale=100.0)  # or the tiny model is sure of nothing
TEXTS = ("the film was great", "the film was awful", "a very sad day", "so nice")
LABELS = (1, 0, 0, 1)
PRIVATE = Private((Example("a great film", 1), Example("a grim day", 0), Example("so very dull", 0)), (), (), ())
TRAINING = Training(steps=2, batch_size=3)


def said(soft: Sequence[Sequence[float]], labels: Sequence[int] = LABELS, texts: Sequence[str] = TEXTS) -> list[Sample]:
    """What the LLM says of public texts."""
    names = factories.ENCODER_TASK.labels
    return [
        Sample(i + 1, f"p{i}", text, names[label], tuple(map(float, row)), float(row[label]), 0, "llm", "")
        for i, (text, label, row) in enumerate(zip(texts, labels, soft, strict=True))
    ]


# What is learned from a lesson ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def engine(encoder_bundle: Path) -> Engine:
    return open_engine(encoder_bundle, bundles.read(encoder_bundle), TASK)


@pytest.fixture(scope="module")
def spec(encoder_bundle: Path) -> AdapterSpec:
    return AdapterSpec(bundles.read(encoder_bundle).slots, rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def trained(spec: AdapterSpec) -> dict[str, Array]:
    """An adapter that is not the start."""
    arrays, rng = spec.start(0), np.random.default_rng(5)
    return {**arrays, **{s.b: rng.normal(size=arrays[s.b].shape).astype(np.float32) for s in spec.slots}}


def gives(engine: Engine, arrays: dict[str, Array], spec: AdapterSpec) -> list[float]:
    """What the device gives the label of each public text."""
    engine.set_adapter(Adapter(arrays, spec))
    found = softmax(engine.logits(list(TEXTS)))
    engine.set_adapter(None)
    return [float(row[label]) for row, label in zip(found, LABELS, strict=True)]


def with_shares(shares: Sequence[float]) -> list[Sample]:
    """An LLM that gives each label so much."""
    return said([(1 - p, p) if label else (p, 1 - p) for p, label in zip(shares, LABELS, strict=True)])


def prepare(
    engine: Engine,
    arrays: dict[str, Array],
    spec: AdapterSpec,
    public: Sequence[Sample],
    lesson: Lesson | None,
    **more: Any,
) -> verbs.Prepared:
    return verbs.prepare(1, arrays, spec, PRIVATE, TRAINING, None, 3, engine, public=public, lesson=lesson, **more)


def targets(prepared: verbs.Prepared) -> list[list[float]]:
    """Of the last source."""
    found = [row.target for row in prepared.job.sources[-1].rows]
    assert all(isinstance(target, Classes) and target.probabilities.dtype == np.float32 for target in found)
    return [target.probabilities.tolist() for target in found if isinstance(target, Classes)]


@pytest.mark.parametrize("which", ["start", "trained"])
def test_a_lesson_by_hand(engine: Engine, spec: AdapterSpec, trained: dict[str, Array], which: str) -> None:
    """Where the LLM gives a label more than the device with this adapter, .9 label and .1 of what it says; else the label."""
    arrays = spec.start(0) if which == "start" else trained
    own = gives(engine, arrays, spec)
    assert all(0.01 < p < 0.99 for p in own[:2])
    shares = [own[0] + 0.005, own[1] - 0.005, 0.0, 1.0]
    engine.set_adapter(None if which == "trained" else Adapter(trained, spec))  # another than the one it starts from
    prepared = prepare(engine, arrays, spec, with_shares(shares), Lesson("b", 4, 0.9, 2))
    own_rows, public_rows = prepared.job.sources

    first = [0.1 * (1 - shares[0]), 0.9 + 0.1 * shares[0]]
    np.testing.assert_allclose(targets(prepared), [first, [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], atol=1e-6)
    assert (public_rows.batch_size, public_rows.weight) == (2, 1.0)
    assert [row.ids for row in public_rows.rows] == engine.encoder.prompts(list(TEXTS))
    assert [row.target for row in own_rows.rows] == [Label(1), Label(0), Label(0)]
    taught = 0.25 + 0.25 * (own[3] < 1.0)
    assert prepared.metrics == {"public_examples": 4.0, "public_taught": taught}
    assert prepared.num_examples == 3  # what all have is nobody's own
    assert prepared.job.start is not arrays
    assert all((prepared.job.start[name] == array).all() for name, array in arrays.items())


def test_what_was_learned_is_taught_no_more(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> None:
    """The same lesson teaches a device only what it does not say better itself: between the two adapters' shares, one of them."""
    before, after = gives(engine, spec.start(0), spec), gives(engine, trained, spec)
    lesson, public = Lesson("b", 4, 0.5, 2), with_shares([(a + b) / 2 for a, b in zip(before, after, strict=True)])
    counts = [prepare(engine, arrays, spec, public, lesson).metrics["public_taught"] for arrays in (spec.start(0), trained)]

    assert counts[0] == np.mean([a < b for a, b in zip(before, after, strict=True)])
    assert sum(counts) == 1


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0])
def test_the_weight_is_that_of_labels(engine: Engine, spec: AdapterSpec, weight: float) -> None:
    """1: labels alone; 0: the LLM alone where it is better."""
    shares = [0.999] * 4
    prepared = prepare(engine, spec.start(0), spec, with_shares(shares), Lesson("b", 4, weight, 2))
    share = weight + (1 - weight) * 0.999

    np.testing.assert_allclose(targets(prepared)[0], [1 - share, share], atol=1e-6)
    np.testing.assert_allclose(targets(prepared)[1], [share, 1 - share], atol=1e-6)


def test_a_lesson_is_beside_what_else_there_is(engine: Engine, spec: AdapterSpec) -> None:
    """Its texts are the last source; the others and the order of the device's own stay as they are without it."""
    lesson, public = Lesson("b", 4, 0.9, 2), with_shares([0.9] * 4)
    mixed = with_shares([0.5] * 4)
    plain = prepare(engine, spec.start(0), spec, (), None, synthetic=mixed, mix=Mix(4))
    both = prepare(engine, spec.start(0), spec, public, lesson, synthetic=mixed, mix=Mix(4))

    assert [len(source.rows) for source in both.job.sources] == [3, 4, 4]
    assert [source.batch_size for source in both.job.sources[:2]] == [source.batch_size for source in plain.job.sources]
    assert (both.num_examples, plain.num_examples) == (3, 3)
    assert both.job.key != plain.job.key
    for public_texts, given in (((), lesson), (public, None)):
        alone = prepare(engine, spec.start(0), spec, public_texts, given, synthetic=mixed, mix=Mix(4))
        assert (alone.job.key, alone.metrics) == (plain.job.key, {"synthetic_examples": 4.0})


@pytest.mark.parametrize(
    "odd", [{"label": "great"}, {"label": ""}, {"soft": (1.0,)}, {"soft": (0.2, 0.3, 0.5)}], ids=lambda odd: str(odd)
)
def test_a_lesson_of_another_task_is_refused(engine: Engine, spec: AdapterSpec, odd: dict[str, Any]) -> None:
    """A label, or a number of classes, that this task does not have, in any line."""
    public = with_shares([0.9] * 4)
    public[2] = msgspec.structs.replace(public[2], **odd)

    with pytest.raises(DataError, match="a public text has labels of another task"):
        prepare(engine, spec.start(0), spec, public, Lesson("b", 4, 0.9, 2))


@pytest.mark.parametrize(("weight", "batch_size"), [(-0.1, 1), (1.1, 1), (float("nan"), 1), (0.5, 0), (0.5, 4097)])
def test_a_lesson_has_bounds(weight: float, batch_size: int) -> None:
    """A hostile server cannot ask for a step of a million texts, or for weights that are none."""
    with pytest.raises(SettingsError, match="lesson"):
        Lesson("b", 4, weight, batch_size)


# The daemon -----------------------------------------------------------------------------------------------------------
class Choice(ServerSimulator):
    """A server with several models: tells each device of the one it names, and remembers names."""

    def __init__(self, manifest: Manifest, others: dict[str, Manifest] | None = None) -> None:
        super().__init__(manifest)
        self.others = {"": manifest, **(others or {})}
        self.named: list[str] = []

    async def request(self, method: str, path: str, body: bytes = b"", *args: Any, **more: Any) -> Response:
        if path == "/v1/enroll" and not self.offline:
            name = wire.decode(body, Enroll).model
            self.named.append(name)
            if name not in self.others:
                problem = {"type": "", "title": "", "status": 404, "code": "unknown-model", "detail": "this run has small, other"}
                return Response(404, msgspec.json.encode(problem), {"Content-Type": wire.PROBLEM_TYPE})
            self.manifest = self.others[name]
        return await super().request(method, path, body, *args, **more)


@pytest.fixture
def world(tmp_path: Path, encoder_bundle: Path) -> Iterator[World]:
    bundle = bundles.read(encoder_bundle)
    spec = AdapterSpec(bundle.slots, rank=2, alpha=4.0)
    server = Choice(Manifest(PROTOCOL, "fedmkt", factories.ENCODER_TASK, spec, bundle))
    for name in bundle.files:
        server.keep((encoder_bundle / name).read_bytes())
    store = Store(tmp_path / "home")
    yield World(store, server, tmp_path / "cache", spec)
    store.close()


PUBLIC = said([(0.25, 0.75), (0.75, 0.25), (0.75, 0.25), (0.25, 0.75)])


def start(world: World) -> str:
    return world.server.keep(wire.pack_adapter(world.spec.start(0)))


def alone(world: World, version: int = 0, seed: int = 1) -> Train:
    """A device's own labels, before there is a lesson."""
    training = Training(steps=3, batch_size=3, dropout=0.1, learning_rate=0.5)
    return Train(version, start(world), training, None, seed=seed, share=False)


def lesson(world: World, version: int = 1, lines: Sequence[Sample] = PUBLIC, count: int = 4, adapter: str = "") -> Train:
    blob = world.server.keep(wire.pack_lines(lines))
    work = msgspec.structs.replace(alone(world, version), seed=2, lesson=Lesson(blob, count, 0.9, 2))
    return msgspec.structs.replace(work, adapter=adapter or start(world))


OVER = Finished(9, "")
LONG = Limits(step_seconds=1000, micro_tokens=1)  # undisturbed, and in the same small pieces as SMALL


async def lived(world: World, home: Path, *works: Work) -> tuple[list[bytes], bytes]:
    """What a device sends that does these works in long steps, and the adapter it ends with."""
    store = Store(home)
    many(store)
    server = ServerSimulator(world.server.manifest, [*works, OVER], world.server.blobs)
    await World(store, server, world.cache, world.spec).agent(limits=LONG, look=Conditions).run()
    store.close()
    return server.bodies, (home / ADAPTER).read_bytes()


def kept(world: World) -> bytes:
    return (world.store.home / ADAPTER).read_bytes()


async def test_a_lesson_is_fetched_and_learned(world: World, tmp_path: Path) -> None:
    """Once, as a blob; it changes what is learned, its numbers are told, and nothing but numbers is sent."""
    many(world.store)
    world.server.work += [work := lesson(world), OVER]
    assert await world.agent(look=Conditions, limits=LONG).run() == 9
    (report,) = world.server.results
    turned = said([(0.75, 0.25), (0.25, 0.75), (0.25, 0.75), (0.75, 0.25)], [0, 1, 1, 0])
    others = msgspec.structs.replace(alone(world, 1), seed=2), lesson(world, lines=turned)
    adapters = {(await lived(world, tmp_path / str(i), other))[1] for i, other in enumerate(others)}

    assert isinstance(report, Trained)
    assert (report.device, report.version, report.num_examples) == ("same", 1, 18)
    assert report.metrics.keys() == {"loss", "public_examples", "public_taught", "newer"}
    assert (report.metrics["public_examples"], report.metrics["newer"]) == (4.0, 1.0)
    assert work.lesson is not None
    assert [path for _, path in world.server.requests].count(f"/v1/blobs/{work.lesson.blob}") == 1
    assert len(adapters | {kept(world)}) == 3  # no lesson, another lesson, this lesson
    assert world.said("version 1: trained on 18 texts")


@pytest.mark.parametrize(
    ("lines", "count", "reason"),
    [
        (PUBLIC[:3], 4, "the lesson has 3 texts, not the 4 it was said to have"),
        (PUBLIC, 3, "the lesson has 4 texts, not the 3 it was said to have"),
        ([], 1, "the lesson has 0 texts, not the 1 it was said to have"),
        ([msgspec.structs.replace(PUBLIC[0], soft=(0.0, 0.0)), *PUBLIC[1:]], 4, "soft labels of nothing"),
        ([msgspec.structs.replace(PUBLIC[0], soft=(1.5, 0.0)), *PUBLIC[1:]], 4, "are probabilities"),
        ([msgspec.structs.replace(PUBLIC[0], text="two\nlines"), *PUBLIC[1:]], 4, "printable characters"),
        ([msgspec.structs.replace(PUBLIC[0], label="great"), *PUBLIC[1:]], 4, "labels of another task"),
    ],
)
async def test_a_lesson_that_is_none_is_not_learned(world: World, lines: list[Sample], count: int, reason: str) -> None:
    """Too few or too many lines, or one that means nothing: said in a line, nothing trained or sent, tried again later."""
    many(world.store)
    world.server.work += [lesson(world, lines=lines, count=count)]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions, limits=LONG).run()

    assert [line for line in world.lines if line.startswith("cannot work: ") and reason in line]
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert world.server.results == []
    assert not (world.store.home / ADAPTER).exists()


async def test_a_sheet_is_no_lesson(world: World) -> None:
    """The texts to be judged, without what the LLM says of them, teach nothing."""
    many(world.store)
    blob = world.server.keep(wire.pack_lines(Text(sample.id, sample.text, 0) for sample in PUBLIC))
    work = lesson(world)
    world.server.work += [msgspec.structs.replace(work, lesson=Lesson(blob, 4, 0.9, 2))]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions, limits=LONG).run()

    assert world.said("cannot work: ")
    assert world.server.results == []


# Where a lesson begins ------------------------------------------------------------------------------------------------
async def test_it_goes_on_from_what_it_has_learned(world: World, tmp_path: Path) -> None:
    """A lesson begins at the adapter that the last one ended at: as if that had been the start of a device with none."""
    many(world.store)
    world.server.work += [alone(world), lesson(world), lesson(world, 2), OVER]
    await world.agent(look=Conditions, limits=SMALL).run()
    begin, ends = "", list[bytes]()
    for number, work in enumerate((alone(world), lesson(world), lesson(world, 2))):
        given = msgspec.structs.replace(work, adapter=begin or work.adapter)
        bodies, adapter = await lived(world, tmp_path / str(number), given)
        assert bodies == [world.server.bodies[number]]
        ends.append(adapter)
        begin = world.server.keep(adapter)

    assert kept(world) == ends[-1]
    assert len(set(ends)) == 3
    assert (world.store.home / START).read_bytes() == world.server.blobs[start(world)]


async def test_without_one_of_its_own_it_begins_at_the_start(world: World, tmp_path: Path) -> None:
    """A late device's first training is a lesson; that it has judged before gives it no adapter."""
    many(world.store)
    sheet = wire.pack_lines(Text(sample.id, sample.text, 0) for sample in PUBLIC)
    asked = Predict(0, start(world), world.server.keep(sheet), len(sheet), 4, "probabilities")
    world.server.work += [asked, lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    bodies, adapter = await lived(world, tmp_path / "other", lesson(world))

    assert (world.server.bodies[1:], kept(world)) == (bodies, adapter)


async def test_a_lost_adapter_costs_no_lesson(world: World, tmp_path: Path) -> None:
    """One that cannot be read is said to be lost, and the lesson begins at the start."""
    many(world.store)
    world.server.work += [alone(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    (world.store.home / ADAPTER).write_bytes(kept(world)[:-7])
    world.server.work += [lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    bodies, adapter = await lived(world, tmp_path / "other", lesson(world))

    assert world.said("the adapter it had is lost")
    assert (world.server.bodies[1:], kept(world)) == (bodies, adapter)


@pytest.mark.parametrize("right", [0, 1])
async def test_it_keeps_the_adapter_that_serves_it_better(world: World, tmp_path: Path, right: int) -> None:
    """Where a lesson ends at less accuracy on held-out text the old adapter stays, and the next lesson begins there."""
    works = alone(world), lesson(world)
    _, first = await lived(world, tmp_path / "first", works[0])
    _, second = await lived(world, tmp_path / "second", *works)
    engine = (await world.agent().models()).engine
    texts = [f"a {word} {noun}" for noun in ("phone", "film") for word in factories.GOOD + factories.BAD]
    labels = []
    for body in (first, second):
        engine.set_adapter(Adapter(wire.unpack_adapter(body, world.spec.shapes()), world.spec))
        labels.append(engine.logits(texts).argmax(1).tolist())
    engine.set_adapter(None)
    held = [(t, pair[right]) for t, *pair in zip(texts, *labels, strict=True) if pair[0] != pair[1]]
    assert held
    many(world.store)
    for text, label in held:
        world.store.add(text, factories.ENCODER_TASK.labels[label], held_out=True)
    world.server.work += [*works, OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    _, report = world.server.results

    assert (report.metrics["accuracy"], report.metrics["newer"]) == (1.0, float(right))
    assert kept(world) == (first, second)[right]
    assert world.said("the adapter it had is better on held-out text, and stays") is (right == 0)


# Power cuts -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("owns", [False, True])
@pytest.mark.parametrize("calls", [2, 3, 4, 7, 11])
async def test_after_a_power_cut_a_lesson_ends_without_a_network(world: World, tmp_path: Path, owns: bool, calls: int) -> None:
    """Cut in the middle of it, a new agent ends it offline, from where it began, at the undisturbed bytes and adapter."""
    many(world.store)
    before = [alone(world)] if owns else []
    world.server.work += [*before, OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    world.server.work += [work := lesson(world)]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(calls)).run()
    assert (world.store.pending(), world.store.fact(WORK)) == (None, wire.encode(work).decode())
    world.server.offline, world.most_sleeps = True, 0
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=Conditions).run()
    parcel = world.store.pending()
    bodies, adapter = await lived(world, tmp_path / "undisturbed", *before, work)

    assert parcel is not None
    assert (parcel.body, kept(world)) == (bodies[-1], adapter)
    assert not (world.store.home / CHECKPOINT).exists()


class Torn(Store):
    """The power goes before a result reaches the outbox."""

    def post(self, parcel: Parcel, residual: bytes | None = None) -> None:
        raise PowerCut


@pytest.mark.parametrize("owns", [False, True])
async def test_a_lesson_is_not_learned_twice(world: World, tmp_path: Path, owns: bool) -> None:
    """Cut when the new adapter is kept and nothing is in the outbox yet: the lesson is done again from where it began."""
    many(world.store)
    before = [alone(world)] if owns else []
    world.server.work += [*before, OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    world.server.work += [lesson(world)]
    torn = Torn(world.store.home)
    with pytest.raises(PowerCut):
        await World(torn, world.server, world.cache, world.spec).agent(look=Conditions, limits=LONG).run()
    torn.close()
    bodies, adapter = await lived(world, tmp_path / "undisturbed", *before, lesson(world))
    assert kept(world) == adapter  # it has learned already
    world.server.work += [OVER]
    await world.agent(look=Conditions, limits=LONG).run()

    assert (world.server.bodies, kept(world)) == (bodies, adapter)


async def test_the_same_lesson_again_is_another_training(world: World, tmp_path: Path) -> None:
    """A server that gives the same work once more, not interrupted, is obeyed from what the first one ended at."""
    many(world.store)
    world.server.work += [alone(world), lesson(world), lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    _, once = await lived(world, tmp_path / "once", alone(world), lesson(world))
    again = lesson(world, adapter=world.server.keep(once))
    bodies, adapter = await lived(world, tmp_path / "again", again)

    assert (world.server.bodies[2:], kept(world)) == (bodies, adapter)


async def test_a_damaged_lesson_is_fetched_again(world: World, tmp_path: Path) -> None:
    """A file that rotted after a power cut costs one download, and is not learned from."""
    many(world.store)
    world.server.work += [work := lesson(world)]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(4)).run()
    (world.store.home / LESSON).write_bytes(wire.pack_lines(PUBLIC[::-1]))
    world.server.work += [OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    bodies, adapter = await lived(world, tmp_path / "undisturbed", work)

    assert (world.server.bodies, kept(world)) == (bodies, adapter)
    assert work.lesson is not None
    assert [path for _, path in world.server.requests].count(f"/v1/blobs/{work.lesson.blob}") == 2


# Models ---------------------------------------------------------------------------------------------------------------
def server_of(world: World) -> Choice:
    assert isinstance(world.server, Choice)
    return world.server


@pytest.mark.parametrize("model", ["", "small"])
async def test_the_model_is_named_when_it_enrols(world: World, model: str) -> None:
    """With the first word, and with each later first word; none for the run's first."""
    server = server_of(world)
    server.others["small"] = server.manifest
    for _ in range(2):
        world.server.work += [OVER]
        await world.agent(model=model).run()

    assert server.named == [model, model]


async def test_a_model_that_there_is_not_is_told_and_asked_for_again(world: World) -> None:
    """The device says which there are, waits a minute, and takes part once the server has it."""
    server = server_of(world)
    world.most_sleeps = 1
    with pytest.raises(Enough):
        await world.agent(model="big").run()

    assert world.lines == ["refused: unknown-model: this run has small, other"] * 2
    assert world.slept == [PAUSE_AFTER_FAILED_WORK] * 2
    server.others["big"] = server.manifest
    world.server.work += [OVER]
    assert await world.agent(model="big").run() == 9


async def test_another_model_begins_anew(world: World, tmp_path: Path, decoder_bundle: Path) -> None:
    """What was learned with the old one, and what waits in its outbox, is dropped; the lesson begins at the new one's start."""
    server, bundle = server_of(world), bundles.read(decoder_bundle)
    spec = AdapterSpec(bundle.slots, rank=2, alpha=4.0)
    server.others["other"] = Manifest(PROTOCOL, "fedmkt", factories.DECODER_TASK, spec, bundle)
    for name in bundle.files:
        server.keep((decoder_bundle / name).read_bytes())
    many(world.store)
    world.server.work += [alone(world), lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    assert (world.store.home / BEFORE).exists()
    world.store.post(Parcel(wire.JSON_TYPE, wire.encode(Trained("same", 1, 1, {}))))
    first = server.keep(wire.pack_adapter(spec.start(0)))
    work = lesson(world, 2, adapter=first)
    world.server.work += [work, OVER]
    await world.agent(look=Conditions, limits=LONG, model="other").run()
    world.server.manifest = server.others["other"]
    bodies, adapter = await lived(world, tmp_path / "fresh", work)

    assert len(world.server.bodies) == 3
    assert (world.server.bodies[2:], kept(world)) == (bodies, adapter)
    assert world.said("this device takes part with another model; what belongs to the old one is dropped")
    assert [name for name in server.named if name] == ["other"]


async def test_another_run_drops_the_lesson(world: World) -> None:
    """Nothing of it stays on the device, nor where it began."""
    server = server_of(world)
    many(world.store)
    world.server.work += [alone(world), lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    assert all((world.store.home / name).exists() for name in (LESSON, BEFORE, ADAPTER))
    server.others[""] = msgspec.structs.replace(server.manifest, run="another")
    world.server.work += [OVER]
    await world.agent(look=Conditions, limits=LONG).run()

    assert not any((world.store.home / name).exists() for name in (LESSON, BEFORE, ADAPTER))
    assert world.said("the server started another run")


async def test_a_refused_lesson_is_dropped(world: World) -> None:
    """A report that the server does not want any more costs the report; what was learned stays."""
    many(world.store)
    world.server.refusals.append(WireError("already-answered", "this device has already answered version 1", 409))
    world.server.work += [lesson(world), OVER]
    await world.agent(look=Conditions, limits=LONG).run()

    assert world.server.results == []
    assert world.store.pending() is None
    assert (world.store.home / ADAPTER).exists()
