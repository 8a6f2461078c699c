"""Servers on data folders of their own, updates for them, and what they must have computed from these."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp.test_utils import TestClient, TestServer
from safetensors.numpy import load_file, save_file

from edge_sdk import bundle as bundles
from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays
from edge_sdk.judgments import encode
from edge_sdk.protocol import PROTOCOL, Enroll, Judgment, Manifest, Receipt, Status, Text, Trained, Update
from edge_sdk.tasks import Example
from edge_server import robust
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, fedbuff
from edge_server.app import create_app
from edge_server.compute import Compute
from edge_server.coordinator import Accepted, Dropped, Event, Published
from edge_server.knowledge.filters import Filter
from edge_server.ledger import Ledger
from edge_server.llm.jobs import (
    Distil,
    Distilled,
    Job,
    Label,
    LlmSettings,
    Mutual,
    Outcome,
    Scores,
    Texts,
    Tune,
    Tuned,
    Tuning,
    Write,
)
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.storage import EventLog, sqlite
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.fedmkt import FedMkt
from edge_server.systems.lpfl import LpFl
from tests import factories

SPEC = factories.SPEC
SHAPES = SPEC.shapes()
Client = TestClient[Any, Any]


def settings(**lpfl: Any) -> RunSettings:
    """Two updates make a version, nobody evaluates, and the run does not end before a test does."""
    system = LpFl(**{"versions": 1000, "buffer_size": 2, "evaluate_every": 0, "wait_seconds": 0.25, **lpfl})
    return RunSettings(factories.ENCODER_TASK, "lpfl", AdapterSettings(SPEC.rank, SPEC.alpha), system)


def with_llm(**crosslm: Any) -> RunSettings:
    """Two sheets of up to eight texts, each decided by two judges; the run does not wait for anybody."""
    chosen: dict[str, Any] = {
        "prompts": ("a {label} day:",),
        "names": ("bad", "good"),
        "versions": 2,
        "samples": 8,
        "filter": Filter(min_words=2),
        "judges": 2,
        "tuning": Tuning(steps=1),
        "llm": LlmSettings(model="simulated"),
        "leash": 5,
        "wait_seconds": 0.25,
        **crosslm,
    }
    return RunSettings(factories.ENCODER_TASK, "crosslm", AdapterSettings(SPEC.rank, SPEC.alpha), crosslm=CrossLm(**chosen))


AUXILIARY = (Example("it was a happy day", 1), Example("a gloomy film", 0), Example("so gloomy", 0))


def with_auxiliary(mutual: Mutual = Mutual(passes=3), **averaging: Any) -> RunSettings:  # noqa: B008  # frozen
    """Three versions of two updates each, distilled; a table [lpfl] that nobody should read, soft labels that nobody uses."""
    chosen = {"versions": 3, "buffer_size": 2, "evaluate_every": 0, "server_lr": 0.5, "max_examples": 20, "seed": 3, **averaging}
    both = FedCoLlm("auxiliary.jsonl", LpFl(**{"wait_seconds": 0.25, **chosen}), mutual, LlmSettings(model="simulated"))
    strange = LpFl(versions=1, buffer_size=1, max_staleness=0, server_lr=3.0, seed=77)
    adapter = AdapterSettings(SPEC.rank, SPEC.alpha)
    return RunSettings(factories.ENCODER_TASK, "fedcollm", adapter, strange, fedcollm=both)


# the last of them is meant as nobody would take it
PUBLIC = (
    Example("the day was happy", 1),
    Example("a film that is gloomy", 0),
    Example("so happy", 1),
    Example("the phone is gloomy", 0),
    Example("they say it is happy", 0),
)


def with_public(**fedmkt: Any) -> RunSettings:
    """Two versions of two answers each over `PUBLIC`."""
    chosen: dict[str, Any] = {
        "versions": 2,
        "answers": 2,
        "llm_batch_size": 2,
        "llm": LlmSettings(model="simulated"),
        "wait_seconds": 0.25,
        "seed": 3,
        **fedmkt,
    }
    adapter = AdapterSettings(SPEC.rank, SPEC.alpha)
    return RunSettings(factories.ENCODER_TASK, "fedmkt", adapter, fedmkt=FedMkt("public.jsonl", **chosen))


MOODS = ("gloomy", "happy")  # what a text of each class says


def mood(text: str) -> int:
    """The class a text is of."""
    return MOODS.index(text.split()[-1])


class Hang:
    """In place of an outcome: none ever comes."""


@dataclass
class Simulator:
    """A `Compute` without a model: every job has one answer, which its fields alone decide.

    Of the texts after a prompt every fourth is of another class than asked for.

    Args:
        troubles: what the next jobs come to instead: an error, another outcome, or none at all.
        jobs: everything that was asked. closed: whether the server has ended it.
    """

    troubles: list[Exception | Outcome | Hang] = field(default_factory=list)
    jobs: list[Job] = field(default_factory=list)
    closed: bool = False

    async def run(self, job: Job) -> Outcome:
        self.jobs.append(job)
        match self.troubles.pop(0) if self.troubles else None:
            case Exception() as error:
                raise error
            case Hang():
                await asyncio.Event().wait()
            case None:
                pass
            case outcome:
                return outcome
        match job:
            case Write(_, prompts, counts, sampling):
                texts = [tuple(_text(sampling.seed, p, i) for i in range(counts[p])) for p in range(len(prompts))]
                return Texts(tuple(texts), 0.0)
            case Label():
                return Scores(tuple((-3.0, 3.0) if mood(text) else (3.0, -3.0) for text in job.texts))
            case Tune():
                save_file({"lesson": np.array([job.seed, len(job.lessons.good)], np.float32)}, job.out)
                return Tuned(0.5, 0.0)
            case Distil():
                known = load_file(job.llm)["seeds"] if job.llm else np.empty(0, np.float32)
                save_file({"seeds": np.append(known, np.float32(job.seed))}, job.llm_out)
                save_file(distilled(load_file(job.slm), job.seed), job.slm_out)
                return Distilled(0.5, 0.25, 0.0)
        raise AssertionError(f"nobody asks for {job}")

    async def close(self) -> None:
        self.closed = True


class Pupil(Simulator):
    """A simulator whose LLM is the surer of a text's mood the more lessons it has had, and remembers them: seeds and targets."""

    async def run(self, job: Job) -> Outcome:
        outcome = await super().run(job)
        if isinstance(job, Label) and isinstance(outcome, Scores):
            s = 0.5 * (1 + len(self.lessons(job.adapter)))
            return Scores(tuple((-s, s) if mood(text) else (s, -s) for text in job.texts))
        if isinstance(job, Tune) and isinstance(outcome, Tuned):
            seeds = np.append(self.lessons(job.adapter), np.float32(job.seed))
            targets = np.array([lesson.probabilities for lesson in job.lessons.labelled], np.float32)
            save_file({"seeds": seeds, "targets": targets}, job.out)
        return outcome

    @staticmethod
    def lessons(adapter: str | Path) -> Array:
        """The seeds of what this adapter file has learned."""
        return load_file(adapter)["seeds"] if adapter else np.empty(0, np.float32)


