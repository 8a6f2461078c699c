"""Carries out what `systems/fedmkt.py` decides is next: lets the LLM learn from what devices say of public text, and answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_sdk import judgments, wire
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.knowledge import class_targets
from edge_sdk.protocol import Judgment, Sample, Text
from edge_sdk.tasks import Example, Task, softmax
from edge_server import coordinator
from edge_server.compute import Compute, expect
from edge_server.coordinator import Decided, State, Tuned, Written
from edge_server.llm.jobs import Label, Labelled, Lessons, Scores, Tune, Tuning
from edge_server.llm.jobs import Tuned as Learned
from edge_server.storage import Blobs
from edge_server.systems import fedmkt
from edge_server.systems.fedmkt import AskAll, FedMkt, Learn, Step

Probabilities = NDArray[np.float32]


@dataclass(frozen=True)
class Tutor:
    """The LLM's side of a run.

    Args:
        settings: of the run. task: its labels. public: the labelled texts that all have.
        blobs: where answers, lessons and adapters lie. compute: where the LLM runs. now: seconds since the epoch.
    """

    settings: FedMkt
    task: Task
    public: tuple[Example, ...]
    blobs: Blobs
    compute: Compute
    now: Callable[[], float]

    @property
    def labels(self) -> list[int]:
        return [e.label or 0 for e in self.public]

    async def carry_out(self, step: Step, state: State) -> Written | Decided | Tuned:
        """Raises: JobFailed, DataError, OSError: it cannot be done now."""
        if isinstance(step, AskAll):
            lines = sheet(self.public)
            blob = await asyncio.to_thread(self.blobs.put, lines)
            return Written(step.number, blob, blob, len(lines), len(self.public), "", {}, self.now())
        if isinstance(step, Learn):
            return await self._learn(step.number, state)
        return await self._say(step.number, state)

    async def _learn(self, number: int, state: State) -> Tuned:
        settings, before = self.settings, self._file(state)
        own = await self._probabilities(before)
        devices = await asyncio.to_thread(self._heard, number, state)
        targets, _ = class_targets(self.labels, own, devices, settings.label_weight)
        labelled = tuple(Labelled(e.text, tuple(map(float, row))) for e, row in zip(self.public, targets, strict=True))
        steps = settings.passes * -(-len(labelled) // settings.llm_batch_size)
        tuning = Tuning(steps, settings.llm_batch_size, settings.learning_rate, generation=0.0, contrast="none", leash=0.0)
        path = self.blobs.incoming()
        try:
            job = Tune(before, str(path), Lessons(labelled=labelled), tuning, settings.seed + number)
            loss = expect(await self.compute.run(job), Learned).loss
            sha256 = await asyncio.to_thread(self.blobs.take, path)
        finally:
            path.unlink(missing_ok=True)
        return Tuned(number, sha256, loss)

    async def _say(self, number: int, state: State) -> Decided:
        """What the LLM makes of the public text; `acceptance` is how much of it it gets right."""
        said, adapter = await self._probabilities(self._file(state)), state.tuned[-1]
        model, names = self.settings.llm.model, self.task.labels
        lines = [
            Sample(i + 1, f"p{i}", e.text, names[label], tuple(map(float, row)), float(row[label]), number, model, adapter)
            for i, (e, label, row) in enumerate(zip(self.public, self.labels, said, strict=True))
        ]
        blob = await asyncio.to_thread(self.blobs.put, wire.pack_lines(lines))
        return Decided(number, blob, 0, float(np.mean(said.argmax(1) == self.labels)))

    async def _probabilities(self, adapter: str) -> Probabilities:
        outcome = expect(await self.compute.run(Label(adapter, tuple(e.text for e in self.public))), Scores)
        return softmax(np.array(outcome.scores, np.float32))

    def _heard(self, number: int, state: State) -> list[Probabilities]:
        """What each device said last, (texts, classes)."""
        shape, found = (len(self.public), len(self.task.labels)), []
        for _, ballot in fedmkt.heard(self.settings, state, number):
            _, answer = wire.unpack_judgment(self.blobs.get(ballot.blob), lambda _: shape)
            found.append(judgments.decode(answer, self.labels, shape[1], "probabilities").astype(np.float32))
        return found

    def read(self, body: bytes, state: State) -> Judgment:
        """What a device says of the public text, checked to its last byte.

        Raises:
            WireError: as `wire.unpack_judgment`; `unknown-sheet`; `bad-message`: a class that this task does not have.
        """

        def shape(judgment: Judgment) -> tuple[int, int]:
            coordinator.sheet_of(state, judgment.version)
            if any(not 0 <= label < len(self.task.labels) for label in judgment.covers):
                raise WireError("bad-message", "a judgment covers a class that this task does not have")
            return len(self.public), len(self.task.labels)

        judgment, _ = wire.unpack_judgment(body, shape)
        return judgment

    def _file(self, state: State) -> str:
        return str(self.blobs.file(state.tuned[-1])) if state.tuned else ""


def sheet(public: Sequence[Example]) -> bytes:
    """The public texts as they travel. Raises: SettingsError: one that no device takes, or too many."""
    texts = [Text(f"p{i}", e.text, e.label or 0) for i, e in enumerate(public)]
    if len(texts) > wire.MAX_TEXTS:
        raise SettingsError(f"fedmkt.public: devices take at most {wire.MAX_TEXTS} texts, these are {len(texts)}; leave some out")
    for text in texts:
        try:
            wire.unpack_lines(wire.pack_lines([text]), Text)
        except WireError as error:
            raise SettingsError(f"fedmkt.public: text {text.id[1:]} cannot be sent: {error.detail}; make it one line") from error
    return wire.pack_lines(texts)
