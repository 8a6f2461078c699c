"""What every bench shares: the machine's description, the JSON file, and tables on the screen."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from edge_sdk.assets import cache_folder

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """A finished bench: flat rows, the few numbers that matter, and a table for people."""

    bench: str
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    table: Table
    notes: Sequence[str] = field(default_factory=tuple)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    names = ("torch", "transformers", "peft", "onnxruntime", "optimum", "numpy")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": {name: version(name) for name in names},
        "commit": _commit(),
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation (of the sample; 0 for one value)."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def run_cells(
    measure: Callable[[C], R], cells: Sequence[C], told: Callable[[C, R], str], keep: str = "", workers: int = 2
) -> list[R]:
    """Measures all cells, each in one thread of one of `workers` processes, with a progress bar, or a line `told` a cell.

    Args:
        keep: names a file in the cache where finished cells are kept, as JSON: a bench of hours that was interrupted goes on
            there, as long as the code is that of the same commit.
    """
    kept = _Kept(keep)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool, Progress(*columns) as progress:
        bar = progress.add_task("training", total=len(cells))
        found: dict[int, R] = {i: kept.rows[repr(cell)] for i, cell in enumerate(cells) if repr(cell) in kept.rows}
        progress.advance(bar, len(found))
        jobs = {pool.submit(measure, cell): i for i, cell in enumerate(cells) if i not in found}
        for job in as_completed(jobs):
            at = jobs[job]
            found[at] = job.result()
            kept.add(repr(cells[at]), found[at])
            progress.advance(bar)
            if not progress.console.is_terminal:
                print(f"{len(found)} of {len(cells)}: {told(cells[at], found[at])}", flush=True)
    return [found[i] for i in range(len(cells))]


class _Kept:
    """Finished cells of this commit, by their names."""

    def __init__(self, name: str) -> None:
        commit, self.rows = _commit(), dict[str, Any]()
        self._path = cache_folder() / "bench" / f"{name}-{commit}.jsonl" if name and not commit.endswith("-dirty") else None
        if self._path is not None and self._path.exists():
            self.rows = dict(json.loads(line) for line in self._path.read_text().splitlines())

    def add(self, cell: str, found: object) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps([cell, found]) + "\n")


def show(result: Result, out: Path | None) -> None:
    """Prints the table and writes `{"bench", "machine", "rows", "summary"}`."""
    console = Console(width=None if sys.stdout.isatty() else 120)  # a file has no width
    console.print(result.table)
    for note in result.notes:
        console.print(note)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        content = {"bench": result.bench, "machine": machine(), "rows": list(result.rows), "summary": result.summary}
        out.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"written to {out}")


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],  # noqa: S607  # git of the developer's path
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"
