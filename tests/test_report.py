"""What the demo says of a run: a table, phrases, the numbers of report.json and a page, from a small run written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from edge_sdk import bundle as bundles
from edge_sdk.protocol import DeviceStatus, Measurement, Metrics, SheetStatus, Status
from edge_server.systems.crosslm import Draft, Judged
from examples import report, story
from examples.story import Story

DEVICES = (DeviceStatus("d1", "movie", 3, 6000), DeviceStatus("d2", "amazon", 1, 2000))
SHEETS = (SheetStatus(60, 4, 30, 0.5), SheetStatus(64, 3, -1, -1.0))
MEASURED = {
    "movie": {"zero_shot": 0.5, "local_only": 0.625, "federated": 0.75},
    "amazon": {"zero_shot": 0.25, "local_only": 0.5, "federated": 1.0},
}


def judged(text: str, label: int = 1, quality: float = 0.75) -> Judged:
    return Judged(Draft("p", label, text), (1 - quality, quality), quality, good=quality >= 0.6, bad=quality < 0.5)


STORY = Story(
    {"before": 0.5, "after": 0.75, "before_balanced": 0.625, "after_balanced": 0.8125},
    {"written": 124, "accepted_first": 0.5, "accepted_last": 0.875},
    (judged('so <b>dull</b> & "grim"', 0, 0.25), judged("a great film")),
    (judged("a superb story", quality=1.0), judged("a fine day", quality=0.55)),
)


def measured(kind: str, device: str, version: int, **metrics: float) -> Measurement:
    numbers: Metrics = metrics
    return Measurement(kind, device, version, 16, numbers)


def status(*measurements: Measurement, sheets: tuple[SheetStatus, ...] = (), buffered: int = 0) -> Status:
    return Status("crosslm", 2, "ab" * 32, buffered, False, DEVICES, measurements, sheets)


def rows(table: Table) -> list[list[Any]]:
    """The cells as a reader sees them, headings first."""
    columns = [[column.header, *column.cells] for column in table.columns]
    return [list(row) for row in zip(*columns, strict=True)]


# Phrases and curves ---------------------------------------------------------------------------------------------------
def test_a_sheet_is_a_phrase() -> None:
    """A decided one says what share was accepted, an open one how many have judged; without sheets nothing is said."""
    none = SheetStatus(12, 1, 0, 0.0)  # decided, and nothing was good

    assert report.sheets(status(sheets=(*SHEETS, none))) == [
        "sheet 0 of 60 texts: 50% accepted",
        "sheet 1 of 64 texts: 3 judges so far",
        "sheet 2 of 12 texts: 0% accepted",
    ]
    assert report.sheets(status()) == []


def test_a_curve_has_a_device_own_accuracy_in_every_version() -> None:
    """Of the adapter it kept, then of the global one it measured; neither another device's, nor a judge's, nor an update's."""
    stands = status(
        measured("kept", "d1", 0, accuracy=0.5, loss=1.0),
        measured("kept", "d2", 0, accuracy=0.125),
        measured("judgment", "d1", 0, accuracy=0.0625),
        measured("kept", "d1", 1, accuracy=0.625, newer=0.0),
        measured("update", "d1", 2, loss=0.5, accuracy=0.25),
        measured("evaluation", "d1", 2, accuracy=0.75),
        measured("evaluation", "d1", 3, loss=0.5),  # it holds nothing out
    )

    assert report.accuracy_curve(stands, "d1") == {0: 0.5, 1: 0.625, 2: 0.75}
    assert report.accuracy_curve(stands, "d2") == {0: 0.125}
    assert report.accuracy_curve(stands, "nobody") == {}


def test_a_curve_of_soft_labels_has_their_share_of_right_ones() -> None:
    """Versions in which a device had soft labels whose truth is known."""
    stands = status(
        measured("update", "d1", 0, loss=0.5),
        measured("update", "d1", 1, soft_accuracy=0.75, soft_examples=8.0),
        measured("update", "d2", 1, soft_accuracy=0.5),
        measured("update", "d1", 2, soft_accuracy=0.875),
    )

    assert report.soft_accuracy(stands, "d1") == {1: 0.75, 2: 0.875}


def test_progress_has_a_row_for_each_device_and_a_column_for_each_version() -> None:
    """What is not measured yet is left empty; sheets and waiting updates are said above and below."""
    stands = status(measured("kept", "d1", 0, accuracy=0.5), measured("evaluation", "d2", 2, accuracy=2 / 3), sheets=SHEETS)
    made = report.progress(stands, 2)

    assert rows(made) == [["device", "v0", "v1", "v2"], ["movie", "0.500", "", ""], ["amazon", "", "", "0.667"]]
    assert made.title == "crosslm, version 2 of 2"
    assert made.caption == "sheet 0 of 60 texts: 50% accepted; sheet 1 of 64 texts: 3 judges so far"
    assert report.progress(status(buffered=3), 5).title == "crosslm, version 2 of 5, 3 updates waiting"


# The final numbers ----------------------------------------------------------------------------------------------------
def summarized(bundle: Path, told: Story | None) -> dict[str, Any]:
    return report.summarize(status(), MEASURED, 240, bundle, 12.5, told)


