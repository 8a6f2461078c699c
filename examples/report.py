"""The demo's numbers as a table, a JSON object and a page with plots."""

from __future__ import annotations

import html
import io
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from edge_sdk import bundle as bundles
from edge_sdk.protocol import Measurement, Status

SCORES = ("zero_shot", "local_only", "federated")
TITLES = {"zero_shot": "zero-shot", "local_only": "local-only", "federated": "LP-FL"}
COLOURS = {"movie": "#c2410c", "amazon": "#0369a1", "tweets": "#15803d", "nyt": "#7e22ce"}


def summarize(status: Status, alone: Mapping[str, float], bundle: Path, seconds: float) -> dict[str, Any]:
    """The object of report.json: accuracies are fractions, sizes bytes; one device an entry."""
    devices: list[dict[str, Any]] = []
    uploads = updates = 0
    for device in sorted(status.devices, key=lambda d: list(alone).index(d.name)):
        curve = {m.version: m for m in evaluations(status, device.id)}
        devices.append(
            {
                "name": device.name,
                "zero_shot": curve[0].metrics["accuracy"],
                "local_only": alone[device.name],
                "federated": curve[status.version].metrics["accuracy"],
                "test_examples": curve[status.version].num_examples,
                "uploaded_bytes": device.uploaded_bytes,
            }
        )
        uploads, updates = uploads + device.uploaded_bytes, updates + device.updates
    model_bytes = 4 * bundles.read(bundle).parameters
    return {
        "system": status.system,
        "versions": status.version,
        "devices": devices,
        "mean": {score: statistics.fmean(d[score] for d in devices) for score in SCORES},
        "upload_fraction": uploads / updates / model_bytes,
        "seconds": seconds,
    }


def evaluations(status: Status, device: str) -> list[Measurement]:
    return [m for m in status.measurements if m.kind == "evaluation" and m.device == device and "accuracy" in m.metrics]


def soft_accuracy(status: Status, device: str) -> dict[int, float]:
    """Version -> share of the device's soft labels that were right."""
    own = (m for m in status.measurements if m.device == device)
    return {m.version: m.metrics["soft_accuracy"] for m in own if "soft_accuracy" in m.metrics}


def progress(status: Status, versions: int) -> Table:
    """The run as it goes: one row a device, one column a version."""
    table = Table(title=f"LP-FL, version {status.version} of {versions}, {status.buffered} updates waiting")
    table.add_column("device")
    for version in range(versions + 1):
        table.add_column("zero-shot" if version == 0 else f"v{version}", justify="right")
    table.add_column("soft labels right", justify="right")
    for device in status.devices:
        curve = {m.version: m.metrics["accuracy"] for m in evaluations(status, device.id)}
        soft = list(soft_accuracy(status, device.id).values())
        cells = [f"{curve[v]:.3f}" if v in curve else "" for v in range(versions + 1)]
        table.add_row(device.name, *cells, f"{soft[-1]:.3f}" if soft else "")
    return table


def table(result: Mapping[str, Any]) -> Table:
    """The final table."""
    made = Table(title="accuracy on each device's held-out text")
    made.add_column("device")
    for score in SCORES:
        made.add_column(TITLES[score], justify="right")
    made.add_column("uploaded", justify="right")
    for device in result["devices"]:
        made.add_row(device["name"], *(f"{device[s]:.3f}" for s in SCORES), f"{device['uploaded_bytes'] / 1e3:,.0f} kB")
    share = f"{result['upload_fraction']:.2%} of the model an upload"
    made.add_row("mean", *(f"{result['mean'][s]:.3f}" for s in SCORES), share, style="bold")
    return made


def write_html(path: Path, result: Mapping[str, Any], status: Status, slm: str) -> None:
    """One page without scripts or outside links: the table and two plots."""
    rows = "".join(
        f"<tr><td>{html.escape(d['name'])}</td>{''.join(f'<td>{d[s]:.3f}</td>' for s in SCORES)}"
        f"<td>{d['test_examples']}</td><td>{d['uploaded_bytes']:,}</td></tr>"
        for d in result["devices"]
    )
    mean = "".join(f"<td>{result['mean'][s]:.3f}</td>" for s in SCORES)
    names = {device.id: device.name for device in status.devices}
    accuracy = {names[i]: {m.version: m.metrics["accuracy"] for m in evaluations(status, i)} for i in names}
    soft = {name: soft_accuracy(status, i) for i, name in names.items()}
    alone = {d["name"]: d["local_only"] for d in result["devices"]}
    path.write_text(
        _PAGE.format(
            slm=html.escape(slm),
            versions=result["versions"],
            seconds=result["seconds"],
            share=result["upload_fraction"],
            heads="".join(f"<th>{TITLES[s]}</th>" for s in SCORES),
            rows=rows,
            mean=mean,
            accuracy=_plot(accuracy, "accuracy on held-out text", alone),
            soft=_plot(soft, "share of soft labels that are right", {}),
        )
    )


def _plot(curves: Mapping[str, Mapping[int, float]], title: str, alone: Mapping[str, float]) -> str:
    """An SVG of one line a device over versions; dotted where the device would be alone."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        versions = sorted(curve)
        colour = COLOURS.get(name)
        axes.plot(versions, [curve[v] for v in versions], marker="o", label=name, color=colour)
        if name in alone:
            axes.axhline(alone[name], linestyle=":", linewidth=1, color=colour)
    axes.set_xlabel("version")
    axes.set_title(title + (" (dotted: learning alone)" if alone else ""), fontsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    out = io.StringIO()
    figure.savefig(out, format="svg")
    return out.getvalue()[out.getvalue().index("<svg") :]


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>tandem-edge demo</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; color: #1c1917; }}
table {{ border-collapse: collapse; }} td, th {{ padding: .25rem .9rem; text-align: right; border-bottom: 1px solid #e7e5e4; }}
td:first-child, th:first-child {{ text-align: left; }} tr:last-child {{ font-weight: 600; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>Four devices learned sentiment together</h1>
<p>LP-FL with {slm}: {versions} versions in {seconds:.0f} s. Each device has 16 labelled sentences of one domain and
many without a label; no sentence left its device. One upload is {share:.2%} of the model.</p>
<table><tr><th>device</th>{heads}<th>test sentences</th><th>bytes sent</th></tr>{rows}
<tr><td>mean</td>{mean}<td></td><td></td></tr></table>
<h2>Accuracy over versions</h2>{accuracy}
<h2>Soft labels over versions</h2>
<p>What the global adapter thinks of the sentences each device took into its soft set, against labels that only this
plot knows.</p>
{soft}
</body></html>
"""
