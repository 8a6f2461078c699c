"""Buffered asynchronous averaging against synchronous rounds, in virtual time: hours and uploads to the same accuracy.

200 devices of four domains with 16 labels each train a LoRA adapter on frozen MiniLM embeddings of the ICWSM-14 sentences; the
loop around them is the product's (`edge_server/simulate.py`). In both modes a device that is free trains, one pass over its
labels:

    sync   a version is made of all 200 devices: FedAvg, a round lasts as long as its slowest device
    async  a version is made of the first 10 updates that arrive: FedBuff (Nguyen et al. 2022)

    three_tier   training takes 100, 200 or 400 s on average, sending 5 s more (NVFlare's edge simulation)
    half_normal  every training takes |N(0, 200)| s

Rates of device and server are chosen on validation text, by the time to the target, for each mode and delay alike; time and
uploads are counted on test text. The target is a share of what the same learner reaches on all labels in one place. It counts
as reached at the first version that is there and stays there on average for the next 420 s, longer than a round of three tiers:
who is measured more often shall not win by luck.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from bench import fleet
from bench.report import Result, run_cells, spread
from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec, Array, Arrays, Slot, subtract
from edge_sdk.assets import cache_folder
from edge_sdk.engines import open_engine
from edge_sdk.tasks import Example, accuracy, softmax
from edge_sdk.training.batches import Training
from edge_sdk.verbs import Learned
from edge_server import simulate
from edge_server.simulate import Delays, Fleet, HalfNormal, Tiers
from edge_server.systems.lpfl import LpFl

Mode = Literal["sync", "async"]
Part = Literal["validation", "test"]
MODES: tuple[Mode, ...] = ("sync", "async")
DELAYS: dict[str, Delays] = {"three_tier": Tiers(), "half_normal": HalfNormal()}
DEVICES, LABELS, BUFFER = 200, 16, 10
TRAIN, HELD_OUT = 900, 240  # texts of each domain
RATES = tuple(itertools.product((0.003, 0.01, 0.03), (1.0, 2.0, 4.0, 8.0, 16.0)))  # of a device's AdamW, of the server
SHARE = 0.99  # of the centralized accuracy
HORIZON, EVERY, HOLD = 8_000.0, 20.0, 420.0  # virtual seconds: of a run, between two measurements, and on target
SPEC = AdapterSpec((Slot("layer.0.head", 384, 2),), rank=8, alpha=16.0)  # on a head of zeros


class Texts(NamedTuple):
    """Embedded sentences (n, 384) and their classes (n,)."""

    x: Array
    y: NDArray[np.int64]


@dataclass(frozen=True)
class Learning:
    """A task: what each device may learn from, and what is measured on."""

    devices: tuple[Texts, ...]
    validation: Texts
    test: Texts

    @property
    def pooled(self) -> Texts:
        """All devices' labels in one place."""
        return _together(self.devices)


class Cell(NamedTuple):
    """One simulated run."""

    delays: str
    mode: Mode
    seed: int
    rates: tuple[float, float]
    target: float
    part: Part = "test"


class Point(NamedTuple):
    """A version that was measured."""

    seconds: float
    uploads: int
    accuracy: float


# What is learned ------------------------------------------------------------------------------------------------------
@cache
def learning(seed: int) -> Learning:
    """The sentences, embedded once and cached; device k has texts of domain k modulo 4, and nobody else has them."""
    rng = np.random.default_rng(seed)
    devices: dict[int, Texts] = {}
    validation, test = list[Texts](), list[Texts]()
    for index, domain in enumerate(fleet.domains().values()):
        train = _embedded(_some(domain.train, TRAIN))
        order = rng.permutation(len(train.y))
        for turn, k in enumerate(range(index, DEVICES, 4)):
            own = order[turn * LABELS :][:LABELS]
            devices[k] = Texts(train.x[own], train.y[own])
        validation.append(_embedded(_some(domain.validation, HELD_OUT)))
        test.append(_embedded(_some(domain.test, HELD_OUT)))
    return Learning(tuple(devices[k] for k in range(DEVICES)), _together(validation), _together(test))


