"""FedMKT's server where answers are texts: which judgments it takes, what its LLM learns from them, and what devices are told."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from aiohttp.test_utils import TestClient, TestServer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import BPE

from edge_sdk import exchange, knowledge, wire
from edge_sdk.bundle import TOKENIZER, digest
from edge_sdk.errors import DataError, SettingsError, WireError
from edge_sdk.exchange import POSITIONS, Voice
from edge_sdk.knowledge import Knowledge, Sheet, Truth
from edge_sdk.protocol import MAX_K, Judgment, Lesson, Manifest, Predict, Problem, Text, Told, Train
from edge_sdk.tasks import Example
from edge_sdk.tokens import PromptEncoder
from edge_server import coordinator
from edge_server import settings as run_settings
from edge_server import tutor as tutors
from edge_server.app import create_app
from edge_server.coordinator import Enrolled, Event, Judged, Published, State
from edge_server.ledger import Ledger
from edge_server.llm.jobs import Describe, Job, LlmSettings, Outcome, Study, Tell
from edge_server.llm.model import Llm
from edge_server.llm.worker import Models, do
from edge_server.settings import RunSettings
from edge_server.storage import Blobs
from edge_server.systems import fedmkt
from edge_server.systems.fedmkt import AskAll, FedMkt, Learn, Say, Step
from edge_server.tutor import Tutor
from tests import factories, strategies, tiny
from tests.server_helpers import Simulator, running, with_public
from tests.training_helpers import ANSWERS

PUBLIC = (
    Example("the film", answer="great"),
    Example("the day", answer="very sad"),
    Example("a phone", answer="so good"),
    Example("the story", answer="grim"),
    Example("a film", answer="lovely"),
)
TEXTS = tutors.texts(PUBLIC)
RUN = FedMkt(
    "public.jsonl",
    versions=2,
    answers=2,
    top_k=4,
    llm_batch_size=2,
    learning_rate=1e-2,
    llm=LlmSettings(layers=2, rank=4, alpha=8.0, threads=1),
    seed=3,
)
SETTINGS = RunSettings(ANSWERS, "fedmkt", fedmkt=RUN)
LONG = msgspec.structs.replace(ANSWERS, answer_tokens=64)
MANY = [Example("the film", answer="great " * 64)] * 4_000
MODELS = {"d0": "words", "d1": "pieces", "d2": "words"}
CODES = {
    "too-large",
    "bad-message",
    "bad-tensors",
    "wrong-shape",
    "not-finite",
    "wrong-knowledge",
    "unknown-device",
    "unknown-sheet",
}


@dataclass
class InProcess:
    """The LLM without its process; remembers its jobs."""

    llm: Llm
    jobs: list[Job] = field(default_factory=list)
    outcomes: list[Any] = field(default_factory=list)

    async def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        outcome = do(Models(self.llm), job)
        self.outcomes.append(outcome)
        return outcome

    async def close(self) -> None:
        pass


@dataclass(frozen=True)
class World:
    """Tokenizers of two kinds of devices, and the LLM, which has another one."""

    files: dict[str, Path]
    llm: Llm

    def voice(self, model: str) -> Voice:
        return Voice(PromptEncoder(self.files[model], (), (), POSITIONS, ANSWERS), 2)

    def manifests(self) -> dict[str, Manifest]:
        found = {}
        for name, path in self.files.items():
            bundle = msgspec.structs.replace(factories.bundle("decoder"), end=(2,), files={TOKENIZER: digest(path)})
            found[name] = run_settings.manifest(SETTINGS, bundle)
        return {"": found["words"], **found}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("models")
    words = factories.write_model(folder / "words", "decoder") / TOKENIZER
    pieces = tiny.write_spelling(folder / "pieces", 44) / TOKENIZER
    llm = Llm(tiny.write_spelling(folder / "llm", 130), ANSWERS, RUN.llm)
    return World({"words": words, "pieces": pieces}, llm)


def says(who: Voice, share: float, k: int = 2, texts: Sequence[Text] = TEXTS) -> list[Knowledge]:
    """This share for each token of the answers, and the rest to the tokens after it; 0 for all tokens alike."""
    found, size = [], len(who.vocabulary)
    for name, truth in exchange.sheet(who, texts).truths.items():
        ids = np.array([[(token + i) % size for i in range(k)] for token in truth.tokens])
        p = np.full(ids.shape, (1 - share) / max(k - 1, 1) if share else 1 / size, np.float32)
        p[:, 0] = share or 1 / size
        found.append(Knowledge(name, truth.size, ids, np.log(p)))
    return found


def body_of(who: Voice, device: str, number: int = 0, known: Sequence[Knowledge] | None = None) -> bytes:
    judgment = Judgment(device, number, 10, {"loss": 1.5})
    return knowledge.pack(says(who, 0.8) if known is None else known, exchange.sheet(who, TEXTS), judgment)


class Desk:
    """A tutor on a folder, the run it works for, and three devices of two kinds."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world, self.blobs, self.llm = world, Blobs(folder), InProcess(world.llm)
        for path in world.files.values():
            self.blobs.adopt(path, digest(path).sha256)
        self.tutor = Tutor(RUN, ANSWERS, PUBLIC, self.blobs, self.llm, lambda: 1000.0, world.manifests())
        self.state = State()
        start: list[Event] = [Published(0, "a0", 0), *(Enrolled(device, "x", model) for device, model in MODELS.items())]
        for event in start:
            self.apply(event)

    def apply(self, event: Event) -> None:
        self.state = coordinator.apply(self.state, event)

    async def do(self, step: Step) -> Any:
        event = await self.tutor.carry_out(step, self.state)
        self.apply(event)
        return event

    def hear(self, device: str, share: float = 0.8, k: int = 2) -> None:
        """A device says what it makes of the public answers."""
        who = self.world.voice(self.state.devices[device].model)
        body = body_of(who, device, len(self.state.sheets) - 1, says(who, share, k))
        message = self.tutor.read(body, self.state)
        decision = coordinator.judge(self.state, message, f"{device} {message.version}", self.blobs.put(body), len(body))
        assert isinstance(decision, Judged)
        self.apply(decision)

    def refusal(self, body: bytes) -> str:
        with pytest.raises(WireError) as caught:
            self.tutor.read(body, self.state)
        return caught.value.code


