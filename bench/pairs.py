"""Rows of benches that measure devices' model and the server's LLM by task, method and seed: means, gains, tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from bench.report import spread

Rows = Sequence[dict[str, Any]]
MODELS = ("slm", "llm")
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # two-sided 95 %, for 1 to 9 degrees of freedom


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


def verdict(gain: dict[str, float], seeds: int, target: float) -> str:
    """Whether a mean reaches its target; with a word where the target is in its 95 % confidence interval, by Student's t."""
    said = "kept" if gain["mean"] >= target else "MISSED"
    error = gain["std"] / seeds**0.5
    close = seeds < 2 or abs(gain["mean"] - target) <= T[min(seeds - 1, len(T)) - 1] * error
    return f"{said}, within the noise" if close else said


def gain_line(rows: Rows, task: str, model: str, method: str, base: str, target: float | None = None) -> str:
    """One method against another on one task, seed by seed, in points."""
    own = [r for r in rows if r["task"] == task]
    gain, seeds = gain_of(own, model, method, base), len({r["seed"] for r in own})
    line = f"{task}: {model.upper()}, {method} - {base} = {100 * gain['mean']:+.1f} ± {100 * gain['std']:.1f} points"
    return line if target is None else f"{line}, target {100 * target:+.1f}: {verdict(gain, seeds, target)}"


def share_line(rows: Rows, task: str, method: str, target: float) -> str:
    """The LLM's accuracy as a share of what all labels in one place give it, seed by seed, where these give it enough."""
    own = [r for r in rows if r["task"] == task and r["model"] == "llm"]
    of = {(r["seed"], r["method"]): r["accuracy"] for r in own}
    seeds = sorted({seed for seed, _ in of})
    most, least = (spread_of(own, "llm", name)["mean"] for name in ("centralized", "zero_shot"))
    share = spread([of[seed, method] / of[seed, "centralized"] for seed in seeds])
    line = f"{task}: LLM, {method} / centralized = {share['mean']:.3f} ± {share['std']:.3f}, untouched {least / most:.3f}"
    if least >= target * most:
        return f"{line}; target {target}: says nothing, the LLM untouched reaches it"
    return f"{line}; target {target}: {verdict(share, len(seeds), target)}"


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
