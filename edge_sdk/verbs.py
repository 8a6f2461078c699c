"""What a device does when it is asked: `train` and `evaluate`, as functions of the work, the adapter and private data.

LP-FL's device side (Jiang, Liu & Fan 2023, reconstruction in docs/systems/lpfl.md) is `prepare`: label with the fresh global
adapter, choose, and learn from few labels and many soft ones. The agent takes the steps in between, small and interrupted;
bench/lpfl.py runs these same functions without a network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sdk import exchange, softlabels
from edge_sdk.adapters import Adapter, AdapterSpec, Array, Arrays, take
from edge_sdk.engines import Scorer
from edge_sdk.errors import DataError
from edge_sdk.exchange import Heard, Voice
from edge_sdk.judgments import Bytes, Form, encode
from edge_sdk.knowledge import Knowledge, Sheet, class_targets
from edge_sdk.protocol import Lesson, Metrics, Mix, Sample, Text
from edge_sdk.softlabels import SoftLabels, SoftSet
from edge_sdk.tasks import Example, Private, accuracy, sharpen, softmax
from edge_sdk.training.batches import Answer, Classes, Guess, Job, Label, Row, Source, Training

NO_LABELS = "this device has no labelled text; add some with `edge-agent add`"


class Fits(Protocol):
    """Runs a job to its end; `edge_sdk.training.learner.Learner`."""

    def fit(self, job: Job) -> tuple[dict[str, Array], float]:
        """Returns the trained arrays and the mean loss."""
        ...


@dataclass(frozen=True)
class Prepared:
    """A training to be run: the job, the part of the adapter it trains, how many examples it rests on, numbers worth telling."""

    job: Job
    part: AdapterSpec
    num_examples: int
    metrics: Metrics

    def learned(self, trained: Arrays, loss: float) -> Learned:
        """What came of it."""
        frozen = {slot.a for slot in self.part.slots} if self.part.freeze_a else set()
        delta = {name: trained[name] - array for name, array in self.job.start.items() if name not in frozen}
        return Learned(delta, self.num_examples, {"loss": loss, **self.metrics})


@dataclass(frozen=True)
class Learned:
    """What came of one `Train`: trained - start, how many examples it rests on, and numbers worth telling."""

    delta: dict[str, Array]
    num_examples: int
    metrics: Metrics


def prepare(
    version: int,
    start: Arrays,
    spec: AdapterSpec,
    private: Private,
    training: Training,
    soft: SoftLabels | None,
    seed: int,
    engine: Scorer,
    part: AdapterSpec | None = None,
    synthetic: Sequence[Sample] = (),
    mix: Mix | None = None,
    public: Sequence[Sample] | Heard = (),
    lesson: Lesson | None = None,
) -> Prepared:
    """What to learn from private data, starting at the global adapter of `version`.

    Args:
        part: what of `spec` is trained; all of it by default.
        synthetic: samples to learn from too, by their soft labels, as `mix` says.
        public: labelled or answered texts and what the server's LLM says of them, to learn from as `lesson` says.

    Raises:
        DataError: no text with a label or an answer, or a sample of another task.
    """
    if not private.labelled:
        raise DataError(NO_LABELS)
    sources = [Source(private_rows(private.labelled, engine), training.batch_size)]
    metrics: Metrics = {}
    if soft is not None and (count := softlabels.size(soft, version, len(private.unlabelled))):
        engine.set_adapter(Adapter(start, spec))
        chosen = softlabels.choose(engine.logits(private.unlabelled), count)
        metrics = _about(chosen, private.truths)
        texts = engine.encoder.prompts([private.unlabelled[i] for i in chosen.indices])
        guesses = [Row(ids, Guess(scores, soft.temperature)) for ids, scores in zip(texts, chosen.scores, strict=True)]
        sources.append(Source(guesses, soft.batch_size, soft.weight))
    count = sum(len(source.rows) for source in sources)  # what is the device's own weighs, what all have does not
    if mix is not None and synthetic:
        if any(len(sample.soft) != len(engine.encoder.labels) for sample in synthetic):
            raise DataError("a synthetic text has soft labels of other classes than this task's")
        rows = zip(engine.encoder.prompts([s.text for s in synthetic]), synthetic, strict=True)
        soft_rows = [Row(ids, Classes(sharpen(np.array(sample.soft, np.float32), mix.temperature))) for ids, sample in rows]
        sources.append(Source(soft_rows, mix.batch_size, mix.weight))
        metrics = {**metrics, "synthetic_examples": float(len(synthetic))}
    if lesson is not None and public:
        own = Adapter(start, spec)
        if isinstance(public, Heard):
            rows_of, taught = _answered(public, own, engine, lesson)
        else:
            rows_of, taught = _public(public, own, engine, lesson)
        sources.append(Source(rows_of, lesson.batch_size))
        metrics = {**metrics, "public_examples": float(len(rows_of)), "public_taught": taught}
    job = Job(dict(start) if part is None else take(start, part), sources, training, seed)
    return Prepared(job, part or spec, count, metrics)


def _public(public: Sequence[Sample], adapter: Adapter, engine: Scorer, lesson: Lesson) -> tuple[list[Row], float]:
    """Rows of public texts, and the share of them that the LLM says better than this device."""
    names = engine.encoder.labels
    if any(sample.label not in names or len(sample.soft) != len(names) for sample in public):
        raise DataError("a public text has labels of another task")
    texts = [sample.text for sample in public]
    engine.set_adapter(adapter)
    own, told = softmax(engine.logits(texts)), np.array([sample.soft for sample in public], np.float32)
    labels = [names.index(sample.label) for sample in public]
    targets, chosen = class_targets(labels, own, [told], lesson.label_weight)
    rows = [Row(ids, Classes(target)) for ids, target in zip(engine.encoder.prompts(texts), targets, strict=True)]
    return rows, float(np.mean(chosen >= 0))


def _answered(heard: Heard, adapter: Adapter, engine: Scorer, lesson: Lesson) -> tuple[list[Row], float]:
    """Rows of public answers, and the share of them that the LLM says better than this device."""
    engine.set_adapter(adapter)
    own = know(heard.public, engine, max((known.ids.shape[1] for known in heard.knowledge), default=1))
    teacher = heard.voice, heard.knowledge
    rows, chosen = exchange.lessons(Voice(engine.encoder, engine.end), heard.public, own, [teacher], lesson.label_weight)
    return rows, float(np.mean(chosen >= 0))


def tell(
    public: Sequence[Text], adapter: Arrays, spec: AdapterSpec, private: Private, engine: Scorer, k: int
) -> tuple[Metrics, list[Knowledge], Sheet]:
    """What this device makes of public answers: how it does on its held-out text, what it says, and how it spells them.

    Raises:
        DataError: an answer is empty.
    """
    _, metrics = evaluate(adapter, spec, private, engine)
    engine.set_adapter(Adapter(adapter, spec))
    return metrics, know(public, engine, k), exchange.sheet(Voice(engine.encoder, engine.end), public)


def know(public: Sequence[Text], engine: Scorer, k: int) -> list[Knowledge]:
    """What a model, with the adapter it has, says of public answers: the k likeliest tokens at each position."""
    found = engine.answer_top_k([t.text for t in public], [t.answer for t in public], k)
    return exchange.said(Voice(engine.encoder, engine.end), public, found)


def train(
    version: int,
    start: Arrays,
    spec: AdapterSpec,
    private: Private,
    training: Training,
    soft: SoftLabels | None,
    seed: int,
    engine: Scorer,
    trainer: Fits,
    part: AdapterSpec | None = None,
) -> Learned:
    """Prepares a training and runs it undisturbed.

    Raises:
        DataError: no labelled text, or training went wrong; nothing is sent then.
    """
    prepared = prepare(version, start, spec, private, training, soft, seed, engine, part)
    return prepared.learned(*trainer.fit(prepared.job))


def judge(
    sheet: Sequence[Text], adapter: Arrays, spec: AdapterSpec, private: Private, engine: Scorer, form: Form
) -> tuple[int, Metrics, tuple[int, ...], Bytes]:
    """What this device makes of synthetic texts: how many labels it rests on, its accuracy, the classes it has, the answer.

    Raises:
        DataError: no labelled text, so nothing to judge by; or a text was written for a class that this task does not have.
    """
    covers = tuple(sorted({e.label for e in private.labelled if e.label is not None}))
    if not covers:
        raise DataError(NO_LABELS)
    classes = len(engine.encoder.labels)
    if any(not 0 <= text.label < classes for text in sheet):
        raise DataError("a synthetic text was written for a class that this task does not have")
    _, metrics = evaluate(adapter, spec, private, engine)
    engine.set_adapter(Adapter(adapter, spec))
    probabilities = softmax(engine.logits([text.text for text in sheet]))
    return len(private.labelled), metrics, covers, encode(probabilities, [text.label for text in sheet], form)


def better(
    old: Arrays | None, new: Arrays, spec: AdapterSpec, private: Private, engine: Scorer, found: Metrics | None = None
) -> tuple[Arrays, Metrics, bool]:
    """The adapter that is right more often on held-out text, its numbers, and whether it is the new one.

    Learning from others can make a device worse; it keeps what serves it. Where both do alike, or there is nothing to measure
    by, the new one has seen more.

    Args:
        found: the new one's numbers, where they are measured already.
    """
    found = evaluate(new, spec, private, engine)[1] if found is None else found
    if old is not None and found:
        _, known = evaluate(old, spec, private, engine)
        if _worth(known) > _worth(found):
            return old, known, False
    return new, found, True


def _worth(metrics: Metrics) -> float:
    """The more the better: accuracy, or how likely answers are."""
    return metrics["accuracy"] if "accuracy" in metrics else -metrics["loss"]


def evaluate(adapter: Arrays, spec: AdapterSpec, private: Private, engine: Scorer) -> tuple[int, Metrics]:
    """How many held-out examples there are, and the accuracy on them, or the loss of answers in nats a token; {} for none."""
    if not private.held_out:
        return 0, {}
    engine.set_adapter(Adapter(adapter, spec))
    texts = [e.text for e in private.held_out]
    if answers := [e.answer for e in private.held_out if e.answer is not None]:
        logprobs = engine.answer_logprobs(texts, answers)
        return len(answers), {"loss": -float(np.concatenate(logprobs).mean())}
    scores: NDArray[np.float32] = engine.logits(texts)
    labels = [e.label for e in private.held_out if e.label is not None]
    return len(labels), {"accuracy": accuracy(scores, labels)}


def private_rows(examples: Sequence[Example], engine: Scorer) -> list[Row]:
    """What to train on: prompts with their labels, or with answers where these are texts."""
    prompts = engine.encoder.prompts([e.text for e in examples])
    if answers := [e.answer for e in examples if e.answer is not None]:
        said = engine.answers(answers)
        return [Row([*prompt, *answer], Answer(len(prompt))) for prompt, answer in zip(prompts, said, strict=True)]
    return [Row(ids, Label(e.label)) for ids, e in zip(prompts, examples, strict=True) if e.label is not None]


def _about(chosen: SoftSet, truths: Sequence[int | None]) -> Metrics:
    """Size of the soft set and, where truths are known, the share of its labels that are right."""
    known = [(int(scores.argmax()), truths[i]) for i, scores in zip(chosen.indices, chosen.scores, strict=True)]
    hits = [predicted == truth for predicted, truth in known if truth is not None]
    right = {"soft_accuracy": float(np.mean(hits))} if hits else {}
    return {"soft_examples": float(len(chosen)), **right}