@pytest.fixture
async def desk(tmp_path: Path, world: World) -> Desk:
    made = Desk(tmp_path, world)
    await made.do(AskAll(0))
    return made


# What is taken --------------------------------------------------------------------------------------------------------
async def test_devices_are_asked_with_answers(desk: Desk) -> None:
    """Each text and its answer; the work names the sheet and how many tokens are told at a position."""
    sheet = desk.state.sheets[0]
    lines = wire.unpack_lines(desk.blobs.get(sheet.texts), Text)
    work = fedmkt.plan(RUN, desk.state, coordinator.known_device(desk.state, "d0"), False, "start")

    assert [(line.id, line.text, line.answer) for line in lines] == [(f"p{i}", e.text, e.answer) for i, e in enumerate(PUBLIC)]
    assert work == Predict(0, "start", sheet.texts, sheet.size, 5, "probabilities", 4)


async def test_the_llm_is_met_before_anybody_is_asked(tmp_path: Path, world: World) -> None:
    """Once a run; where it could not tell devices what it says of the answers, they are not asked."""
    desk = Desk(tmp_path, world)
    await desk.do(AskAll(0))
    await desk.do(AskAll(1))
    assert desk.llm.jobs == [Describe()]

    for public, said in ((MANY, "the LLM may have to say .* lower"), ([Example("a film", answer="x" * 99)], "")):
        tutor = replace(desk.tutor, public=tuple(public), settings=msgspec.structs.replace(RUN, top_k=MAX_K), task=LONG)
        with pytest.raises(DataError, match=said) if said else contextlib.nullcontext():
            await tutor.carry_out(AskAll(0), State())


def test_what_a_model_cannot_say_is_refused_at_start(tmp_path: Path, world: World) -> None:
    """An answer that a tokenizer makes nothing of, and more than travels: the text and the model are named, and what to do."""
    desk = Desk(tmp_path, world)
    silent = tmp_path / TOKENIZER
    Tokenizer(BPE({"a": 0, "b": 1, "<end>": 2}, [])).save(str(silent))
    desk.blobs.adopt(silent, digest(silent).sha256)
    bundle = msgspec.structs.replace(factories.bundle("decoder"), end=(2,), files={TOKENIZER: digest(silent)})
    manifests = {**world.manifests(), "silent": run_settings.manifest(SETTINGS, bundle)}
    long = {name: msgspec.structs.replace(told, task=LONG) for name, told in world.manifests().items()}
    deep = msgspec.structs.replace(RUN, top_k=MAX_K)
    pairs = [Example("a film", answer="ab"), Example("a day", answer="é")]

    desk.tutor.check()
    replace(desk.tutor, public=tuple(pairs[:1]), models=manifests).check()
    with pytest.raises(SettingsError, match=r"fedmkt\.public: the model 'silent': the answer of 'p1' cannot be said"):
        replace(desk.tutor, public=tuple(pairs), models=manifests).check()
    with pytest.raises(SettingsError, match=r"the first model may have to say \d{8} bytes of these 4000 texts, 16777216 travel"):
        replace(desk.tutor, public=tuple(MANY), models=long, settings=deep).check()
    replace(desk.tutor, public=tuple(MANY[:500]), models=long, settings=deep).check()


