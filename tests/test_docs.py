"""What the README says is what the committed results say, and what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import async_vs_sync, crosslm, engines, fedcollm, fedmkt, lora_push, lpfl, pairs, training, uploads

ROOT = Path(__file__).parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_table_in_the_readme_is_the_committed_result() -> None:
    """Every number of the table comes from docs/results/lpfl.json."""
    rows = json.loads((ROOT / "docs/results/lpfl.json").read_text())["rows"]

    assert lpfl.markdown(rows) in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/systems/crosslm.md"])
def test_the_table_of_mutual_learning_is_the_committed_result(page: str) -> None:
    """Every number of the table comes from docs/results/crosslm.json."""
    rows = json.loads((ROOT / "docs/results/crosslm.json").read_text())["rows"]

    assert crosslm.markdown(rows) in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/bundles.md"])
def test_the_table_of_engines_is_the_committed_result(page: str) -> None:
    """Every number of the table comes from docs/results/engines.json."""
    rows = json.loads((ROOT / "docs/results/engines.json").read_text())["rows"]

    assert engines.markdown(rows) in (ROOT / page).read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_table_of_training_is_the_committed_result(page: str) -> None:
    """Every number of the table, and the ratios beside it, come from docs/results/training.json."""
    result = json.loads((ROOT / "docs/results/training.json").read_text())

    assert training.markdown(result["rows"]) in (ROOT / page).read_text()
    assert training.ratios(result["summary"]) in (ROOT / page).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_exist(page: Path) -> None:
    """Links and quoted paths of the repository lead somewhere."""
    text = page.read_text()
    links = [page.parent / link.split("#")[0] for link in re.findall(r"\]\((?!https?:)([^)#][^)]*)\)", text)]
    folders = "edge_sdk|server|export|examples|bench|tests|docs"
    quoted = [ROOT / path for path in re.findall(rf"`((?:{folders})/[\w./-]*)`", text)]

    assert not [str(path) for path in links + quoted if not path.exists()]


def test_what_is_said_of_secure_averaging_is_the_committed_result() -> None:
    """Its cost against plain averaging, without dropouts, with four and with most, comes from docs/results/secure.json."""
    rows = json.loads((ROOT / "docs/results/secure.json").read_text())["rows"]
    ratio = {(r["devices"], r["dropped"]): f"{r['ratio']:.2f}" for r in rows}
    most = max(r["dropped"] for r in rows if r["devices"] == 32)
    said = " ".join((ROOT / "docs/systems/fedcollm.md").read_text().split())

    assert f"{ratio[32, 0]} times the processor time of plain averaging, with four of them dropped {ratio[32, 4]} times" in said
    assert f"with {most}, the most that may, {ratio[32, most]} times" in said


def test_the_numbers_of_fedcollm_are_the_committed_result() -> None:
    """Its table, and what became of each target, come from docs/results/fedcollm.json."""
    result = json.loads((ROOT / "docs/results/fedcollm.json").read_text())
    page = (ROOT / "docs/systems/fedcollm.md").read_text()

    assert pairs.markdown(result["rows"], fedcollm.TASKS, fedcollm.METHODS) in page
    assert "\n".join(fedcollm.targets(result["rows"], result["summary"])) in page


def test_what_the_readme_says_of_fedcollm_is_the_committed_result() -> None:
    """Accuracies on sentiment come from docs/results/fedcollm.json."""
    found = json.loads((ROOT / "docs/results/fedcollm.json").read_text())["summary"]
    slm, llm = ({name: f"{each['mean']:.3f}" for name, each in found[model].items()} for model in ("slm", "llm"))
    said = " ".join((ROOT / "README.md").read_text().split())

    assert f"has {slm['fedcollm']} on sentiment, averaging alone {slm['fedavg']}" in said
    assert f"without any LLM {slm['fedavg_server_ce']}" in said
    rows = [r for r in json.loads((ROOT / "docs/results/fedcollm.json").read_text())["rows"] if r["task"] == "sentiment"]
    gain = pairs.gain_of(rows, "slm", "fedcollm", "fedavg_server_ce")
    assert f"the LLM's part in it is {100 * gain['mean']:.1f} ± {100 * gain['std']:.1f} points" in said
    assert f"from {llm['zero_shot']} to {llm['fedcollm']} (all labels in one place: {llm['centralized']})" in said


def test_the_numbers_of_fedmkt_are_the_committed_result() -> None:
    """Its table, what became of each target, and the bytes, come from docs/results/fedmkt.json."""
    result = json.loads((ROOT / "docs/results/fedmkt.json").read_text())
    page, sent = (ROOT / "docs/systems/fedmkt.md").read_text(), result["summary"]["bytes_per_device_version"]
    small = {name: f"{each['mean']:.3f} ± {each['std']:.3f}" for name, each in result["summary"]["small"].items()}
    said = " ".join(page.split())

    assert pairs.markdown(result["rows"], fedmkt.TASKS, fedmkt.METHODS) in page
    assert "\n".join(fedmkt.targets(result["rows"])) in page
    assert f"{sent['sentiment']:,.0f} bytes where classes are told, {sent['cloze']:,.0f} where" in said
    assert f"have {small['fedavg']} with it on sentiment, and {small['fedmkt']} with FedMKT" in said


def test_what_the_readme_says_of_fedmkt_is_the_committed_result() -> None:
    """Accuracies on sentiment come from docs/results/fedmkt.json."""
    found = json.loads((ROOT / "docs/results/fedmkt.json").read_text())["summary"]
    slm, llm = ({name: f"{each['mean']:.3f}" for name, each in found[model].items()} for model in ("slm", "llm"))
    said = " ".join((ROOT / "README.md").read_text().split())

    assert f"devices have {slm['fedmkt']} on sentiment, with the public labels and no teacher {slm['standalone_public']}" in said
    assert f"alone {slm['standalone']}; the LLM has {llm['fedmkt']}, with these labels alone {llm['public_only']}" in said


def test_what_rounding_costs_is_the_committed_result() -> None:
    """The sentence comes from docs/results/uploads.json."""
    found = json.loads((ROOT / "docs/results/uploads.json").read_text())["summary"]

    assert uploads.said(found) in " ".join((ROOT / "docs/server.md").read_text().split())


def test_what_a_push_costs_is_the_committed_result() -> None:
    """The table and the numbers beside it come from docs/results/lora_push.json."""
    result = json.loads((ROOT / "docs/results/lora_push.json").read_text())
    page, found = (ROOT / "docs/server.md").read_text(), result["summary"]
    said = " ".join(page.split())

    assert lora_push.markdown(result["rows"]) in page
    assert f"{found['bytes_ratio_fp32']:.3f} times the bytes of bare float32, {found['bytes_ratio_int8']:.3f} with" in said
    assert f"{found['updates_per_second']:.0f} updates a second in production" in said
    assert f"{found['production']['server_cpu_seconds_per_update']:.3f} s of processor time an update" in said
    assert f"{found['in_flight_64_mb']:.0f} MB with 64 uploads in flight over TLS" in said
    seconds = found["production"]["seconds_per_round"]
    peer = {r["flat"]: r["seconds_per_round"] for r in result["rows"] if r["system"].startswith("flwr")}
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"takes {seconds:.2f} s, where Flower takes {peer[False]:.1f} s ({peer[True]:.1f} s in one tensor)" in readme
    cost = {
        (r["system"].startswith("flwr"), r["flat"]): r["server_cpu_seconds_per_update"]
        for r in result["rows"]
        if (r["mode"], r.get("buffer"), r.get("encoding")) == ("sync", 4, "fp32") and not r.get("counted")
        if r["tier"] == "production" or r["system"].startswith("flwr")
    }
    less, flat = (cost[True, kind] / cost[False, kind] for kind in (False, True))
    assert f"{less:.0f} times less processor time an update ({flat:.0f} times, in one tensor)" in readme


@pytest.mark.parametrize("page", ["README.md", "docs/simulate.md"])
def test_what_asynchrony_gains_is_the_committed_result(page: str) -> None:
    """Its speed-ups come from docs/results/async_vs_sync.json."""
    result = json.loads((ROOT / "docs/results/async_vs_sync.json").read_text())
    found, said = result["summary"], " ".join((ROOT / page).read_text().split())

    for name in ("three_tier_speedup", "half_normal_speedup"):
        assert f"{found[name]:.2f} ± {found[name + '_std']:.2f} times" in said
    if page == "docs/simulate.md":
        assert async_vs_sync.markdown(result["rows"]) in (ROOT / page).read_text()
