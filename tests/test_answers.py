"""Tasks whose answers are texts, from the store to what the device says: trained, measured and written on a tiny decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_sdk import DataError, EdgeDevice
from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec, Array, add
from edge_sdk.agent import Agent, bundle_folder
from edge_sdk.bundle import VOCABULARY, Bundle
from edge_sdk.eligibility import Conditions
from edge_sdk.engines import Sampling, open_engine
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import PROTOCOL, Evaluate, Evaluation, Finished, Manifest, Train
from edge_sdk.softlabels import SoftLabels
from edge_sdk.store import Store
from edge_sdk.tasks import Task
from edge_sdk.testing import ServerSimulator
from edge_sdk.training import base
from edge_sdk.training.batches import Training
from edge_sdk.wire import encode, pack_adapter, unpack, update_shapes
from tests import factories
from tests.training_helpers import ANSWERS

TEXTS = ["the film was", "it was very", "a"]
SAID = ["great", "very sad story", "good bad so lovely film"]


@pytest.fixture
def bundle(decoder_bundle: Path) -> Bundle:
    return bundles.read(decoder_bundle)


def adapter_of(bundle: Bundle) -> Adapter:
    spec, rng = AdapterSpec(bundle.slots, 3, 6.0), np.random.default_rng(1)
    return Adapter({name: rng.normal(0, 1, shape).astype(np.float32) for name, shape in spec.shapes().items()}, spec)


# The engine -----------------------------------------------------------------------------------------------------------
def test_log_probabilities_are_those_of_the_whole_torch_model(decoder_bundle: Path, bundle: Bundle) -> None:
    """Token by token over the cache, each answer has the log-softmax that torch has for prompt and answer in one piece."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    model: Any = base.load(bundle)
    found = engine.answer_logprobs(TEXTS, SAID)

    assert [len(row) for row in found] == [2, 4, 4]  # one and three words and the end; of five words four
    assert [answer[-1] == bundle.end[0] for answer in engine.answers(SAID)] == [True, True, False]
    for prompt, answer, row in zip(engine.encoder.prompts(TEXTS), engine.answers(SAID), found, strict=True):
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        expected = [float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(answer)]
        np.testing.assert_allclose(row, expected, atol=1e-3)


@pytest.mark.parametrize("k", [1, 3, 29, 1000])
def test_the_likeliest_tokens_of_an_answer(decoder_bundle: Path, bundle: Bundle, k: int) -> None:
    """As many as asked for, or all there are, the likeliest first; the answer's own are worth what `answer_logprobs` says."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    engine.set_adapter(adapter_of(bundle))
    tops, expected = engine.answer_top_k(TEXTS, SAID, k), engine.answer_logprobs(TEXTS, SAID)

    assert engine.end == bundle.end[0]
    for top, answer, row in zip(tops, engine.answers(SAID), expected, strict=True):
        assert top.ids.shape == top.logprobs.shape == (len(answer), min(k, 29))
        assert (np.diff(top.logprobs, axis=1) <= 0).all()
        assert all(len(set(ids)) == len(ids) for ids in top.ids.tolist())
        for token, ids, logprobs, logprob in zip(answer, top.ids, top.logprobs, row, strict=True):
            if token in ids:
                assert logprobs[ids == token][0] == pytest.approx(logprob, abs=1e-5)
            else:
                assert logprob <= logprobs[-1] + 1e-5
        if k >= 29:
            np.testing.assert_allclose(np.exp(top.logprobs).sum(1), 1, rtol=1e-4)


def test_likeliest_tokens_have_bounds(decoder_bundle: Path, encoder_bundle: Path, bundle: Bundle) -> None:
    """None at all are not asked for, labels have none, and an encoder says none."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    with pytest.raises(SettingsError, match="at least 1"):
        engine.answer_top_k(TEXTS, SAID, 0)
    with pytest.raises(DataError, match="are its labels"):
        open_engine(decoder_bundle, bundle).answer_top_k(TEXTS, SAID, 2)
    with pytest.raises(DataError, match="needs a decoder"):
        open_engine(encoder_bundle, bundles.read(encoder_bundle), ANSWERS).answer_top_k(TEXTS, SAID, 2)


