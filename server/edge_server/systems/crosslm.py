"""CrossLM-style mutual learning of a server's LLM and devices' SLMs through synthetic text (after Deng et al. 2023, 2312.05842).

    server:  S_t <- texts of the LLM for each label                                        `prompts`, knowledge/filters.py
    device:  p_kj <- class probabilities of its own SLM, trained on its private data
    server:  p_j <- sum_k a_k p_kj, good if its label is likeliest and sure enough          `decide`, knowledge/judging.py
    server:  LLM <- learns to write what was judged good, not what was judged bad, and the task itself    `lessons`
    device:  SLM <- private labels + mu * judged texts with their soft labels

The paper's equations are not public: this is a reconstruction, and docs/systems/crosslm.md says of what.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from immutables import Map

from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.errors import SettingsError
from edge_sdk.judgments import Form
from edge_sdk.protocol import Finished, Line, Mix, Predict, Sample, Text, Train, Wait, Work
from edge_sdk.training.batches import Training
from edge_server.coordinator import Buffered, Device, State
from edge_server.knowledge.filters import Filter
from edge_server.knowledge.judging import Verdict
from edge_server.llm.jobs import Good, Labelled, Lessons, LlmSettings, Pair, Tuning
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl


class CrossLm(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a run.

    Args:
        prompts: what the LLM continues; `{label}` stands for a label's name, and the text ends where a quotation is closed.
        names: what labels are called in prompts; empty for the task's own.
        versions: how many sheets of synthetic texts are written, judged and learned from.
        samples: texts of a sheet, before the filters.
        temperature, top_p, max_tokens: how they are written.
        filter: which of them are worth a judge's time.
        form: what judges say: `probabilities` in 8 bits, or only `agree` with two bits a text.
        judges: answers after which a sheet is decided. deadline_seconds: after its writing, with at least one answer.
        quality: how sure the judges must be of a text to accept it.
        tuning: how the LLM learns from a sheet. llm: which it is.
        leash: texts the base itself writes once, to hold the LLM to what it was.
        task: what the feed of synthetic data calls this task; whoever asks for another gets none.
        retain: newest decided sheets whose texts stay in the feed, older ones are withdrawn; 0 for all.
        alone: the device's steps on its labels alone. training: with synthetic texts beside them.
        weight, batch_size, label_temperature: of synthetic texts in these; a temperature below 1 sharpens their soft labels.
        federated: after the last sheet devices average what they learn from labels and feed (LP-FL, systems/lpfl.py); its
            `evaluate_every` counts the versions of the whole run.
        wait_seconds: how long an idle device waits before it asks again.
        seed: of everything random.
    """

    prompts: tuple[str, ...]
    names: tuple[str, ...] = ()
    versions: int = 3
    samples: int = 192
    temperature: float = 0.9
    top_p: float = 0.9
    max_tokens: int = 40
    filter: Filter = Filter()
    form: Form = "probabilities"
    judges: int = 4
    deadline_seconds: float = 3600.0
    quality: float = 0.6
    tuning: Tuning = Tuning()
    llm: LlmSettings = LlmSettings()
    leash: int = 40
    task: str = "default"
    retain: int = 0
    alone: Training = Training(steps=32, batch_size=8, learning_rate=5e-4, dropout=0.2)
    training: Training = Training(steps=24, batch_size=8, learning_rate=1e-3, dropout=0.2)
    weight: float = 1.0
    batch_size: int = 16
    label_temperature: float = 0.5
    federated: LpFl | None = None
    wait_seconds: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or not all("{label}" in prompt for prompt in self.prompts):
            raise SettingsError("crosslm.prompts needs at least one prompt, each with {label} in it")
        if self.versions < 1 or self.judges < 1 or not 1 <= self.samples <= 10_000 or self.leash < 0 or self.seed < 0:
            raise SettingsError("crosslm.versions and judges must be at least 1, samples 1 to 10000, leash and seed not negative")
        if not 0 < self.temperature < math.inf or not 0 < self.top_p <= 1 or not 1 <= self.max_tokens <= 1000:
            raise SettingsError("crosslm.temperature must be positive, top_p in (0, 1], max_tokens 1 to 1000")
        if not 0 < self.quality <= 1 or not 0 <= self.weight < math.inf or not 1 <= self.batch_size <= 4096:
            raise SettingsError("crosslm.quality must be in (0, 1], weight not negative, batch_size 1 to 4096")
        if self.llm.endpoint and not self.llm.endpoint_model:
            raise SettingsError("crosslm.llm.endpoint_model must say which model writes at the endpoint: every sample names it")
        if self.retain < 0 or not self.task:
            raise SettingsError("crosslm.retain must not be negative, and crosslm.task not empty")
        if not 0 < self.label_temperature < math.inf:
            raise SettingsError("crosslm.label_temperature must be positive and finite")
        if not 0 < self.wait_seconds < math.inf or not 0 < self.deadline_seconds < math.inf:
            raise SettingsError("crosslm.wait_seconds and deadline_seconds must be positive and finite")


