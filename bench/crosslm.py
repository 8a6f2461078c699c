"""CrossLM-style learning and its ablations on the ICWSM-14 domains: does each side get better, and from what?

Four devices, one domain each, 16 or 32 labels, 16 more to choose by; SmolLM2-135M-Instruct writes. One cell trains everything for
one seed, and what methods have in common is done once. Settings come from validation text (docs/LOG.md), accuracy from test text.
Devices have MiniLM; with `--full`, in one cell, SmolLM2, of which they train the top 12 layers and are measured on fewer texts.

    zero_shot         the base model and its verbalizer
    standalone        each device trains on its own labels
    datafree_kd       labels, and as many texts as `crosslm` ever sees, with the label the LLM was asked for; nobody judges, but
                      devices keep the better adapter, as in all that follow
    no_feedback       texts are judged, and the LLM learns nothing from it
    no_contrast       the LLM learns to write what is good, but not what is bad
    crosslm           everything
    unchosen          the same devices' last adapters, better or not
    lpfl              LP-FL: averaged adapters and soft labels of the devices' own texts, no LLM
    crosslm_plus_lpfl LP-FL with crosslm's judged texts beside the labels
"""

from __future__ import annotations

import asyncio
import pydoc_data.topics
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from rich.table import Table

from bench import fleet, mutual
from bench.report import Result, run_cells, spread
from edge_sdk.adapters import Arrays
from edge_sdk.assets import MODELS, cache_folder, resolve
from edge_sdk.protocol import Mix, Sample
from edge_sdk.tasks import Example, Private, Task
from edge_server import settings as run_settings
from edge_server.knowledge.filters import Embed
from edge_server.llm.jobs import Foresee, Hello, Job, Labelled, Lessons, Outcome, Perplexity, Tune, Tuning
from edge_server.systems.crosslm import CrossLm

METHODS = (
    *("zero_shot", "standalone", "datafree_kd", "no_feedback", "no_contrast"),
    *("crosslm", "unchosen", "lpfl", "crosslm_plus_lpfl"),
)
ABLATIONS = ("no_feedback", "no_contrast", "lpfl")  # a cell of their own
MUTUAL = tuple(m for m in METHODS if m not in ABLATIONS)
SLMS = {"minilm": (0, 1.0, 240), "smollm2": (12, 2.0, 60)}  # layers trained (0: all), learning rate x the run's, test texts
CHOICE = 16  # labels a device holds out, to keep the better adapter by
NAMES = {"minilm": "MiniLM", "smollm2": "SmolLM2"}
UNLABELLED, LLM_TEXTS = 240, 30  # of a device; LLM_TEXTS of its test texts are put to the LLM
TOPIC = Task(("movie", "product"), "{text}\nThis is about a", ((" movie",), (" product",)), 1.0, 48)  # a task nobody trains


class Cell(NamedTuple):
    """Everything that is trained for one seed."""

    labels: int
    seed: int
    methods: tuple[str, ...] = METHODS
    part: fleet.Part = "test"
    slm: str = "minilm"


@dataclass(frozen=True)
class Place:
    """What a cell works with: models, and the devices twice, as they learn and as they are measured."""

    lab: fleet.Lab
    task: Task
    settings: CrossLm
    devices: mutual.Devices
    measured: Sequence[Private]
    llm: mutual.Here
    folder: Path
    embed: Embed | None
    foreign: Sequence[str]

    def accuracies(self, own: Sequence[Arrays]) -> list[float]:
        """Each device's adapter on its domain's held-out text."""
        pairs = zip(own, self.measured, strict=True)
        return [fleet.accuracies(adapter, self.lab.spec, [private], self.lab.engine)[0] for adapter, private in pairs]

    def versions(self, tuning: Tuning) -> list[mutual.Version]:
        """A whole run, by the server's author and the devices' verbs."""
        settings = msgspec.structs.replace(self.settings, tuning=tuning)

        async def collect() -> list[mutual.Version]:
            start = self.lab.spec.start(settings.seed)
            return [v async for v in mutual.versions(self.devices, start, settings, self.task, self.llm, self.folder, self.embed)]

        return asyncio.run(collect())

    def panel(self, versions: Sequence[mutual.Version]) -> list[float]:
        """Share of good texts in each sheet by judges that never learn: devices as they were before the first."""
        first, *later = versions
        return [self.devices.acceptance(first.own, version.sheet, self.settings) for version in later]

    def federated(self, feed: Sequence[Sample]) -> list[Arrays]:
        """LP-FL with the settings of examples/minilm.toml, and the feed beside each device's labels."""
        how, settings = msgspec.structs.replace(self.lab.settings.lpfl, seed=self.settings.seed), self.settings
        mix = Mix(len(feed), settings.weight, settings.batch_size, settings.label_temperature) if feed else None
        start, spec, engine = self.lab.spec.start(how.seed), self.lab.spec, self.lab.engine
        adapter = fleet.federate(self.devices.fleet, start, spec, how, engine, self.lab.lora, feed, mix)
        return [adapter] * len(self.measured)

    def ask(self, job: Job) -> Outcome:
        return asyncio.run(self.llm.run(job))