def _together(parts: Sequence[Texts]) -> Texts:
    return Texts(np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts]))


def _some(examples: Sequence[Example], count: int) -> list[Example]:
    """Always the same ones, in no order: the file has one class after the other."""
    return [examples[i] for i in np.random.default_rng(0).permutation(len(examples))[:count]]


def _embedded(examples: Sequence[Example]) -> Texts:
    """MiniLM's unit vectors, from the cache where they have been made before."""
    folder = fleet.bundle_of("minilm")
    named = hashlib.sha256("\n".join([folder.name, *(e.text for e in examples)]).encode()).hexdigest()[:24]
    path = cache_folder() / "bench" / f"embedded-{named}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, open_engine(folder, bundles.read(folder), variant="int8").embed([e.text for e in examples]))
    return Texts(np.load(path), np.array([e.label for e in examples], np.int64))


def scores(adapter: Arrays, x: Array) -> Array:
    """(alpha / rank) B A x, (n, 2)."""
    (slot,) = SPEC.slots
    return np.asarray(SPEC.scaling * (x @ adapter[slot.a].T) @ adapter[slot.b].T, np.float32)


def fit(start: Arrays, texts: Texts, training: Training, rng: np.random.Generator) -> tuple[dict[str, Array], float]:
    """The adapter after `training.steps` steps of Adam on the cross-entropy (nats), and its mean; batches are drawn anew."""
    (slot,) = SPEC.slots
    arrays, losses = dict(start), []
    mean, square = ({name: np.zeros_like(array) for name, array in start.items()} for _ in range(2))
    for step in range(1, training.steps + 1):
        batch = rng.integers(0, len(texts.y), training.batch_size)
        x, y = texts.x[batch], texts.y[batch]
        probabilities = softmax(scores(arrays, x))
        losses.append(-float(np.log(probabilities[np.arange(len(y)), y].clip(1e-12)).mean()))
        error = probabilities.copy()
        error[np.arange(len(y)), y] -= 1
        error *= SPEC.scaling / len(y)
        gradients = {slot.a: (error @ arrays[slot.b]).T @ x, slot.b: error.T @ (x @ arrays[slot.a].T)}
        for name, gradient in gradients.items():
            mean[name] = np.asarray(0.9 * mean[name] + 0.1 * gradient, np.float32)
            square[name] = np.asarray(0.999 * square[name] + 0.001 * gradient**2, np.float32)
            towards = mean[name] / (1 - 0.9**step) / (np.sqrt(square[name] / (1 - 0.999**step)) + 1e-8)
            arrays[name] = np.asarray(arrays[name] - training.learning_rate * towards, np.float32)
    return arrays, statistics.fmean(losses)


def centralized(seed: int, rate: float, part: Part) -> float:
    """Accuracy of the same learner on all labels in one place."""
    task = learning(seed)
    training = Training(steps=800, batch_size=64, learning_rate=rate)
    adapter, _ = fit(SPEC.start(seed), task.pooled, training, np.random.default_rng(seed))
    held_out: Texts = getattr(task, part)
    return accuracy(scores(adapter, held_out.x), held_out.y.tolist())


# What is simulated ----------------------------------------------------------------------------------------------------
def settings_of(mode: Mode, rates: tuple[float, float], seed: int, devices: int = DEVICES) -> LpFl:
    """The modes differ in what makes a version, and in rates."""
    return LpFl(
        versions=1_000_000,
        buffer_size=devices if mode == "sync" else BUFFER,
        max_staleness=1_000_000,
        server_lr=rates[1],
        clip_norm=0.0,
        wait_seconds=1.0,
        evaluate_every=0,
        training=Training(steps=2, batch_size=8, learning_rate=rates[0], dropout=0.0),
        soft=None,
        seed=seed,
    )


