"""FedMKT: an LLM and devices' models of any kind teach each other by what they say of public text (Fan et al. 2024, 2406.02224).

    device:  theta_k <- Train(theta_k; private labels, and public labels with what the LLM says of them)        edge_sdk/verbs.py
             S_k <- Predict(public text)
    server:  for each text the S_k that says its label best, if better than the LLM itself: DualMinCE        edge_sdk/knowledge.py
             LLM <- Train(LLM; 0.9 CE(label) + 0.1 KD(that S_k)); S_0 <- what it now says of the public text         tutor.py
    device:  of S_0 what says a label better than the device itself, and so on

The paper goes through clients, server and clients in strict order. Here a device that stays away delays nobody: what it said last
counts until it is too old. Labels are spoken of as classes, so that models of any kind take part; texts token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import msgspec

from edge_sdk.adapters import AdapterSpec, Array
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import MAX_K, Finished, Lesson, Predict, Train, Wait, Work
from edge_sdk.training.batches import Training
from edge_server.coordinator import Ballot, Buffered, Device, State
from edge_server.llm.jobs import LlmSettings


class FedMkt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a run.

    Args:
        public: labelled texts that all have (D_p): a file of JSON lines with text and label, which is the answer where answers
            are texts. A relative path is one beside the run's file.
        versions: how often devices are asked and the LLM learns.
        answers: of devices, after which it does. deadline_seconds: after asking, with at least one answer.
        max_staleness: for how many versions what an absent device said last still counts.
        top_k: where answers are texts, how many of the likeliest tokens are told at each position.
        alone: a device's steps on its own labels, before the LLM has said anything. training: with its lesson.
        batch_size: public texts in each step. label_weight: lambda, of their labels; the rest is the teacher's, and
            so a liar's, which above a half never comes out on top.
        passes, llm_batch_size, learning_rate: of the LLM over the public texts, for each version.
        llm: which it is.
        wait_seconds: how long an idle device waits before it asks again.
        seed: of everything random.
    """

    public: str
    versions: int = 3
    answers: int = 4
    deadline_seconds: float = 3600.0
    max_staleness: int = 2
    top_k: int = 16
    alone: Training = Training(steps=32, batch_size=8, learning_rate=5e-4, dropout=0.2)
    training: Training = Training(steps=24, batch_size=8, learning_rate=5e-4, dropout=0.2)
    batch_size: int = 8
    label_weight: float = 0.9
    passes: int = 1
    llm_batch_size: int = 8
    learning_rate: float = 5e-4
    llm: LlmSettings = LlmSettings()
    wait_seconds: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.public or self.llm.endpoint:
            raise SettingsError("fedmkt.public names the file of public texts, and fedmkt.llm.endpoint cannot be trained here")
        if self.versions < 1 or self.answers < 1 or self.max_staleness < 0 or self.seed < 0:
            raise SettingsError("fedmkt.versions and answers must be at least 1, max_staleness and seed not negative")
        if not 0 <= self.label_weight <= 1 or not 1 <= self.batch_size <= 4096 or not 1 <= self.llm_batch_size <= 4096:
            raise SettingsError("fedmkt.label_weight must be in [0, 1], batch_size and llm_batch_size 1 to 4096")
        if not 1 <= self.top_k <= MAX_K:
            raise SettingsError(f"fedmkt.top_k must be 1 to {MAX_K}")
        if not 1 <= self.passes <= 10_000 or not 0 < self.learning_rate <= 1:
            raise SettingsError("fedmkt.passes must be 1 to 10000, learning_rate in (0, 1]")
        if not 0 < self.wait_seconds < math.inf or not 0 < self.deadline_seconds < math.inf:
            raise SettingsError("fedmkt.wait_seconds and deadline_seconds must be positive and finite")


# What the server does next --------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class AskAll:
    """Ask every device what it makes of the public text."""

    number: int


@dataclass(frozen=True)
class Learn:
    """Let the LLM learn from what devices said."""

    number: int


@dataclass(frozen=True)
class Say:
    """Ask the LLM what it makes of the public text, for devices to learn from."""

    number: int


Step = AskAll | Learn | Say


def due(settings: FedMkt, state: State, now: float) -> Step | None:
    """What is to be done now; None: nothing yet.

    Args:
        now: seconds since the epoch.
    """
    number = len(state.sheets) - 1
    if number < 0 or state.sheets[number].judged:
        return AskAll(number + 1) if number + 1 < settings.versions else None
    if len(state.tuned) > number:
        return Say(number)
    last = state.sheets[number]
    late = now - last.at >= settings.deadline_seconds and last.ballots
    return Learn(number) if len(last.ballots) >= settings.answers or late else None


def start(settings: FedMkt, spec: AdapterSpec) -> dict[str, Array]:
    """The first adapter of a model: one that changes nothing."""
    return spec.start(settings.seed)


def averaged(_: FedMkt, __: State, ___: float) -> tuple[Buffered, ...]:
    """Nothing: what devices learn stays with them."""
    return ()


def heard(settings: FedMkt, state: State, number: int) -> list[tuple[int, Ballot]]:
    """What counts: of each device the newest answer that is not too old, and the sheet it is about."""
    newest: dict[str, tuple[int, Ballot]] = {}
    for i in range(max(0, number - settings.max_staleness), number + 1):
        newest |= {ballot.device: (i, ballot) for ballot in state.sheets[i].ballots}
    return [newest[device] for device in sorted(newest)]


def plan(settings: FedMkt, state: State, device: Device, can_train: bool, start: str) -> Work:
    """What a device that asks should do now: learn, then say what it makes of the public text, each once a version.

    Args:
        start: the first adapter of its model, for a device that has learned nothing yet.
    """
    version, number = state.version, len(state.sheets) - 1
    if can_train and device.trained < version:
        seed = settings.seed + 1 + version
        if not version:
            return Train(version, start, settings.alone, None, seed, share=False)
        said = state.sheets[version - 1]
        lesson = Lesson(said.judged, said.count, settings.label_weight, settings.batch_size)
        return Train(version, start, settings.training, None, seed, share=False, lesson=lesson)
    if number >= 0 and not state.sheets[number].judged and device.judged < number:
        sheet = state.sheets[number]
        return Predict(number, start, sheet.texts, sheet.size, sheet.count, "probabilities", settings.top_k)
    if version >= settings.versions:
        return Finished(version, "")
    return Wait(settings.wait_seconds)


def finished(settings: FedMkt, state: State) -> bool:
    """Whether the LLM has said its last. Nobody is waited for; who comes later still gets it, see `plan`."""
    return state.version >= settings.versions