def test_an_adapter_changes_what_an_answer_is_worth(decoder_bundle: Path, bundle: Bundle) -> None:
    """Log-probabilities are those of the adapter that is worn, and the base's again without it."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    before = np.concatenate(engine.answer_logprobs(TEXTS, SAID))
    engine.set_adapter(adapter_of(bundle))
    worn = np.concatenate(engine.answer_logprobs(TEXTS, SAID))
    engine.set_adapter(None)

    assert np.abs(worn - before).max() > 0.01
    assert (np.concatenate(engine.answer_logprobs(TEXTS, SAID)) == before).all()


def test_there_are_no_classes(decoder_bundle: Path, bundle: Bundle) -> None:
    """Scores, probabilities and class rows of a task without labels are errors that name the way out."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    for ask in (
        lambda: engine.logits(["a film"]),
        lambda: engine.score(["a film"]),
        lambda: engine.logits_of([[4, 5]]),
        lambda: engine.head,
    ):
        with pytest.raises(DataError, match="no classes; its answers are texts"):
            ask()


def test_a_task_of_labels_has_no_answers(decoder_bundle: Path, encoder_bundle: Path, bundle: Bundle) -> None:
    """A classifying decoder has no answer to grade, and an encoder writes none, whatever the task."""
    with pytest.raises(DataError, match="are its labels"):
        open_engine(decoder_bundle, bundle).answer_logprobs(["a"], ["b"])
    reader = open_engine(encoder_bundle, bundles.read(encoder_bundle), ANSWERS)
    for ask in (lambda: reader.answer_logprobs(["a"], ["b"]), lambda: reader.answer("a")):
        with pytest.raises(DataError, match="needs a decoder"):
            ask()


def test_an_answer_goes_on_from_the_prompt_of_training(decoder_bundle: Path, bundle: Bundle) -> None:
    """The text is cut and the pattern is not: what is written is torch's greedy text after the very tokens trained on."""
    engine = open_engine(decoder_bundle, bundle, ANSWERS)
    engine.set_adapter(adapter_of(bundle))
    long = "the story was so very good . " * 40  # more than the model can read
    (prompt,) = engine.encoder.prompts([long])
    assert len(prompt) == ANSWERS.max_tokens + 2

    assert engine.answer(long, Sampling(6)) == engine.generate(engine.encoder.decode(prompt), Sampling(6)) != ""


@pytest.mark.parametrize(
    "fields",
    [
        {"labels": ("a", "b"), "verbalizer": (("x",), ("y",)), "answer_tokens": 4},
        {"labels": (), "verbalizer": (("x",),), "answer_tokens": 4},
        {"labels": (), "verbalizer": (), "answer_tokens": 0},
        {"labels": (), "verbalizer": (), "answer_tokens": -1},
        {"labels": (), "verbalizer": (), "answer_tokens": 513},
    ],
)
def test_a_task_has_labels_or_text_answers(fields: dict[str, Any]) -> None:
    """Both at once, neither, or answers of impossible length are refused where the task is made."""
    with pytest.raises(SettingsError, match=r"task\."):
        Task(pattern="{text}", **fields)


# A device -------------------------------------------------------------------------------------------------------------
@dataclass
class World:
    store: Store
    server: ServerSimulator
    cache: Path
    spec: AdapterSpec
    lines: list[str] = field(default_factory=list)

    def agent(self) -> Agent:
        return Agent(self.store, self.server, self.cache, "device", look=Conditions, say=self.lines.append)

    def keep(self, arrays: dict[str, Array]) -> str:
        return self.server.keep(pack_adapter(arrays))


@pytest.fixture
def world(tmp_path: Path, decoder_bundle: Path, bundle: Bundle) -> Iterator[World]:
    spec = AdapterSpec(bundle.slots, 4, 8.0)
    server = ServerSimulator(Manifest(PROTOCOL, "lpfl", ANSWERS, spec, bundle))
    for name in bundle.files:
        server.keep((decoder_bundle / name).read_bytes())
    store = Store(tmp_path / "home")
    yield World(store, server, tmp_path / "cache", spec)
    store.close()


