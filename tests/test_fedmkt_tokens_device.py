"""A device in FedMKT where answers are texts: what it tells, what it learns from other tokens, and what a power cut costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import exchange, knowledge, verbs, wire
from edge_sdk.adapters import Adapter, AdapterSpec
from edge_sdk.agent import ADAPTER, KNOWLEDGE, LESSON, SHEET, TEACHER
from edge_sdk.bundle import File
from edge_sdk.eligibility import Conditions
from edge_sdk.engines import open_engine
from edge_sdk.errors import SettingsError
from edge_sdk.exchange import POSITIONS, Heard, Voice
from edge_sdk.knowledge import Knowledge
from edge_sdk.protocol import PROTOCOL, Finished, Judgment, Lesson, Manifest, Predict, Text, Told, Train, Trained, Work
from edge_sdk.session import PAUSE_AFTER_FAILED_WORK
from edge_sdk.store import WORK, Store
from edge_sdk.tasks import Example, Private
from edge_sdk.testing import ServerSimulator
from edge_sdk.tokens import PromptEncoder
from edge_sdk.training.batches import Answer, TopTokens, Training
from tests import tiny
from tests.test_agent import SMALL, Enough, PowerCut, World, cut_at
from tests.test_fedmkt_device import LONG, OVER
from tests.training_helpers import ANSWERS

PUBLIC = [
    Text("p0", "the film", 0, "great"),
    Text("p1", "the day", 0, "very sad"),
    Text("p2", "a phone", 0, "so good"),
    Text("p3", "the story", 0, "grim"),
]
NO_BODIES: Mapping[str, bytes] = MappingProxyType({})
TRAINING = Training(steps=3, batch_size=3, learning_rate=0.5, dropout=0.1)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Voice:
    """The LLM's voice; it has another tokenizer than the device."""
    folder = tiny.write_spelling(tmp_path_factory.mktemp("llm"), 130)
    return Voice(PromptEncoder(folder / "tokenizer.json", (), (), POSITIONS, ANSWERS), 2)


@pytest.fixture
def world(tmp_path: Path, decoder_bundle: Path) -> Iterator[World]:
    bundle = bundles.read(decoder_bundle)
    spec = AdapterSpec(bundle.slots, rank=2, alpha=4.0)
    server = ServerSimulator(Manifest(PROTOCOL, "fedmkt", ANSWERS, spec, bundle))
    for name in bundle.files:
        server.keep((decoder_bundle / name).read_bytes())
    store = Store(tmp_path / "home")
    yield World(store, server, tmp_path / "cache", spec)
    store.close()


def fill(store: Store) -> None:
    store.set_fact("device", "same")
    for number, text in enumerate(("the film", "a phone", "so very good", "this day", "the story was", "it was")):
        store.add(text, ("great story", "very sad", "nice")[number % 3])


def start(world: World) -> str:
    return world.server.keep(wire.pack_adapter(world.spec.start(0)))


def says(who: Voice, share: float = 0.9, texts: Sequence[Text] = PUBLIC) -> list[Knowledge]:
    """This share for each token of the answers, and the rest to the next token."""
    found, size = [], len(who.vocabulary)
    for name, truth in exchange.sheet(who, texts).truths.items():
        ids = np.array([[token, (token + 1) % size] for token in truth.tokens])
        found.append(Knowledge(name, truth.size, ids, np.log(np.full(ids.shape, [share, 1 - share], np.float32))))
    return found


def asked(world: World, **changes: int) -> Predict:
    body = wire.pack_lines(PUBLIC)
    work = Predict(0, start(world), world.server.keep(body), len(body), 4, "probabilities", 5)
    return msgspec.structs.replace(work, **changes)


def parts(llm: Voice, share: float = 0.9) -> dict[str, bytes]:
    body = knowledge.pack(says(llm, share), exchange.sheet(llm, PUBLIC))
    return {"texts": wire.pack_lines(PUBLIC), "knowledge": body, "tokenizer": llm.encoder.tokenizer.to_str().encode()}


def lesson(world: World, llm: Voice, share: float = 0.9, count: int = 4, bodies: Mapping[str, bytes] = NO_BODIES) -> Train:
    """A lesson of what the LLM says, or with other blobs."""
    files = {name: File(world.server.keep(body), len(body)) for name, body in {**parts(llm, share), **bodies}.items()}
    blob = world.server.keep(wire.encode(Told(**files, task=ANSWERS, end=2)))
    return Train(1, start(world), TRAINING, None, 2, share=False, lesson=Lesson(blob, count, 0.5, 2))


async def lived(world: World, home: Path, *works: Work) -> tuple[list[bytes], bytes]:
    """What a device sends that does these works in long steps, and the adapter it ends with."""
    store = Store(home)
    fill(store)
    server = ServerSimulator(world.server.manifest, [*works, OVER], world.server.blobs)
    await World(store, server, world.cache, world.spec).agent(limits=LONG, look=Conditions).run()
    store.close()
    return server.bodies, (home / ADAPTER).read_bytes()


