"""FedCoLLM and its controls on the ICWSM-14 domains: what do devices gain from the server's LLM, and the LLM from them?

Four devices, one domain each; the server has labelled texts of all four, as many as a device; all labels are balanced. The
devices' model is SmolLM2 with 12 of 30 layers (`edge-export shrink`), of which the top 6 learn, the LLM SmolLM2-135M-Instruct.
Two tasks: sentiment, distilled over classes, and the last word of a sentence (examples/cloze.py), distilled over tokens and
scored by log-likelihood among four. Settings come from validation text, accuracy from test text. The devices' model was distilled
on that validation text, without labels, so that settings for the last word come from sentences it knows.

    zero_shot         both models as they are
    standalone        each device trains on its own labels, as many steps as in all versions
    fedavg            devices' adapters are averaged
    fedavg_server_ce  and the server trains each average on its own labels, as many steps as the methods below
    lambda0           FedCoLLM with lambda = 0: nobody teaches anybody. Its LLM has learned from the server's labels alone
    fedcollm          LLM and SLM distil each other on the server's labels
    centralized       the LLM on all labels in one place, devices' and server's, as many passes
"""

from __future__ import annotations

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
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn import functional as F

from bench import fleet, mutual, pairs, secure
from bench.pairs import spread_of
from bench.report import Result, run_cells
from edge_sdk import bundle as bundles
from edge_sdk import verbs, wire
from edge_sdk.adapters import Arrays
from edge_sdk.assets import MODELS, resolve
from edge_sdk.tasks import Example, Private
from edge_sdk.tokens import Ids, PromptEncoder
from edge_sdk.training.batches import Job, Source, Training, epochs
from edge_server import settings as run_settings
from edge_server.llm.distil import OfLlm, OfSlm, Partner, partners
from edge_server.llm.jobs import Distil, Mutual
from edge_server.llm.worker import Models, do
from edge_server.systems import fedcollm
from edge_server.systems.fedcollm import FedCoLlm
from examples import cloze
from examples.cloze import Choice

SLM = ("zero_shot", "standalone", "fedavg", "fedavg_server_ce", "lambda0", "fedcollm")
LLM = ("zero_shot", "auxiliary_only", "centralized", "fedcollm")
METHODS = (*SLM, "centralized")
LLM_ROWS = {"auxiliary_only": "lambda0"}  # an LLM that nobody teaches has the server's labels alone
TASKS = ("sentiment", "cloze")
LABELS = 32  # of a device
AUXILIARY = 32  # the server's labelled texts, of all domains: as many as one device has
RATES = (("training.learning_rate", 2e-4), ("mutual.slm_learning_rate", 2e-4), ("mutual.llm_learning_rate", 1e-4))
SAME = {  # what sets `lambda0` apart from `fedavg_server_ce`
    "sentiment": "the same but for the order of texts",
    "cloze": "the same but for the order of texts, and one mean over tokens where the other has one over rows",
}
CHANGES = {"sentiment": (), "cloze": RATES}  # of the example's settings, by task: words take smaller steps
HELD_OUT = {"sentiment": 120, "cloze": 60}  # test texts of a device


