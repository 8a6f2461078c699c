"""FedMKT and its controls on the ICWSM-14 domains: what do models of several kinds gain from the server's LLM, and it from them?

Four devices, one domain each; as many public texts, with labels, as a device has of its own. Two tasks: sentiment, spoken of as
classes, by MiniLM, SmolLM2, SmolLM2 with 12 of 30 layers, and the same with a tokenizer of its own; and the last word of a
sentence (examples/cloze.py), spoken of token by token, by decoders alone. The LLM is SmolLM2-135M-Instruct. Devices train the top
layers and keep the better adapter by a few labels held out. Settings come from validation text, accuracy from test text. The
small decoders were distilled on that validation text, without labels: settings for the last word come from sentences they know.

    zero_shot         all models as they are
    standalone        each device trains on its own labels, as many steps as in all versions
    standalone_public and on the public texts' labels, as those below do; nobody teaches. Its LLM has learned these labels alone
    fedavg            four devices with the smallest of the decoders, adapters averaged; the homogeneous case
    self_distil       public texts by label and by what the device itself said of them last
    random_teacher    public texts by label and by noise
    fedmkt            LLM and devices teach each other; with 4 and 64 tokens a position instead of 16, `fedmkt_k4`, `fedmkt_k64`
    centralized       the LLM on all labels in one place, devices' and public, but for those that a device chooses by
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from bench import fleet, mutual, pairs
from bench.fedcollm import picked
from bench.pairs import spread_of, there
from bench.report import Result, run_cells
from edge_sdk import bundle as bundles
from edge_sdk import exchange, knowledge, verbs, wire
from edge_sdk.adapters import Adapter, Arrays, add
from edge_sdk.assets import MODELS, resolve
from edge_sdk.bundle import TOKENIZER
from edge_sdk.engines import TopK
from edge_sdk.exchange import Heard
from edge_sdk.protocol import Judgment, Lesson, Manifest, Sample, Text, Told
from edge_sdk.tasks import Example, Private, softmax
from edge_sdk.training.batches import Answer, Classes, Job, Row, Source, TopTokens
from edge_server import settings as run_settings
from edge_server.coordinator import Ballot
from edge_server.llm.distil import OfLlm, OfSlm
from edge_server.llm.jobs import Hello, Tuning
from edge_server.llm.model import Llm
from edge_server.storage import Blobs
from edge_server.systems.fedmkt import FedMkt
from edge_server.systems.lpfl import LpFl
from edge_server.tutor import Tutor, texts
from examples import cloze
from examples.cloze import Choice

TASKS = ("sentiment", "cloze")
MODELS_OF = {"sentiment": ("minilm", "smollm2", "small", "other"), "cloze": ("smollm2", "small", "other", "small")}
LAYERS = {"minilm": 0, "smollm2": 3, "small": 3, "other": 3}  # trained, nearest the output; 0 for all
SLM = ("zero_shot", "standalone", "standalone_public", "fedavg", "self_distil", "random_teacher", "fedmkt")
K = ("fedmkt_k4", "fedmkt_k64")
METHODS = (*SLM, *K, "centralized")
LLM_ROWS = {"zero_shot": "zero_shot", "public_only": "standalone_public", "centralized": "centralized", "fedmkt": "fedmkt"}
RATES = (("alone.learning_rate", 2e-4), ("training.learning_rate", 2e-4), ("learning_rate", 1e-4))
CHANGES = {"sentiment": (), "cloze": RATES}  # of the example's settings, by task: words take smaller steps
LABELS, CHOICE, PUBLIC = 32, 16, 32  # of a device, held out by a device to keep the better adapter, of all
HELD_OUT = {"sentiment": 100, "cloze": 40}  # test texts of a device


class Cell(NamedTuple):
    """One method with one seed. `change`: settings to try, by name, e.g. `alone.steps`."""

    task: str
    seed: int
    method: str
    part: fleet.Part = "test"
    change: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Device:
    """A device: its kind of model, what it has, what it chooses by (`private.held_out`), and what it is measured by."""

    name: str
    lab: fleet.Lab
    private: Private
    held_out: tuple[Example, ...]
    asked: Sequence[Choice] = ()


@dataclass(frozen=True)
class Place:
    """What a cell works with; `cell` without its method."""

    cell: Cell
    settings: FedMkt
    devices: Sequence[Device]
    public: tuple[Example, ...]
    llm: Llm
    tutor: Tutor
    blobs: Blobs

    @property
    def texts(self) -> list[Text]:
        """The public texts as devices know them."""
        return texts(self.public)

    def said(self, device: Device, adapter: Arrays, number: int, k: int) -> bytes:
        """A device's judgment of the public texts, as it travels."""
        lab, private = device.lab, device.private
        if lab.settings.task.answer_tokens:
            metrics, known, sheet = verbs.tell(self.texts, adapter, lab.spec, private, lab.engine, k)
            return knowledge.pack(known, sheet, Judgment(device.name, number, len(private.labelled), metrics))
        count, metrics, covers, answer = verbs.judge(self.texts, adapter, lab.spec, private, lab.engine, "probabilities")
        return wire.pack_judgment(Judgment(device.name, number, count, metrics, covers), answer)


