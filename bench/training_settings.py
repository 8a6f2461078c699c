"""How the rates of bench/training.py were chosen: every k at several, on validation text and other sentences.

The Trainer takes what is best for full depth: it is the same training.
"""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import Result, spread
from bench.training import SENTENCES, Plan, measure

GRID = {
    "split 4": (2e-3, 4e-3, 8e-3),
    "split 8": (1e-3, 2e-3, 4e-3, 8e-3),
    "split 10": (2e-3, 3e-3),
    "split 12": (1e-3, 2e-3, 3e-3),
    "split 20": (5e-4, 1e-3, 2e-3),
    "split 30": (2.5e-4, 5e-4, 1e-3, 2e-3),
}


def run(full: bool) -> Result:
    """Two seeds, three with `full`."""
    console = Console(stderr=True)
    seeds = range(3 if full else 2)
    plans = [Plan(m, SENTENCES, s, rate, "validation") for m, rates in GRID.items() for rate in rates for s in seeds]
    rows = [measure(plan, console) for plan in plans]
    table = Table(title="accuracy on validation text, mean over seeds")
    for head in ("method", "rate", "accuracy"):
        table.add_column(head)
    best: dict[str, Any] = {}
    for method, rates in GRID.items():
        found = {rate: [r["accuracy"] for r in rows if (r["method"], r["rate"]) == (method, rate)] for rate in rates}
        best[method] = max(found, key=lambda rate: statistics.fmean(found[rate]))
        for rate, values in found.items():
            table.add_row(method, f"{rate:g}", f"{spread(values)['mean']:.3f} ± {spread(values)['std']:.3f}")
    return Result("training_settings", rows, {"best": best}, table)
