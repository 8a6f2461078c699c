"""What rounding an update costs in accuracy: LP-FL with MiniLM, and nothing but how updates travel differs.

Four devices, one domain each, 16 labels and 240 texts without (as `bench lpfl`); examples/minilm.toml as it stands. Accuracy on
test text, differences within a seed.

    fp32           as the default
    fp16           half the bytes
    int8           a quarter; what rounding lost is added to the device's next update
    int8_forgotten the same, but lost is lost
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
from rich.table import Table

from bench import fleet
from bench.lpfl import SCALES
from bench.report import Result, run_cells, spread
from edge_sdk import codec
from edge_sdk.adapters import Arrays, add, shapes_of
from edge_sdk.codec import Encoding

ENCODINGS: dict[str, Encoding] = {"fp32": "fp32", "fp16": "fp16", "int8": "int8", "int8_forgotten": "int8"}


class Cell(NamedTuple):
    """One fleet."""

    way: str
    seed: int


class Line:
    """What a fleet's updates go through; `size` is the bytes of the last one's numbers."""

    def __init__(self, way: str) -> None:
        self._encoding, self._remembers = ENCODINGS[way], way == "int8"
        self._rests: dict[int, Arrays] = {}  # what each device still owes
        self.size = 0

    def __call__(self, device: int, delta: Arrays) -> Arrays:
        owed = add(delta, self._rests[device]) if device in self._rests else delta
        sent = codec.encode(owed, self._encoding)
        self.size = sum(array.nbytes for array in sent.values())
        if self._remembers:
            self._rests[device] = codec.lost(owed, self._encoding)
        return codec.decode(sent, self._encoding, shapes_of(delta))


def measure(cell: Cell) -> dict[str, Any]:
    """Trains one fleet and measures it on held-out text; runs in a worker process."""
    lab, scale, line = fleet.lab("minilm"), SCALES["minilm"], Line(cell.way)
    devices = fleet.devices("by-domain", 16, scale.unlabelled, scale.held_out, "test", cell.seed)
    settings = msgspec.structs.replace(lab.settings.lpfl, seed=cell.seed)
    began, start = time.perf_counter(), lab.spec.start(cell.seed)
    adapter = fleet.federate(devices, start, lab.spec, settings, lab.engine, lab.lora, travels=line)
    found = fleet.accuracies(adapter, lab.spec, devices, lab.engine)
    row = {**cell._asdict(), "bytes": line.size, "seconds": round(time.perf_counter() - began, 1)}
    return {**row, "accuracy": statistics.fmean(found), "per_device": found}


def run(full: bool) -> Result:
    """Three seeds; `full`: five."""
    fleet.bundle_of("minilm")  # made once, before the workers need it
    cells = [Cell(way, seed) for seed in range(5 if full else 3) for way in ENCODINGS]
    rows = run_cells(measure, cells, lambda cell, row: f"{cell.way}, seed {cell.seed}: {row['accuracy']:.3f}")
    return Result("uploads", rows, summary(rows), _table(rows))


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of each way: bytes against float32, accuracy over seeds, and what it is above that of float32, seed by seed."""
    of = {(r["way"], r["seed"]): r for r in rows}
    seeds = sorted({seed for _, seed in of})
    return {
        way: {
            "bytes": of[way, seeds[0]]["bytes"] / of["fp32", seeds[0]]["bytes"],
            "accuracy": spread([of[way, seed]["accuracy"] for seed in seeds]),
            "gain": spread([of[way, seed]["accuracy"] - of["fp32", seed]["accuracy"] for seed in seeds]),
        }
        for way in ENCODINGS
    }


def said(found: dict[str, Any]) -> str:
    """The summary in a sentence, as a page has it; a test holds the two together."""
    parts = [
        f"{way.replace('_', ' ')} {100 * found[way]['gain']['mean']:+.1f} ± {100 * found[way]['gain']['std']:.1f}"
        for way in ENCODINGS
        if way != "fp32"
    ]
    return f"points of accuracy against float32 ({found['fp32']['accuracy']['mean']:.3f}): {', '.join(parts)}"


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="accuracy on test text, mean over devices ± spread over seeds")
    for head in ("way", "bytes / fp32", "accuracy", "- fp32"):
        table.add_column(head, justify="left" if head == "way" else "right")
    for way, each in summary(rows).items():
        texts = [f"{each[key]['mean']:+.4f} ±{each[key]['std']:.4f}" for key in ("accuracy", "gain")]
        table.add_row(way.replace("_", " "), f"{each['bytes']:.3f}", *texts)
    return table
