"""CrossLM-style learning without a network: the server's own author and the devices' own verbs, called in one process."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_sdk import files, judgments, verbs, wire
from edge_sdk.adapters import AdapterSpec, Arrays, add
from edge_sdk.judgments import Bytes
from edge_sdk.protocol import Judgment, Mix, Sample, Text
from edge_sdk.tasks import Example, Private, Task
from edge_server import coordinator
from edge_server.author import Author
from edge_server.compute import Compute
from edge_server.coordinator import Enrolled, Judged, Published, State
from edge_server.knowledge.filters import Embed
from edge_server.knowledge.judging import UNKNOWN, Ballot, combine
from edge_server.llm import jobs
from edge_server.llm.jobs import Hello, Job, Label, Outcome, Scores, Write
from edge_server.llm.worker import Models, do
from edge_server.storage import Blobs
from edge_server.systems import crosslm
from edge_server.systems.crosslm import CrossLm, DecideSheet, Draft, TuneLlm, WriteSheet

if TYPE_CHECKING:
    from edge_sdk.engines import Scorer
    from edge_server.llm.model import Llm

SOURCES = Path(jobs.__file__).parent
Liar = Callable[[int, Bytes], Bytes]


class Here:
    """The LLM in this process. What the base writes is the same for every method of a seed, and kept in `cache`, under a name
    that changes with the code that writes it."""

    def __init__(self, llm: Llm, hello: Hello, cache: Path) -> None:
        code = b"".join((SOURCES / name).read_bytes() for name in ("model.py", "writing.py"))
        self._llm, self._name, self._cache = llm, msgspec.json.encode(hello) + code, cache

    async def run(self, job: Job) -> Outcome:
        if not isinstance(job, Write) or job.adapter:
            return do(Models(self._llm), job)
        kept = self._cache / f"{hashlib.sha256(self._name + msgspec.json.encode(job)).hexdigest()[:24]}.json"
        if not kept.exists():
            files.write(kept, msgspec.json.encode(do(Models(self._llm), job)))
        return msgspec.json.decode(kept.read_bytes(), type=Outcome)  # type: ignore[no-any-return]

    async def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Version:
    """After a sheet: what devices learned and what they keep, the feed, the LLM's adapter, the share of good texts, all texts.

    `traffic`: bytes that a device gets and sends for 1,000 texts: the sheet, its judgment, and the new lines of the feed (gzip).
    """

    own: tuple[Arrays, ...]
    kept: tuple[Arrays, ...]
    feed: tuple[Sample, ...]
    llm: str
    acceptance: float
    traffic: float
    sheet: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Devices:
    """Everything devices need to train and to judge."""

    fleet: Sequence[Private]
    spec: AdapterSpec
    engine: Scorer
    trainer: verbs.Fits
    known: dict[bytes, tuple[Arrays, ...]] = field(default_factory=dict)

    def better(self, old: Sequence[Arrays], new: Sequence[Arrays]) -> tuple[Arrays, ...]:
        """What each device keeps of two adapters."""
        rows = zip(old, new, self.fleet, strict=True)
        return tuple(verbs.better(a, b, self.spec, private, self.engine)[0] for a, b, private in rows)

    def acceptance(self, adapters: Sequence[Arrays], sheet: Sequence[Text], settings: CrossLm) -> float:
        """Share of a sheet's texts that the devices find good with these adapters."""
        written, ballots = [text.label for text in sheet], []
        for adapter, private in zip(adapters, self.fleet, strict=True):
            _, metrics, covers, answer = verbs.judge(sheet, adapter, self.spec, private, self.engine, settings.form)
            probabilities = judgments.decode(answer, written, len(self.engine.encoder.labels), settings.form)
            ballots.append(Ballot(probabilities, metrics.get("accuracy", UNKNOWN), frozenset(covers)))
        drafts = [Draft("", text.label, text.text) for text in sheet]
        return crosslm.acceptance(crosslm.decide(drafts, combine(ballots, written), settings.quality))

    def train(self, start: Arrays, settings: CrossLm, feed: Sequence[Sample] = ()) -> tuple[Arrays, ...]:
        """Each device's own adapter, from private labels and the feed."""
        mix = Mix(len(feed), settings.weight, settings.batch_size, settings.label_temperature) if feed else None
        key = msgspec.json.encode((settings.training, settings.alone, settings.seed, mix, feed))
        if key in self.known:  # methods of a seed have their first versions in common
            return self.known[key]
        how, seed, own = settings.training if feed else settings.alone, settings.seed + 1, []
        for private in self.fleet:
            prepared = verbs.prepare(0, start, self.spec, private, how, None, seed, self.engine, None, feed, mix)
            own.append(add(start, prepared.learned(*self.trainer.fit(prepared.job)).delta))
        self.known[key] = tuple(own)
        return self.known[key]