def run_file() -> run_settings.RunSettings:
    return run_settings.load(fleet.CONFIGS / "crosslm.toml")


def settings_of(seed: int, slm: str = "minilm") -> CrossLm:
    """The settings of examples/crosslm.toml, the LLM on one core."""
    if (settings := run_file().crosslm) is None:
        raise ValueError("examples/crosslm.toml has no table [crosslm]")
    _, faster, _ = SLMS[slm]
    alone, training = (
        msgspec.structs.replace(how, learning_rate=faster * how.learning_rate) for how in (settings.alone, settings.training)
    )
    llm = msgspec.structs.replace(settings.llm, threads=1)
    return msgspec.structs.replace(settings, seed=seed, llm=llm, alone=alone, training=training)


def measure(cell: Cell) -> list[dict[str, Any]]:
    """Trains and measures one cell; runs in a worker process."""
    from edge_server.llm.model import Llm

    layers, _, texts = SLMS[cell.slm]
    lab, settings, task = fleet.lab(cell.slm, layers=layers), settings_of(cell.seed, cell.slm), run_file().task
    private = fleet.devices("by-domain", cell.labels, UNLABELLED, CHOICE, "validation", cell.seed)
    skip = CHOICE if cell.part == "validation" else 0  # nobody is measured on what it chose by
    held = fleet.devices("by-domain", cell.labels, 0, texts + skip, cell.part, cell.seed)
    model, cache = resolve(MODELS[settings.llm.model]), cache_folder() / "bench"
    cache.mkdir(parents=True, exist_ok=True)
    here = mutual.Here(Llm(model, task, settings.llm), Hello(str(model), task, settings.llm), cache)
    devices = mutual.Devices(private, lab.spec, lab.engine, lab.lora)
    with tempfile.TemporaryDirectory() as folder:
        measured = [replace(p, held_out=p.held_out[skip:]) for p in held]
        embed = lab.engine.embed if cell.slm == "minilm" else None  # as the server: a decoder's states do not say what is alike
        place = Place(lab, task, settings, devices, measured, here, Path(folder), embed, foreign(cell.part))
        return [
            {"slm": cell.slm, "labels": cell.labels, "seed": cell.seed, **row}
            for row in _rows(place, cell.methods, (cell.slm, cell.labels) == ("minilm", 16))
        ]


def foreign(part: fleet.Part) -> list[str]:
    """Excerpts of Python's manual: nothing that a device, a judge or the LLM ever saw in a run.

    What was looked at when the leash was chosen is not for the test.
    """
    topics = [text for text in pydoc_data.topics.topics.values() if len(text) >= 400]
    known = {*list(pydoc_data.topics.topics.values())[:40], *sorted(pydoc_data.topics.topics.values())[:40]}
    found = [text for text in topics if (text in known) == (part == "validation")]
    return [" ".join(text.split())[:400] for text in found[:25]]