def fill(store: Store) -> None:
    for text in ("the film", "a phone", "so very good", "this day"):
        store.add(text, "great story")
    store.add("nobody answered this")
    store.add("the phone", "great story", held_out=True)


async def test_a_device_learns_to_answer(world: World, tmp_path: Path) -> None:
    """Stored answers are trained on, the loss on a held-out answer falls, and the device gives it; long texts are cut."""
    fill(world.store)
    start = world.spec.start(0)
    first = world.keep(start)
    work = Train(0, first, Training(40, 4, 0.1, dropout=0.0), None, 1)
    world.server.work += [Evaluate(0, first), work]
    await world.agent().run(updates=1)
    update, delta = unpack(world.server.bodies[-1], update_shapes(world.server.manifest))
    last = world.keep(add(start, dict(delta)))
    world.server.work += [Evaluate(1, last), Finished(1, last)]
    await world.agent().run()
    before, after = (result for result in world.server.results if isinstance(result, Evaluation))

    assert update.num_examples == 4
    assert before.num_examples == after.num_examples == 1
    assert before.metrics.keys() == after.metrics.keys() == {"loss"}
    assert before.metrics["loss"] == pytest.approx(math.log(29), abs=0.05)  # it knows nothing of its 29 words
    assert after.metrics["loss"] < before.metrics["loss"] - 0.2  # scores of random words 0.02 small reach no further
    assert (bundle_folder(world.cache, world.server.manifest) / VOCABULARY).exists()
    device = EdgeDevice(tmp_path / "home", cache=world.cache)
    assert device.answer("the phone") == "great story"
    assert device.answer("the phone", Sampling(max_tokens=1)) == "great"
    assert device.answer("the phone " * 100) == device.answer("the phone " * (ANSWERS.max_tokens // 2)) != ""
    with pytest.raises(DataError, match="no classes"):
        device.predict(["the phone"])
    device.close()


async def test_soft_labels_of_texts_without_classes_are_an_error_that_is_said(world: World) -> None:
    """A server that asks for soft labels where there are no classes gets no update, and the device says why."""
    fill(world.store)
    soft = SoftLabels(growth=4, limit=1.0)
    world.server.work += [Train(0, world.keep(world.spec.start(0)), Training(1, 2), soft, 1)]
    with pytest.raises(DataError, match="no classes"):
        await world.agent().run(updates=1)
    assert world.server.results == []


async def test_an_empty_answer_is_said(world: World) -> None:
    """An answer without words is named before anything is trained."""
    world.store.add("the film", " ")
    world.server.work += [Train(0, world.keep(world.spec.start(0)), Training(1, 2), None, 1)]
    with pytest.raises(DataError, match="at least one word"):
        await world.agent().run(updates=1)


async def test_without_held_out_answers_there_is_nothing_to_measure(world: World) -> None:
    """A device that keeps no answer aside reports no number, not a perfect one."""
    world.store.add("the film", "great")
    adapter = world.keep(world.spec.start(0))
    world.server.work += [Evaluate(0, adapter), Finished(0, adapter)]
    await world.agent().run()

    assert world.server.results == [Evaluation(world.store.device_id, 0, 0, {})]


def test_a_task_of_labels_is_asked_with_predict(tmp_path: Path, decoder_bundle: Path, bundle: Bundle) -> None:
    """`answer` on a classification task names the call that answers it."""
    manifest = Manifest(PROTOCOL, "lpfl", factories.DECODER_TASK, AdapterSpec(bundle.slots, 2, 4.0), bundle)
    folder = bundle_folder(tmp_path / "cache", manifest)
    folder.mkdir(parents=True)
    for name in bundle.needs():
        (folder / name).write_bytes((decoder_bundle / name).read_bytes())
    store = Store(tmp_path / "home")
    store.set_fact("manifest", encode(manifest).decode())
    store.close()
    device = EdgeDevice(tmp_path / "home", cache=tmp_path / "cache")
    with pytest.raises(DataError, match="use predict"):
        device.answer("a film")
    device.close()
