"""What a device makes of synthetic texts: its answer to a sheet, to the byte, what it mixes into its training, and which adapter
it keeps.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import verbs
from edge_sdk.adapters import Adapter, AdapterSpec, Array
from edge_sdk.engines import Engine, open_engine
from edge_sdk.errors import DataError
from edge_sdk.judgments import AGREE, CERTAIN, SURE
from edge_sdk.protocol import Mix, Sample, Text
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Example, Private
from edge_sdk.training.batches import Classes, Guess, Label, Training
from tests import factories

TASK = msgspec.structs.replace(factories.ENCODER_TASK, scale=100.0)  # or the tiny model is sure of nothing
TEXTS = [f"the {noun} was {word}" for noun in ("film", "phone") for word in (*factories.GOOD[:3], *factories.BAD[:3])]
SHEET = [Text(f"t{i}", text, i % 2) for i, text in enumerate(TEXTS)]
LABELLED = (Example("a great film", 1), Example("a grim day", 0), Example("so very dull", 0))
PRIVATE = Private(LABELLED, ("it was nice", "it was sad"), (None, None), ())
TRAINING = Training(steps=2, batch_size=3)
SAMPLES = [Sample(i, f"s{i}", text, "positive", (0.25, 0.75), 0.75, 0, "llm", "") for i, text in enumerate(TEXTS[:4], 1)]


@pytest.fixture(scope="module")
def engine(encoder_bundle: Path) -> Engine:
    return open_engine(encoder_bundle, bundles.read(encoder_bundle), TASK)


@pytest.fixture(scope="module")
def spec(encoder_bundle: Path) -> AdapterSpec:
    return AdapterSpec(bundles.read(encoder_bundle).slots, rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def trained(spec: AdapterSpec) -> dict[str, Array]:
    """An adapter that is not the start."""
    arrays, rng = spec.start(0), np.random.default_rng(5)
    return {**arrays, **{s.b: rng.normal(size=arrays[s.b].shape).astype(np.float32) for s in spec.slots}}


def scores(engine: Engine, adapter: dict[str, Array], spec: AdapterSpec, texts: list[str] = TEXTS) -> Array:
    engine.set_adapter(Adapter(adapter, spec))
    found = engine.score(texts)
    engine.set_adapter(None)
    return found


# Judging --------------------------------------------------------------------------------------------------------------
def test_probabilities_are_told_in_256_levels(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> None:
    """A byte a class and text, in the sheet's order, of the adapter given and not the one the engine wore before."""
    engine.set_adapter(None)
    *_, answer = verbs.judge(SHEET, trained, spec, PRIVATE, engine, "probabilities")
    *_, base = verbs.judge(SHEET, spec.start(0), spec, PRIVATE, engine, "probabilities")

    assert answer.shape == (len(SHEET), 2)
    assert answer.tolist() == np.rint(scores(engine, trained, spec) * 255).tolist()
    assert base.tolist() == np.rint(scores(engine, spec.start(0), spec) * 255).tolist()
    assert answer.tolist() != base.tolist()