# What it tells --------------------------------------------------------------------------------------------------------
async def test_it_tells_the_likeliest_tokens_of_answers(world: World, decoder_bundle: Path) -> None:
    """The engine's own, in 16 bits, five a position, and how it does on its held-out answers; and no text."""
    fill(world.store)
    world.store.add("the phone", "great story", held_out=True)
    world.server.work += [asked(world), OVER]
    await world.agent(look=Conditions).run()
    bundle = bundles.read(decoder_bundle)
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    engine.set_adapter(Adapter(world.spec.start(0), world.spec))
    spelled = exchange.sheet(Voice(engine.encoder, engine.end), PUBLIC)
    judgment, found = knowledge.unpack_judgment(world.server.bodies[0], lambda _: spelled, 1 << 21, 5)
    expected = engine.answer_top_k([t.text for t in PUBLIC], [t.answer for t in PUBLIC], 5)

    assert judgment == world.server.results[0] == Judgment("same", 0, 6, {"loss": judgment.metrics["loss"]})
    assert [known.id for known in found] == ["p0", "p1", "p2", "p3"]
    for known, top in zip(found, expected, strict=True):
        assert (known.ids == top.ids).all()
        np.testing.assert_allclose(known.logprobs, top.logprobs, rtol=1e-3)
    assert not any(word in world.server.bodies[0] for word in (b"film", b"great", b"sad"))


@pytest.mark.parametrize("changes", [{"top_k": 0}, {"count": 3}])
async def test_it_is_told_how_much_to_tell(world: World, changes: dict[str, int]) -> None:
    """Asked for no tokens, or of another number of texts: one line, and nothing is sent."""
    fill(world.store)
    world.server.work += [asked(world, **changes)]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions).run()

    assert sum(line.startswith("cannot work: ") for line in world.lines) == 1
    assert (world.slept, world.server.results) == ([PAUSE_AFTER_FAILED_WORK], [])


@pytest.mark.parametrize("k", [-1, 257])
def test_what_is_asked_for_has_bounds(k: int) -> None:
    """A hostile server cannot ask for every token there is."""
    with pytest.raises(SettingsError, match=r"predict\.top_k must be 0 to 256"):
        Predict(0, "a", "s", 1, 1, "probabilities", k)


# What it learns -------------------------------------------------------------------------------------------------------
def test_a_lesson_by_hand(world: World, decoder_bundle: Path, llm: Voice) -> None:
    """What the LLM says better is learned in the device's own tokens beside its own answers; what it says worse is not."""
    engine = open_engine(decoder_bundle, bundles.read(decoder_bundle), ANSWERS)
    private = Private((Example("the film", answer="great story"),), (), (), ())
    told = [*says(llm, 0.75)[:3], *says(llm, 1e-6)[3:]]
    args = 1, world.spec.start(0), world.spec, private, TRAINING, None, 3, engine
    heard = Heard(PUBLIC, told, llm)
    prepared = verbs.prepare(*args, public=heard, lesson=Lesson("b", 4, 0.25, 2))
    own, public = prepared.job.sources
    tokens = engine.encoder.tokens()

    assert [type(row.target) for row in own.rows] == [Answer]
    assert [type(row.target) for row in public.rows] == [TopTokens] * 3 + [Answer]
    assert prepared.metrics == {"public_examples": 4.0, "public_taught": 0.75}
    assert (prepared.num_examples, public.batch_size) == (1, 2)
    target = public.rows[0].target
    assert isinstance(target, TopTokens)
    assert target.label_weight == 0.25
    assert target.ids.shape == (2, 2)  # one word and the end
    assert int(target.ids[0, target.logprobs[0].argmax()]) == tokens["great"]
    assert int(target.ids[1, target.logprobs[1].argmax()]) == engine.end


