"""The running coordinator: decides on the state, writes the event, applies it, answers; makes versions in the background.

This is the one place where the pure reducer meets the disk. A call from an HTTP handler to the mathematics goes
handlers -> ledger -> systems/lpfl.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_sdk import files, wire
from edge_sdk.adapters import Array, add, write_peft
from edge_sdk.cohort import Answer
from edge_sdk.errors import SettingsError, WireError
from edge_sdk.protocol import PROTOCOL, Evaluation, Line, Manifest, Receipt, Status, Trained, Wait, Work
from edge_sdk.tasks import Example
from edge_server import cohorts, coordinator, unmasking
from edge_server.aggregation import Contribution
from edge_server.author import Author
from edge_server.cohorts import Secure
from edge_server.compute import Compute, LocalCompute
from edge_server.coordinator import (
    Buffered,
    Decided,
    Device,
    Event,
    Lost,
    Opened,
    Published,
    State,
    Ticked,
    Tuned,
    Withdrawn,
    Written,
)
from edge_server.distiller import Distiller
from edge_server.endpoint import Endpoint
from edge_server.knowledge.filters import Embed
from edge_server.settings import RunSettings
from edge_server.storage import Blobs, EventLog
from edge_server.systems import crosslm, fedcollm, fedmkt, lpfl
from edge_server.systems.lpfl import LpFl
from edge_server.tutor import Tutor, sheet
from edge_server.unmasking import Cohort, Failed

RETRY_SECONDS = 60.0
R = TypeVar("R", Evaluation, Trained)
log = logging.getLogger(__name__)


class Ledger:
    """One run on one data folder.

    Args:
        settings: of the run; a folder that holds a run with other settings is refused.
        manifest: what devices are told.
        data: folder for the event log, blobs and versions.
        say: told one line per version.
        compute: where the LLM runs, for a system that has one; CrossLM's is a process of its own by default.
        auxiliary: the server's own labelled texts, for FedCoLLM; the public ones, for FedMKT.
        others: what devices with other models are told, by the model's name, for FedMKT.
        embed: finds near duplicates among synthetic texts; None compares words.
        now: seconds since the epoch.

    Raises:
        SettingsError: the folder belongs to another run, or another server uses it.
    """

    def __init__(
        self,
        settings: RunSettings,
        manifest: Manifest,
        data: Path,
        say: Callable[[str], None] = print,
        compute: Compute | None = None,
        embed: Embed | None = None,
        now: Callable[[], float] = time.time,
        auxiliary: tuple[Example, ...] = (),
        others: Mapping[str, Manifest] | None = None,
    ) -> None:
        both = settings.fedcollm if settings.system == "fedcollm" else None
        if both is not None and (compute is None or not auxiliary):
            raise SettingsError("fedcollm needs a process for its models, and labelled texts in the file fedcollm.auxiliary")
        public = settings.fedmkt if settings.system == "fedmkt" else None
        if public is not None:
            if compute is None or not auxiliary:
                raise SettingsError("fedmkt needs a process for its LLM, and labelled texts in the file fedmkt.public")
            sheet(auxiliary)
        self._open = contextlib.ExitStack()
        self._open.enter_context(files.held(data, "edge-server"))
        run = _run_of(data / "run.json", settings, manifest, others or {})
        self.manifest = msgspec.structs.replace(manifest, run=run)
        self._others = {name: msgspec.structs.replace(other, run=run) for name, other in (others or {}).items()}
        self.blobs = Blobs(data / "blobs")
        self._settings = settings
        self._data = data
        self._say = say
        self._shapes = manifest.adapter.shapes()
        self._update_shapes = wire.update_shapes(manifest)
        self.body_limit = wire.size_limit(self._shapes)
        self._log = self._open.enter_context(contextlib.closing(EventLog(data / "events.sqlite")))
        events = (msgspec.json.decode(body, type=Event) for body in self._log.read())
        self.state: State = functools.reduce(coordinator.apply, events, State())
        self._lock = asyncio.Lock()
        self._full, self._news = asyncio.Event(), asyncio.Event()  # there may be a version to make; the LLM may have work
        self._now = now
        self._author: Author | None = None
        self._feed: list[Line] = []
        if (llm := settings.crosslm) is not None and settings.system == "crosslm":
            compute = compute or LocalCompute(llm.llm, settings.task)
            writer = Endpoint(llm.llm) if llm.llm.endpoint else None
            self._author = Author(llm, settings.task, self.blobs, compute, embed, now, writer)
        self._distiller = Distiller(both, auxiliary, self.blobs, compute) if both is not None and compute is not None else None
        self._tutor: Tutor | None = None
        if public is not None and compute is not None:
            self._tutor = Tutor(public, settings.task, auxiliary, self.blobs, compute, now)
        self._starts: dict[str, str] = {}  # the first adapters of other models
        self._troubles: dict[asyncio.Event, str] = {}

    async def open(self) -> None:
        """Publishes version 0 on a fresh folder; mends the newest version's folder where a power cut tore it."""
        for name, other in self._others.items():
            seed = 0 if self._tutor is None else self._tutor.settings.seed
            self._starts[name] = await asyncio.to_thread(self.blobs.put, wire.pack_adapter(other.adapter.start(seed)))
        if self.state.version < 0:
            first = self._start()
            await asyncio.to_thread(self._publish_files, 0, first)
            blob = await asyncio.to_thread(self.blobs.put, self._version_bytes(0))
            async with self._lock:
                await self._record(Published(0, blob, 0))
        else:
            await asyncio.to_thread(self._mend_version)
        self._full.set()
        self._news.set()

    def _start(self) -> dict[str, Array]:
        spec = self.manifest.adapter
        if self._author is not None:
            return crosslm.start(self._author.settings, spec)
        if self._distiller is not None:
            return fedcollm.start(self._distiller.settings, spec)
        if self._tutor is not None:
            return spec.start(self._tutor.settings.seed)
        return lpfl.start(self._settings.lpfl, spec)

    async def rest(self) -> None:
        """Ends the LLM's process, where there is one."""
        for part in (self._author, self._distiller, self._tutor):
            if part is not None:
                await part.compute.close()

    def close(self) -> None:
        self._open.close()

    async def enroll(self, device: str, name: str, model: str = "") -> Manifest:
        """Raises: WireError: `bad-device`; `unknown-model`: the run has no such model."""
        if model and model not in self._others:
            known = ", ".join(self._others) or "one model only; leave it out"
            raise WireError("unknown-model", f"this run has {known}", 404)
        async with self._lock:
            if event := coordinator.enroll(self.state, device, name, model):
                await self._record(event)
        return self._others[model] if model else self.manifest

    def plan(self, device: str, can_train: bool) -> Work:
        known = coordinator.known_device(self.state, device)
        work = self._next(known, can_train)
        if isinstance(work, Wait) and self.state.cohort is not None and known.trained == self.state.version:
            return cohorts.plan(self.state.cohort, self.state.version, device) or work
        return work

    def _next(self, known: Device, can_train: bool) -> Work:
        if self._author is not None:
            return crosslm.plan(self._author.settings, self.state, known, can_train)
        if self._distiller is not None:
            return fedcollm.plan(self._distiller.settings, self.state, known, can_train)
        if self._tutor is not None:
            start = self._starts.get(known.model, self.state.adapter)
            return fedmkt.plan(self._tutor.settings, self.state, known, can_train, start)
        return lpfl.plan(self._settings.lpfl, self.state, known, can_train)

    async def take_update(self, incoming: Path, sha256: str) -> Receipt:
        """Checks a streamed upload, keeps it, and answers once it is on disk.

        Raises:
            WireError: the upload is refused; nothing of it remains.
        """
        if (averaged := self._settings.averaged) is None:
            raise WireError("wrong-system", f"what devices learn stays with them in {self._settings.system}", 404)
        if averaged.secure is not None:
            raise WireError("wrong-system", "this run averages masked updates only; ask for work", 404)
        body = await asyncio.to_thread(incoming.read_bytes)
        update, _ = await asyncio.to_thread(wire.unpack, body, self._update_shapes)
        id = wire.update_id(update.device, update.version, sha256)
        if self._author is not None and update.version < (first := self._author.settings.versions):
            raise WireError("wrong-system", f"before version {first} of this run devices keep what they learn", 404)
        async with self._lock:  # two updates at once for one version: the second is refused before its blob is kept
            decision = coordinator.accept(self.state, update, id, sha256, len(body), averaged.max_staleness)
            if isinstance(decision, Receipt):
                return decision
            await asyncio.to_thread(self.blobs.keep, incoming, sha256)
            await self._record(decision)
        self._full.set()
        return self.state.receipts[id]

    async def take_evaluation(self, evaluation: Evaluation, sha256: str) -> Receipt:
        """Raises: WireError: the evaluation is refused."""
        return await self._take_report(coordinator.take, evaluation, sha256)

    async def take_trained(self, trained: Trained, sha256: str) -> Receipt:
        """Raises: WireError: the report is refused."""
        secure = self._secure
        if self._author is None and self._tutor is None and secure is None:
            raise WireError("wrong-system", f"{self._settings.system} wants what was learned, not only a word of it", 404)
        receipt = await self._take_report(coordinator.keep, trained, sha256)
        if secure is not None:
            async with self._lock:
                if trained.version == self.state.version:  # one that comes late has nothing for the next
                    await self._form_cohort(secure)
            self._full.set()  # there may be a deadline now
        return receipt

    async def take_answer(self, answer: Answer, blob: str = "", size: int = 0, incoming: Path | None = None) -> Receipt:
        """Takes in what a device of the cohort says, and answers once it is on disk. Raises: WireError: it is refused."""
        async with self._lock:
            if event := coordinator.answer(self.state, answer, blob, size, self._now()):
                if incoming is not None:
                    await asyncio.to_thread(self.blobs.keep, incoming, blob)
                await self._record(event)
        self._full.set()
        said = hashlib.sha256(wire.encode(answer)).hexdigest()
        return Receipt(wire.update_id(answer.device, self.state.version, blob or said), self.state.version)

    async def take_masked(self, incoming: Path, sha256: str) -> Receipt:
        """The same for a masked vector."""
        body = await asyncio.to_thread(incoming.read_bytes)
        length = cohorts.length(self.manifest.adapter) + 1
        masked, _ = await asyncio.to_thread(wire.unpack_masked, body, length)
        return await self.take_answer(masked, sha256, len(body), incoming)

    @property
    def _secure(self) -> Secure | None:
        how = self._settings.averaged
        return None if how is None else how.secure

    async def _form_cohort(self, secure: Secure) -> None:
        """Forms a cohort where none is under way and there is still a version to make; the caller holds the lock."""
        state, how = self.state, self._settings.averaged
        if how is None or isinstance(state.cohort, Cohort) or state.version >= how.versions:
            return
        name = f"{self.manifest.run[:16]}-{state.version}-{state.cohorts}"
        terms = cohorts.terms(secure, how.buffer_size, self.manifest.adapter, name)
        await self._record(Opened(terms, self._now() + secure.join_seconds, secure.phase_seconds))

    async def _take_report(self, decide: Callable[[State, R, str], Event | Receipt], report: R, sha256: str) -> Receipt:
        """A message of numbers: decided on, and on disk before it is answered."""
        id = wire.update_id(report.device, report.version, sha256)
        async with self._lock:
            decision = decide(self.state, report, id)
            if isinstance(decision, Receipt):
                return decision
            await self._record(decision)
        return self.state.receipts[id]

    async def take_judgment(self, body: bytes) -> Receipt:
        """Checks a judgment, keeps it, and answers once it is on disk. Raises: WireError: it is refused."""
        judgment = (self._tutor or self._writer).read(body, self.state)
        sha256 = hashlib.sha256(body).hexdigest()
        id = wire.update_id(judgment.device, judgment.version, sha256)
        async with self._lock:
            decision = coordinator.judge(self.state, judgment, id, sha256, len(body))
            if isinstance(decision, Receipt):
                return decision
            await asyncio.to_thread(self.blobs.put, body)
            await self._record(decision)
        self._news.set()
        return self.state.receipts[id]

    async def synthetic(self, since: int, limit: int, task: str | None = None) -> list[Line]:
        """At most `limit` lines of the feed after line `since`.

        Raises:
            WireError: `wrong-system`: this run has no feed; `unknown-task`: it is one of another task.
        """
        author, state = self._writer, self.state
        if task not in (None, own := author.settings.task):
            raise WireError("unknown-task", f"this feed is of the task {own!r}", 404)
        if len(self._feed) < state.lines:
            self._feed = await asyncio.to_thread(author.lines, state, self._feed)
        return self._feed[since : since + limit]

    async def withdraw(self, sample: str) -> None:
        """Takes a sample out of use; devices drop it when they next ask. Raises: WireError: there is no such sample."""
        known = {line.id for line in await self.synthetic(0, self.state.lines)}
        async with self._lock:
            if event := coordinator.withdraw(self.state, sample, known):
                await self._record(event)

    @property
    def _writer(self) -> Author:
        if self._author is None:
            raise WireError("wrong-system", f"{self._settings.system} has no synthetic data", 404)
        return self._author

    async def make_versions(self) -> None:
        """Runs for ever: makes a version whenever the buffer is full, also one that a crash interrupted; and, beside that, lets
        the LLM do what is next.

        What fails (a full disk, a lost blob) is said, told to `/healthz`, and tried again a minute later or with the next
        update.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_doing(self._average, self._full, self._cohort_patience))
            if (author := self._author) is not None:
                group.create_task(self._keep_doing(lambda: self._llm_step(author), self._news, self._patience))
            if (tutor := self._tutor) is not None:
                group.create_task(self._keep_doing(lambda: self._lesson(tutor), self._news, self._patience))

    async def _keep_doing(
        self, step: Callable[[], Awaitable[bool]], wake: asyncio.Event, patience: Callable[[], float | None]
    ) -> None:
        """Does `step` as long as there is one, and again once woken or out of patience."""
        while True:
            with contextlib.suppress(TimeoutError):  # wait_for would swallow a cancellation that comes with the news
                async with asyncio.timeout(RETRY_SECONDS if wake in self._troubles else patience()):
                    await wake.wait()
            wake.clear()
            try:
                while await step():
                    self._troubles.pop(wake, None)  # what comes next may take hours
                self._troubles.pop(wake, None)
            except Exception as error:
                self._troubles[wake] = f"version {self.state.version + 1} cannot be made: {error}"
                log.exception("%s; trying again", self._troubles[wake])

    async def _average(self) -> bool:
        """Makes a version if enough updates are there; whether it did."""
        how = self._settings.averaged
        if how is not None and how.secure is not None:
            return await self._average_unseen(how, how.secure)
        if how is None or not (batch := self._batch(how)):
            return False
        adapter = await asyncio.to_thread(self._averaged, self.state.adapter, batch, how)
        staleness = ", ".join(str(b.staleness) for b in batch)
        await self._make_version(adapter, f"{len(batch)} updates (staleness {staleness})", len(batch))
        return True

    async def _average_unseen(self, how: LpFl, secure: Secure) -> bool:
        """Goes on with the cohort; whether anything came of it."""
        async with self._lock:
            match self.state.cohort:
                case Cohort() as cohort if unmasking.advance(cohort, now := self._now(), self.state.seconds) is not cohort:
                    await self._record(Ticked(now))
                    return True
                case Failed(name, reason):
                    self._say(f"cohort {name} has failed: {reason}; the next one is formed")
                    await self._form_cohort(secure)
                    return True
        if not isinstance(whole := self.state.cohort, Cohort) or whole.phase != "done":
            return False
        try:
            adapter = await asyncio.to_thread(self._unmasked, whole, how)
        except WireError as error:
            async with self._lock:
                await self._record(Lost(error.detail))
        else:
            await self._make_version(adapter, f"the sum of {len(whole.uploads)} masked updates", 0)
        return True

    def _cohort_patience(self) -> float | None:
        """Seconds until the cohort's deadline; None where there is none."""
        cohort = self.state.cohort
        return max(cohort.deadline - self._now(), 0.01) if isinstance(cohort, Cohort) and cohort.phase != "done" else None

    def _unmasked(self, cohort: Cohort, how: LpFl) -> dict[str, Array]:
        spec, length = self.manifest.adapter, cohort.terms.length + 1
        vectors = (wire.unpack_masked(self.blobs.get(blob), length)[1] for blob in cohort.uploads.values())
        mean, _ = unmasking.unmask(cohort, vectors)
        return add(self._adapter_of(self.state.adapter), cohorts.unflatten(mean, spec), how.server_lr)

    def _batch(self, how: LpFl) -> tuple[Buffered, ...]:
        if self._author is not None:
            return crosslm.averaged(self._author.settings, self.state)
        if self._distiller is not None:
            return fedcollm.due(self._distiller.settings, self.state)
        return lpfl.due(how, self.state)

    @property
    def trouble(self) -> str:
        """Why no version is being made, for the operator; "" where all is well."""
        return "; ".join(self._troubles.values())

    def _patience(self) -> float | None:
        """Seconds until a deadline may pass; None where only news can change anything."""
        if (part := self._author or self._tutor) is None or not self.state.sheets or (last := self.state.sheets[-1]).judged:
            return None
        return max(last.at + part.settings.deadline_seconds - self._now(), 0.01) if last.ballots else None

    async def _lesson(self, tutor: Tutor) -> bool:
        """Lets the LLM learn or answer, or asks devices again; whether there was anything to do."""
        if (step := fedmkt.due(tutor.settings, state := self.state, self._now())) is None:
            return False
        event = await tutor.carry_out(step, state)
        async with self._lock:
            await self._record(event)
        match event:
            case Written():
                self._say(f"version {event.sheet}: devices are asked what they make of {event.count} public texts")
            case Tuned():
                heard = fedmkt.heard(tutor.settings, state, event.sheet)
                self._say(f"the LLM learned from {len(heard)} devices, loss {event.loss:.3f}")
            case Decided():
                self._say(f"version {self.state.version}: the LLM gets {event.acceptance:.0%} of the public texts right")
        return True

    async def _llm_step(self, author: Author) -> bool:
        """Does what the LLM or its sheets need next; whether there was anything."""
        if old := crosslm.expired(author.settings, self.state, await self.synthetic(0, self.state.lines)):
            async with self._lock:
                for sample in old:
                    await self._record(Withdrawn(sample))
            self._say(f"{len(old)} texts of sheets before the last {author.settings.retain} withdrawn (crosslm.retain)")
        if (step := crosslm.due(author.settings, self.state, self._now())) is None:
            return False
        event = await author.carry_out(step, self.state)
        async with self._lock:
            await self._record(event)
        match event:
            case Written():
                dropped = ", ".join(f"{count} {name}" for name, count in event.dropped.items()) or "none"
                self._say(f"sheet {event.sheet}: {event.count} texts written in {event.seconds:g} s, dropped: {dropped}")
            case Decided():
                self._say(f"sheet {event.sheet}: {event.samples} accepted ({event.acceptance:.0%}); version {self.state.version}")
            case Tuned():
                self._say(f"the LLM learned from sheet {event.sheet}, loss {event.loss:.3f}")
        return True

    async def _make_version(self, adapter: dict[str, Array], source: str, folded: int) -> None:
        version, llm, learned = self.state.version + 1, "", ""
        if self._distiller is not None:
            adapter, llm, how_well = await self._distiller.distil(adapter, self.state)
            learned = f"; distilled in {how_well.seconds:.0f} s, losses {how_well.slm_loss:.3f} and {how_well.llm_loss:.3f} (LLM)"
        await asyncio.to_thread(self._publish_files, version, adapter)
        blob = await asyncio.to_thread(self.blobs.put, self._version_bytes(version))
        async with self._lock:
            await self._record(Published(version, blob, folded, llm))
        self._say(f"version {version} from {source}{learned}")

    def status(self) -> Status:
        if self._author is not None:
            done = crosslm.finished(self._author.settings, self.state)
        elif self._distiller is not None:
            done = fedcollm.finished(self._distiller.settings, self.state)
        elif self._tutor is not None:
            done = fedmkt.finished(self._tutor.settings, self.state)
        else:
            done = lpfl.finished(self._settings.lpfl, self.state)
        return coordinator.status(self.state, self._settings.system, done)

    async def _record(self, event: Event) -> None:
        """On disk first, then in memory, also when the caller is cancelled in between; the caller holds the lock."""
        writing = asyncio.create_task(self._write(event))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing
            raise

    async def _write(self, event: Event) -> None:
        await asyncio.to_thread(self._log.append, msgspec.json.encode(event))
        self.state = coordinator.apply(self.state, event)

    def _averaged(self, adapter: str, batch: tuple[Buffered, ...], how: LpFl) -> dict[str, Array]:
        buffer = (self._contribution(waiting) for waiting in batch)
        return lpfl.step(how, self.manifest.adapter, self._adapter_of(adapter), buffer)

    def _contribution(self, waiting: Buffered) -> Contribution:
        delta = wire.unpack(self.blobs.get(waiting.blob), self._update_shapes)[1]
        base = self._adapter_of(self.state.adapters[waiting.version])
        return Contribution(delta, waiting.num_examples, waiting.staleness, base)

    def _adapter_of(self, blob: str) -> dict[str, Array]:
        return wire.unpack_adapter(self.blobs.get(blob), self._shapes)

    def _publish_files(self, version: int, arrays: dict[str, Array]) -> None:
        """Every version is a folder that PEFT can load."""
        write_peft(self._version_folder(version), arrays, self.manifest.adapter, self.manifest.bundle.base)

    def _mend_version(self) -> None:
        body = self.blobs.get(self.state.adapter)
        with contextlib.suppress(OSError):
            if self._version_bytes(self.state.version) == body:
                return
        self._publish_files(self.state.version, wire.unpack_adapter(body, self._shapes))

    def _version_bytes(self, version: int) -> bytes:
        return (self._version_folder(version) / "adapter_model.safetensors").read_bytes()

    def _version_folder(self, version: int) -> Path:
        return self._data / "versions" / f"{version:04d}"


def _run_of(path: Path, settings: RunSettings, manifest: Manifest, others: Mapping[str, Manifest]) -> str:
    """The run's id: made with the folder, and only for these settings and these bundles."""
    now = json.loads(msgspec.json.encode({"settings": settings, "manifest": manifest, "others": others, "protocol": PROTOCOL}))
    if path.exists():
        try:
            known = json.loads(path.read_bytes())
            run = str(known.pop("run"))
        except (ValueError, KeyError, AttributeError) as error:
            raise SettingsError(f"{path} is damaged ({error}); restore it, or use another --data folder") from error
        if different := list(_differences(now, known)):
            some = ", ".join(different[:3])
            raise SettingsError(
                f"{path.parent} holds a run with other settings or another bundle ({some}); use another --data folder"
            )
        return run
    run = uuid.uuid4().hex
    files.write(path, json.dumps({"run": run, **now}, indent=1).encode())
    return run


def _differences(a: object, b: object, path: str = "") -> Iterator[str]:
    """Dotted names of what differs between two JSON values."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(name), b.get(name), f"{path}.{name}" if path else name)
    elif a != b:
        yield path