@dataclass
class Trained:
    """What came of a method: an adapter for each device, the LLM's, and the bytes of a device and version."""

    slm: Sequence[Arrays] = ()
    llm: Arrays | None = None
    traffic: float = 0.0


# Places ---------------------------------------------------------------------------------------------------------------
def run_file(task: str) -> run_settings.RunSettings:
    run = run_settings.load(fleet.CONFIGS / "fedmkt.toml")
    return run if task == "sentiment" else msgspec.structs.replace(run, task=cloze.TASK)


def settings_of(cell: Cell) -> FedMkt:
    """The settings of examples/fedmkt.toml, the LLM on one core."""
    if (settings := run_file(cell.task).fedmkt) is None:
        raise ValueError("examples/fedmkt.toml has no table [fedmkt]")
    parts: dict[str, Any] = {"alone": settings.alone, "training": settings.training, "": settings}
    for name, value in (*CHANGES[cell.task], *cell.change):
        part, _, key = name.rpartition(".")
        parts[part] = msgspec.structs.replace(parts[part], **{key: type(getattr(parts[part], key))(value)})
    top_k = int(cell.method.removeprefix("fedmkt_k")) if cell.method in K else settings.top_k
    llm = msgspec.structs.replace(settings.llm, threads=1)
    own = {"alone": parts["alone"], "training": parts["training"], "top_k": top_k, "llm": llm, "seed": cell.seed}
    found: FedMkt = msgspec.structs.replace(parts[""], **own)
    return found


@cache
def bundle_of(name: str) -> Path:
    return {"small": fleet.small_bundle, "other": fleet.other_bundle}.get(name, lambda: fleet.bundle_of(name))()


@cache
def lab_of(name: str, task: str) -> fleet.Lab:
    """A device's model, loaded once in a process; asked in its bundle's words where answers are classes."""
    run, bundle = run_file(task), bundles.read(bundle_of(name))
    own = run if run.task.answer_tokens else msgspec.structs.replace(run, task=bundle.task)
    return fleet.open_lab(bundle_of(name), own, layers=LAYERS[name])


@cache
def llm_of(task: str) -> Llm:
    return Llm(resolve(MODELS["smollm2"]), run_file(task).task, settings_of(Cell(task, 0, "")).llm)


def place_of(cell: Cell, folder: Path) -> Place:
    """Everything but what is trained."""
    settings, run, llm = settings_of(cell), run_file(cell.task), llm_of(cell.task)
    devices, public = people(cell)
    blobs, models = Blobs(folder / "blobs"), dict[str, Manifest]()
    for name in {device.name for device in devices}:
        bundle = bundles.read(bundle_of(name))
        models[name] = run_settings.manifest(run, bundle)
        blobs.adopt(bundle_of(name) / TOKENIZER, bundle.files[TOKENIZER].sha256)
    here = mutual.Here(llm, Hello("", run.task, settings.llm), folder)
    return Place(
        cell._replace(method=""),
        settings,
        devices,
        public,
        llm,
        Tutor(settings, run.task, public, blobs, here, lambda: 0.0, models),
        blobs,
    )