def _rows(place: Place, methods: Sequence[str], llm: bool) -> Iterator[dict[str, Any]]:
    """Devices' rows, one a method, and the LLM's, one a version and one for its upper bound."""
    tuning, start = place.settings.tuning, place.lab.spec.start(place.settings.seed)
    deaf = msgspec.structs.replace(tuning, generation=0.0, contrast_weight=0.0, task=0.0)
    versions: list[mutual.Version] = []
    for method in methods:
        began, more = time.perf_counter(), dict[str, Any]()
        match method:
            case "zero_shot":
                own: Sequence[Arrays] = [start] * len(place.measured)
            case "standalone":
                own = place.devices.train(start, place.settings)
            case "datafree_kd":
                taught = place.devices.train(start, place.settings, asyncio.run(_as_written(place)))
                own = place.devices.better(place.devices.train(start, place.settings), taught)
            case "no_feedback":
                own = (found := place.versions(deaf))[-1].kept
                more = {"acceptance": [v.acceptance for v in found[1:]], "panel": place.panel(found)}
            case "no_contrast":
                own = (found := place.versions(msgspec.structs.replace(tuning, contrast="none")))[-1].kept
                more = {"acceptance": [v.acceptance for v in found[1:]], "panel": place.panel(found)}
            case "crosslm":
                own = (versions := place.versions(tuning))[-1].kept
                more = {"traffic": max(v.traffic for v in versions), "by_version": _means(place, versions)}
                more |= {"acceptance": [v.acceptance for v in versions[1:]], "panel": place.panel(versions)}
            case "unchosen":
                own = versions[-1].own
            case "lpfl":
                own = place.federated(())
            case "crosslm_plus_lpfl":
                own = place.federated(versions[-1].feed)
            case _:
                raise ValueError(f"no method {method}")
        accuracy, seconds = place.accuracies(own), time.perf_counter() - began
        yield {"method": method, "accuracy": statistics.fmean(accuracy), "per_device": accuracy, "seconds": seconds, **more}
    if llm and versions:
        yield from _about_llm(place, versions)


def _means(place: Place, versions: Sequence[mutual.Version]) -> list[float]:
    return [statistics.fmean(place.accuracies(version.own)) for version in versions]


async def _as_written(place: Place) -> list[Sample]:
    """All that the base writes, with the labels it was asked for."""
    texts = await mutual.sheets(place.settings, place.task, place.llm, place.folder, place.embed)
    sure, names = np.eye(len(place.task.labels)), place.task.labels
    return [
        Sample(i + 1, text.id, text.text, names[text.label], tuple(map(float, sure[text.label])), 1.0, 0, "", "")
        for i, text in enumerate(texts)
    ]


# The LLM --------------------------------------------------------------------------------------------------------------
def _about_llm(place: Place, versions: Sequence[mutual.Version]) -> Iterator[dict[str, Any]]:
    from edge_server.llm.model import Llm

    other = place.settings.llm
    other = msgspec.structs.replace(other, pattern=TOPIC.pattern, words=tuple(word[0] for word in TOPIC.verbalizer))
    model = resolve(MODELS[other.model])
    topic = mutual.Here(Llm(model, TOPIC, other), Hello(str(model), TOPIC, other), cache_folder() / "bench")
    about = [Example(e.text, i) for i in (0, 1) for e in place.measured[i].held_out[:LLM_TEXTS]]  # movie and amazon
    known = [e for private in place.measured for e in private.held_out[:LLM_TEXTS]]

    def row(name: str, adapter: str) -> dict[str, Any]:
        raw, balanced = _accuracy(place.llm, adapter, known)
        outcome = place.ask(Foresee(adapter, tuple(place.foreign)))
        perplexity = outcome.value if isinstance(outcome, Perplexity) else float("nan")
        found = {"llm": name, "task": raw, "task_balanced": balanced, "foreign_perplexity": perplexity}
        return {**found, "other_task_balanced": _accuracy(topic, adapter, about)[1]}

    yield row("before", "")
    for number, version in enumerate(versions[1:]):
        yield {**row(f"version {number + 1}", version.llm), "acceptance": version.acceptance, "feed": len(version.feed)}
    yield row("upper_bound", str(_upper_bound(place)))