def curve(cell: Cell, task: Learning, horizon: float = HORIZON) -> list[Point]:
    """Accuracy over virtual time, measured every 20 s at most, until the target is reached for good or the horizon."""
    settings = settings_of(cell.mode, cell.rates, cell.seed, len(task.devices))
    held_out: Texts = getattr(task, cell.part)

    def learn(_: int, adapter: Arrays, device: int, rng: np.random.Generator) -> Learned:
        own = task.devices[device]
        trained, loss = fit(adapter, own, settings.training, rng)
        return Learned(subtract(trained, adapter), len(own.y), {"loss": loss})

    found: list[Point] = []
    for version in simulate.run(settings, SPEC, Fleet(len(task.devices), DELAYS[cell.delays], seed=cell.seed), learn):
        if version.seconds > horizon:
            break
        if found and version.seconds < found[-1].seconds + EVERY:
            continue
        measured = accuracy(scores(version.adapter, held_out.x), held_out.y.tolist())
        found.append(Point(version.seconds, version.uploads, measured))
        at = reached(found, cell.target)
        if at is not None and version.seconds > at.seconds + HOLD:
            break
    return found


def reached(points: Sequence[Point], target: float) -> Point | None:
    """The first point on target from which the mean of the next 420 s is on target too."""
    for i, point in enumerate(points):
        if point.accuracy >= target:
            following = itertools.takewhile(lambda p: p.seconds <= point.seconds + HOLD, points[i:])  # noqa: B023  # used here
            if statistics.fmean(p.accuracy for p in following) >= target:
                return point
    return None


def measure(cell: Cell) -> dict[str, Any]:
    """Simulates one cell; runs in a worker process."""
    began = time.perf_counter()
    points = curve(cell, learning(cell.seed))
    at = reached(points, cell.target)
    numbers = {"reached": at is not None, "seconds": at.seconds if at else HORIZON, "uploads": (at or points[-1]).uploads}
    best = max(p.accuracy for p in points)
    return {**cell._asdict(), **numbers, "best": best, "took": round(time.perf_counter() - began, 1), "curve": points}