async def test_a_run_that_cannot_be_carried_out_does_not_open(tmp_path: Path, world: World) -> None:
    """The ledger says so before it makes version 0; with fewer texts the same folder opens."""
    told = msgspec.structs.replace(world.manifests()[""], task=LONG)
    settings = msgspec.structs.replace(SETTINGS, task=LONG, fedmkt=msgspec.structs.replace(RUN, top_k=MAX_K))
    versions = []
    for public in (MANY, MANY[:9]):
        ledger = Ledger(settings, told, tmp_path, lambda _: None, InProcess(world.llm), auxiliary=tuple(public))
        ledger.blobs.adopt(world.files["words"], digest(world.files["words"]).sha256)
        with pytest.raises(SettingsError, match="use fewer texts") if public is MANY else contextlib.nullcontext():
            await ledger.open()
        versions.append(ledger.state.version)
        ledger.close()

    assert versions == [-1, 0]


async def test_each_device_speaks_in_its_own_tokens(desk: Desk, world: World) -> None:
    """Both kinds are read, as many tokens a position as asked for or fewer, of some texts or all."""
    for device, model in MODELS.items():
        who = world.voice(model)
        for known in (says(who, 0.8, 4), says(who, 0.8, 1), says(who, 0.8)[1:3], says(who, 0.0)):
            assert desk.tutor.read(body_of(who, device, known=known), desk.state) == Judgment(device, 0, 10, {"loss": 1.5})


async def test_what_is_not_of_these_answers_is_refused(desk: Desk, world: World) -> None:
    """Another tokenizer's ids, more tokens than asked for, nobody, no such sheet, other texts or answers, no judgment at all."""
    words, pieces = world.voice("words"), world.voice("pieces")
    other = [msgspec.structs.replace(TEXTS[0], answer="so grim"), *TEXTS[1:]]
    strange = [msgspec.structs.replace(TEXTS[0], id="q0"), *TEXTS[1:]]
    judgment = Judgment("d0", 0, 10, {})

    assert desk.refusal(body_of(pieces, "d0")) == "wrong-knowledge"
    assert desk.refusal(body_of(words, "d1")) == "wrong-knowledge"
    assert desk.refusal(body_of(words, "d0", known=says(words, 0.8, 5))) == "wrong-shape"
    assert desk.refusal(body_of(words, "d9")) == "unknown-device"
    assert desk.refusal(body_of(words, "d0", 1)) == "unknown-sheet"
    for texts in (other, strange):
        known = says(words, 0.8, texts=texts)
        assert desk.refusal(knowledge.pack(known, exchange.sheet(words, texts), judgment)) in {"wrong-knowledge", "wrong-shape"}
    assert desk.refusal(knowledge.pack(says(words, 0.8), exchange.sheet(words, TEXTS))) == "bad-message"  # nobody's
    assert desk.refusal(wire.pack_judgment(judgment, np.zeros((5, 2), np.uint8))) == "bad-tensors"
    assert desk.refusal(zlib.compress(b"x" * (1 << 22))) == "too-large"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
async def test_what_is_no_number_is_refused(desk: Desk, world: World, value: float) -> None:
    """In one place among many."""
    who = world.voice("words")
    plain = zlib.decompress(body_of(who, "d0"))
    wrong = np.array([value], np.float16).tobytes()
    at = plain.rfind(says(who, 0.8)[4].logprobs.astype(np.float16).tobytes())
    assert at > 0

    assert desk.refusal(zlib.compress(plain[:at] + wrong + plain[at + 2 :])) == "not-finite"


def check_refusal(error: WireError) -> None:
    assert error.code in CODES