def _upper_bound(place: Place) -> Path:
    """The LLM tuned on all devices' labels in one place, as many steps as in a whole run."""
    tuning, classes = place.settings.tuning, len(place.task.labels)
    pooled = [e for private in place.devices.fleet for e in private.labelled]
    labelled = tuple(Labelled(e.text, tuple(float(e.label == c) for c in range(classes))) for e in pooled)
    out = place.folder / "upper-bound"
    steps = tuning.steps * place.settings.versions
    place.ask(Tune("", str(out), Lessons(labelled=labelled), msgspec.structs.replace(tuning, steps=steps), place.settings.seed))
    return out


def _accuracy(llm: mutual.Here, adapter: str, examples: Sequence[Example]) -> tuple[float, float]:
    return asyncio.run(mutual.skill(llm, adapter, examples))


# The bench ------------------------------------------------------------------------------------------------------------
def run(full: bool) -> Result:
    """16 labels and one seed, 20 minutes on two cores; `full`: three seeds, 32 labels too, without the ablations, and SmolLM2."""
    seeds = range(3 if full else 1)
    cells = [Cell(16, seed, methods) for seed in seeds for methods in (MUTUAL, ABLATIONS)]
    if full:
        own = tuple(m for m in MUTUAL if m != "crosslm_plus_lpfl")
        cells.insert(2, Cell(16, 0, own, slm="smollm2"))  # the longest, so not the last
        cells += [Cell(32, seed, MUTUAL) for seed in seeds]
    rows = run_all(cells)
    return Result("crosslm", rows, summary(rows), _table(rows), _targets(rows))


def run_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures all cells: one list of rows."""
    for slm in {cell.slm for cell in cells}:
        fleet.bundle_of(slm)  # exported and fetched once, before the workers need them
    resolve(MODELS[settings_of(0).llm.model])
    found = run_cells(
        measure,
        cells,
        lambda cell, _: f"{cell.slm}, {cell.labels} labels, seed {cell.seed}, {', '.join(cell.methods)}",
        "crosslm",
    )
    return [row for rows in found for row in rows]


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds of the runs with 16 labels, and of those with 32 where there are any."""
    few = _of(rows, "minilm", 16)
    llm = {name: _llm(few, name) for name in ("before", "upper_bound")}
    first, last = _llm(few, "version 1"), _llm(few, _last(few))
    return {
        "slm": _methods(few),
        "slm_32_labels": _methods(_of(rows, "minilm", 32)),
        "slm_smollm2": _methods(_of(rows, "smollm2", 16)),
        "llm": {
            "task_before": llm["before"]["task"],
            "task_before_balanced": llm["before"]["task_balanced"],
            "task_after": last["task"],
            "task_after_balanced": last["task_balanced"],
            "task_upper_bound": llm["upper_bound"]["task"],
            "foreign_perplexity_ratio": _ratio(few),
            "other_task_before": llm["before"]["other_task_balanced"],
            "other_task_after": last["other_task_balanced"],
            "acceptance_first": first["acceptance"],
            "acceptance_last": last["acceptance"],
        },
        "acceptance_by_judges_that_never_learn": {
            method: {"first": spread([f[0] for f in found]), "last": spread([f[-1] for f in found])}
            for method in ("no_feedback", "no_contrast", "crosslm")
            if (found := [r["panel"] for r in few if r.get("method") == method and "panel" in r])
        },
        "bytes_per_device_version": max(r["traffic"] for r in rows if "traffic" in r),  # of 1,000 texts
    }


def _of(rows: Sequence[dict[str, Any]], slm: str, labels: int) -> list[dict[str, Any]]:
    return [r for r in rows if (r["slm"], r["labels"]) == (slm, labels)]