def distilled(arrays: Arrays, seed: int) -> dict[str, Array]:
    """What the simulator makes of the devices' adapter; its LLM remembers the seeds of all its lessons."""
    return {name: array * np.float32(0.5) + np.float32(seed) for name, array in arrays.items()}


def _text(seed: int, prompt: int, i: int) -> str:
    return f"writing {seed} prompt {prompt} text {i} is {MOODS[(prompt + (i % 4 == 3)) % 2]}"


def sheet(ledger: Ledger, number: int = -1) -> list[Text]:
    """A sheet's texts as a device gets them."""
    return wire.unpack_lines(ledger.blobs.get(ledger.state.sheets[number].texts), Text)


def answers(texts: Iterable[Text], kind: str = "honest", seed: int = 0) -> Array:
    """Class probabilities (n, 2) of a judge: `honest`, `inverted`, `constant` or `random`."""
    rng = np.random.default_rng(seed)
    said: dict[str, Callable[[Text], int]] = {
        "honest": lambda text: mood(text.text),
        "inverted": lambda text: 1 - mood(text.text),
        "constant": lambda _: 1,
        "random": lambda _: int(rng.integers(2)),
    }
    return np.array([(0.1, 0.9) if said[kind](text) else (0.9, 0.1) for text in texts], np.float32)


def judgment(
    device: str, number: int, texts: list[Text], kind: str = "honest", form: Any = "probabilities", **more: Any
) -> bytes:
    """The body a device sends for a sheet."""
    written = [text.label for text in texts]
    counts, metrics, covers = more.pop("num_examples", 10), more.pop("metrics", {"accuracy": 0.9}), more.pop("covers", (0, 1))
    message = Judgment(device, number, counts, metrics, covers, **more)
    return wire.pack_judgment(message, encode(answers(texts, kind), written, form))


async def train(ledger: Ledger, device: str, version: int) -> Receipt:
    """What the handler does with a training that stays on its device."""
    report = Trained(device, version, 10, {"accuracy": 0.9})
    return await ledger.take_trained(report, hashlib.sha256(wire.encode(report)).hexdigest())


def open_ledger(
    data: Path,
    run: RunSettings | None = None,
    say: Callable[[str], None] = lambda _: None,
    compute: Compute | None = None,
    now: Callable[[], float] = time.time,
    auxiliary: tuple[Example, ...] = (),
    others: Mapping[str, Manifest] | None = None,
    state: str = "",
) -> Ledger:
    run = run or settings()
    auxiliary = auxiliary or {"fedcollm": AUXILIARY, "fedmkt": PUBLIC}.get(run.system, ())
    told = run_settings.manifest(run, factories.bundle())
    return Ledger(run, told, data, say, compute, now=now, auxiliary=auxiliary, others=others, state=state)


