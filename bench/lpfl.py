"""LP-FL against its baselines on the ICWSM-14 domains: the claims of Jiang, Liu & Fan 2023 as a table.

Four devices, by domain or IID, 16 or 64 labels each, and texts without a label (240 for MiniLM, 80 for SmolLM2). All methods
share text, versions, steps and batch sizes, but for what `SCALES` says: the learning rate, dropout and passes that were best
for that method on validation text (bench/lpfl_settings.py; MiniLM by domain with 16 labels, used in every setting). SmolLM2's
baselines have LP-FL's settings, but for FP-FL's rate: they are not tuned. Accuracy is counted on test text.

    zero_shot    the base model and its verbalizer
    local_only   each device trains LoRA on its own labels
    fl_no_soft   LoRA, averaged every version, labels only
    lpfl         the same with soft labels
    fp_fl        every weight trained and averaged, the same soft labels; torch does what ONNX Runtime does elsewhere
    centralized  LoRA on all devices' labels in one place
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from bench import fleet
from bench.report import Result, run_cells, spread
from edge_sdk.adapters import Arrays
from edge_sdk.protocol import Update
from edge_sdk.tasks import Private
from edge_sdk.wire import pack
from edge_server.systems.lpfl import LpFl

SPLITS: tuple[fleet.Split, ...] = ("by-domain", "iid")
METHODS = ("zero_shot", "local_only", "fl_no_soft", "lpfl", "fp_fl", "centralized")


class Scale(NamedTuple):
    """How many texts without a label a device has, how many test texts (fewer where time is short), and in which settings a
    method differs from the run's."""

    unlabelled: int
    held_out: int
    few_held_out: int
    changes: dict[str, dict[str, float]]


SCALES = {
    "minilm": Scale(
        240,
        240,
        160,
        {
            "local_only": {"learning_rate": 5e-4},
            "fl_no_soft": {"learning_rate": 2e-3},
            "fp_fl": {"learning_rate": 3e-5},
            "centralized": {"steps": 16, "learning_rate": 5e-4},
        },
    ),
    "smollm2": Scale(80, 120, 60, {"fp_fl": {"learning_rate": 2e-5}}),
}


class Cell(NamedTuple):
    """One trained model or fleet."""

    slm: str
    split: fleet.Split
    labels: int
    seed: int
    method: str
    part: fleet.Part = "test"
    change: tuple[tuple[str, float], ...] = ()  # settings to try, by name; for lpfl_settings
    full: bool = True  # measured on all test texts


def measure(cell: Cell) -> dict[str, Any]:
    """Trains one cell and measures it on held-out text; runs in a worker process."""
    lab, scale = fleet.lab(cell.slm), SCALES[cell.slm]
    held_out = scale.held_out if cell.full else scale.few_held_out
    devices = fleet.devices(cell.split, cell.labels, scale.unlabelled, held_out, cell.part, cell.seed)
    began = time.perf_counter()
    accuracy = accuracies(cell.method, lab, devices, settings_of(cell, lab.settings.lpfl))
    seconds = round(time.perf_counter() - began, 1)
    row = {**cell._asdict(), "change": dict(cell.change), "seconds": seconds}
    return {**row, "accuracy": statistics.fmean(accuracy), "per_device": accuracy}


def settings_of(cell: Cell, run: LpFl) -> LpFl:
    """The run's settings as a method uses them.

    Raises:
        ValueError: a change that this method has no use for.
    """
    training, versions = run.training, run.versions
    soft = run.soft if cell.method in ("lpfl", "fp_fl") else None
    for name, value in (SCALES[cell.slm].changes.get(cell.method, {}) | dict(cell.change)).items():
        if name == "versions":
            versions = int(value)
        elif name in ("steps", "learning_rate", "dropout"):
            training = msgspec.structs.replace(training, **{name: type(getattr(training, name))(value)})
        elif soft is not None and name in soft.__struct_fields__:
            soft = msgspec.structs.replace(soft, **{name: type(getattr(soft, name))(value)})
        else:
            raise ValueError(f"{cell.method} has no setting {name}")
    return msgspec.structs.replace(run, training=training, soft=soft, seed=cell.seed, versions=versions)


def accuracies(method: str, lab: fleet.Lab, devices: Sequence[Private], settings: LpFl) -> list[float]:
    """Every method in a few lines: what is trained where, starting from the same adapter."""
    start, spec, engine = lab.spec.start(settings.seed), lab.spec, lab.engine
    match method:
        case "zero_shot":
            return fleet.accuracies(start, spec, devices, engine)
        case "local_only":
            alone = [fleet.federate([device], start, spec, settings, engine, lab.lora) for device in devices]
            return [fleet.accuracies(a, spec, [d], engine)[0] for a, d in zip(alone, devices, strict=True)]
        case "fl_no_soft" | "lpfl":
            return fleet.accuracies(fleet.federate(devices, start, spec, settings, engine, lab.lora), spec, devices, engine)
        case "centralized":
            one = fleet.federate([fleet.pooled(devices)], start, spec, settings, engine, lab.lora)
            return fleet.accuracies(one, spec, devices, engine)
        case "fp_fl":
            own, learner = lab.full()
            whole: Arrays = fleet.federate(devices, fleet.flatten(learner), spec, settings, own, learner)
            return fleet.accuracies(whole, spec, devices, own)
    raise ValueError(f"no method {method}")