async def test_a_lesson_is_fetched_and_learned(world: World, llm: Voice, tmp_path: Path) -> None:
    """Four blobs, each once; it changes what is learned, its numbers are told, and nothing but numbers is sent."""
    fill(world.store)
    world.server.work += [asked(world), work := lesson(world, llm), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    report = world.server.results[1]
    others = msgspec.structs.replace(work, lesson=None), lesson(world, llm, 0.6)
    adapters = {(await lived(world, tmp_path / str(i), other))[1] for i, other in enumerate(others)}

    assert isinstance(report, Trained)
    assert (report.version, report.num_examples) == (1, 6)
    assert report.metrics.keys() == {"loss", "public_examples", "public_taught", "newer"}
    assert (report.metrics["public_examples"], report.metrics["public_taught"]) == (4.0, 1.0)
    assert len(adapters | {(world.store.home / ADAPTER).read_bytes()}) == 3
    assert work.lesson is not None
    told = wire.decode(world.server.blobs[work.lesson.blob], Told)
    paths = [path for _, path in world.server.requests]
    for sha256 in (work.lesson.blob, told.texts.sha256, told.knowledge.sha256, told.tokenizer.sha256):
        assert paths.count(f"/v1/blobs/{sha256}") == 1  # the texts were fetched to be judged


HALF = msgspec.structs.replace(PUBLIC[3], answer="so sad story")


@pytest.mark.parametrize(
    ("bodies", "count", "reason"),
    [
        ({}, 3, "the lesson has 4 texts, not the 3 it was said to have"),
        ({"texts": b""}, 0, "the lesson has no texts"),
        ({"texts": wire.pack_lines([*PUBLIC[:3], HALF])}, 4, "wrong-shape"),
        ({"texts": wire.pack_lines([*PUBLIC[:3], PUBLIC[0]])}, 4, "the same id"),
        ({"texts": wire.pack_lines([*PUBLIC[:3], msgspec.structs.replace(PUBLIC[3], text="two\nlines")])}, 4, "printable"),
        ({"knowledge": b""}, 4, "bad-tensors"),
        ({"knowledge": b"no knowledge"}, 4, "bad-tensors"),
        ({"tokenizer": b"{}"}, 4, "the LLM's tokenizer cannot be used"),
    ],
)
async def test_a_lesson_that_is_none_is_not_learned(
    world: World, llm: Voice, bodies: dict[str, bytes], count: int, reason: str
) -> None:
    """Each of its blobs wrong: said in a line, nothing trained or sent, tried again later; a right one is learned then."""
    fill(world.store)
    world.server.work += [lesson(world, llm, count=count, bodies=bodies)]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions, limits=LONG).run()
    (line,) = (line for line in world.lines if line.startswith("cannot work: "))

    assert reason in line
    assert "\n" not in line
    assert world.slept == [PAUSE_AFTER_FAILED_WORK]
    assert (world.server.results, (world.store.home / ADAPTER).exists()) == ([], False)
    world.server.work += [lesson(world, llm), OVER]
    world.most_sleeps = 3
    await world.agent(look=Conditions, limits=LONG).run()
    assert [type(result) for result in world.server.results] == [Trained]


async def test_a_blob_of_another_size_is_not_taken(world: World, llm: Voice) -> None:
    """One that is longer than it was said to be is not read to its end; the device asks for work again."""
    fill(world.store)
    work = lesson(world, llm)
    assert work.lesson is not None
    told = wire.decode(world.server.blobs[work.lesson.blob], Told)
    short = msgspec.structs.replace(told, tokenizer=File(told.tokenizer.sha256, 10))
    blob = world.server.keep(wire.encode(short))
    world.server.work += [msgspec.structs.replace(work, lesson=Lesson(blob, 4, 0.5, 2))]
    world.most_sleeps = 0
    with pytest.raises(Enough):
        await world.agent(look=Conditions, limits=LONG).run()

    assert world.said("longer than 10 bytes")
    assert world.server.results == []


@pytest.mark.parametrize("calls", [2, 5, 9])
async def test_after_a_power_cut_a_lesson_ends_without_a_network(world: World, llm: Voice, tmp_path: Path, calls: int) -> None:
    """Cut in the middle of it, a new agent ends it offline at the undisturbed bytes and adapter."""
    fill(world.store)
    world.server.work += [OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    world.server.work += [work := lesson(world, llm)]
    with pytest.raises(PowerCut):
        await world.agent(limits=SMALL, look=cut_at(calls)).run()
    assert world.store.fact(WORK) == wire.encode(work).decode()
    world.server.offline, world.most_sleeps = True, 0
    with pytest.raises(Enough):
        await world.agent(limits=SMALL, look=Conditions).run()
    parcel = world.store.pending()
    bodies, adapter = await lived(world, tmp_path / "undisturbed", work)

    assert parcel is not None
    assert (parcel.body, (world.store.home / ADAPTER).read_bytes()) == (bodies[-1], adapter)


async def test_another_run_drops_the_lesson(world: World, llm: Voice) -> None:
    """Index, texts, knowledge and tokenizer."""
    fill(world.store)
    world.server.work += [lesson(world, llm), OVER]
    await world.agent(look=Conditions, limits=LONG).run()
    names = (LESSON, SHEET, KNOWLEDGE, TEACHER, ADAPTER)
    assert all((world.store.home / name).exists() for name in names)
    world.server.manifest = msgspec.structs.replace(world.server.manifest, run="another")
    world.server.work += [Finished(9, "")]
    await world.agent(look=Conditions, limits=LONG).run()

    assert not any((world.store.home / name).exists() for name in names)