def test_agreement_is_told_in_two_bits(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> None:
    """A byte a text: whether the likeliest class is the one it was written for, and whether that is sure."""
    *_, answer = verbs.judge(SHEET, trained, spec, PRIVATE, engine, "agree")
    rows = scores(engine, trained, spec).tolist()
    agrees = [row[text.label] > row[1 - text.label] for row, text in zip(rows, SHEET, strict=True)]
    sure = [max(row) >= SURE for row in rows]

    assert answer.tolist() == [[AGREE * a + CERTAIN * s] for a, s in zip(agrees, sure, strict=True)]
    assert set(agrees) == {True, False}
    assert any(sure)
    turned = [msgspec.structs.replace(text, label=1 - text.label) for text in SHEET]
    *_, other = verbs.judge(turned, trained, spec, PRIVATE, engine, "agree")
    assert (answer ^ other).tolist() == [[AGREE]] * len(SHEET)


def test_the_same_texts_get_the_same_bytes(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> None:
    """A device that is asked again says the same, whatever it was asked in between."""
    first = verbs.judge(SHEET, trained, spec, PRIVATE, engine, "probabilities")
    verbs.judge(SHEET, spec.start(0), spec, PRIVATE, engine, "agree")
    again = verbs.judge(SHEET, trained, spec, PRIVATE, engine, "probabilities")

    assert first[:3] == again[:3]
    assert first[3].tobytes() == again[3].tobytes()


def test_accuracy_is_told_where_texts_are_held_out(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> None:
    """The share of held-out texts that the judging adapter has right; without any, no number."""
    held_out = [*TEXTS[:3], TEXTS[0] + " ."]
    right = scores(engine, trained, spec, held_out).argmax(1).tolist()
    labels = [*right[:3], 1 - right[3]]
    private = Private(LABELLED, (), (), tuple(Example(t, label) for t, label in zip(held_out, labels, strict=True)))

    assert verbs.judge(SHEET, trained, spec, private, engine, "agree")[:2] == (3, {"accuracy": 0.75})
    assert verbs.judge(SHEET, trained, spec, PRIVATE, engine, "agree")[:2] == (3, {})


@pytest.mark.parametrize(
    ("labelled", "covers"), [(LABELLED, (0, 1)), (LABELLED[::-1], (0, 1)), (LABELLED[1:], (0,)), (LABELLED[:1], (1,))]
)
def test_what_a_device_covers_is_what_it_has_labels_of(
    engine: Engine, spec: AdapterSpec, labelled: tuple[Example, ...], covers: tuple[int, ...]
) -> None:
    """Each class once, in order, of labelled texts alone: neither held-out texts nor a truth of unlabelled ones count."""
    private = Private(labelled, ("it was nice", "it was sad"), (1, 0), (Example("a film", 0), Example("a day", 1)))
    count, _, found, _ = verbs.judge(SHEET[:1], spec.start(0), spec, private, engine, "agree")

    assert (count, found) == (len(labelled), covers)


def test_a_device_without_labels_judges_nothing(engine: Engine, spec: AdapterSpec) -> None:
    """Neither unlabelled nor held-out text makes a judge of it."""
    private = Private((), ("it was nice",), (1,), (Example("a film", 0),))
    with pytest.raises(DataError, match="no labelled text"):
        verbs.judge(SHEET, spec.start(0), spec, private, engine, "agree")


@pytest.mark.parametrize("label", [-1, 2, 7, 10**30])
def test_a_text_written_for_no_class_of_the_task_is_refused(engine: Engine, spec: AdapterSpec, label: int) -> None:
    """One label outside the task anywhere in the sheet, and nothing is judged."""
    with pytest.raises(DataError, match="written for a class that this task does not have"):
        verbs.judge([*SHEET, Text("x", "a film", label)], spec.start(0), spec, PRIVATE, engine, "probabilities")


# Synthetic texts in training ------------------------------------------------------------------------------------------
def prepare(
    engine: Engine, spec: AdapterSpec, samples: list[Sample], mix: Mix | None, soft: SoftLabels | None = None
) -> verbs.Prepared:
    return verbs.prepare(1, spec.start(0), spec, PRIVATE, TRAINING, soft, 3, engine, None, samples, mix)


def test_synthetic_texts_are_a_source_of_their_own(engine: Engine, spec: AdapterSpec) -> None:
    """Their prompts with the judges' soft labels, at the weight and batch size of the mix, beside the device's own labels."""
    samples = [msgspec.structs.replace(s, soft=(i / 8, 1 - i / 8)) for i, s in enumerate(SAMPLES)]
    prepared = prepare(engine, spec, samples, Mix(4, 0.5, 2))
    own, mixed = prepared.job.sources

    assert (own.batch_size, own.weight) == (3, 1.0)
    assert [row.target for row in own.rows] == [Label(1), Label(0), Label(0)]
    assert (mixed.batch_size, mixed.weight) == (2, 0.5)
    assert [row.ids for row in mixed.rows] == engine.encoder.prompts(TEXTS[:4])
    for row, sample in zip(mixed.rows, samples, strict=True):
        assert isinstance(row.target, Classes)
        assert row.target.probabilities.dtype == np.float32
        assert tuple(row.target.probabilities.tolist()) == sample.soft
    assert prepared.metrics == {"synthetic_examples": 4.0}


def test_soft_labels_are_sharpened_by_the_temperature_of_the_mix(engine: Engine, spec: AdapterSpec) -> None:
    """At 1/2 the judges' 1/4 and 3/4 are learned as 1/10 and 9/10, and the job is another one; nothing else of it changes."""
    sharp = prepare(engine, spec, SAMPLES, Mix(4, 0.5, 2, 0.5))
    plain = prepare(engine, spec, SAMPLES, Mix(4, 0.5, 2))
    own, mixed = sharp.job.sources

    assert own == plain.job.sources[0]
    assert (mixed.batch_size, mixed.weight, [row.ids for row in mixed.rows]) == (2, 0.5, engine.encoder.prompts(TEXTS[:4]))
    for row in mixed.rows:
        assert isinstance(row.target, Classes)
        assert row.target.probabilities.dtype == np.float32
        np.testing.assert_allclose(row.target.probabilities, [0.1, 0.9], rtol=1e-6)
    assert sharp.job.key != plain.job.key


def test_only_what_is_the_devices_own_is_counted(engine: Engine, spec: AdapterSpec) -> None:
    """What all devices have adds nothing to a device's weight: labels and soft labels count, synthetic texts do not."""
    assert prepare(engine, spec, SAMPLES, Mix(4)).num_examples == 3
    both = prepare(engine, spec, SAMPLES, Mix(4), SoftLabels(growth=1, limit=1.0, batch_size=1))

    assert both.num_examples == 3 + both.metrics["soft_examples"] == 5
    assert both.metrics == {"soft_examples": 2.0, "synthetic_examples": 4.0}
    assert [type(source.rows[0].target) for source in both.job.sources] == [Label, Guess, Classes]


@pytest.mark.parametrize(("samples", "mix"), [(SAMPLES, None), ([], Mix(4)), ([], None)])
def test_nothing_synthetic_without_mix_or_samples(
    engine: Engine, spec: AdapterSpec, samples: list[Sample], mix: Mix | None
) -> None:
    """The job is the one of private data alone, and no number speaks of samples."""
    alone = verbs.prepare(1, spec.start(0), spec, PRIVATE, TRAINING, None, 3, engine)
    prepared = prepare(engine, spec, samples, mix)

    assert prepared.job.key == alone.job.key != prepare(engine, spec, SAMPLES, Mix(4)).job.key
    assert (len(prepared.job.sources), prepared.num_examples, prepared.metrics) == (1, 3, {})


@pytest.mark.parametrize("soft", [(1.0,), (0.25, 0.25, 0.5)])
def test_soft_labels_of_another_task_are_refused(engine: Engine, spec: AdapterSpec, soft: tuple[float, ...]) -> None:
    """A probability for each of the task's classes, or nothing is learned: one number would be taken for all of them."""
    odd = msgspec.structs.replace(SAMPLES[1], soft=soft)

    with pytest.raises(DataError, match="soft labels of other classes"):
        prepare(engine, spec, [SAMPLES[0], odd], Mix(2))


def test_synthetic_texts_alone_are_no_training(engine: Engine, spec: AdapterSpec) -> None:
    """A device without a label of its own does not train on what others judged."""
    with pytest.raises(DataError, match="no labelled text"):
        verbs.prepare(1, spec.start(0), spec, Private((), (), (), ()), TRAINING, None, 3, engine, None, SAMPLES, Mix(4))


# Which adapter it keeps -----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def differ(engine: Engine, spec: AdapterSpec, trained: dict[str, Array]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Texts that the start and `trained` call alike, and texts they do not, each with the class that the start says."""
    said = scores(engine, spec.start(0), spec).argmax(1).tolist()
    other = scores(engine, trained, spec).argmax(1).tolist()
    alike = [(text, a) for text, a, b in zip(TEXTS, said, other, strict=True) if a == b]
    return alike, [(text, a) for text, a, b in zip(TEXTS, said, other, strict=True) if a != b]


def holding(pairs: list[tuple[str, int]]) -> Private:
    return Private(LABELLED, (), (), tuple(Example(text, label) for text, label in pairs))


Differ = tuple[list[tuple[str, int]], list[tuple[str, int]]]


def test_the_adapter_that_is_right_more_often_is_kept(
    engine: Engine, spec: AdapterSpec, trained: dict[str, Array], differ: Differ
) -> None:
    """One text more that only one of them has right decides, whichever is the new one; the numbers are those of the kept one."""
    start, (alike, other) = spec.start(0), differ
    right = holding([alike[0], other[0]])  # as the start says

    assert verbs.better(start, trained, spec, right, engine) == (start, {"accuracy": 1.0}, False)
    assert verbs.better(trained, start, spec, right, engine) == (start, {"accuracy": 1.0}, True)
    wrong = holding([alike[0], (other[0][0], 1 - other[0][1])])
    assert verbs.better(start, trained, spec, wrong, engine) == (trained, {"accuracy": 1.0}, True)
    assert verbs.better(trained, start, spec, wrong, engine) == (trained, {"accuracy": 1.0}, False)


def test_of_two_that_do_alike_the_new_one_is_kept(
    engine: Engine, spec: AdapterSpec, trained: dict[str, Array], differ: Differ
) -> None:
    """Both right in half of the texts, each in another half, or both wrong everywhere: the new one has seen more."""
    start, (alike, other) = spec.start(0), differ
    half = holding([other[0], (other[0][0], 1 - other[0][1])])
    wrong = holding([(text, 1 - label) for text, label in alike])

    assert verbs.better(start, trained, spec, half, engine) == (trained, {"accuracy": 0.5}, True)
    assert verbs.better(trained, start, spec, half, engine) == (start, {"accuracy": 0.5}, True)
    assert verbs.better(start, trained, spec, wrong, engine) == (trained, {"accuracy": 0.0}, True)


def test_without_an_adapter_or_held_out_text_the_new_one_is_kept(
    engine: Engine, spec: AdapterSpec, trained: dict[str, Array], differ: Differ
) -> None:
    """A first adapter has nothing to be compared with, and without held-out text there is nothing to compare by."""
    wrong = holding([(text, label) for text, label in differ[1]])

    assert verbs.better(None, trained, spec, wrong, engine) == (trained, {"accuracy": 0.0}, True)
    assert verbs.better(spec.start(0), trained, spec, PRIVATE, engine) == (trained, {}, True)
    assert verbs.better(None, trained, spec, PRIVATE, engine) == (trained, {}, True)
