"""Rows of benches that measure devices' model and the server's LLM by task, method and seed: means, gains, tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bench.report import spread

Rows = Sequence[dict[str, Any]]
MODELS = ("slm", "llm")


def there(rows: Rows, model: str, method: str) -> bool:
    """Whether a method has measured a model."""
    return any((r["model"], r["method"]) == (model, method) for r in rows)


def spread_of(rows: Rows, model: str, method: str, key: str = "accuracy") -> dict[str, float]:
    """Over seeds."""
    return spread([r[key] for r in rows if (r["model"], r["method"]) == (model, method)])


def gain_of(rows: Rows, model: str, method: str, base: str) -> dict[str, float]:
    """Of one method over another, seed by seed."""
    of = {(r["seed"], r["method"]): r["accuracy"] for r in rows if r["model"] == model}
    return spread([of[seed, method] - of[seed, base] for seed in sorted({seed for seed, _ in of})])


def _cells(rows: Rows, task: str, method: str, form: str) -> list[str]:
    own = [r for r in rows if r["task"] == task]
    return [form.format(**spread_of(own, model, method)) if there(own, model, method) else "" for model in MODELS]


def table(rows: Rows, tasks: Sequence[str], methods: Sequence[str]) -> Table:
    """For people at a terminal."""
    found = Table(title="accuracy on test text, mean over devices ± spread over seeds")
    for head in ("task", "method", "SLM", "LLM"):
        found.add_column(head, justify="left" if head in ("task", "method") else "right")
    for task, method in itertools.product(tasks, methods):
        if any(cells := _cells(rows, task, method, "{mean:.3f} ±{std:.3f}")):
            found.add_row(task, method.replace("_", " "), *cells)
    return found


def markdown(rows: Rows, tasks: Sequence[str], methods: Sequence[str]) -> str:
    """For a page; a test holds the two together."""
    lines = ["| task | method | SLM | LLM |", "| --- | --- | --- | --- |"]
    for task, method in itertools.product(tasks, methods):
        if any(cells := _cells(rows, task, method, "{mean:.3f} ± {std:.3f}")):
            lines.append(f"| {task} | {method.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)