def run_all(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measures all cells."""
    for slm in {cell.slm for cell in cells}:
        fleet.bundle_of(slm)  # exported once, before the workers need it
    return run_cells(measure, cells, _told)


def _told(cell: Cell, row: dict[str, Any]) -> str:
    where = f"{cell.slm} {cell.split} {cell.labels} labels seed {cell.seed} {cell.method}"
    return f"{where}: {row['accuracy']:.3f} in {row['seconds']:.0f} s"


def upload_fraction(slm: str) -> dict[str, float]:
    """Bytes of one upload as they go over the wire, and their share of the whole model's float32 bytes."""
    lab = fleet.lab(slm)
    size = len(pack(Update("0" * 32, 0, 16, {"loss": 0.5}), lab.spec.start(0)))
    return {"upload_bytes": size, "upload_fraction": size / (4 * lab.parameters)}


def run(full: bool) -> Result:
    """MiniLM in every setting with 3 seeds; SmolLM2 by domain with 16 labels and one seed, with `full` in every setting.

    24 minutes on two cores, `full` takes 48 and counts on more test texts.
    """
    settings = list(itertools.product(SPLITS, (16, 64)))
    plan = {
        "smollm2": [(split, labels, 0) for split, labels in (settings if full else settings[:1])],
        "minilm": [(split, labels, seed) for split, labels in settings for seed in (0, 1, 2)],
    }
    cells = [Cell(slm, *where, m, full=full) for slm, listed in plan.items() for where in listed for m in reversed(METHODS)]
    rows = run_all(cells)
    summary = {slm: {**_over_seeds(rows, slm), **upload_fraction(slm)} for slm in plan}
    ran = f"MiniLM: every setting, 3 seeds; SmolLM2: {'every setting' if full else 'by domain, 16 labels'}, 1 seed"
    return Result("lpfl", rows, summary, _table(rows), [f"ran: {ran}", *_targets(rows, summary), *_by_labels(rows)])


def _over_seeds(rows: Sequence[dict[str, Any]], slm: str) -> dict[str, Any]:
    """Each method's mean over settings, and its spread over seeds."""
    return {m: spread(_by_seed([r for r in rows if r["slm"] == slm], m)) for m in METHODS}


def _by_seed(rows: Sequence[dict[str, Any]], method: str) -> list[float]:
    seeds = sorted({r["seed"] for r in rows})
    return [statistics.fmean(r["accuracy"] for r in rows if r["method"] == method and r["seed"] == seed) for seed in seeds]


def grid(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str, int, list[dict[str, float]]]]:
    """One line a setting: model, split, labels, and every method's accuracy over seeds."""
    lines = []
    for slm, split, labels in dict.fromkeys((r["slm"], r["split"], r["labels"]) for r in rows):
        group = [r for r in rows if (r["slm"], r["split"], r["labels"]) == (slm, split, labels)]
        lines.append((slm, split, labels, [spread(_by_seed(group, m)) for m in METHODS]))
    return lines


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The grid as README.md shows it; a test holds the two together."""
    heads = ("model", "split", "labels", *(m.replace("_", " ") for m in METHODS))
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for slm, split, labels, cells in grid(rows):
        lines.append(" | ".join([slm, split, str(labels), *(f"{c['mean']:.3f}" for c in cells)]))
    return "\n".join(f"| {line} |" for line in lines)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="accuracy on test text, mean over devices (spread over seeds)")
    for name in ("model", "split", "labels", *METHODS):
        table.add_column(name.replace("_", "\n"), justify="left" if name in ("model", "split") else "right", no_wrap=True)
    for slm, split, labels, cells in grid(rows):
        table.add_row(slm, split, str(labels), *(f"{c['mean']:.3f}\n±{c['std']:.3f}" for c in cells))
    return table


def _targets(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    """What LP-FL is held to, and by how much it keeps or misses it; differences are within a seed."""
    wanted = (("local_only", 0.03), ("fl_no_soft", 0.01), ("fp_fl", 0.0), ("centralized", 0.0))
    lines = []
    for slm, numbers in summary.items():
        own = [r for r in rows if r["slm"] == slm]
        for method, margin in wanted:
            pairs = zip(_by_seed(own, "lpfl"), _by_seed(own, method), strict=True)
            got = spread([a - b for a, b in pairs])
            verdict = "kept" if got["mean"] >= margin else "MISSED"
            lines.append(f"{slm}: lpfl - {method} = {got['mean']:+.4f} ±{got['std']:.4f}, target >= {margin:+.2f}: {verdict}")
        lines.append(f"{slm}: one upload is {numbers['upload_bytes']:,} bytes, {numbers['upload_fraction']:.2%} of the model")
    return lines


def _by_labels(rows: Sequence[dict[str, Any]]) -> list[str]:
    """LP-FL's lead with few labels and with more."""
    lines = []
    for slm, labels in dict.fromkeys((r["slm"], r["labels"]) for r in rows):
        own = [r for r in rows if (r["slm"], r["labels"]) == (slm, labels)]
        mean = {m: statistics.fmean(_by_seed(own, m)) for m in METHODS}
        leads = ", ".join(f"{m} {mean['lpfl'] - mean[m]:+.4f}" for m in METHODS if m != "lpfl")
        lines.append(f"{slm}, {labels} labels: lpfl minus {leads}")
    return lines
