"""Fixtures shared by all tests: tiny models and their bundles, made once for a whole run.

Without an exporter (`make test-transformers5`) the bundles come from the folder that TANDEM_TEST_BUNDLES names.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from edge_sdk.tasks import Kind
from tests import databases, factories
from tests.databases import Postgres

HERE = Path(__file__).parent
NEED_AN_EXPORTER = ["test_demo.py", "test_liars.py", "test_real_assets.py", "test_report.py"]  # real models, or plots
collect_ignore: list[str] = []
if importlib.util.find_spec("onnx") is None:
    own = [path.name for path in HERE.glob("test_*.py") if "\nfrom edge_export" in path.read_text()]  # the exporter's own tests
    collect_ignore = sorted(own + NEED_AN_EXPORTER)


def pytest_report_header() -> list[str]:
    if not collect_ignore:
        return []
    return [f"transformers {version('transformers')} without an exporter; left out: {', '.join(collect_ignore)}"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """One server for a whole run; every test makes a database of its own. TANDEM_TEST_POSTGRES=1 says that it must be there."""
    if (programs := databases.binaries()) is None:
        missing = "no PostgreSQL on this machine: apt-get install postgresql"
        if os.environ.get("TANDEM_TEST_POSTGRES"):
            pytest.fail(missing)
        pytest.skip(missing)
    with databases.postgres(programs) as running:
        yield running


@pytest.fixture(params=["sqlite", "postgresql"])
def state(request: pytest.FixtureRequest) -> str:
    """`edge-server serve --state`: a test runs on each kind of database."""
    return "" if request.param == "sqlite" else request.getfixturevalue("postgres").create()


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tmp_path_factory, "encoder")


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tmp_path_factory, "decoder")


def _bundle(tmp_path_factory: pytest.TempPathFactory, kind: Kind) -> Path:
    if made := os.environ.get("TANDEM_TEST_BUNDLES"):
        return factories.bundle_path(Path(made), kind)
    return factories.write_bundle(tmp_path_factory.mktemp("bundles"), kind)
