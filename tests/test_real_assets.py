"""The real model and the real text: what the design says of them holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bench import fleet, lpfl
from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec
from edge_sdk.assets import resolve
from edge_sdk.engines import open_engine
from edge_sdk.tasks import accuracy
from edge_sdk.training.batches import Job, Label, Row, Source, Training
from edge_sdk.training.learner import Learner
from edge_server import settings as run_settings
from examples import icwsm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # exporting SmolLM2 takes minutes

PARTS = {"movie": (5866, 1499, 1807), "amazon": (1564, 386, 496), "tweets": (1624, 383, 523), "nyt": (937, 261, 348)}


def test_the_split_is_the_one_that_was_measured() -> None:
    """Every domain has the parts that all published numbers rest on, and no text of any domain stands in two of them."""
    domains = icwsm.load(resolve(icwsm.ASSET))

    assert {name: (len(d.train), len(d.validation), len(d.test)) for name, d in domains.items()} == PARTS
    parts = ("train", "validation", "test")
    texts = [{icwsm.words(e.text) for d in domains.values() for e in getattr(d, part)} for part in parts]
    assert not texts[0] & texts[1]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


@pytest.mark.parametrize("slm", ["minilm", "smollm2"])
def test_onnx_runtime_scores_real_sentences_as_torch_does(slm: str) -> None:
    """The exported graph agrees with torch on real text, without and with an adapter, and knows something untrained."""
    folder = fleet.bundle_of(slm)
    bundle = bundles.read(folder)
    bundles.verify(folder, bundle.files)
    lab = fleet.lab(slm, threads=2)
    examples = [e for domain in fleet.domains().values() for e in domain.validation[:20]]
    texts = [e.text for e in examples]
    rng = np.random.default_rng(0)
    random = {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in lab.spec.shapes().items()}

    whole = Learner.whole(bundle, lab.engine.head, lab.engine.encoder, lab.spec, threads=2)
    torch.set_float32_matmul_precision("highest")  # training may multiply in bfloat16; here digits are compared
    for adapter in (lab.spec.start(0), random):
        lab.engine.set_adapter(Adapter(adapter, lab.spec))
        whole.set(adapter)
        np.testing.assert_allclose(lab.engine.logits(texts), whole.scores(texts), atol=2e-3)
    lab.engine.set_adapter(None)
    assert accuracy(lab.engine.logits(texts), [e.label for e in examples if e.label is not None]) > 0.5


def test_the_upload_share_is_that_of_the_decoder() -> None:
    """One upload of the decoder's adapter is at most half a percent of the model."""
    assert 0 < lpfl.upload_fraction("smollm2")["upload_fraction"] <= 0.005


@pytest.mark.parametrize(("slm", "layers"), [("minilm", 3), ("smollm2", 12)])
def test_what_is_trained_is_what_is_served(slm: str, layers: int) -> None:
    """An adapter trained on the int8 trunk's hidden states scores in torch as in the int8 engine: r >= .99, same answers."""
    folder = fleet.bundle_of(slm)
    bundle = bundles.read(folder)
    engine = open_engine(folder, bundle, variant="int8", threads=2)
    spec = AdapterSpec(bundle.pick((), layers), 8, 16.0)
    learner = Learner.beside(engine, folder, bundle, spec, bundle.task, threads=2)
    movie = fleet.domains()["movie"]
    examples, held_out = movie.train[:32], movie.validation[:100]
    rows = [
        Row(ids, Label(e.label or 0)) for ids, e in zip(engine.encoder.prompts([e.text for e in examples]), examples, strict=True)
    ]
    trained, _ = learner.fit(Job(spec.start(0), [Source(rows, 8)], Training(8, 8, 2e-3, dropout=0.0), 0))
    texts = [e.text for e in held_out]
    in_torch = learner.scores(texts)
    engine.set_adapter(Adapter(trained, spec))
    served = engine.logits(texts)

    margins = [scores[:, 1] - scores[:, 0] for scores in (in_torch, served)]
    assert np.corrcoef(margins[0], margins[1])[0, 1] >= 0.99
    assert np.mean((margins[0] > 0) == (margins[1] > 0)) >= 0.95


def test_full_parameter_training_moves_every_weight_that_matters() -> None:
    """The baseline that trains all weights changes them, and its first scores are those of the base model."""
    lab = fleet.lab("minilm", threads=2)
    engine, learner = lab.full()
    torch.set_float32_matmul_precision("highest")
    assert isinstance(learner, Learner)
    texts = [e.text for e in fleet.domains()["movie"].validation[:8]]
    lab.engine.set_adapter(None)
    np.testing.assert_allclose(engine.logits(texts), lab.engine.logits(texts), atol=2e-3)
    assert sum(a.size for a in fleet.flatten(learner).values()) == lab.parameters


def test_both_configurations_fit_their_bundles() -> None:
    """The settings of the demo name layers that the bundles have."""
    for slm in ("minilm", "smollm2"):
        settings = run_settings.load(fleet.CONFIGS / f"{slm}.toml")
        manifest = run_settings.manifest(settings, bundles.read(fleet.bundle_of(slm)))
        assert manifest.adapter.slots