# What the server does next --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class WriteSheet:
    number: int


@dataclass(frozen=True)
class DecideSheet:
    number: int


@dataclass(frozen=True)
class TuneLlm:
    """Learn from a decided sheet."""

    number: int


Step = WriteSheet | DecideSheet | TuneLlm


def start(settings: CrossLm, spec: AdapterSpec) -> dict[str, Array]:
    """Version 0: an adapter that changes nothing, from which every device trains its own."""
    return spec.start(settings.seed)


def due(settings: CrossLm, state: State, now: float) -> Step | None:
    """What is to be done now: write, decide once enough have judged or time is up, learn, and so on; None: nothing yet.

    Args:
        now: seconds since the epoch.
    """
    number = len(state.sheets) - 1
    if number >= 0 and not (last := state.sheets[number]).judged:
        late = now - last.at >= settings.deadline_seconds and last.ballots
        return DecideSheet(number) if len(last.ballots) >= settings.judges or late else None
    if len(state.tuned) <= number:
        return TuneLlm(number)
    return WriteSheet(number + 1) if len(state.sheets) < settings.versions else None


def averaged(settings: CrossLm, state: State, now: float) -> tuple[Buffered, ...]:
    """The updates that the next version is made from; the LLM may still be learning from the last sheet meanwhile."""
    then = _afterwards(settings)
    return lpfl.averaged(then, state, now) if then is not None and state.version >= settings.versions else ()


def plan(settings: CrossLm, state: State, device: Device, can_train: bool) -> Work:
    """What a device that asks should do now: learn from what is decided, then judge what is not, each once."""
    version, number = state.version, len(state.sheets) - 1
    mix = Mix(state.lines, settings.weight, settings.batch_size, settings.label_temperature) if state.in_use > 0 else None
    if version >= settings.versions and (then := _afterwards(settings)):
        measured = max(device.evaluated, settings.versions)  # an adapter that changes nothing need not be
        work = lpfl.plan(then, state, replace(device, evaluated=measured), can_train)
        return msgspec.structs.replace(work, synthetic=mix) if isinstance(work, Train) else work
    if can_train and device.trained < version:
        training = settings.training if mix else settings.alone
        return Train(version, state.adapter, training, None, settings.seed + 1, synthetic=mix, share=False)
    if number >= 0 and not state.sheets[number].judged and device.judged < number:
        sheet = state.sheets[number]
        return Predict(number, state.adapter, sheet.texts, sheet.size, sheet.count, settings.form)
    if version >= settings.versions:
        return Finished(version, "")
    return Wait(settings.wait_seconds)


def finished(settings: CrossLm, state: State) -> bool:
    """Whether the last sheet is decided, the LLM has learned from it, and so has every device that trains; and what follows.

    A device that only enrolled is not waited for.
    """
    done = len(state.tuned) >= settings.versions
    if then := _afterwards(settings):
        there = {id: d for id, d in state.devices.items() if max(d.trained, d.judged, d.evaluated) >= 0}
        return done and lpfl.finished(then, replace(state, devices=Map(there)))
    return done and all(d.trained >= settings.versions or d.trained < 0 for d in state.devices.values())


def expired(settings: CrossLm, state: State, feed: Sequence[Line]) -> list[str]:
    """Samples of the feed that are older than is retained, and not withdrawn yet."""
    decided = sum(bool(sheet.judged) for sheet in state.sheets)
    first = decided - settings.retain if settings.retain else 0
    return [line.id for line in feed if isinstance(line, Sample) and line.version < first and line.id not in state.feed]


def _afterwards(settings: CrossLm) -> LpFl | None:
    """LP-FL as it goes on where the last sheet ended: its version 0 is the run's version `versions`."""
    if (then := settings.federated) is None:
        return None
    soft = then.soft and msgspec.structs.replace(then.soft, first=then.soft.first + settings.versions)
    return msgspec.structs.replace(then, versions=settings.versions + then.versions, soft=soft)


