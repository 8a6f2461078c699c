"""FedMKT where answers are texts: what models say token by token, each in its own tokens, and the LLM's word for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edge_sdk import exchange, knowledge, wire
from edge_sdk.bundle import TOKENIZER, File
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.exchange import Voice
from edge_sdk.knowledge import Sheet
from edge_sdk.protocol import Judgment, Manifest, Text, Told
from edge_sdk.tasks import Task
from edge_sdk.tokens import PromptEncoder
from edge_server import coordinator
from edge_server.compute import Compute, expect
from edge_server.coordinator import Ballot, State
from edge_server.llm import jobs
from edge_server.llm.jobs import Answers, Described, Studied, Study, Tell, Tuning
from edge_server.storage import Blobs
from edge_server.systems.fedmkt import FedMkt


@dataclass(frozen=True)
class Tokenwise:
    """Arguments as `Tutor`'s."""

    settings: FedMkt
    task: Task
    public: Sequence[Text]
    blobs: Blobs
    compute: Compute
    models: Mapping[str, Manifest]

    measure = "of the public answers' tokens"

    def check(self) -> None:
        """Raises: SettingsError: see `tutor.Subject`."""
        for name, sheet in self._sheets.items():
            if problem := self._too_much(sheet):
                raise SettingsError(f"fedmkt.public: {_named(name)} {problem}")

    async def meet(self) -> None:
        """Raises: DataError: see `tutor.Subject`."""
        described = expect(await self.compute.run(jobs.Describe()), Described)
        encoder = PromptEncoder(described.tokenizer, (), (), exchange.POSITIONS, self.task)
        sheet = await asyncio.to_thread(exchange.sheet, Voice(encoder, described.end), self.public)
        if problem := self._too_much(sheet):
            raise DataError(f"fedmkt.public: the LLM {problem}")

    def _too_much(self, sheet: Sheet) -> str:
        """What is wrong with a model's words on the public answers, where they are more than travels."""
        if (size := knowledge.size_limit(sheet, self.settings.top_k)) <= wire.MAX_SHEET:
            return ""
        way = "use fewer texts, or lower fedmkt.top_k or task.answer_tokens"
        return f"may have to say {size} bytes of these {len(self.public)} texts, {wire.MAX_SHEET} travel; {way}"

    async def learn(self, before: str, out: Path, heard: Sequence[tuple[Ballot, str]], tuning: Tuning, seed: int) -> float:
        """The LLM learns each answer and, where a device says it better than the LLM does, from that; see `tutor.Subject`."""
        settings = self.settings
        said = tuple(self._answers(ballot, model) for ballot, model in heard)
        job = Study(before, str(out), tuple(self.public), said, settings.top_k, settings.label_weight, tuning, seed)
        return expect(await self.compute.run(job), Studied).loss

    async def say(self, number: int, sha256: str, adapter: str) -> tuple[bytes, float]:
        """A message `Told`, and how many of the answers' tokens the LLM finds likeliest."""
        described = expect(await self.compute.run(jobs.Describe()), Described)
        path = self.blobs.incoming()
        try:
            job = Tell(adapter, str(path), tuple(self.public), self.settings.top_k)
            right = expect(await self.compute.run(job), jobs.Told).right
            known = File(await asyncio.to_thread(self.blobs.take, path), 0)
        finally:
            path.unlink(missing_ok=True)
        known = File(known.sha256, self.blobs.file(known.sha256).stat().st_size)
        texts, tokenizer = [
            File(await asyncio.to_thread(self.blobs.put, body), len(body))
            for body in (wire.pack_lines(self.public), described.tokenizer.encode())
        ]
        return wire.encode(Told(texts, known, tokenizer, self.task, described.end)), right

    def read(self, body: bytes, state: State) -> Judgment:
        """What a device says of the public answers, checked to its last byte.

        Raises:
            WireError: as `knowledge.unpack_judgment`; `unknown-sheet`; `unknown-device`.
        """

        def sheet(judgment: Judgment) -> Sheet:
            coordinator.sheet_of(state, judgment.version)
            return self._sheets[coordinator.known_device(state, judgment.device).model]

        k = self.settings.top_k
        most = max(knowledge.plain_limit(each, k) for each in self._sheets.values())
        return knowledge.unpack_judgment(body, sheet, most, k)[0]

    @cached_property
    def _sheets(self) -> dict[str, Sheet]:
        """The public answers in the tokens of each model. Raises: SettingsError: one cannot say them."""
        found = {}
        for name, manifest in self.models.items():
            encoder = PromptEncoder(self._tokenizer(manifest), (), (), exchange.POSITIONS, manifest.task)
            try:
                found[name] = exchange.sheet(Voice(encoder, _end(manifest)), self.public)
            except DataError as error:
                raise SettingsError(f"fedmkt.public: {_named(name)}: {error}") from error
        return found

    def _answers(self, ballot: Ballot, model: str) -> Answers:
        manifest = self.models[model]
        return Answers(str(self.blobs.file(ballot.blob)), str(self._tokenizer(manifest)), manifest.task, _end(manifest))

    def _tokenizer(self, manifest: Manifest) -> Path:
        return self.blobs.file(manifest.bundle.files[TOKENIZER].sha256)


def _named(model: str) -> str:
    return f"the model {model!r}" if model else "the first model"


def _end(manifest: Manifest) -> int | None:
    return next(iter(manifest.bundle.end), None)
