"""What the README says is what the committed results say, and what it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from bench import crosslm, engines, lpfl, training

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
    """Its cost against plain averaging, without dropouts and with four, comes from docs/results/secure.json."""
    rows = json.loads((ROOT / "docs/results/secure.json").read_text())["rows"]
    ratio = {(r["devices"], r["dropped"]): f"{r['ratio']:.2f}" for r in rows}
    said = " ".join((ROOT / "docs/systems/fedcollm.md").read_text().split())

    assert f"{ratio[32, 0]} times the processor time of plain averaging, with four of them dropped {ratio[32, 4]} times" in said
