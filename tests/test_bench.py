"""The benches' own logic on a tiny model: every method runs, and numbers become summaries as documented."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from rich.table import Table

from bench import fleet, lpfl
from bench.report import Result, show, spread
from edge_sdk import bundle as bundles
from edge_sdk.engines import open_engine
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Example, Private
from edge_sdk.training.batches import Training
from edge_server import settings as run_settings
from edge_server.systems.lpfl import LpFl
from tests import factories


@pytest.fixture(scope="module")
def lab(encoder_bundle: Path) -> fleet.Lab:
    run = LpFl(versions=2, training=Training(steps=2, batch_size=4), soft=SoftLabels(growth=4, batch_size=4))
    settings = run_settings.RunSettings(task=factories.ENCODER_TASK, lpfl=run)
    bundle = bundles.read(encoder_bundle)
    manifest = run_settings.manifest(settings, bundle)
    engine = open_engine(encoder_bundle, bundle, settings.task)
    learner = fleet.learner_of(encoder_bundle, bundle, engine, manifest.adapter)
    return fleet.Lab(settings, manifest.adapter, bundle.parameters, engine, learner, encoder_bundle)


def some_devices() -> list[Private]:
    words = [(word, int(word in factories.GOOD)) for word in factories.GOOD + factories.BAD]
    examples = [Example(f"the film was {word}", label) for word, label in words]
    texts = tuple(f"a {word} day" for word, _ in words)
    truths = tuple(label for _, label in words)
    return [Private(tuple(examples[i::2]), texts, truths, tuple(examples[1 - i :: 2])) for i in (0, 1)]


@pytest.mark.parametrize("method", lpfl.METHODS)
def test_every_method_gives_one_accuracy_a_device(lab: fleet.Lab, method: str) -> None:
    """All six rows of the table can be made, as fractions."""
    settings = lab.settings.lpfl
    found = lpfl.accuracies(method, lab, some_devices(), settings)

    assert len(found) == 2
    assert all(0 <= value <= 1 for value in found)


def test_zero_shot_is_the_base_model(lab: fleet.Lab) -> None:
    """Version 0's adapter changes nothing, so zero-shot needs no training and no luck."""
    lab.engine.set_adapter(None)
    devices = some_devices()
    expected = []
    for device in devices:
        predicted = lab.engine.logits([e.text for e in device.held_out]).argmax(1)
        expected.append(sum(int(p) == e.label for p, e in zip(predicted, device.held_out, strict=True)) / len(predicted))

    assert lpfl.accuracies("zero_shot", lab, devices, lab.settings.lpfl) == pytest.approx(expected)


def test_methods_differ_only_where_the_table_says_so() -> None:
    """Baselines get LP-FL's versions and batch sizes, and its steps and dropout unless their own were better for them."""
    run = LpFl()
    made = {m: lpfl.settings_of(lpfl.Cell("minilm", "iid", 16, 3, m), run) for m in lpfl.METHODS}

    for method, settings in made.items():
        own = lpfl.SCALES["minilm"].changes.get(method, {})
        assert own.keys() <= {"steps", "learning_rate", "dropout"}
        assert settings.versions == run.versions
        assert settings.training == msgspec.structs.replace(run.training, **own)
        assert (settings.soft is not None) == (method in ("lpfl", "fp_fl"))
        assert settings.seed == 3
    assert "lpfl" not in lpfl.SCALES["minilm"].changes


@pytest.mark.parametrize(("method", "name"), [("lpfl", "grwoth"), ("local_only", "growth")])
def test_a_change_that_does_nothing_is_refused(method: str, name: str) -> None:
    """A misspelt setting in a grid, or one the method has no use for, is an error, not a silent default."""
    cell = lpfl.Cell("minilm", "iid", 16, 0, method, change=((name, 1.0),))
    with pytest.raises(ValueError, match=f"{method} has no setting {name}"):
        lpfl.settings_of(cell, LpFl())


def test_the_json_has_the_promised_shape(tmp_path: Path) -> None:
    """A result file names its bench and machine and keeps rows and summary as they are."""
    pytest.importorskip("optimum", reason="no exporter here, whose version the file names")
    out = tmp_path / "deep" / "out.json"
    show(Result("name", [{"a": 1}], {"m": spread([0.5, 0.7])}, Table()), out)

    content = json.loads(out.read_text())
    assert content.keys() == {"bench", "machine", "rows", "summary"}
    assert content["summary"]["m"]["mean"] == pytest.approx(0.6)
    assert content["summary"]["m"]["std"] == pytest.approx(0.02**0.5)
    assert {"cpu", "cores", "versions", "commit"} <= content["machine"].keys()


def test_targets_are_judged_within_a_seed() -> None:
    """A margin is the mean of differences between runs of the same seed, and a miss is called one."""
    rows = [
        {"slm": "minilm", "seed": seed, "method": method, "accuracy": accuracy + seed / 10}
        for seed in (0, 1)
        for method, accuracy in (("lpfl", 0.5), ("local_only", 0.46), ("fl_no_soft", 0.495), ("fp_fl", 0.5), ("centralized", 0.6))
    ]
    lines = lpfl._targets(rows, {"minilm": {"upload_bytes": 10, "upload_fraction": 0.1}})

    assert "local_only = +0.0400 ±0.0000" in lines[0]
    assert lines[0].endswith("kept")
    assert lines[1].endswith("MISSED")
    assert lines[2].endswith("kept")
    assert lines[3].endswith("MISSED")
