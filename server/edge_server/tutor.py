"""Carries out what `systems/fedmkt.py` decides is next: lets the LLM learn from what devices say of public text, and answer.

Whether they speak of classes or of tokens is the business of `classwise.py` and `tokenwise.py`.
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from edge_sdk import wire
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import Judgment, Manifest, Text
from edge_sdk.tasks import Example, Task
from edge_server.classwise import Classwise
from edge_server.compute import Compute
from edge_server.coordinator import Ballot, Decided, Event, State, Tuned, Written
from edge_server.llm.jobs import Tuning
from edge_server.storage import Blobs
from edge_server.systems import fedmkt
from edge_server.systems.fedmkt import AskAll, FedMkt, Learn, Step
from edge_server.tokenwise import Tokenwise


class Subject(Protocol):
    """What is spoken of.

    Args:
        measure: what the LLM's accuracy is a share of.
    """

    measure: str

    def check(self) -> None:
        """Raises: SettingsError: a model cannot say one of the answers, or there would be more to say than travels."""
        ...

    async def meet(self) -> None:
        """The same of the LLM. Raises: DataError: so it is; JobFailed, OSError: it cannot be asked now."""
        ...

    async def learn(self, before: str, out: Path, heard: Sequence[tuple[Ballot, str]], tuning: Tuning, seed: int) -> float:
        """Lets the LLM learn, from the adapter file `before` ("" for none) to the file `out`; its mean loss.

        Args:
            heard: each device's last judgment, and which model it has.

        Raises:
            JobFailed, DataError, OSError: it cannot be done now.
        """
        ...

    async def say(self, number: int, sha256: str, adapter: str) -> tuple[bytes, float]:
        """The lesson that devices get, and the LLM's accuracy; `adapter` is the file of the LLM's adapter `sha256`."""
        ...

    def read(self, body: bytes, state: State) -> Judgment:
        """A judgment, checked to its last byte. Raises: WireError: it is refused."""
        ...


@dataclass(frozen=True)
class Tutor:
    """The LLM's side of a run.

    Args:
        settings: of the run. task: how the LLM is asked. public: the labelled texts that all have.
        blobs: where answers, lessons and adapters lie. compute: where the LLM runs. now: seconds since the epoch.
        models: what devices are told, by the model's name, "" for the first; of use where answers are texts.
    """

    settings: FedMkt
    task: Task
    public: tuple[Example, ...]
    blobs: Blobs
    compute: Compute
    now: Callable[[], float]
    models: Mapping[str, Manifest]

    @cached_property
    def subject(self) -> Subject:
        about = self.settings, self.task, texts(self.public), self.blobs, self.compute
        return Tokenwise(*about, self.models) if self.task.answer_tokens else Classwise(*about)

    async def step(self, state: State) -> tuple[Sequence[Event], str]:
        """Does what is next; as `runs.Llm` says."""
        if (step := fedmkt.due(self.settings, state, self.now())) is None:
            return [], ""
        event = await self.carry_out(step, state)
        match event:
            case Written():
                said = f"version {event.sheet}: devices are asked what they make of {event.count} public texts"
            case Tuned():
                heard = fedmkt.heard(self.settings, state, event.sheet)
                said = f"the LLM learned from {len(heard)} devices, loss {event.loss:.3f}"
            case Decided():
                said = f"version {event.sheet + 1}: the LLM gets {event.acceptance:.0%} {self.subject.measure} right"
        return [event], said

    async def carry_out(self, step: Step, state: State) -> Written | Decided | Tuned:
        """Raises: JobFailed, DataError, OSError: it cannot be done now."""
        if isinstance(step, AskAll):
            if not step.number:
                await self.subject.meet()
            lines = sheet(self.public)
            blob = await asyncio.to_thread(self.blobs.put, lines)
            return Written(step.number, blob, blob, len(lines), len(self.public), "", {}, self.now())
        if isinstance(step, Learn):
            return await self._learn(step.number, state)
        return await self._say(step.number, state)

    async def _learn(self, number: int, state: State) -> Tuned:
        settings, path = self.settings, self.blobs.incoming()
        steps = settings.passes * -(-len(self.public) // settings.llm_batch_size)
        tuning = Tuning(steps, settings.llm_batch_size, settings.learning_rate, generation=0.0, contrast="none", leash=0.0)
        heard = [(ballot, state.devices[ballot.device].model) for _, ballot in fedmkt.heard(settings, state, number)]
        try:
            loss = await self.subject.learn(self._file(state), path, heard, tuning, settings.seed + number)
            sha256 = await asyncio.to_thread(self.blobs.take, path)
        finally:
            path.unlink(missing_ok=True)
        return Tuned(number, sha256, loss)

    async def _say(self, number: int, state: State) -> Decided:
        """What the LLM makes of the public text; `acceptance` is how much of it it gets right."""
        lesson, right = await self.subject.say(number, state.tuned[-1], self._file(state))
        return Decided(number, await asyncio.to_thread(self.blobs.put, lesson), 0, right)

    def check(self) -> None:
        """Raises: SettingsError: devices' models and the public texts do not go together."""
        self.subject.check()

    def read(self, body: bytes, state: State) -> Judgment:
        """A judgment, checked to its last byte. Raises: WireError: it is refused."""
        return self.subject.read(body, state)

    def _file(self, state: State) -> str:
        return str(self.blobs.file(state.tuned[-1])) if state.tuned else ""


def texts(public: Sequence[Example]) -> list[Text]:
    """The public texts as devices know them."""
    return [Text(f"p{i}", e.text, e.label or 0, e.answer or "") for i, e in enumerate(public)]


def sheet(public: Sequence[Example]) -> bytes:
    """The public texts as they travel. Raises: SettingsError: one that no device takes, or too many."""
    lines = texts(public)
    if len(lines) > wire.MAX_TEXTS:
        raise SettingsError(f"fedmkt.public: devices take at most {wire.MAX_TEXTS} texts, these are {len(lines)}; leave some out")
    for text, example in zip(lines, public, strict=True):
        if example.answer is not None and not example.answer.strip():
            raise SettingsError(f"fedmkt.public: text {text.id[1:]} has an answer without a word; give it one, or leave it out")
        if odd := next((c for c in text.text + text.answer if not c.isprintable()), ""):
            name = f"U+{ord(odd):04X} {unicodedata.name(odd, '')}".strip()
            raise SettingsError(f"fedmkt.public: text {text.id[1:]} has a character that is not printable, {name}; take it out")
        try:
            wire.unpack_lines(wire.pack_lines([text]), Text)
        except WireError as error:
            raise SettingsError(f"fedmkt.public: text {text.id[1:]} cannot be sent: {error.detail}") from error
    if len(body := wire.pack_lines(lines)) > wire.MAX_SHEET:
        raise SettingsError(f"fedmkt.public: devices take {wire.MAX_SHEET} bytes, these texts are {len(body)}; leave some out")
    return body