class Cell(NamedTuple):
    """One method with one seed. `change`: settings to try, by name, e.g. `mutual.weight`."""

    task: str
    seed: int
    method: str
    part: fleet.Part = "test"
    change: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Place:
    """What a cell works with."""

    lab: fleet.Lab
    settings: FedCoLlm
    devices: Sequence[Private]
    choices: Sequence[Sequence[Choice]]
    auxiliary: tuple[Example, ...]
    models: Models
    folder: Path

    @property
    def steps(self) -> int:
        """Of the server, for a version."""
        return self.settings.mutual.passes * -(-len(self.auxiliary) // self.settings.mutual.batch_size)


def run_file() -> run_settings.RunSettings:
    return run_settings.load(fleet.CONFIGS / "fedcollm.toml")


def settings_of(cell: Cell) -> FedCoLlm:
    """The settings of examples/fedcollm.toml, the LLM on one core."""
    if (settings := run_file().fedcollm) is None:
        raise ValueError("examples/fedcollm.toml has no table [fedcollm]")
    parts = {"mutual": settings.mutual, "training": settings.averaging.training, "averaging": settings.averaging}
    for name, value in (*CHANGES[cell.task], *cell.change):
        part, _, key = name.partition(".")
        parts[part] = msgspec.structs.replace(parts[part], **{key: type(getattr(parts[part], key))(value)})
    averaging = msgspec.structs.replace(parts["averaging"], training=parts["training"], seed=cell.seed, soft=None)
    llm = msgspec.structs.replace(settings.llm, threads=1)
    return msgspec.structs.replace(settings, averaging=averaging, mutual=parts["mutual"], llm=llm)


@cache
def models(task: str) -> tuple[fleet.Lab, Models]:
    """The devices' model and the LLM, loaded once in a process."""
    from edge_server.llm.model import Llm

    run = run_file()
    run = run if task == "sentiment" else msgspec.structs.replace(run, task=cloze.TASK)
    lab = fleet.open_lab(fleet.small_bundle(), run)
    llm = Llm(resolve(MODELS["smollm2"]), run.task, settings_of(Cell(task, 0, "")).llm)
    return lab, Models(llm, lab.lora, next(iter(bundles.read(lab.folder).end), None))


def measure(cell: Cell) -> list[dict[str, Any]]:
    """Trains one cell and measures devices' model and LLM; runs in a worker process."""
    lab, both = models(cell.task)
    devices, choices, auxiliary = _sentiment(cell) if cell.task == "sentiment" else _cloze(cell)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Place(lab, settings_of(cell), devices, choices, tuple(auxiliary), both, Path(folder))
        slm, llm = _train(place, cell.method)
    seconds = round(time.perf_counter() - began, 1)
    row = {"task": cell.task, "seed": cell.seed, "method": cell.method, "change": dict(cell.change), "seconds": seconds}
    return [
        *({**row, "model": "slm", **_slm(place, slm)} for _ in (0,) if slm),
        *({**row, "model": "llm", **_llm(place, adapter)} for adapter in (llm,) if adapter is not None),
    ]


def _sentiment(cell: Cell) -> tuple[list[Private], list[list[Choice]], list[Example]]:
    """Devices' and the server's labels, half of each class on either side."""
    found = fleet.devices("by-domain", LABELS + AUXILIARY // 4, 0, HELD_OUT[cell.task], cell.part, cell.seed)
    shared = [fleet.share(private.labelled, LABELS) for private in found]
    devices = [replace(private, labelled=own) for private, (own, _) in zip(found, shared, strict=True)]
    return devices, [], [e for _, rest in shared for e in rest]


def _cloze(cell: Cell) -> tuple[list[Private], list[list[Choice]], list[Example]]:
    """Devices with prompts and answers, what they are asked at the end, and the server's share of each domain."""
    rng = np.random.default_rng(cell.seed)
    devices, asked, auxiliary = [], [], []
    for domain in fleet.domains().values():
        train = cloze.examples([domain.train[i] for i in rng.permutation(len(domain.train))])
        held = cloze.choices(domain.test if cell.part == "test" else domain.validation, rng)
        devices.append(Private(tuple(train[:LABELS]), (), (), ()))
        auxiliary += train[LABELS:][: AUXILIARY // 4]
        asked.append([held[i] for i in rng.permutation(len(held))[: HELD_OUT[cell.task]]])
    return devices, asked, auxiliary


def _train(place: Place, method: str) -> tuple[Sequence[Arrays], Arrays | None]:
    """Devices' adapters, one each, and the LLM's; none where the method has none."""
    lab, how, llm = place.lab, fedcollm.averaging(place.settings), place.models.llm
    start = lab.spec.start(how.seed)
    many = len(place.devices)
    match method:
        case "zero_shot":
            return [start] * many, llm.start(how.seed)
        case "standalone":
            return [fleet.federate([d], start, lab.spec, how, lab.engine, lab.lora) for d in place.devices], None
        case "fedavg":
            return [fleet.federate(place.devices, start, lab.spec, how, lab.engine, lab.lora)] * many, None
        case "fedavg_server_ce":
            taught = _server_ce(place)
            return [fleet.federate(place.devices, start, lab.spec, how, lab.engine, lab.lora, after=taught)] * many, None
        case "lambda0" | "fedcollm":
            weight = place.settings.mutual.weight if method == "fedcollm" else 0.0
            distil = _distil(place, msgspec.structs.replace(place.settings.mutual, weight=weight))
            adapter = fleet.federate(place.devices, start, lab.spec, how, lab.engine, lab.lora, after=distil)
            return [adapter] * many, llm.get()
        case "centralized":
            return (), _centralized(place)
    raise ValueError(f"no method {method}")


def _server_ce(place: Place) -> fleet.After:
    """The server's labels, learned by the averaged adapter; no LLM."""
    how, rows = place.settings.mutual, verbs.private_rows(place.auxiliary, place.lab.engine)
    training = Training(place.steps, how.batch_size, how.slm_learning_rate, dropout=0.0)

    def after(version: int, adapter: Arrays) -> Arrays:
        job = Job(adapter, [Source(rows, how.batch_size)], training, place.settings.averaging.seed + version + 1)
        return place.lab.lora.fit(job)[0]

    return after


def _distil(place: Place, how: Mutual) -> fleet.After:
    """The server's own job, on files as the server does it."""
    slm, slm_out, llm_out = (place.folder / name for name in ("slm", "slm-out", "llm-out"))

    def after(version: int, adapter: Arrays) -> Arrays:
        slm.write_bytes(wire.pack_adapter(adapter))
        known = str(llm_out) if version else ""
        seed = place.settings.averaging.seed + version + 1
        do(place.models, Distil(known, str(slm), str(llm_out), str(slm_out), place.auxiliary, how, seed))
        return dict(load_file(slm_out))

    return after


def _centralized(place: Place) -> Arrays:
    """The LLM on all labels there are, in as many passes as the others see the server's."""
    settings, llm = place.settings, place.models.llm
    pooled = [*place.auxiliary, *(e for private in place.devices for e in private.labelled)]
    how, seed = settings.mutual, settings.averaging.seed
    _, student, truths = partners(place.lab.lora, llm, pooled, place.models.end)
    llm.set(llm.start(seed + 1))
    for version in range(settings.averaging.versions):
        fit(student, truths, how.passes, how.batch_size, how.llm_learning_rate, seed + version + 1)
    return llm.get()


def fit(model: Partner, truths: Sequence[Tensor], passes: int, batch_size: int, rate: float, seed: int) -> None:
    """Cross-entropy alone, with the steps of `distil`."""
    optimizer = torch.optim.AdamW(model.trained, lr=rate, weight_decay=0.0)
    steps, rng = passes * -(-len(truths) // batch_size), np.random.default_rng(seed)
    for batch in epochs([1] * len(truths), batch_size, steps, rng):
        some = batch.tolist()
        optimizer.zero_grad()
        F.cross_entropy(model.said(some), torch.cat([truths[i] for i in some])).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.trained, 1.0)
        optimizer.step()


def picked(of: Callable[[list[Ids], list[int]], Partner], encoder: PromptEncoder, asked: Sequence[Choice]) -> float:
    """How often the true word is the likeliest of four: by the sum of its tokens' log-probabilities."""
    prompts = encoder.prompts([choice.example.text for choice in asked])
    words = [encoder.answers(choice.words, None) for choice in asked]
    read = sorted({(i, *ids[:-1]) for i, four in enumerate(words) for ids in four})  # before a last token; words share these
    sequences = [[*prompts[i], *ids, 0] for i, *ids in read]  # whatever comes last, nobody looks past it
    model, values = of(sequences, [len(prompts[i]) for i, *_ in read]), dict[tuple[int, ...], float]()
    with torch.no_grad():
        for at in range(0, len(read), 16):
            some = range(at, min(at + 16, len(read)))
            said = torch.split(F.log_softmax(model.said(some), dim=1), [len(read[i]) for i in some])
            for context, scores in zip([read[i] for i in some], said, strict=True):
                known, choice = torch.tensor(context[1:], dtype=torch.long), words[context[0]]
                before = float(scores[:-1].gather(1, known[:, None]).sum())
                own = [ids for ids in choice if (*ids[:-1],) == context[1:]]
                values |= {(context[0], *ids): before + float(scores[-1, ids[-1]]) for ids in own}
    return statistics.fmean(max(four, key=lambda ids: values[i, *ids]) == four[0] for i, four in enumerate(words))


def _slm(place: Place, own: Sequence[Arrays]) -> dict[str, Any]:
    spec, engine, lora = place.lab.spec, place.lab.engine, place.lab.lora
    if place.choices:
        found = []
        for adapter, asked in zip(own, place.choices, strict=True):
            lora.set(adapter)
            found.append(picked(lambda ids, starts: OfSlm(lora, ids, starts, lora.encoder.vocabulary), lora.encoder, asked))
        return {"accuracy": statistics.fmean(found), "per_device": found}
    found = [fleet.accuracies(a, spec, [d], engine)[0] for a, d in zip(own, place.devices, strict=True)]
    return {"accuracy": statistics.fmean(found), "per_device": found}


def _llm(place: Place, adapter: Arrays) -> dict[str, Any]:
    llm, known = place.models.llm, [e for private in place.devices for e in private.held_out]
    llm.set(adapter)
    if place.choices:
        encoder = place.lab.lora.encoder
        asked = [choice for own in place.choices for choice in own]
        return {"accuracy": picked(lambda ids, starts: OfLlm(llm, ids, starts, encoder.vocabulary), encoder, asked)}
    scores = llm.logits([e.text for e in known])
    raw, balanced = mutual.both_ways(scores, [e.label for e in known])
    return {"accuracy": raw, "balanced": balanced}


# The bench ------------------------------------------------------------------------------------------------------------
def run(full: bool) -> Result:
    """Two seeds of each task; `full`: five."""
    rows = run_all([Cell(task, seed, method) for seed in range(5 if full else 2) for task in TASKS for method in METHODS])
    found = summary(rows)
    return Result("fedcollm", rows, found, pairs.table(rows, TASKS, METHODS), targets(rows, found))


def run_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures all cells: one list of rows."""
    fleet.small_bundle()  # made once, before the workers need it
    found = run_cells(
        measure, cells, lambda cell, _: f"{cell.task}, seed {cell.seed}, {cell.method}, {dict(cell.change)}", "fedcollm"
    )
    return [row for rows in found for row in rows]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds: of sentiment as the acceptance names them, of the last word under `cloze`."""
    lab, _ = models("sentiment")
    sent = sum(int(np.prod(shape)) for shape in lab.spec.update_shapes().values())
    first, second = ([r for r in rows if r["task"] == task] for task in TASKS)
    return {
        **_summary(first),
        "llm_balanced": {name: spread_of(first, "llm", LLM_ROWS.get(name, name), "balanced") for name in LLM},
        "cloze": _summary(second),
        "upload_fraction": sent / lab.parameters,
        "secure_mean_max_error": secure.error(lab.spec),
    }


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "slm": {method: spread_of(rows, "slm", method) for method in SLM},
        "llm": {name: spread_of(rows, "llm", LLM_ROWS.get(name, name)) for name in LLM},
    }


def targets(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """What is promised, and by how much it is kept or missed, seed by seed; docs/systems/fedcollm.md has them."""
    lines = []
    for task in TASKS:
        for base, target in (("fedavg_server_ce", 0.01), ("fedavg", 0.013), ("standalone", 0.013)):
            lines.append(pairs.gain_line(rows, task, "slm", "fedcollm", base, target))
        lines.append(pairs.gain_line(rows, task, "slm", "lambda0", "fedavg_server_ce") + f": {SAME[task]}")
        lines.append(pairs.share_line(rows, task, "fedcollm", 0.97))
        lines.append(pairs.gain_line(rows, task, "llm", "fedcollm", "lambda0"))
    sent, error = found["upload_fraction"], found["secure_mean_max_error"]
    for text, value, good in (
        ("share of the SLM's weights that a device sends (target <= 0.0035)", sent, sent <= 0.0035),
        ("largest error of a secure mean (target <= 1e-4)", error, error <= 1e-4),
    ):
        lines.append(f"{text} = {value:.4g}: {'kept' if good else 'MISSED'}")
    return lines