# The mathematics ------------------------------------------------------------------------------------------------------


class Draft(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text the LLM wrote after `prompt`, which asks for the class `label`."""

    prompt: str
    label: int
    text: str


class Judged(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A draft and what the judges make of it.

    Args:
        soft: combined class probabilities (n_classes,).
        quality: that of the class it was written for.
        good: this class is the likeliest, and sure enough to be an example of it. bad: another class is the likeliest.
    """

    draft: Draft
    soft: tuple[float, ...]
    quality: float
    good: bool
    bad: bool


def prompts(patterns: Sequence[str], names: Sequence[str]) -> list[tuple[str, int]]:
    """Every pattern for every label, `{label}` replaced by the label's name: (prompt, class index)."""
    return [(pattern.replace("{label}", name), label) for pattern in patterns for label, name in enumerate(names)]


def decide(drafts: Sequence[Draft], verdict: Verdict, quality: float) -> list[Judged]:
    """What becomes of each draft that somebody judged; the others are left out.

    Args:
        verdict: of these drafts, in their order.
        quality: how sure the judges must be of a good one, of (1 / n_classes, 1].
    """
    decided = []
    for draft, soft, answers in zip(drafts, verdict.soft, verdict.answers, strict=True):
        if answers:
            own, likeliest = float(soft[draft.label]), int(np.argmax(soft))
            good = likeliest == draft.label and own >= quality
            decided.append(Judged(draft, tuple(map(float, soft)), own, good, bad=likeliest != draft.label))
    return decided


def lessons(judged: Sequence[Judged], leash: Sequence[str]) -> Lessons:
    """What the LLM learns from: good texts by their quality, each bad text beside a good one of its prompt, and all soft labels.

    The best texts of a prompt meet its worst first; where a prompt has none of a kind, there is no contrast to learn.
    """
    good: defaultdict[str, list[Judged]] = defaultdict(list)
    bad: defaultdict[str, list[Judged]] = defaultdict(list)
    for sample in judged:
        if sample.good or sample.bad:
            (good if sample.good else bad)[sample.draft.prompt].append(sample)
    pairs = []
    for prompt, worse in bad.items():
        better = sorted(good[prompt], key=lambda sample: -sample.quality)
        worse.sort(key=lambda sample: sample.quality)
        pairs += [Pair(prompt, better[i % len(better)].draft.text, x.draft.text) for i, x in enumerate(worse) if better]
    return Lessons(
        good=tuple(Good(x.draft.prompt, x.draft.text, x.quality) for x in judged if x.good),
        pairs=tuple(pairs),
        labelled=tuple(Labelled(x.draft.text, x.soft) for x in judged),
        leash=tuple(leash),
    )


def teach(lessons: Lessons, tuning: Tuning) -> bool:
    """Whether there is anything in them to learn; a leash alone only holds."""
    contrast = tuning.contrast_weight if tuning.contrast != "none" else 0.0
    weighted = ((tuning.generation, lessons.good), (contrast, lessons.pairs), (tuning.task, lessons.labelled))
    return any(weight and some for weight, some in weighted)


def texts_of(drafts: Sequence[Draft], sheet: int) -> list[Text]:
    """A sheet as devices get it; the prompts stay on the server."""
    return [Text(id_of(sheet, draft), draft.text, draft.label) for draft in drafts]


def samples_of(judged: Sequence[Judged], sheet: int, first: int, labels: Sequence[str], model: str, adapter: str) -> list[Sample]:
    """What of a decided sheet goes into the feed: the good texts, numbered from `first`."""
    good = [x for x in judged if x.good]
    return [
        Sample(first + i, id_of(sheet, x.draft), x.draft.text, labels[x.draft.label], x.soft, x.quality, sheet, model, adapter)
        for i, x in enumerate(good)
    ]


def id_of(sheet: int, draft: Draft) -> str:
    """Names a text in its sheet and in the feed."""
    return f"{sheet}-{hashlib.sha256(f'{draft.label} {draft.text}'.encode()).hexdigest()[:16]}"


def acceptance(judged: Sequence[Judged]) -> float:
    """Share of fresh texts that were good."""
    return sum(x.good for x in judged) / len(judged) if judged else 0.0
