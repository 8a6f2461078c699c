"""Exported graphs score like torch, with and without an adapter, and their LoRA inputs are optional."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec, Arrays, read_peft
from edge_sdk.assets import Asset
from edge_sdk.engines import Engine, open_engine
from edge_sdk.errors import DataError
from edge_sdk.tasks import Kind
from edge_sdk.training.learner import Learner
from tests import factories

TEXTS = ["a lovely film", "the story was so very dull .", "grim", "the day was nice and it was bright"]


@pytest.fixture(params=get_args(Kind))
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"{request.param}_bundle")
    return path


def open_both(folder: Path) -> tuple[Engine, Learner, AdapterSpec]:
    bundle = bundles.read(folder)
    engine = open_engine(folder, bundle)
    spec = AdapterSpec(bundle.slots, rank=3, alpha=6.0)
    learner = Learner.whole(bundle, engine.head, engine.encoder, spec, threads=1)
    torch.set_float32_matmul_precision("highest")  # `load` allows bfloat16; here digits are compared
    return engine, learner, spec


def random_adapter(spec: AdapterSpec, seed: int = 1) -> Arrays:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def test_scores_agree_with_torch_without_an_adapter(folder: Path) -> None:
    """ONNX Runtime and torch give the same scores for the base model."""
    engine, learner, spec = open_both(folder)
    learner.set(spec.start(0))

    np.testing.assert_allclose(engine.logits(TEXTS), learner.scores(TEXTS), atol=1e-4)


def test_scores_agree_with_torch_with_an_adapter(folder: Path) -> None:
    """The adapter inputs of the graph do what PEFT does, alpha / rank included."""
    engine, learner, spec = open_both(folder)
    adapter = random_adapter(spec)
    base = engine.logits(TEXTS)
    learner.set(adapter)
    engine.set_adapter(Adapter(adapter, spec))

    np.testing.assert_allclose(engine.logits(TEXTS), learner.scores(TEXTS), atol=1e-4)
    assert np.abs(engine.logits(TEXTS) - base).max() > 1e-2


def test_an_adapter_comes_off_without_a_trace(folder: Path) -> None:
    """After an adapter is taken off, scores are bit for bit those of the base."""
    engine, _, spec = open_both(folder)
    base = engine.logits(TEXTS)
    engine.set_adapter(Adapter(random_adapter(spec), spec))
    engine.logits(TEXTS)
    engine.set_adapter(None)

    assert (engine.logits(TEXTS) == base).all()


def test_any_rank_fits(folder: Path) -> None:
    """The rank is free at every call."""
    engine, _, spec = open_both(folder)
    for rank in (1, 5):
        other = AdapterSpec(spec.slots, rank, 1.0)
        engine.set_adapter(Adapter(random_adapter(other), other))
        assert np.isfinite(engine.logits(TEXTS)).all()


def test_order_and_batches_do_not_matter(folder: Path) -> None:
    """A text's scores do not depend on what else is asked, nor on padding."""
    engine, _, _ = open_both(folder)
    together = engine.logits(TEXTS)
    alone = np.concatenate([engine.logits([text]) for text in TEXTS])

    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_an_adapter_of_another_model_is_refused(encoder_bundle: Path, decoder_bundle: Path) -> None:
    """Names or shapes that do not belong to the base are refused before anything runs."""
    engine, _, spec = open_both(encoder_bundle)
    other = AdapterSpec(bundles.read(decoder_bundle).slots, 2, 4.0)
    with pytest.raises(DataError, match="no adapter slot"):
        engine.set_adapter(Adapter(random_adapter(other), other))
    with pytest.raises(DataError, match="does not fit"):
        engine.set_adapter(Adapter(random_adapter(other), spec))


def test_a_peft_folder_round_trips_through_peft(folder: Path, tmp_path: Path) -> None:
    """What we write, PEFT loads, and it scores the same; what PEFT holds, we read."""
    import torch
    from peft import PeftModel

    from edge_sdk.tokens import PromptEncoder
    from edge_sdk.training import base
    from edge_sdk.training.learner import readout

    bundle = bundles.read(folder)
    engine, _, spec = open_both(folder)
    adapter = random_adapter(spec)
    factories.write_peft(tmp_path, adapter, spec, bundle.base)
    loaded = PeftModel.from_pretrained(base.load(bundle), tmp_path).eval()
    encoder = PromptEncoder(
        folder / "tokenizer.json", bundle.prefix, bundle.suffix, bundle.positions, factories.task(bundle.kind)
    )
    with torch.no_grad():
        scores = engine.head.scores(readout(loaded, bundle.kind, encoder.prompts(TEXTS)).numpy())
    engine.set_adapter(Adapter(adapter, spec))

    np.testing.assert_allclose(engine.logits(TEXTS), scores, atol=1e-4)
    arrays, found = read_peft(tmp_path, bundle.slots)
    assert found == spec
    assert all((arrays[name] == adapter[name]).all() for name in adapter)


def test_an_unknown_layer_is_named(tmp_path: Path) -> None:
    """Asking for LoRA where there is no such layer says so and leaves no folder."""
    export = pytest.importorskip("edge_export.bundle", reason="no exporter here")
    model = factories.write_model(tmp_path / "model", "encoder")
    recipe = export.Recipe(("fp32",), ("q_proj",), factories.task("encoder"), factories.PROBE)
    with pytest.raises(DataError, match="no linear layer named 'q_proj'"):
        export.make(Asset(str(model)), tmp_path / "bundle", recipe)
    assert not (tmp_path / "bundle").exists()


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    """Only an empty folder or an older bundle is replaced."""
    export = pytest.importorskip("edge_export.bundle", reason="no exporter here")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="holds other files"):
        export.make(Asset("nowhere"), tmp_path)

    assert (tmp_path / "thesis.txt").read_text() == "years of work"
