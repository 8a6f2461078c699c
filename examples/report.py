"""The demo's numbers as a table, a JSON object and a page with plots."""

from __future__ import annotations

import html
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from edge_sdk import bundle as bundles
from edge_sdk.protocol import Status
from edge_server.systems.crosslm import Judged
from examples.icwsm import LABELS
from examples.story import Story

SCORES = ("zero_shot", "local_only", "federated")
TITLES = {"zero_shot": "zero-shot", "local_only": "local-only", "federated": "together"}
COLOURS = {"movie": "#c2410c", "amazon": "#0369a1", "tweets": "#15803d", "nyt": "#7e22ce"}


def summarize(
    status: Status, measured: Mapping[str, Mapping[str, float]], tested: int, bundle: Path, seconds: float, story: Story | None
) -> dict[str, Any]:
    """The object of report.json: accuracies are fractions, sizes bytes; one device an entry.

    Args:
        measured: device -> the accuracy of each of `SCORES` on `tested` texts.
        story: of the LLM, in a run that has one.
    """
    by_name = {device.name: device for device in status.devices}
    devices: list[dict[str, Any]] = [
        {"name": name, **scores, "test_examples": tested, "uploaded_bytes": by_name[name].uploaded_bytes}
        for name, scores in measured.items()
    ]
    uploads, updates = sum(d.uploaded_bytes for d in status.devices), sum(d.updates for d in status.devices)
    return {
        "system": status.system,
        "versions": status.version,
        "devices": devices,
        "mean": {score: statistics.fmean(d[score] for d in devices) for score in SCORES},
        "upload_fraction": uploads / max(updates, 1) / (4 * bundles.read(bundle).parameters),
        "seconds": seconds,
        **({} if story is None else {"llm": story.llm, "synthetic": story.synthetic}),
    }


def accuracy_curve(status: Status, device: str) -> dict[int, float]:
    """Version -> accuracy on the device's own held-out text: of its own adapter, or of the global one once these are averaged."""
    own = (m for m in status.measurements if m.device == device and m.kind in ("kept", "evaluation"))
    return {m.version: m.metrics["accuracy"] for m in own if "accuracy" in m.metrics}


def soft_accuracy(status: Status, device: str) -> dict[int, float]:
    """Version -> share of the device's soft labels that were right."""
    own = (m for m in status.measurements if m.device == device)
    return {m.version: m.metrics["soft_accuracy"] for m in own if "soft_accuracy" in m.metrics}


def progress(status: Status, versions: int) -> Table:
    """The run as it goes: one row a device, one column a version."""
    waiting = f", {status.buffered} updates waiting" if status.buffered else ""
    table = Table(title=f"{status.system}, version {status.version} of {versions}{waiting}", caption="; ".join(sheets(status)))
    table.add_column("device")
    for version in range(versions + 1):
        table.add_column(f"v{version}", justify="right")
    for device in status.devices:
        curve = accuracy_curve(status, device.id)
        table.add_row(device.name, *(f"{curve[v]:.3f}" if v in curve else "" for v in range(versions + 1)))
    return table


def sheets(status: Status) -> list[str]:
    """One phrase for each sheet of synthetic texts."""
    said = (f"{s.acceptance:.0%} accepted" if s.accepted >= 0 else f"{s.judges} judges so far" for s in status.sheets)
    return [f"sheet {i} of {s.written} texts: {what}" for i, (s, what) in enumerate(zip(status.sheets, said, strict=True))]


def table(result: Mapping[str, Any]) -> Table:
    """The final table."""
    made = Table(title="accuracy on test text that nobody learned from or chose by")
    made.add_column("device")
    for score in SCORES:
        made.add_column(TITLES[score], justify="right")
    made.add_column("uploaded", justify="right")
    for device in result["devices"]:
        made.add_row(device["name"], *(f"{device[s]:.3f}" for s in SCORES), f"{device['uploaded_bytes'] / 1e3:,.0f} kB")
    share = f"{result['upload_fraction']:.2%} of the model an upload"
    made.add_row("mean", *(f"{result['mean'][s]:.3f}" for s in SCORES), share, style="bold", end_section=True)
    if "llm" in result:
        llm, written = result["llm"], result["synthetic"]
        accepted = f"{written['accepted_first']:.0%} -> {written['accepted_last']:.0%} of {written['written']} texts accepted"
        made.add_row("the LLM", f"{llm['before']:.3f}", "", f"{llm['after']:.3f}", accepted)
    return made