async def versions(
    devices: Devices,
    start: Arrays,
    settings: CrossLm,
    task: Task,
    compute: Here,
    folder: Path,
    embed: Embed | None,
    lie: Liar | None = None,
) -> AsyncIterator[Version]:
    """All versions of a run, as the server and agents make them over HTTP. `lie` may change what a device answers."""
    blobs = Blobs(folder)
    author = Author(settings, task, blobs, compute, embed, lambda: 0.0)
    state = coordinator.apply(State(), Published(0, "start", 0))
    for k in range(len(devices.fleet)):
        state = coordinator.apply(state, Enrolled(str(k), "x"))
    feed: tuple[Sample, ...] = ()
    own = kept = devices.train(start, settings)
    yield Version(own, kept, feed, "", 0.0, 0.0)
    for number in range(settings.versions):
        state = coordinator.apply(state, await author.carry_out(WriteSheet(number), state))
        sheet = wire.unpack_lines(blobs.get(state.sheets[-1].texts), Text)
        size, known = 0, len(feed)
        for k, private in enumerate(devices.fleet):
            count, metrics, covers, answer = verbs.judge(sheet, kept[k], devices.spec, private, devices.engine, settings.form)
            body = wire.pack_judgment(Judgment(str(k), number, count, metrics, covers), answer if lie is None else lie(k, answer))
            message, size = author.read(body, state), max(size, len(body))
            decision = coordinator.judge(state, message, f"{k} {number}", blobs.put(body), len(body))
            if isinstance(decision, Judged):  # always: nobody answers twice here
                state = coordinator.apply(state, decision)
        for step in (DecideSheet(number), TuneLlm(number)):
            state = coordinator.apply(state, await author.carry_out(step, state))
        feed = tuple(line for line in author.lines(state, []) if isinstance(line, Sample))
        own = devices.train(start, settings, feed)
        kept = devices.better(kept, own)
        size += state.sheets[-1].size + len(gzip.compress(wire.pack_lines(feed[known:])))
        adapter, traffic = str(blobs.path(state.tuned[-1]) or ""), 1000 * size / len(sheet)
        yield Version(own, kept, feed, adapter, state.sheets[-1].acceptance, traffic, tuple(sheet))


async def sheets(settings: CrossLm, task: Task, compute: Here, folder: Path, embed: Embed | None) -> list[Text]:
    """What the base writes if nobody tells it anything: as many sheets as a run has."""
    blobs, state = Blobs(folder), State()
    author, found = Author(settings, task, blobs, compute, embed, lambda: 0.0), []
    for number in range(settings.versions):
        state = coordinator.apply(state, await author.carry_out(WriteSheet(number), state))
        found += wire.unpack_lines(blobs.get(state.sheets[-1].texts), Text)
    return found


async def skill(llm: Compute, adapter: str, examples: Sequence[Example]) -> tuple[float, float]:
    """An LLM's accuracy on a task of two classes: as it answers, and with the threshold where half of all texts are above it.

    What the second gains over the first, calibration alone can give.
    """
    outcome = await llm.run(Label(adapter, tuple(e.text for e in examples)))
    return both_ways(np.array(outcome.scores if isinstance(outcome, Scores) else ()), [e.label for e in examples])


def both_ways(scores: NDArray[np.float32], known: Sequence[int | None]) -> tuple[float, float]:
    """Accuracy of scores (n, 2), plain and balanced; see `skill`."""
    labels, margin = np.array(known), scores[:, 1] - scores[:, 0]
    return float(((margin > 0) == labels).mean()), float(((margin > np.median(margin)) == labels).mean())
