"""What an export came to: progress while it runs, a table in the terminal, a page with bars to look at."""

from __future__ import annotations

import html
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

if TYPE_CHECKING:
    from edge_export.bundle import Made
    from edge_export.measure import Measured

NAME = "report.html"
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% }
td, th { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
dt { font-weight: 600 }
dd { margin: 0 0 .4rem; overflow-wrap: anywhere }
.bar { display: grid; grid-template-columns: 5rem 1fr 9rem; gap: .6rem; align-items: center }
.bar i { display: block; height: 1rem; background: #3b7dd8; border-radius: 2px }
"""


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A spinner with the present stage and the time on a terminal, one line a stage elsewhere; both on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda line: print(line, file=sys.stderr, flush=True)
        return
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task("starting")

        def say(line: str) -> None:
            bar.console.print(f"[dim]{line}[/dim]")
            bar.update(task, description=line)

        yield say


def rows(made: Made) -> list[dict[str, Any]]:
    """One flat row for each variant, fp32 first."""
    return [
        {
            "variant": m.name,
            "megabytes": m.size / 1e6,
            "load_seconds": m.load,
            "texts_per_second": m.texts,
            "tokens_per_second": m.tokens,
            "r": m.agreement.r,
            "kl": m.agreement.kl,
            "accuracy_change": m.agreement.accuracy_change,
            "in_bundle": any(v.name == m.name for v in made.bundle.variants),
        }
        for m in made.measured
    ]


def cells(m: Measured, reference: Measured) -> list[str]:
    """A table row in words."""
    change = m.agreement.accuracy_change
    return [
        m.name,
        f"{m.size / 1e6:.0f} MB ({m.size / reference.size:.2f}x)",
        f"{m.load:.2f} s",
        f"{m.texts:.0f} ({m.texts / reference.texts:.1f}x)",
        "-" if m.tokens is None else f"{m.tokens:.0f}",
        f"{m.agreement.r:.4f}",
        f"{m.agreement.kl:.2g}",
        "-" if change is None else f"{100 * change:+.1f}",
    ]


HEADINGS = ("variant", "size", "load", "texts/s", "tokens/s", "r", "KL, nats", "accuracy, points")


def show(made: Made) -> None:
    """Prints the table."""
    table = Table(title=f"{made.bundle.base.rsplit('#', 1)[-1]}, against fp32 in ONNX Runtime")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for m in made.measured:
        table.add_row(*cells(m, made.measured[0]))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def page(made: Made) -> str:
    """The same as one self-contained page."""
    bundle, reference = made.bundle, made.measured[0]
    head = "".join(f"<th>{h}</th>" for h in HEADINGS)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in cells(m, reference)) + "</tr>" for m in made.measured)
    size = _bars([(m.name, m.size / 1e6, f"{m.size / 1e6:.0f} MB") for m in made.measured])
    speed = _bars([(m.name, m.texts, f"{m.texts:.0f} texts/s") for m in made.measured])
    loss = _bars([(m.name, 1 - m.agreement.r, f"r = {m.agreement.r:.4f}") for m in made.measured])
    facts = {
        "base": bundle.base,
        "licence": bundle.license,
        "parameters": f"{bundle.parameters:,}",
        "LoRA slots": str(len(bundle.slots)),
        "task": f"{' / '.join(bundle.task.labels)}, {bundle.task.pattern!r}",
    }
    listed = "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Bundle of {html.escape(bundle.base)}</title>
<meta name="viewport" content="width=device-width"><style>{STYLE}</style>
<h1>Bundle</h1><dl>{listed}</dl>
<h2>Variants against fp32</h2><table><tr>{head}</tr>{body}</table>
<p>r: correlation of class scores with those of the fp32 model on {len(made.probe.judge)} texts nobody calibrated on. Speeds were
measured on the exporting machine with {made.threads} threads; tokens/s is writing, one text at a time.</p>
<h2>Size</h2>{size}<h2>Speed</h2>{speed}<h2>Disagreement with fp32 (1 - r)</h2>{loss}</html>
"""


def _bars(values: list[tuple[str, float, str]]) -> str:
    most = max(value for _, value, _ in values) or 1.0
    drawn = [f'<i style="width:{100 * value / most:.1f}%"></i>' for _, value, _ in values]
    return "".join(
        f'<div class="bar"><span>{html.escape(name)}</span>{bar}<span>{said}</span></div>'
        for bar, (name, _, said) in zip(drawn, values, strict=True)
    )
