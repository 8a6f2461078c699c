"""Carries out what `systems/crosslm.py` decides is next: asks the LLM, reads judgments, and says what happened as an event."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
import numpy as np

from edge_sdk import judgments, wire
from edge_sdk.engines import Sampling
from edge_sdk.errors import DataError, WireError
from edge_sdk.protocol import Judgment, Line, Withdrawal
from edge_sdk.tasks import Task, softmax
from edge_server import coordinator
from edge_server.compute import Compute, expect
from edge_server.coordinator import Decided, Event, Sheet, State, Tuned, Withdrawn, Written
from edge_server.knowledge import filters, judging
from edge_server.knowledge.filters import Embed
from edge_server.knowledge.judging import Ballot, combine
from edge_server.llm.jobs import Label, Scores, Texts, Tune, Write
from edge_server.llm.jobs import Tuned as Learned
from edge_server.storage import Blobs
from edge_server.systems import crosslm
from edge_server.systems.crosslm import CrossLm, DecideSheet, Draft, Judged, Step, WriteSheet

T = TypeVar("T")

LEASH_PROMPTS = ("The most important", "I have never", "In the beginning", "When a computer", "A good way to")  # as it likes


@dataclass(frozen=True)
class Author:
    """The LLM's side of a run.

    Args:
        settings: of the run. task: its labels.
        blobs: where sheets, judgments and adapters lie.
        compute: where the LLM runs. writer: what writes the sheets, if not the LLM.
        embed: finds near duplicates; None compares words alone.
        now: seconds since the epoch.
    """

    settings: CrossLm
    task: Task
    blobs: Blobs
    compute: Compute
    embed: Embed | None
    now: Callable[[], float]
    writer: Compute | None = None
    attempts: Counter[int] = field(default_factory=Counter)  # at each sheet: what failed is not written again word for word

    async def step(self, state: State) -> tuple[Sequence[Event], str]:
        """Takes old texts out of use, or does what is next; as `runs.Llm` says."""
        retain = self.settings.retain
        feed = await asyncio.to_thread(self.lines, state, []) if retain else []
        if old := crosslm.expired(self.settings, state, feed):
            said = f"{len(old)} texts of sheets before the last {retain} withdrawn (crosslm.retain)"
            return [Withdrawn(sample) for sample in old], said
        if (step := crosslm.due(self.settings, state, self.now())) is None:
            return [], ""
        event = await self.carry_out(step, state)
        return [event], _said(event)

    async def carry_out(self, step: Step, state: State) -> Written | Decided | Tuned:
        """Raises: JobFailed, DataError, OSError: it cannot be done now."""
        if isinstance(step, WriteSheet):
            return await self._write(step.number, state)
        if isinstance(step, DecideSheet):
            return await self._decide(step.number, state.sheets[step.number], state)
        return await self._tune(step.number, state)

    async def _write(self, number: int, state: State) -> Written:
        settings, adapter = self.settings, state.tuned[-1] if state.tuned and self.writer is None else ""
        asked = crosslm.prompts(settings.prompts, settings.names or self.task.labels)
        each, attempt = -(-settings.samples // len(asked)), self.attempts[number] % 1000
        self.attempts[number] += 1
        sampling = Sampling(
            settings.max_tokens, settings.temperature, settings.top_p, settings.seed * 1_000_000 + number * 1000 + attempt
        )
        job = Write(self._file(adapter), tuple(prompt for prompt, _ in asked), (each,) * len(asked), sampling)
        outcome = expect(await (self.writer or self.compute).run(job), Texts)
        drafts = [
            Draft(prompt, label, filters.clean(text))
            for (prompt, label), texts in zip(asked, outcome.texts, strict=True)
            for text in texts
        ]
        written = await asyncio.to_thread(self._sift, number, state, adapter, drafts)
        return msgspec.structs.replace(written, seconds=round(outcome.seconds, 1))

    def _sift(self, number: int, state: State, adapter: str, drafts: list[Draft]) -> Written:
        known = [draft.text for sheet in state.sheets for draft in self._drafts(sheet)]
        names = (*self.settings.names, *self.task.labels)
        names += tuple(word for words in self.task.verbalizer for word in words) if self.settings.names else ()
        pairs = [(draft.prompt, draft.text) for draft in drafts]
        kept, why = filters.keep(pairs, names, self.settings.filter, self.embed, known)
        if not kept:
            reasons = ", ".join(f"{count} {name}" for name, count in why.most_common())
            raise DataError(f"the LLM wrote nothing usable ({reasons}); other crosslm.prompts or crosslm.filter may help")
        some = [drafts[i] for i in kept][: wire.MAX_TEXTS]  # devices read no more
        texts = wire.pack_lines(crosslm.texts_of(some, number))
        return Written(
            number, self.blobs.put(texts), self.blobs.put(_pack(some)), len(texts), len(some), adapter, dict(why), self.now()
        )

    async def _decide(self, number: int, sheet: Sheet, state: State) -> Decided:
        drafts = await asyncio.to_thread(self._drafts, sheet)
        written = [draft.label for draft in drafts]
        ballots = await asyncio.to_thread(self._ballots, sheet, written)
        if state.tuned and state.tuned[-1] and len(ballots) > 1:  # by then the LLM knows the task, from what it was taught before
            texts = tuple(draft.text for draft in drafts)
            scores = expect(await self.compute.run(Label(self._file(state.tuned[-1]), texts)), Scores).scores
            ballots.append(judging.guest(softmax(np.array(scores, np.float32)).astype(np.float64), ballots, written))
        judged = crosslm.decide(drafts, combine(ballots, written), self.settings.quality)
        blob = await asyncio.to_thread(self.blobs.put, _pack(judged))
        return Decided(number, blob, sum(x.good for x in judged), crosslm.acceptance(judged))

    async def _tune(self, number: int, state: State) -> Tuned:
        settings, before = self.settings, state.tuned[-1] if state.tuned else ""
        judged = await asyncio.to_thread(self._judged, state.sheets[number])
        judged = [x for x in judged if crosslm.id_of(number, x.draft) not in state.feed]  # withdrawn already
        lessons = crosslm.lessons(judged, ())
        if not crosslm.teach(lessons, settings.tuning):
            return Tuned(number, before, 0.0)
        lessons = msgspec.structs.replace(lessons, leash=await self._leash())
        path = self.blobs.incoming()
        try:
            job = Tune(self._file(before), str(path), lessons, settings.tuning, settings.seed + number)
            loss = expect(await self.compute.run(job), Learned).loss
            sha256 = await asyncio.to_thread(self.blobs.take, path)
        finally:
            path.unlink(missing_ok=True)
        return Tuned(number, sha256, loss)

    async def _leash(self) -> tuple[str, ...]:
        """The base's own texts: the same every time, so they need not be kept."""
        each = -(-self.settings.leash // len(LEASH_PROMPTS))  # at a temperature where what it writes is language
        if not each:
            return ()
        job = Write("", LEASH_PROMPTS, (each,) * len(LEASH_PROMPTS), Sampling(self.settings.max_tokens, 0.7, 0.95, 1))
        written = expect(await self.compute.run(job), Texts).texts
        return tuple(f"{start} {text}" for start, texts in zip(LEASH_PROMPTS, written, strict=True) for text in texts if text)

    def lines(self, state: State, done: list[Line]) -> list[Line]:
        """The feed of synthetic data, from what of it is there already: grows by what happened since."""
        lines, entries = list(done), 0
        for entry in state.feed:
            first = entries
            entries += state.sheets[entry].samples if isinstance(entry, int) else 1
            if entries <= len(done):
                continue
            if isinstance(entry, int):
                sheet, llm = state.sheets[entry], self.settings.llm
                judged = self._judged(sheet)
                lines += crosslm.samples_of(
                    judged, entry, first + 1, self.task.labels, llm.endpoint_model if llm.endpoint else llm.model, sheet.adapter
                )
            else:
                lines.append(Withdrawal(first + 1, entry))
        return lines

    def open(self, state: State) -> set[str]:
        """Ids of texts that are being judged."""
        sheets = [(number, sheet) for number, sheet in enumerate(state.sheets) if not sheet.judged]
        return {crosslm.id_of(number, draft) for number, sheet in sheets for draft in self._drafts(sheet)}

    def notes(self, state: State) -> set[str]:
        """Blobs that are the server's own: prompts, verdicts, the LLM's adapters."""
        return {*state.tuned, *(blob for sheet in state.sheets for blob in (sheet.drafts, sheet.judged))}

    def read(self, body: bytes, state: State) -> Judgment:
        """A judgment of a sheet there is, checked to its last byte: what is taken in here can be decided on.

        Raises:
            WireError: as `wire.unpack_judgment`; `unknown-sheet`; `bad-message`: a class or a byte that means nothing, no class,
                or fewer than half of the texts answered: a sheet must not end with those who say nothing.
        """

        def shape(judgment: Judgment) -> tuple[int, int]:
            if not judgment.covers:
                raise WireError("bad-message", "a judgment covers no class: a device without labelled text judges nothing")
            if any(not 0 <= label < len(self.task.labels) for label in judgment.covers):
                raise WireError("bad-message", "a judgment covers a class that this task does not have")
            return self._answer_shape(coordinator.sheet_of(state, judgment.version))

        judgment, answer = wire.unpack_judgment(body, shape)
        try:
            said = judgments.decode(answer, [0] * len(answer), len(self.task.labels), self.settings.form)
        except DataError as error:
            raise WireError("bad-message", str(error)) from error
        if 2 * np.count_nonzero(said.any(1)) < len(said):
            raise WireError("bad-message", "a judgment answers fewer than half of its texts")
        return judgment

    def _answer_shape(self, sheet: Sheet) -> tuple[int, int]:
        return sheet.count, judgments.width(self.settings.form, len(self.task.labels))

    # Blobs ------------------------------------------------------------------------------------------------------------
    def _file(self, adapter: str) -> str:
        """Where an adapter lies; "" for the base. Raises: DataError: it is missing."""
        return str(self.blobs.file(adapter)) if adapter else ""

    def _drafts(self, sheet: Sheet) -> list[Draft]:
        return msgspec.json.decode(self.blobs.get(sheet.drafts), type=list[Draft])

    def _judged(self, sheet: Sheet) -> list[Judged]:
        return msgspec.json.decode(self.blobs.get(sheet.judged), type=list[Judged])

    def _ballots(self, sheet: Sheet, written: list[int]) -> list[Ballot]:
        form, classes = self.settings.form, len(self.task.labels)
        found = []
        for waiting in sheet.ballots:
            judgment, answer = wire.unpack_judgment(self.blobs.get(waiting.blob), lambda _: self._answer_shape(sheet))
            probabilities = judgments.decode(answer, written, classes, form)
            found.append(Ballot(probabilities, judgment.metrics.get("accuracy", judging.UNKNOWN), frozenset(judgment.covers)))
        return found


def _said(event: Written | Decided | Tuned) -> str:
    match event:
        case Written():
            dropped = ", ".join(f"{count} {name}" for name, count in event.dropped.items()) or "none"
            return f"sheet {event.sheet}: {event.count} texts written in {event.seconds:g} s, dropped: {dropped}"
        case Decided(number):
            return f"sheet {number}: {event.samples} accepted ({event.acceptance:.0%}); version {number + 1}"
        case Tuned():
            return f"the LLM learned from sheet {event.sheet}, loss {event.loss:.3f}"


def _pack(rows: list[Draft] | list[Judged]) -> bytes:
    return msgspec.json.encode(rows)