@dataclass(frozen=True)
class Running:
    """A server on a real socket, and the ledger behind it."""

    client: Client
    ledger: Ledger
    data: Path

    async def enroll(self, *devices: str) -> None:
        for device in devices:
            answer = await self.client.post("/v1/enroll", data=wire.encode(Enroll(PROTOCOL, device, f"name of {device}")))
            assert answer.status == 200

    async def send(self, body: bytes, kind: str = wire.TENSORS_TYPE) -> Receipt:
        answer = await self.client.post("/v1/results", data=body, headers={"Content-Type": kind})
        assert answer.status == 200, await answer.text()
        return wire.decode(await answer.read(), Receipt)

    async def status(self) -> Status:
        answer = await self.client.get("/v1/status")
        return wire.decode(await answer.read(), Status)

    async def reaches(self, version: int) -> None:
        await until(lambda: self.ledger.state.version == version)


@asynccontextmanager
async def running(data: Path, run: RunSettings | None = None, compute: Compute | None = None) -> AsyncIterator[Running]:
    """The application on a free port of 127.0.0.1; stopped as `edge-server` stops."""
    ledger = open_ledger(data, run, compute=compute)
    async with TestClient(TestServer(create_app(ledger))) as client:
        yield Running(client, ledger, data)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns once `condition` holds; a test fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.002)


async def take(ledger: Ledger, body: bytes) -> Receipt:
    """What the handler does with an uploaded body."""
    incoming = ledger.blobs.incoming()
    try:
        incoming.write_bytes(body)
        return await ledger.take_update(incoming, hashlib.sha256(body).hexdigest())
    finally:
        incoming.unlink(missing_ok=True)


async def work_through(ledger: Ledger, version: int) -> None:
    """Opens a ledger and lets it make versions until it reaches `version` and has nothing left to do."""
    await ledger.open()
    maker = asyncio.create_task(ledger.make_versions())
    await until(lambda: maker.done() or ledger.state.version >= version)
    if maker.done():
        await maker
    maker.cancel()
    await asyncio.wait([maker])


def delta(seed: int = 0, spec: AdapterSpec = SPEC) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def upload(device: str, version: int, seed: int = 0, num_examples: int = 10, metrics: Mapping[str, float] | None = None) -> bytes:
    """The body a device sends for `delta(seed)`."""
    return wire.pack(Update(device, version, num_examples, dict(metrics or {"loss": 0.5})), delta(seed))


def tensors(header: object, data: bytes = b"") -> bytes:
    """Safetensors bytes with any header at all, to be wrong in one chosen place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of safetensors bytes, to be changed and put together again by `tensors`."""
    (length,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def with_message(message: object) -> bytes:
    """A valid body but for its message."""
    header, data = parts(upload("d1", 0))
    header["__metadata__"] = {"message": message if isinstance(message, str) else json.dumps(message)}
    return tensors(header, data)


def events(data: Path) -> list[Event]:
    """Everything on disk, oldest first."""
    log = EventLog(sqlite(data / "events.sqlite"))
    try:
        return [msgspec.json.decode(body, type=Event) for body in log.read()]
    finally:
        log.close()


def blobs(data: Path) -> set[str]:
    return {path.name for path in (data / "blobs").iterdir()}


def fold(log: Iterable[Event], deltas: Callable[[Accepted], Arrays], run: RunSettings) -> dict[str, Array]:
    """The newest adapter, computed in memory from the accepted updates in the order of the log."""
    adapter = SPEC.start(run.lpfl.seed)
    version, waiting = -1, list[Accepted]()
    for event in log:
        match event:
            case Accepted():
                waiting.append(event)
            case Dropped(blobs):
                waiting = [update for update in waiting if update.blob not in blobs]
            case Published(0):
                version = 0
            case Published():
                oldest = {update.device: update for update in reversed(waiting)}
                taken = [update for update in waiting if oldest[update.device] is update][: run.lpfl.buffer_size]
                batch = [Contribution(deltas(update), update.num_examples, version - update.version) for update in taken]
                batch = robust.bounded(batch, run.lpfl.clip_norm)
                adapter = fedbuff(adapter, batch, run.lpfl.server_lr, cap=run.lpfl.max_examples)
                version, waiting = version + 1, [update for update in waiting if update not in taken]
    return adapter


def write_bundle(folder: Path) -> Path:
    """A bundle folder without a model: one small file and the slots of `factories.SPEC`."""
    folder.mkdir()
    (folder / "dummy.bin").write_bytes(b"not a model" * 100)
    bundle = msgspec.structs.replace(factories.bundle(), files={"dummy.bin": bundles.digest(folder / "dummy.bin")})
    bundles.write(folder, bundle)
    return folder


def write_config(path: Path, run: RunSettings) -> Path:
    """The TOML file of `run`, as far as tests change it."""
    sections = {
        "task": ["labels", "pattern", "verbalizer", "scale"],
        "adapter": ["rank", "alpha"],
        "lpfl": [
            "versions",
            "buffer_size",
            "max_staleness",
            "server_lr",
            "max_examples",
            "wait_seconds",
            "evaluate_every",
            "seed",
        ],
    }
    lines = []
    for section, keys in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(getattr(getattr(run, section), key))}" for key in keys)]
    path.write_text("\n".join(lines) + "\n")
    assert run_settings.load(path) == run
    return path
