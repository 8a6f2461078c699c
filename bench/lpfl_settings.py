"""How LP-FL's settings and its baselines' were chosen: a grid on validation text, never on test text.

MiniLM by domain with 16 labels, the first seeds. It repeats the comparisons that decided `examples/minilm.toml` and `SCALES` of
bench/lpfl.py; docs/LOG.md has the numbers as they were then, failures included, and the few runs SmolLM2's settings rest on.
"""

from __future__ import annotations

from rich.table import Table

from bench.lpfl import Cell, run_all
from bench.report import Result, spread

GRID: dict[str, tuple[dict[str, float], ...]] = {
    "local_only": ({"learning_rate": 5e-4}, {"learning_rate": 1e-3}, {"dropout": 0.0}, {"dropout": 0.1}),
    "fl_no_soft": (
        *({"learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)),
        *({"learning_rate": 2e-3, "dropout": dropout} for dropout in (0.0, 0.1)),
    ),
    "lpfl": ({}, {"learning_rate": 2e-3}, {"dropout": 0.0}, {"dropout": 0.1}, {"first": 1.0}, {"growth": 96.0}, {"weight": 2.0}),
    "fp_fl": ({"learning_rate": 2e-5}, {"learning_rate": 3e-5}, {"learning_rate": 5e-5}),
    "centralized": (
        *({"steps": steps, "learning_rate": 1e-3} for steps in (8.0, 16.0, 32.0)),
        {"steps": 16.0, "learning_rate": 5e-4},
        *({"steps": 16.0, "learning_rate": 1e-3, "dropout": dropout} for dropout in (0.0, 0.1)),
    ),
}


def run(full: bool) -> Result:
    """Two seeds, four with `--full`."""
    seeds = range(4 if full else 2)
    cells = [
        Cell("minilm", "by-domain", 16, seed, method, "validation", tuple(change.items()))
        for method, changes in GRID.items()
        for change in changes
        for seed in seeds
    ]
    rows = run_all(cells)
    table = Table(title="accuracy on validation text")
    for name in ("method", "setting", "accuracy"):
        table.add_column(name)
    summary = {}
    for method, changes in GRID.items():
        for change in changes:
            got = spread([r["accuracy"] for r in rows if r["method"] == method and r["change"] == change])
            name = ", ".join(f"{k} {v:g}" for k, v in change.items()) or "as in examples/minilm.toml"
            table.add_row(method, name, f"{got['mean']:.4f} ±{got['std']:.4f}")
            summary[f"{method}: {name}"] = got
    return Result("lpfl_settings", rows, summary, table)