def _groups(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """SLMs and numbers of labels, in the order they were measured in."""
    return list(dict.fromkeys((r["slm"], r["labels"]) for r in rows))


def _methods(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found = {m: [r["accuracy"] for r in rows if r.get("method") == m] for m in METHODS}
    return {m: spread(values) for m, values in found.items() if values}


def _llm(rows: Sequence[dict[str, Any]], name: str) -> dict[str, dict[str, float]]:
    """Every number of the LLM's rows of this name, over seeds."""
    own = [r for r in rows if r.get("llm") == name]
    return {key: spread([r[key] for r in own]) for key in own[0] if key not in ("slm", "labels", "seed", "llm")}


def _last(rows: Sequence[dict[str, Any]]) -> str:
    """The name of the last version's rows."""
    return f"version {sum('acceptance' in r for r in rows if 'llm' in r) // len({r['seed'] for r in rows})}"


def _ratio(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Perplexity on foreign text, last version over base, seed by seed."""
    found = {(r["seed"], r["llm"]): r["foreign_perplexity"] for r in rows if "llm" in r}
    last = _last(rows)
    return spread([found[seed, last] / found[seed, "before"] for seed in sorted({seed for seed, _ in found})])


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table of the README; a test holds the two together."""
    heads = ["SLM", "labels", *(m.replace("_", " ") for m in METHODS)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for slm, labels in _groups(rows):
        found = _methods(_of(rows, slm, labels))
        lines.append(
            f"| {NAMES[slm]} | {labels} | " + " | ".join(f"{found[m]['mean']:.3f}" if m in found else "" for m in METHODS) + " |"
        )
    return "\n".join(lines)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="accuracy on test text, mean over devices (spread over seeds)")
    table.add_column("SLM")
    table.add_column("labels", justify="right")
    for name in METHODS:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for slm, labels in _groups(rows):
        found = _methods(_of(rows, slm, labels))
        table.add_row(
            NAMES[slm], str(labels), *(f"{found[m]['mean']:.3f}\n±{found[m]['std']:.3f}" if m in found else "" for m in METHODS)
        )
    return table


def _targets(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is promised, and by how much it is kept or missed; differences are within a seed."""
    lines, of = [], {((r["slm"], r["labels"]), r["seed"], r["method"]): r["accuracy"] for r in rows if "method" in r}
    for group in _groups(rows):
        seeds = sorted({seed for known, seed, _ in of if known == group})
        for base, margin in (("standalone", 0.058), ("datafree_kd", 0.02), ("no_feedback", 0.0), ("no_contrast", 0.0)):
            if (group, seeds[0], base) in of:
                got = spread([of[group, seed, "crosslm"] - of[group, seed, base] for seed in seeds])
                what = f"{NAMES[group[0]]}, {group[1]} labels: crosslm - {base} = {got['mean']:+.4f} ±{got['std']:.4f}"
                lines.append(f"{what}, target >= {margin:+.3f}: {'kept' if got['mean'] >= margin else 'MISSED'}")
    found = summary(rows)
    mean = {name: value["mean"] for name, value in found["llm"].items()}
    for text, value, kept in (
        ("LLM's task accuracy, after - before (target >= +0.10)", gain := mean["task_after"] - mean["task_before"], gain >= 0.10),
        ("after / upper bound (target >= 0.90)", share := mean["task_after"] / mean["task_upper_bound"], share >= 0.90),
        ("acceptance, last - first (target > 0)", rise := mean["acceptance_last"] - mean["acceptance_first"], rise > 0),
        ("perplexity on foreign text, x (target <= 1.01)", ratio := mean["foreign_perplexity_ratio"], ratio <= 1.01),
        ("bytes of 1,000 texts (target <= 300,000)", size := found["bytes_per_device_version"], size <= 300_000),
    ):
        lines.append(f"{text} = {value:,.4g}: {'kept' if kept else 'MISSED'}")
    calibrated = mean["task_after_balanced"] - mean["task_before_balanced"]
    other = mean["other_task_after"] - mean["other_task_before"]
    judged = [
        f"acceptance by judges that never learn, {method}: {of['first']['mean']:.3f} to {of['last']['mean']:.3f}"
        for method, of in found["acceptance_by_judges_that_never_learn"].items()
    ]
    return [
        *lines,
        *judged,
        f"the LLM's gain with balanced thresholds, which take calibration out = {calibrated:+.4f}",
        f"the LLM on a task nobody trained (movie or product, balanced), after - before = {other:+.4f}",
    ]