def people(cell: Cell) -> tuple[list[Device], tuple[Example, ...]]:
    """Devices, and the public texts."""
    return _sentiment(cell) if cell.task == "sentiment" else _cloze(cell)


def _sentiment(cell: Cell) -> tuple[list[Device], tuple[Example, ...]]:
    found = fleet.devices("by-domain", LABELS + CHOICE + PUBLIC // 4, 0, HELD_OUT[cell.task], cell.part, cell.seed)
    devices, public = [], list[Example]()
    for name, private in zip(MODELS_OF[cell.task], found, strict=True):
        own, rest = fleet.share(private.labelled, LABELS)
        choice, shown = fleet.share(rest, CHOICE)
        public += shown
        devices.append(Device(name, lab_of(name, cell.task), Private(own, (), (), choice), private.held_out))
    return devices, tuple(public)


def _cloze(cell: Cell) -> tuple[list[Device], tuple[Example, ...]]:
    rng = np.random.default_rng(cell.seed)
    devices, public = [], []
    for name, domain in zip(MODELS_OF[cell.task], fleet.domains().values(), strict=True):
        train = cloze.examples([domain.train[i] for i in rng.permutation(len(domain.train))])
        held = cloze.choices(domain.test if cell.part == "test" else domain.validation, rng)
        asked = [held[i] for i in rng.permutation(len(held))[: HELD_OUT[cell.task]]]
        own, choice, rest = train[:LABELS], train[LABELS : LABELS + CHOICE], train[LABELS + CHOICE :]
        public += rest[: PUBLIC // 4]
        devices.append(Device(name, lab_of(name, cell.task), Private(tuple(own), (), (), tuple(choice)), (), asked))
    return devices, tuple(public)


# Methods --------------------------------------------------------------------------------------------------------------
def train(place: Place, method: str) -> Trained:
    """What comes of a method."""
    match method:
        case "zero_shot":
            return Trained([d.lab.spec.start(place.settings.seed) for d in place.devices], place.llm.start(place.settings.seed))
        case "fedavg":
            return Trained(_averaged(place))
        case "centralized":
            return Trained(llm=_centralized(place))
        case "standalone":
            return Trained(_alone(place, lambda *_: []))
        case "standalone_public":
            return Trained(_alone(place, _labels), _public_only(place))
        case "self_distil":
            return Trained(_alone(place, _of_oneself))
        case "random_teacher":
            return Trained(_alone(place, _of_noise))
        case _:
            found = asyncio.run(_fedmkt(place))
            return replace(found, llm=None) if method in K else found  # how much is told matters to those that are told


@cache
def _first(cell: Cell, at: int) -> Arrays:
    """What a device learns of its own labels, before anybody has said anything: the same in every method."""
    device, settings = people(cell)[0][at], settings_of(cell)
    lab, start = device.lab, device.lab.spec.start(settings.seed)
    prepared = verbs.prepare(0, start, lab.spec, device.private, settings.alone, None, settings.seed + 1, lab.engine)
    return _learned(device, start, prepared)


def _learned(device: Device, start: Arrays, prepared: verbs.Prepared) -> Arrays:
    return add(start, prepared.learned(*device.lab.lora.fit(prepared.job)).delta)


def _better(device: Device, old: Arrays, new: Arrays) -> Arrays:
    return verbs.better(old, new, device.lab.spec, device.private, device.lab.engine)[0]


Rows = Callable[[Place, Device, Arrays, int], Sequence[Row]]


def _alone(place: Place, rows: Rows) -> list[Arrays]:
    """Devices that learn their own labels and, after the first version, these rows of public texts."""
    found, settings = [], place.settings
    for at, device in enumerate(place.devices):
        lab, own = device.lab, _first(place.cell, at)
        for version in range(1, settings.versions + 1):
            sources = [Source(verbs.private_rows(device.private.labelled, lab.engine), settings.training.batch_size)]
            if more := rows(place, device, own, settings.seed + version):
                sources.append(Source(more, settings.batch_size))
            trained, _ = lab.lora.fit(Job(dict(own), sources, settings.training, settings.seed + 1 + version))
            own = _better(device, own, trained)
        found.append(own)
    return found


def _labels(place: Place, device: Device, _: Arrays, __: int) -> Sequence[Row]:
    """Public texts by their labels."""
    return verbs.private_rows(place.public, device.lab.engine)


def _of_oneself(place: Place, device: Device, own: Arrays, _: int) -> Sequence[Row]:
    """Public texts by label and by what the device says of them, without looking whether that is any better."""
    engine = device.lab.engine
    engine.set_adapter(Adapter(own, device.lab.spec))
    asked = [t.text for t in place.texts]
    if device.lab.settings.task.answer_tokens:
        return _taught(place, device, engine.answer_top_k(asked, [t.answer for t in place.texts], place.settings.top_k))
    return _soft(place, device, softmax(engine.logits(asked)))


def _of_noise(place: Place, device: Device, _: Arrays, seed: int) -> Sequence[Row]:
    """Public texts by label and by a random distribution."""
    rng, k = np.random.default_rng(seed), place.settings.top_k
    if not device.lab.settings.task.answer_tokens:
        classes = len(device.lab.settings.task.labels)
        return _soft(place, device, rng.dirichlet([1.0] * classes, len(place.public)).astype(np.float32))
    encoder, found = device.lab.engine.encoder, []
    for row in _labels(place, device, {}, 0):
        count = len(row.ids) - row.target.start if isinstance(row.target, Answer) else 0
        ids = np.stack([rng.choice(encoder.vocabulary, k, replace=False) for _ in range(count)])
        found.append(TopK(ids, np.log(rng.dirichlet([1.0] * k, count)).astype(np.float32)))
    return _taught(place, device, found)


def _soft(place: Place, device: Device, told: NDArray[np.float32]) -> Sequence[Row]:
    weight, prompts = place.settings.label_weight, device.lab.engine.encoder.prompts([t.text for t in place.texts])
    targets = weight * np.eye(told.shape[1])[[t.label for t in place.texts]] + (1 - weight) * told
    return [Row(ids, Classes(target.astype(np.float32))) for ids, target in zip(prompts, targets, strict=True)]


def _taught(place: Place, device: Device, told: Sequence[TopK]) -> Sequence[Row]:
    weight, found = place.settings.label_weight, []
    for row, top in zip(_labels(place, device, {}, 0), told, strict=True):
        start = row.target.start if isinstance(row.target, Answer) else 0
        found.append(Row(row.ids, TopTokens(start, top.ids, top.logprobs, weight)))
    return found


def _averaged(place: Place) -> list[Arrays]:
    """FedAvg of four devices that all have the smallest decoder."""
    settings = place.settings
    lab = next(device.lab for device in place.devices if device.name == "small")
    steps = (settings.alone.steps + settings.versions * settings.training.steps) // (settings.versions + 1)
    how = LpFl(
        versions=settings.versions + 1,
        training=msgspec.structs.replace(settings.training, steps=steps),
        soft=None,
        seed=settings.seed,
    )
    start, members = lab.spec.start(settings.seed), [device.private for device in place.devices]
    return [fleet.federate(members, start, lab.spec, how, lab.engine, lab.lora)] * len(members)


async def _fedmkt(place: Place) -> Trained:
    """The server's own tutor and the devices' own verbs; every word as it travels."""
    settings, subject, blobs, before, size = place.settings, place.tutor.subject, place.blobs, "", 0
    own = [_first(place.cell, at) for at in range(len(place.devices))]
    for number in range(settings.versions):
        heard, sent = [], []
        for device, adapter in zip(place.devices, own, strict=True):
            body = place.said(device, adapter, number, settings.top_k)
            heard.append((Ballot(device.name, blobs.put(body)), device.name))
            sent.append(len(body))
        out = blobs.incoming()
        await subject.learn(before, out, heard, tuning(place), settings.seed + number)
        sha256 = blobs.take(out)
        before = str(blobs.file(sha256))
        lesson, _ = await subject.say(number, sha256, before)
        size = max(size, max(sent) + len(wire.pack_lines(place.texts)) + _size(place, lesson))
        told = Lesson("", len(place.public), settings.label_weight, settings.batch_size)
        for at, device in enumerate(place.devices):
            lab, public = device.lab, _public(place, lesson)
            args = own[at], lab.spec, device.private, settings.training, None, settings.seed + 2 + number, lab.engine
            prepared = verbs.prepare(number + 1, *args, public=public, lesson=told)
            own[at] = _better(device, own[at], _learned(device, own[at], prepared))
    return Trained(own, dict(load_file(before)), float(size))


def tuning(place: Place) -> Tuning:
    """The LLM's, for a version; as `Tutor` has it."""
    settings = place.settings
    steps = settings.passes * -(-len(place.public) // settings.llm_batch_size)
    return Tuning(steps, settings.llm_batch_size, settings.learning_rate, generation=0.0, contrast="none", leash=0.0)


def _public(place: Place, lesson: bytes) -> Sequence[Sample] | Heard:
    if not place.tutor.task.answer_tokens:
        return wire.unpack_lines(lesson, Sample)
    told = wire.decode(lesson, Told)
    return exchange.hear(told, *(place.blobs.get(file.sha256) for file in (told.texts, told.knowledge, told.tokenizer)))


def _size(place: Place, lesson: bytes) -> int:
    """Bytes of a lesson that a device fetches in every version: not the LLM's tokenizer, nor the texts it has already."""
    return len(lesson) + (wire.decode(lesson, Told).knowledge.size if place.tutor.task.answer_tokens else 0)


# The LLM --------------------------------------------------------------------------------------------------------------
def _public_only(place: Place) -> Arrays:
    """The LLM on the public labels, with nobody's word on them."""

    async def learn() -> str:
        before = ""
        for number in range(place.settings.versions):
            out = place.blobs.incoming()
            await place.tutor.subject.learn(before, out, [], tuning(place), place.settings.seed + number)
            before = str(place.blobs.file(place.blobs.take(out)))
        return before

    return dict(load_file(asyncio.run(learn())))


def _centralized(place: Place) -> Arrays:
    """The LLM on all labels in one place, in as many passes."""
    pooled = [*place.public, *(e for device in place.devices for e in device.private.labelled)]
    whole = replace(place.tutor, public=tuple(pooled))
    return _public_only(replace(place, public=tuple(pooled), tutor=whole))


# Measuring ------------------------------------------------------------------------------------------------------------
def measure(cell: Cell) -> list[dict[str, Any]]:
    """Trains one cell and measures devices' models and LLM; runs in a worker process."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = place_of(cell, Path(folder))
        found = train(place, cell.method)
    row = {"task": cell.task, "seed": cell.seed, "method": cell.method, "change": dict(cell.change)}
    row["seconds"] = round(time.perf_counter() - began, 1)
    rows = []
    if found.slm:
        homogeneous = cell.method == "fedavg"
        accuracy = [_slm(place, device, adapter, homogeneous) for device, adapter in zip(place.devices, found.slm, strict=True)]
        models = ["small" if homogeneous else device.name for device in place.devices]
        rows.append({**row, "model": "slm", "accuracy": statistics.fmean(accuracy), "per_device": accuracy, "models": models})
        rows[-1] |= {"traffic": found.traffic} if found.traffic else {}
    if found.llm is not None:
        rows.append({**row, "model": "llm", **_llm(place, found.llm)})
    return rows


def _slm(place: Place, device: Device, adapter: Arrays, homogeneous: bool) -> float:
    lab = next(d.lab for d in place.devices if d.name == "small") if homogeneous else device.lab
    if device.asked:
        lab.lora.set(adapter)
        return picked(
            lambda ids, starts: OfSlm(lab.lora, ids, starts, lab.lora.encoder.vocabulary), lab.lora.encoder, device.asked
        )
    return fleet.accuracies(adapter, lab.spec, [Private((), (), (), device.held_out)], lab.engine)[0]


def _llm(place: Place, adapter: Arrays) -> dict[str, Any]:
    llm = place.llm
    llm.set(adapter)
    if place.devices[0].asked:
        voice, asked = llm.voice, [choice for device in place.devices for choice in device.asked]
        words = len(voice.vocabulary)
        return {"accuracy": picked(lambda ids, starts: OfLlm(llm, ids, starts, words), voice.encoder, asked)}
    known = [e for device in place.devices for e in device.held_out]
    raw, balanced = mutual.both_ways(llm.logits([e.text for e in known]), [e.label for e in known])
    return {"accuracy": raw, "balanced": balanced}


# The bench ------------------------------------------------------------------------------------------------------------
def run(full: bool) -> Result:
    """Two seeds of each task; `full`: five."""
    seeds = range(5 if full else 2)
    rows = run_all([Cell(t, s, m) for s in seeds for t in TASKS for m in methods(t)])
    return Result("fedmkt", rows, summary(rows), pairs.table(rows, TASKS, METHODS), targets(rows))


def methods(task: str) -> tuple[str, ...]:
    """Of a task: how many tokens are told matters only where answers are texts."""
    return (*SLM, *(K if task == "cloze" else ()), "centralized")


def run_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures all cells: one list of rows."""
    for name in {name for cell in cells for name in MODELS_OF[cell.task]}:
        bundle_of(name)  # made once, before the workers need it
    found = run_cells(
        measure, cells, lambda cell, _: f"{cell.task}, seed {cell.seed}, {cell.method}, {dict(cell.change)}", "fedmkt"
    )
    return [row for rows in found for row in rows]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: of sentiment as the acceptance names them, of the last word under `cloze`."""
    first, second = ([r for r in rows if r["task"] == task] for task in TASKS)
    sent = {
        task: max((r.get("traffic", 0.0) for r in rows if (r["task"], r["method"]) == (task, "fedmkt")), default=0.0)
        for task in TASKS
    }
    return {**_summary(first), "cloze": _summary(second), "bytes_per_device_version": sent}


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`small`: of the devices whose model is the smallest decoder in the mix, too; there FedAvg compares like with like."""
    small = [{**r, "accuracy": statistics.fmean(_of_small(r))} for r in rows if r["model"] == "slm"]
    return {
        "slm": {m: spread_of(rows, "slm", m) for m in (*SLM, *K) if there(rows, "slm", m)},
        "llm": {name: spread_of(rows, "llm", m) for name, m in LLM_ROWS.items() if there(rows, "llm", m)},
        "small": {m: spread_of(small, "slm", m) for m in (*SLM, *K) if there(small, "slm", m)},
    }


def _of_small(row: dict[str, Any]) -> list[float]:
    return [found for found, model in zip(row["per_device"], MODELS_OF[row["task"]], strict=True) if model == "small"]


def targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is promised, and by how much it is kept or missed, seed by seed; docs/systems/fedmkt.md has them."""
    lines = []
    for task in TASKS:
        for base, target in (("standalone_public", 0.01), ("standalone", 0.029), ("self_distil", None), ("random_teacher", None)):
            lines.append(pairs.gain_line(rows, task, "slm", "fedmkt", base, target))
        lines.append(pairs.share_line(rows, task, "fedmkt", 0.93))
        lines.append(pairs.gain_line(rows, task, "llm", "fedmkt", "standalone_public"))
    return lines
