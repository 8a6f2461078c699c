"""The facade: what a script sees when something is missing, damaged or slow."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from edge_sdk import AssetError, DataError, EdgeDevice, Unreachable
from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec
from edge_sdk.agent import bundle_folder
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.store import Store
from edge_sdk.wire import encode
from tests import factories


@pytest.fixture
def home(tmp_path: Path, encoder_bundle: Path) -> Path:
    """The home of a device that has met its server once; the model lies in `cache` beside it."""
    bundle = bundles.read(encoder_bundle)
    manifest = Manifest(PROTOCOL, "lpfl", factories.ENCODER_TASK, AdapterSpec(bundle.slots, 2, 4.0), bundle)
    shutil.copytree(encoder_bundle, bundle_folder(tmp_path / "cache", manifest))
    store = Store(tmp_path / "home")
    store.set_fact("manifest", encode(manifest).decode())
    store.close()
    return tmp_path / "home"


def test_it_predicts_without_a_server(home: Path) -> None:
    """A device that has its model needs nobody; probabilities add up to one, and an empty list is no error."""
    device = EdgeDevice(home, cache=home.parent / "cache")
    found = device.predict(["a great film", "a grim day"])

    assert [p.text for p in found] == ["a great film", "a grim day"]
    assert all(sum(p.probabilities.values()) == pytest.approx(1, abs=1e-6) for p in found)
    assert all(p.label == max(p.probabilities, key=lambda name: p.probabilities[name]) for p in found)
    assert device.predict([]) == []
    device.close()


def test_one_text_is_not_a_list_of_texts(home: Path) -> None:
    """A bare string would be taken for its letters."""
    with pytest.raises(DataError, match="takes a list"):
        EdgeDevice(home, cache=home.parent / "cache").predict("a great film")


def test_a_damaged_model_is_named(home: Path) -> None:
    """A model file that was cut short is an error of ours that says what to do, not one of the library below."""
    (model,) = (home.parent / "cache").rglob("model.fp32.onnx")
    model.write_bytes(model.read_bytes()[:1000])

    with pytest.raises(AssetError, match="missing or damaged"):
        EdgeDevice(home, cache=home.parent / "cache").predict(["a great film"])


def test_without_model_and_server_it_says_what_is_missing(tmp_path: Path) -> None:
    """The first prediction needs a server once."""
    with pytest.raises(DataError, match="name its server"):
        EdgeDevice(tmp_path).predict(["a great film"])


def test_learning_gives_up_when_told_to(tmp_path: Path) -> None:
    """With a server that is down, every try is said, and the time allowed is kept."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said: list[str] = []
    device = EdgeDevice(tmp_path, f"http://127.0.0.1:{port}", say=said.append)

    with pytest.raises(Unreachable, match="call learn\\(\\) again"):
        device.learn(timeout=0.2)
    assert "is the server running?" in said[0]