@strategies.fuzzing
@given(data=st.data())
def test_hostile_judgments_are_one_error(tmp_path_factory: pytest.TempPathFactory, world: World, data: st.DataObject) -> None:
    """Whatever is sent: a judgment, or a WireError with a known code."""
    desk = Desk(tmp_path_factory.getbasetemp() / "hostile", world)
    desk.apply(coordinator.Written(0, "t", "t", 9, 5, "", {}, 0.0))
    plain = zlib.decompress(body_of(world.voice("words"), "d0"))
    body = data.draw(strategies.damaged(plain).map(zlib.compress) | strategies.damaged(zlib.compress(plain)))
    try:
        found = desk.tutor.read(body, desk.state)
    except WireError as error:
        check_refusal(error)
    else:
        assert isinstance(found, Judgment)


# What the LLM learns --------------------------------------------------------------------------------------------------
async def test_the_llm_studies_what_devices_said(desk: Desk) -> None:
    """Its adapter is a blob; the job names each device's file, tokenizer and end, the public answers and the run's settings."""
    desk.hear("d1")
    desk.hear("d0", 0.3)
    event = await desk.do(Learn(0))
    (_, work), (_, outcome) = desk.llm.jobs, desk.llm.outcomes
    assert isinstance(work, Study)
    manifests = desk.world.manifests()

    assert (work.public, work.adapter, work.k, work.label_weight, work.seed) == (tuple(TEXTS), "", 4, 0.9, 3)
    assert (work.tuning.steps, work.tuning.batch_size, work.tuning.learning_rate) == (3, 2, 1e-2)
    for heard, device in zip(work.heard, ("d0", "d1"), strict=True):
        tokenizer = manifests[MODELS[device]].bundle.files[TOKENIZER].sha256
        blob = next(b.blob for b in desk.state.sheets[0].ballots if b.device == device)
        assert (heard.body, heard.tokenizer) == (str(desk.blobs.file(blob)), str(desk.blobs.file(tokenizer)))
        assert (heard.task, heard.end) == (ANSWERS, 2)
    assert (event.loss, outcome.heard, outcome.taught) == (outcome.loss, 2, 1.0)
    assert desk.blobs.path(event.adapter) is not None
    assert not list(desk.blobs.file(event.adapter).parent.glob("incoming-*"))


async def test_all_tokens_alike_never_teach_where_somebody_says_something(tmp_path: Path, world: World) -> None:
    """The LLM learns the very bytes that it learns without the device that knows nothing."""
    ends = []
    for i, devices in enumerate(({"d1": 0.8}, {"d0": 0.0, "d1": 0.8, "d2": 0.0})):
        desk = Desk(tmp_path / str(i), world)
        await desk.do(AskAll(0))
        for device, share in devices.items():
            desk.hear(device, share)
        ends.append((await desk.do(Learn(0))).adapter)

    assert ends[0] == ends[1]


async def test_a_device_that_changes_its_model_does_not_stop_the_llm(desk: Desk) -> None:
    """What it said in its old model's tokens is left out; the others are heard."""
    desk.hear("d0")
    desk.hear("d1")
    desk.apply(Enrolled("d0", "x", "pieces"))
    event = await desk.do(Learn(0))

    assert desk.state.devices["d0"].model == "pieces"
    assert desk.llm.outcomes[1].heard == 1
    assert desk.state.tuned == (event.adapter,)


# What devices are told ------------------------------------------------------------------------------------------------
async def test_a_lesson_names_three_blobs(desk: Desk, world: World) -> None:
    """Texts, tokenizer and knowledge of the LLM that has learned: a device hears in them what the LLM says."""
    desk.hear("d0")
    learned = await desk.do(Learn(0))
    event = await desk.do(Say(0))
    told = wire.decode(desk.blobs.get(event.judged), Told)
    files = told.texts, told.knowledge, told.tokenizer
    heard = exchange.hear(told, *(desk.blobs.get(file.sha256) for file in files))
    _, _, describe, tell = desk.llm.jobs

    assert isinstance(tell, Tell)
    assert (describe, tell.adapter, tell.k) == (Describe(), str(desk.blobs.file(learned.adapter)), 4)
    assert [file.size for file in files] == [desk.blobs.file(file.sha256).stat().st_size for file in files]
    assert (told.task, told.end, told.texts.sha256) == (ANSWERS, 2, desk.state.sheets[0].texts)
    assert heard.public == TEXTS
    assert heard.voice.vocabulary.digest == world.llm.voice.vocabulary.digest
    assert {known.ids.shape[1] for known in heard.knowledge} == {4}
    assert event.acceptance == desk.llm.outcomes[-1].right
    work = fedmkt.plan(RUN, desk.state, coordinator.known_device(desk.state, "d0"), True, "start")
    assert isinstance(work, Train)
    assert work.lesson == Lesson(event.judged, 5, 0.9, 8)