def best_rates(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Those that reach the target soonest; where none does, those that come nearest."""
    best = min(rows, key=lambda row: (not row["reached"], row["seconds"], -row["best"]))
    return float(best["rates"][0]), float(best["rates"][1])


def crowd(devices: int) -> dict[str, Any]:
    """Processor seconds of a large fleet that learns nothing, each device about twice."""

    def nothing(_: int, adapter: Arrays, __: int, ___: np.random.Generator) -> Learned:
        return Learned({name: np.zeros_like(array) for name, array in adapter.items()}, 1, {})

    settings = LpFl(versions=40, buffer_size=devices // 20, max_staleness=1_000_000, evaluate_every=0, wait_seconds=1.0)
    began = time.process_time()
    *_, last = simulate.run(settings, AdapterSpec((Slot("layer.0", 1, 1),), 1, 1.0), Fleet(devices), nothing)
    return {"devices": devices, "uploads": last.uploads, "virtual_seconds": last.seconds, "took": time.process_time() - began}


# The bench ------------------------------------------------------------------------------------------------------------
def run(full: bool) -> Result:
    """Five seeds, twenty with `full`."""
    seeds = range(20 if full else 5)
    rate = max((rate for rate, _ in RATES), key=lambda rate: centralized(0, rate, "validation"))
    goal = SHARE * centralized(0, rate, "validation")
    pairs = list(itertools.product(DELAYS, MODES))
    tried = run_cells(measure, [Cell(d, m, 0, rates, goal, "validation") for d, m in pairs for rates in RATES], _told)
    chosen = {(d, m): best_rates([r for r in tried if (r["delays"], r["mode"]) == (d, m)]) for d, m in pairs}
    ceiling = {seed: centralized(seed, rate, "test") for seed in seeds}
    rows = run_cells(measure, [Cell(d, m, s, chosen[d, m], SHARE * ceiling[s]) for s in seeds for d, m in pairs], _told)
    many = crowd(10_000)
    summary = {**ratios(rows), "centralized": spread(list(ceiling.values())), "crowd_seconds": many["took"]}
    without = [{name: value for name, value in row.items() if name != "curve"} for row in tried]
    notes = [*_targets(rows, summary), f"10,000 devices, {many['uploads']:,} uploads: {many['took']:.0f} s (target < 120)"]
    return Result("async_vs_sync", [*rows, *without, many], summary, _table(rows), notes)


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many times as fast async is, in virtual time, and its uploads over those of sync, both to the target and within a
    seed: the mean, and the spread over seeds. A mode that never got there counts with the horizon."""
    found: dict[str, Any] = {}
    for name in DELAYS:
        found[f"{name}_speedup"] = _over(rows, name, "seconds", inverse=True)
    found["upload_ratio"] = _over(rows, "three_tier", "uploads", inverse=False)
    return {name: value["mean"] for name, value in found.items()} | {f"{name}_std": value["std"] for name, value in found.items()}


def _over(rows: Sequence[dict[str, Any]], delays: str, key: str, inverse: bool) -> dict[str, float]:
    by = {(r["mode"], r["seed"]): float(r[key]) for r in rows if r["delays"] == delays}
    quotients = [by["async", seed] / by["sync", seed] for seed in sorted({seed for _, seed in by})]
    return spread([1 / q if inverse else q for q in quotients])


def _targets(rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> list[str]:
    kept = "kept" if summary["three_tier_speedup"] >= 2 else "MISSED"
    lines = [
        f"three tiers: async is {summary['three_tier_speedup']:.2f} ±{summary['three_tier_speedup_std']:.2f} times as fast "
        f"(target >= 2): {kept}; it takes {summary['upload_ratio']:.2f} ±{summary['upload_ratio_std']:.2f} of the uploads",
        f"half-normal: {summary['half_normal_speedup']:.2f} ±{summary['half_normal_speedup_std']:.2f} times as fast",
        f"target: {SHARE:.0%} of the centralized accuracy, {summary['centralized']['mean']:.3f}",
    ]
    late = [f"{r['delays']} {r['mode']} seed {r['seed']}" for r in rows if not r["reached"]]
    return [*lines, f"never on target, and counted with {HORIZON:,.0f} s: {', '.join(late)}"] if late else lines


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=f"to {SHARE:.0%} of the centralized accuracy on test text, mean over seeds (spread)")
    for head in ("delays", "mode", "rates", "virtual hours", "uploads", "best accuracy"):
        table.add_column(head, justify="left" if head in ("delays", "mode") else "right")
    for line in markdown(rows).splitlines()[2:]:
        table.add_row(*(part.strip() for part in line.strip("|").split("|")))
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as docs/simulate.md shows it, of what was measured on test text; a test holds the two together."""
    heads = ("delays", "mode", "rates", "virtual hours", "uploads", "best accuracy")
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    for delays, mode in itertools.product(DELAYS, MODES):
        own = [r for r in rows if (r.get("delays"), r.get("mode"), r.get("part", "test")) == (delays, mode, "test")]
        hours, uploads, best = (spread([float(r[key]) for r in own]) for key in ("seconds", "uploads", "best"))
        device, server = own[0]["rates"]
        cells = (
            f"{hours['mean'] / 3600:.2f} ±{hours['std'] / 3600:.2f}",
            f"{uploads['mean']:,.0f} ±{uploads['std']:,.0f}",
            f"{best['mean']:.3f}",
        )
        lines.append(" | ".join([delays.replace("_", " "), mode, f"{device:g}, {server:g}", *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _told(cell: Cell, row: dict[str, Any]) -> str:
    where = f"{cell.delays} {cell.mode} seed {cell.seed} rates {cell.rates[0]:g}, {cell.rates[1]:g}"
    came = f"on target after {row['seconds'] / 3600:.2f} h" if row["reached"] else f"never on target, at best {row['best']:.3f}"
    return f"{where}: {came} in {row['took']:.0f} s"
