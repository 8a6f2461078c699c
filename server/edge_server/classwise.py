"""FedMKT where answers are classes: what models of any kind say of public texts is compared as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edge_sdk import judgments, wire
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.knowledge import class_targets
from edge_sdk.protocol import Judgment, Sample, Text
from edge_sdk.tasks import Task, softmax
from edge_server import coordinator
from edge_server.compute import Compute, expect
from edge_server.coordinator import Ballot, State
from edge_server.llm.jobs import Label, Labelled, Lessons, Scores, Tune, Tuned, Tuning
from edge_server.storage import Blobs
from edge_server.systems.fedmkt import FedMkt

Probabilities = NDArray[np.float32]
MEASURE = "of the public texts"
BESIDE = 1 << 14  # bytes that go with the classes of a judgment, at most: its header and metrics


@dataclass(frozen=True)
class Classwise:
    """Arguments as `Tutor`'s."""

    settings: FedMkt
    task: Task
    public: Sequence[Text]
    blobs: Blobs
    compute: Compute

    measure = MEASURE

    @property
    def labels(self) -> list[int]:
        return [text.label for text in self.public]

    def check(self) -> None:
        """Raises: SettingsError: see `tutor.Subject`."""
        count, classes = len(self.public), len(self.task.labels)
        if (size := count * classes + BESIDE) > wire.MAX_JSON:
            raise SettingsError(
                f"fedmkt.public: devices would say {size} bytes of {count} texts, {wire.MAX_JSON} travel; use fewer"
            )
        longest = self._lines(np.full((count, classes), np.finfo(np.float32).tiny), 0, "0" * 64)
        if len(longest) > wire.MAX_SHEET:
            sizes = f"may have {len(longest)} bytes, devices take {wire.MAX_SHEET}"
            raise SettingsError(f"fedmkt.public: what the LLM says of {count} texts {sizes}; use fewer, or shorter ones")

    async def meet(self) -> None:
        """Any LLM can say classes."""

    async def learn(self, before: str, out: Path, heard: Sequence[tuple[Ballot, str]], tuning: Tuning, seed: int) -> float:
        """The LLM learns each label and, where a device gives it more than the LLM does, what that says; see `tutor.Subject`."""
        own = await self._probabilities(before)
        said = [self._said(ballot) for ballot, _ in heard]
        targets, _ = class_targets(self.labels, own, said, self.settings.label_weight)
        labelled = tuple(Labelled(t.text, tuple(map(float, row))) for t, row in zip(self.public, targets, strict=True))
        job = Tune(before, str(out), Lessons(labelled=labelled), tuning, seed)
        return expect(await self.compute.run(job), Tuned).loss

    async def say(self, number: int, sha256: str, adapter: str) -> tuple[bytes, float]:
        """Lines of what the LLM makes of each text, and how many of them it gets right."""
        said = await self._probabilities(adapter)
        return self._lines(said, number, sha256), float(np.mean(said.argmax(1) == self.labels))

    def _lines(self, said: Probabilities, number: int, sha256: str) -> bytes:
        model, names = self.settings.llm.model, self.task.labels
        return wire.pack_lines(
            Sample(i + 1, t.id, t.text, names[t.label], tuple(map(float, row)), float(row[t.label]), number, model, sha256)
            for i, (t, row) in enumerate(zip(self.public, said, strict=True))
        )

    async def _probabilities(self, adapter: str) -> Probabilities:
        outcome = expect(await self.compute.run(Label(adapter, tuple(t.text for t in self.public))), Scores)
        return softmax(np.array(outcome.scores, np.float32))

    def _said(self, ballot: Ballot) -> Probabilities:
        """What a device said last, (texts, classes)."""
        shape = len(self.public), len(self.task.labels)
        _, answer = wire.unpack_judgment(self.blobs.get(ballot.blob), lambda _: shape)
        return judgments.decode(answer, self.labels, shape[1], "probabilities").astype(np.float32)

    def read(self, body: bytes, state: State) -> Judgment:
        """What a device says of the public texts, checked to its last byte.

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