async def test_the_same_run_tells_the_same(tmp_path: Path, world: World) -> None:
    """Two versions on two folders: adapters and lessons by their bytes; the second lesson goes on from the first."""
    ends = []
    for i in range(2):
        desk = Desk(tmp_path / str(i), world)
        for number in range(2):
            await desk.do(AskAll(number))
            desk.hear("d0", 0.5)
            desk.hear("d1")
            await desk.do(Learn(number))
            await desk.do(Say(number))
        ends.append((desk.state.tuned, [sheet.judged for sheet in desk.state.sheets]))

    assert ends[0] == ends[1]
    assert len(set(ends[0][0]) | set(ends[0][1])) == 4
    assert [work.adapter for work in desk.llm.jobs if isinstance(work, Study)] == ["", str(desk.blobs.file(desk.state.tuned[0]))]


def test_answers_without_a_word_are_refused_at_once() -> None:
    """No device could say them."""
    with pytest.raises(SettingsError, match="text 1 has an answer without a word"):
        tutors.sheet([PUBLIC[0], Example("a film", answer=" ")])


@pytest.mark.parametrize(
    ("vocabulary", "plain", "size"),
    [pytest.param(49_152, 19_800, 18_183, id="SmolLM2"), pytest.param(151_665, 29_400, 22_140, id="Qwen2.5")],
)
def test_bytes_of_a_hundred_answers(vocabulary: int, plain: int, size: int) -> None:
    """Three tokens each, 16 tokens a position, ids that nobody could foresee: as docs/systems/fedmkt.md says."""
    rng = np.random.default_rng(0)
    truths = {f"p{i}": Truth(tuple(rng.integers(0, vocabulary, 3).tolist()), 12) for i in range(100)}
    p = -np.sort(-rng.dirichlet(np.full(64, 0.2), 300))[:, :16] + 1e-6
    ids = np.stack([rng.choice(vocabulary, 16, replace=False) for _ in range(300)])
    known = [
        Knowledge(name, 12, ids[3 * i : 3 * i + 3], np.log(p[3 * i : 3 * i + 3] * 0.99).astype(np.float32))
        for i, name in enumerate(truths)
    ]
    body = knowledge.pack(known, Sheet("0" * 64, vocabulary, truths), Judgment("0" * 32, 3, 40, {"loss": 1.25}))

    assert knowledge.data_size(100, 300, 16, vocabulary) == plain
    assert len(body) == pytest.approx(size, rel=0.03)  # zlib's versions differ a little


# Over HTTP ------------------------------------------------------------------------------------------------------------
async def test_a_judgment_of_tokens_may_be_large(tmp_path: Path, world: World) -> None:
    """Sixteen mebibytes are looked into, more are not; where answers are classes it is one."""
    manifests = world.manifests()
    llm = InProcess(world.llm)
    ledger = Ledger(SETTINGS, manifests[""], tmp_path / "tokens", lambda _: None, llm, auxiliary=PUBLIC)
    headers = {"Content-Type": wire.JUDGMENT_TYPE}
    ledger.blobs.adopt(world.files["words"], digest(world.files["words"]).sha256)
    async with TestClient(TestServer(create_app(ledger))) as client:
        codes = []
        for size in (wire.MAX_JSON + 1, wire.MAX_SHEET + 1):
            answer = await client.post("/v1/results", data=bytes(size), headers=headers)
            problem = wire.decode(await answer.read(), Problem)
            codes.append((problem.code, problem.detail))

    assert codes == [
        ("bad-tensors", "the body is not compressed with zlib"),
        ("too-large", f"this may have {wire.MAX_SHEET} bytes, and claims {wire.MAX_SHEET + 1}"),
    ]
    async with running(tmp_path / "classes", with_public(), Simulator()) as server:
        answer = await server.client.post("/v1/results", data=bytes(wire.MAX_JSON + 1), headers=headers)
        assert answer.status == 413