def write_html(path: Path, result: Mapping[str, Any], status: Status, slm: str, story: Story | None) -> None:
    """One page without scripts or outside links: the table, two plots, and what the LLM wrote."""
    rows = "".join(
        f"<tr><td>{html.escape(d['name'])}</td>{''.join(f'<td>{d[s]:.3f}</td>' for s in SCORES)}"
        f"<td>{d['test_examples']}</td><td>{d['uploaded_bytes']:,}</td></tr>"
        for d in result["devices"]
    )
    mean = "".join(f"<td>{result['mean'][s]:.3f}</td>" for s in SCORES)
    names = {device.id: device.name for device in status.devices}
    accuracy = {name: accuracy_curve(status, i) for i, name in names.items()}
    soft = {name: soft_accuracy(status, i) for i, name in names.items()}
    path.write_text(
        _PAGE.format(
            slm=html.escape(slm),
            versions=result["versions"],
            seconds=result["seconds"],
            share=result["upload_fraction"],
            heads="".join(f"<th>{TITLES[s]}</th>" for s in SCORES),
            rows=rows,
            mean=mean,
            mutual="" if story is None else _mutual(story),
            accuracy=_plot(accuracy, "accuracy on each device's own held-out text"),
            soft=_plot(soft, "share of soft labels that are right"),
        )
    )


def _mutual(story: Story) -> str:
    """The LLM's side: what it learned, and some of what it wrote."""
    llm, texts = story.llm, story.synthetic
    return f"""<h2>The LLM learned from them, too</h2>
<p>It wrote {texts["written"]} texts for the devices to judge: they accepted {texts["accepted_first"]:.0%} of the first sheet and
{texts["accepted_last"]:.0%} of the last. Asked whether test sentences of all four domains are positive, it is right in
{llm["before"]:.1%} of cases before and in {llm["after"]:.1%} after; if half of all answers have to be yes,
in {llm["before_balanced"]:.1%} and {llm["after_balanced"]:.1%}.</p>
<h3>What it wrote first</h3>{_texts(story.early)}<h3>And last</h3>{_texts(story.late)}"""


def _texts(judged: Sequence[Judged]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(j.draft.text)}</td><td>{LABELS[j.draft.label]}</td><td>{j.quality:.0%}</td>"
        f"<td>{'accepted' if j.good else 'refused'}</td></tr>"
        for j in judged
    )
    return f"<table><tr><th>text</th><th>asked for</th><th>judges agree</th><th></th></tr>{rows}</table>"


def _plot(curves: Mapping[str, Mapping[int, float]], title: str) -> str:
    """An SVG of one line a device over versions."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        versions = sorted(curve)
        axes.plot(versions, [curve[v] for v in versions], marker="o", label=name, color=COLOURS.get(name))
    axes.set_xlabel("version")
    axes.set_title(title, fontsize=10)
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
td:first-child, th:first-child {{ text-align: left; }} svg {{ width: 100%; height: auto; }}
</style></head><body>
<h1>Four devices learned sentiment together</h1>
<p>Devices with {slm}: {versions} versions in {seconds:.0f} s. Each device has 16 labelled sentences of one domain,
many without a label, and 100 labelled ones that it chooses by; no sentence left its device.
One upload is {share:.2%} of the model.</p>
<table><tr><th>device</th>{heads}<th>test sentences</th><th>bytes sent</th></tr>{rows}
<tr><td>mean</td>{mean}<td></td><td></td></tr></table>
{mutual}
<h2>Accuracy over versions</h2>{accuracy}
<h2>Soft labels over versions</h2>
<p>What the global adapter thinks of the sentences each device took into its soft set, against labels that only this
plot knows.</p>
{soft}
</body></html>
"""
