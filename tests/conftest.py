"""Fixtures shared by all tests: tiny models and their bundles, made once for a whole run."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.assets import Asset
from edge_sdk.tasks import Kind
from tests import factories


@pytest.fixture(scope="session")
def encoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tmp_path_factory.mktemp("encoder"), "encoder")


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _bundle(tmp_path_factory.mktemp("decoder"), "decoder")


def _bundle(folder: Path, kind: Kind) -> Path:
    from edge_export.bundle import Recipe, make

    model = factories.write_model(folder / "model", kind)
    make(Asset(str(model)), folder / "bundle", Recipe(("fp32",), task=factories.task(kind), probe=factories.PROBE))
    return folder / "bundle"