def test_the_numbers_of_a_run(encoder_bundle: Path) -> None:
    """Devices as they were measured, unweighted means, bytes of an update as a share of the model; the LLM where there is one."""
    plain = summarized(encoder_bundle, None)
    movie = {"name": "movie", "zero_shot": 0.5, "local_only": 0.625, "federated": 0.75}

    assert plain["devices"][0] == {**movie, "test_examples": 240, "uploaded_bytes": 6000}
    assert [device["uploaded_bytes"] for device in plain["devices"]] == [6000, 2000]
    assert plain["mean"] == {"zero_shot": 0.375, "local_only": 0.5625, "federated": 0.875}
    assert plain["upload_fraction"] == 8000 / 4 / (4 * bundles.read(encoder_bundle).parameters)
    assert (plain["system"], plain["versions"], plain["seconds"]) == ("crosslm", 2, 12.5)
    assert summarized(encoder_bundle, STORY) == {**plain, "llm": STORY.llm, "synthetic": STORY.synthetic}


def test_the_final_table(encoder_bundle: Path) -> None:
    """A row a device, their means, and, where there is an LLM, what it can do before and after, and what was accepted."""
    plain = summarized(encoder_bundle, None)
    share = f"{plain['upload_fraction']:.2%} of the model an upload"
    want = [
        ["device", "zero-shot", "local-only", "together", "uploaded"],
        ["movie", "0.500", "0.625", "0.750", "6 kB"],
        ["amazon", "0.250", "0.500", "1.000", "2 kB"],
        ["mean", "0.375", "0.562", "0.875", share],
    ]

    assert rows(report.table(plain)) == want
    assert rows(report.table(summarized(encoder_bundle, STORY))) == [
        *want,
        ["the LLM", "0.500", "", "0.750", "50% -> 88% of 124 texts accepted"],
    ]


# The page -------------------------------------------------------------------------------------------------------------
def page(folder: Path, bundle: Path, told: Story | None, slm: str = "MiniLM") -> str:
    stands = status(
        measured("kept", "d1", 0, accuracy=0.5),
        measured("evaluation", "d1", 2, accuracy=0.75),
        measured("update", "d1", 2, soft_accuracy=0.75),
    )
    report.write_html(folder / "report.html", summarized(bundle, told), stands, slm, told)
    return (folder / "report.html").read_text()


def test_the_page_shows_the_run(tmp_path: Path, encoder_bundle: Path) -> None:
    """The table's numbers, one plot of accuracy and one of soft labels, and nothing that a browser would run or fetch."""
    made = page(tmp_path, encoder_bundle, None)

    assert "<tr><td>movie</td><td>0.500</td><td>0.625</td><td>0.750</td><td>240</td><td>6,000</td></tr>" in made
    assert "<tr><td>mean</td><td>0.375</td><td>0.562</td><td>0.875</td><td></td><td></td></tr>" in made
    assert "Devices with MiniLM: 2 versions in 12 s." in made
    assert made.count("<svg") == made.count("</svg>") == 2
    assert "{" not in made.split("<style>")[1].split("</style>")[0].replace("{ ", "")  # its braces are single
    assert not any(word in made for word in ("<script", "<link", "<img", "The LLM learned"))


def test_the_page_tells_what_the_llm_wrote(tmp_path: Path, encoder_bundle: Path) -> None:
    """Its accuracies and shares, then the first and the last texts with what judges said of them, in this order."""
    made = page(tmp_path, encoder_bundle, STORY)
    early, late = made.split("<h3>What it wrote first</h3>")[1].split("<h3>And last</h3>")

    assert "It wrote 124 texts for the devices to judge: they accepted 50% of the first sheet and\n88% of the last." in made
    assert (
        "it is right in\n50.0% of cases before and in 75.0% after; if half of all answers have to be yes,\nin 62.5% and 81.2%."
        in made
    )
    assert "<td>a great film</td><td>positive</td><td>75%</td><td>accepted</td>" in early
    assert "<td>negative</td><td>25%</td><td>refused</td>" in early
    assert "<td>a superb story</td><td>positive</td><td>100%</td><td>accepted</td>" in late
    assert "<td>a fine day</td><td>positive</td><td>55%</td><td>refused</td>" in late
    assert "a great film" not in late


def test_what_others_wrote_is_text_on_the_page(tmp_path: Path, encoder_bundle: Path) -> None:
    """An LLM's or a user's `<` opens no tag."""
    made = page(tmp_path, encoder_bundle, STORY, slm="<i>/models/mine</i>")

    assert "so &lt;b&gt;dull&lt;/b&gt; &amp; &quot;grim&quot;" in made
    assert "Devices with &lt;i&gt;/models/mine&lt;/i&gt;:" in made
    assert not any(tag in made for tag in ("<b>", "<i>"))


# A few texts of a sheet -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("count", "shown"), [(0, []), (1, [0]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (8, [0, 2, 4, 6]), (64, [0, 16, 32, 48])]
)
def test_some_texts_of_a_sheet_are_spread_over_it(count: int, shown: list[int]) -> None:
    """Four, one of each quarter; all of a sheet that has no more."""
    sheet = [judged(f"text {i}") for i in range(count)]

    assert story.some(sheet) == [sheet[i] for i in shown]


@given(st.integers(0, 300))
def test_of_any_sheet_four_texts_are_shown(count: int) -> None:
    """Or all there are, each once and in the sheet's order, from its first text on."""
    sheet = [judged(f"text {i}") for i in range(count)]
    at = [sheet.index(shown) for shown in story.some(sheet)]

    assert len(at) == min(count, story.SHOWN)
    assert at == sorted(set(at))
    assert at[:1] == [0][:count]
