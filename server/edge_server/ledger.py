"""The running coordinator: decides on the state, writes the event, applies it, answers; makes versions in the background.

This is the one place where the pure reducer meets the disk. A call from an HTTP handler to the mathematics goes
handlers -> ledger -> systems/lpfl; which system it is, `runs.py` has said.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from edge_sdk import files, wire
from edge_sdk.adapters import Array, Arrays
from edge_sdk.cohort import Answer, Masked
from edge_sdk.errors import DataError, WireError
from edge_sdk.protocol import Evaluation, Line, Manifest, Receipt, Sample, Status, Train, Trained, Update, Wait, Withdrawal, Work
from edge_sdk.tasks import Example
from edge_server import cohorts, coordinator, pacing, runs, snapshots, storage
from edge_server.aggregation import Contribution
from edge_server.compute import Compute
from edge_server.coordinator import Buffered, Dropped, Event, Lost, Published, State
from edge_server.failpoints import Reached, nothing
from edge_server.folder import Versions, run_of
from edge_server.knowledge.filters import Embed
from edge_server.leases import Leases
from edge_server.runs import Feed, Llm
from edge_server.secure import SecureAverage
from edge_server.settings import RunSettings
from edge_server.storage import Blobs, EventLog
from edge_server.systems import lpfl
from edge_server.systems.lpfl import LpFl
from edge_server.unmasking import Cohort, Failed

RETRY_SECONDS = 60.0
OPENED = 2  # uploads that are in memory at a time, however many wait on disk
CHECK_SECONDS = 5.0  # whoever asks more often hears again what was found: strangers may ask
R = TypeVar("R", Evaluation, Trained)
P = TypeVar("P", Feed, Llm)
log = logging.getLogger(__name__)


class Ledger:
    """One run on one data folder.

    Args:
        settings: of the run; a folder that holds a run with other settings is refused.
        manifest: what devices are told.
        data: folder for blobs and versions, and for the event log where it is a file.
        say: told one line per version.
        compute: where the LLM runs, for a system that has one; CrossLM's is a process of its own by default.
        auxiliary: the server's own labelled texts, for FedCoLLM; the public ones, for FedMKT.
        others: what devices with other models are told, by the model's name, for FedMKT.
        embed: finds near duplicates among synthetic texts; None compares words.
        now: seconds since the epoch.
        state: URL of a PostgreSQL database with the event log; "" for a SQLite file in `data`.
        snapshot_every: events after which the state is taken down.
        reached: told at each write where it is; for tests that kill the process there.
        jitter: a fresh number in [0, 1), which spreads the devices that wait.

    Attributes:
        on_commit: called with each event once it is applied, and the seconds that the database took.
        on_version: called with the seconds that a version took, from when its updates were there until it was on disk.
        revoked: asked before a version is made, or the LLM learns, which devices are shut out; what these have sent before is
            dropped, or not heard.

    Raises:
        SettingsError: folder or database belong to another run, another server uses them, or the system needs what is not there.
        DataError: the database cannot be used.
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
        state: str = "",
        snapshot_every: int = 500,
        reached: Reached = nothing,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        others = others or {}
        bind = runs.of(settings, compute, auxiliary, {"": manifest, **others}, embed, now)
        url = storage.postgresql(state) if state else storage.sqlite(data / "events.sqlite")
        with contextlib.ExitStack() as opened:
            opened.enter_context(files.held(data, "edge-server"))
            self._log = opened.enter_context(contextlib.closing(EventLog(url, reached)))
            run = run_of(data / "run.json", self._log, settings, manifest, others, reached)
            self.state: State = snapshots.replay(self._log, snapshot_every)
            self._open = opened.pop_all()
        self.manifest = msgspec.structs.replace(manifest, run=run)
        self._others = {name: msgspec.structs.replace(other, run=run) for name, other in others.items()}
        self.blobs = Blobs(data / "blobs", reached)
        self._run = bind(self.blobs)
        self._settings = settings
        self._versions = Versions(data / "versions", manifest.adapter, manifest.bundle.base, reached)
        self._say = say
        self._shapes = manifest.adapter.shapes()
        self._update_shapes = wire.update_shapes(manifest)
        self.body_limit = wire.size_limit(self._shapes)
        self._snapshot_every = snapshot_every
        self.lost = asyncio.Event()  # the database is: nothing is taken in any more
        self._lock = asyncio.Lock()
        self._opening = asyncio.Semaphore(OPENED)
        self._full, self._news = asyncio.Event(), asyncio.Event()  # there may be a version to make; the LLM may have work
        self._now, self._jitter = now, jitter
        self._quota = pacing.quota(self._run.wait_seconds)
        self._asked: dict[str, float] = {}  # by device, what `pacing.ask` keeps of it
        each = settings.averaged or LpFl()
        self._leases = Leases(each.lease_seconds, each.concurrency)
        self._unseen: SecureAverage | None = None
        if (how := settings.averaged) is not None and how.secure is not None:
            self._unseen = SecureAverage(how, how.secure, run, manifest.adapter, self.blobs)
        self._lines: list[Line] = []  # of the feed, as far as it has been asked for
        self._check, self._checked, self._refusal = asyncio.Lock(), -math.inf, ""  # of the database
        self.on_commit: list[Callable[[Event, float], None]] = []
        self.on_version: list[Callable[[float], None]] = []
        self.revoked: Callable[[], Collection[str]] = frozenset
        self._unheard: Collection[str] = ()  # who was shut out when the LLM was last asked
        self._troubles: dict[asyncio.Event, str] = {}

    async def open(self) -> None:
        """Publishes version 0 on a fresh folder; mends the versions' folders where a power cut tore them.

        Raises:
            SettingsError: the run cannot be carried out with the blobs that are there.
        """
        await asyncio.to_thread(self._run.check)
        if self.state.version < 0:
            await self._publish(0, self._run.start(self.manifest.adapter), 0)
        else:
            await asyncio.to_thread(self._versions.mend, self.state.adapters, self.blobs)
        self._full.set()
        self._news.set()

    async def rest(self) -> None:
        """Ends the LLM's process, where there is one."""
        if self._run.compute is not None:
            await self._run.compute.close()

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

    def ask(self, device: str, can_train: bool) -> Work:
        """`plan`, for a device that may ask only so often, and whose waits are spread.

        Raises:
            WireError: `unknown-device`, `too-often`.
        """
        coordinator.known_device(self.state, device)
        self._asked[device] = pacing.ask(self._asked.get(device, 0.0), self._quota, self._now())
        work = self.plan(device, can_train)
        return Wait(pacing.spread(work.seconds, self._jitter())) if isinstance(work, Wait) else work

    def plan(self, device: str, can_train: bool) -> Work:
        """What a device should do now; where others will average what it learns, it has a lease on that.

        Raises:
            WireError: `unknown-device`.
        """
        known = coordinator.known_device(self.state, device)
        work = self._run.plan(self.state, known, can_train)
        if isinstance(work, Wait) and self.state.cohort is not None and known.trained == self.state.version:
            return cohorts.plan(self.state.cohort, self.state.version, device) or work
        if isinstance(work, Train) and (work.share or work.masked) and (how := self._settings.averaged) is not None:
            seconds = self._leases.take(device, work.version, lpfl.oldest(how, self.state), self._now())
            return Wait(pacing.until_free(seconds, how.wait_seconds)) if seconds else work
        return work

    @property
    def leases(self) -> int:
        """Devices that train, as far as is known."""
        return self._leases.hold(self._now())

    def public(self, sha256: str) -> Path | None:
        """Where a blob lies that any device may read; None where there is none, a device sent it, or it is the server's own."""
        private = coordinator.is_private(self.state, sha256) or sha256 in self._run.notes(self.state)
        return None if private else self.blobs.path(sha256)

    async def take_update(self, incoming: Path, sha256: str, signer: str | None = None) -> Receipt:
        """Checks a streamed upload, keeps it, and answers once it is on disk.

        Args:
            signer: the device that signed the request; None where the server does not know its devices.

        Raises:
            WireError: the upload is refused; nothing of it remains.
        """
        if (averaged := self._settings.averaged) is None:
            raise WireError("wrong-system", f"what devices learn stays with them in {self._settings.system}", 404)
        if averaged.secure is not None:
            raise WireError("wrong-system", "this run averages masked updates only; ask for work", 404)
        async with self._opening:
            update, size = await asyncio.to_thread(self._opened, incoming)
        coordinator.check_signer(update.device, signer)
        id = wire.update_id(update.device, update.version, sha256)
        if update.version < (first := self._run.shares_from):
            raise WireError("wrong-system", f"before version {first} of this run devices keep what they learn", 404)
        async with self._lock:  # two updates at once for one version: the second is refused before its blob is kept
            decision = coordinator.accept(self.state, update, id, sha256, size, averaged.max_staleness, self._now())
            self._leases.end(update.device, update.version)
            if isinstance(decision, Receipt):
                return decision
            await asyncio.to_thread(self.blobs.keep, incoming, sha256)
            await self._record(decision)
        self._full.set()
        return self.state.receipts[id]

    def _opened(self, incoming: Path) -> tuple[Update, int]:
        """The message of an upload that is whole, and its size in bytes; none of its numbers stays in memory while it waits."""
        body = incoming.read_bytes()
        return wire.unpack(body, self._update_shapes)[0], len(body)

    async def take_evaluation(self, evaluation: Evaluation, sha256: str) -> Receipt:
        """Raises: WireError: the evaluation is refused."""
        return await self._take_report(coordinator.take, evaluation, sha256)

    async def take_trained(self, trained: Trained, sha256: str) -> Receipt:
        """Raises: WireError: the report is refused."""
        if self._run.llm is None and self._unseen is None:
            raise WireError("wrong-system", f"{self._settings.system} wants what was learned, not only a word of it", 404)
        receipt = await self._take_report(coordinator.keep, trained, sha256)
        self._leases.end(trained.device, trained.version)
        if self._unseen is not None:
            async with self._lock:  # one that comes late has nothing for the next cohort
                if trained.version == self.state.version and (event := self._unseen.form(self.state, self._now())):
                    await self._record(event)
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

    async def take_masked(self, incoming: Path, sha256: str, signer: str | None = None) -> Receipt:
        """The same for a masked vector."""
        async with self._opening:
            masked, size = await asyncio.to_thread(self._opened_masked, incoming)
        coordinator.check_signer(masked.device, signer)
        return await self.take_answer(masked, sha256, size, incoming)

    def _opened_masked(self, incoming: Path) -> tuple[Masked, int]:
        body = incoming.read_bytes()
        return wire.unpack_masked(body, cohorts.length(self.manifest.adapter) + 1)[0], len(body)

    async def _take_report(self, decide: Callable[[State, R, str], Event | Receipt], report: R, sha256: str) -> Receipt:
        """A message of numbers: decided on, and on disk before it is answered."""
        id = wire.update_id(report.device, report.version, sha256)
        async with self._lock:
            decision = decide(self.state, report, id)
            if isinstance(decision, Receipt):
                return decision
            await self._record(decision)
        return self.state.receipts[id]

    @property
    def judgment_limit(self) -> int:
        """Bytes that a judgment may have."""
        return self._run.judgment_limit

    async def take_judgment(self, body: bytes, signer: str | None = None) -> Receipt:
        """Checks a judgment, keeps it, and answers once it is on disk. Raises: WireError: it is refused."""
        judgment = await asyncio.to_thread(self._given(self._run.llm).read, body, self.state)
        coordinator.check_signer(judgment.device, signer)
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
        feed, state = self._given(self._run.feed), self.state
        if task not in (None, feed.task):
            raise WireError("unknown-task", f"this feed is of the task {feed.task!r}", 404)
        if len(self._lines) < state.lines:
            self._lines = await asyncio.to_thread(feed.lines, state, self._lines)
        gone = {entry for entry in state.feed if isinstance(entry, str)}
        page = self._lines[since : since + limit]  # what is withdrawn is served no more, also to those that come later
        return [Withdrawal(x.seq, x.id) if isinstance(x, Sample) and x.id in gone else x for x in page]

    async def withdraw(self, sample: str) -> None:
        """Takes a sample out of use; devices drop it when they next ask. Raises: WireError: there is no such sample."""
        known = {line.id for line in await self.synthetic(0, self.state.lines)}
        known.update(await asyncio.to_thread(self._given(self._run.feed).open, self.state))
        async with self._lock:
            if event := coordinator.withdraw(self.state, sample, known):
                await self._record(event)

    def _given(self, part: P | None) -> P:
        if part is None:
            raise WireError("wrong-system", f"{self._settings.system} has no synthetic data", 404)
        return part

    async def make_versions(self) -> None:
        """Runs for ever: makes a version whenever the buffer is full or has waited too long, also one that a crash interrupted;
        and, beside that, lets the LLM do what is next.

        What fails (a full disk, a lost blob) is said, told to `/readyz`, and tried again a minute later or with the next
        update.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep_doing(self._average, self._full, self._average_patience))
            if (llm := self._run.llm) is not None:
                group.create_task(self._keep_doing(lambda: self._llm_step(llm), self._news, self._patience))

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
        if self._unseen is not None:
            return await self._average_unseen(self._unseen)
        if (how := self._settings.averaged) is None:
            return False
        async with self._lock:
            if stale := coordinator.outdated(self.state, how.max_staleness):
                return await self._drop(stale)
        if not (batch := self._run.averaged(self.state, self._now())):
            return False
        revoked = await asyncio.to_thread(self.revoked)
        async with self._lock:
            if shut_out := coordinator.shut_out(batch, revoked):
                return await self._drop(shut_out)
        began = time.monotonic()
        adapter = await asyncio.to_thread(self._averaged, self.state.version, batch, how)
        staleness = ", ".join(str(self.state.version - waiting.version) for waiting in batch)
        await self._make_version(adapter, f"{len(batch)} updates (staleness {staleness})", len(batch), began)
        return True

    async def _drop(self, dropped: Dropped) -> bool:
        """The caller holds the lock."""
        await self._record(dropped)
        self._say(f"dropped as {dropped.code}, of the updates that waited: {len(dropped.blobs)}")
        return True

    async def _average_unseen(self, unseen: SecureAverage) -> bool:
        """Goes on with the cohort; whether anything came of it."""
        async with self._lock:
            event, said = unseen.due(self.state, self._now())
            if said:
                self._say(said)
            if event is not None:
                await self._record(event)
                return True
        match self.state.cohort:
            case Failed(name, reason, revealed=True):
                await self._pass_by(f"cohort {name} has failed: {reason}")
                return True
            case Cohort(phase="done") as cohort:
                await self._average_cohort(unseen, cohort)
                return True
        return False

    async def _pass_by(self, why: str) -> None:
        """Makes a version that is the newest one again: devices train anew, and what they learned before goes into no sum."""
        version = self.state.version + 1
        await self._publish(version, await asyncio.to_thread(self._adapter_of, self.state.adapter), 0)
        self._say(f"{why}; version {version} is version {version - 1} again, and devices train anew")

    async def _average_cohort(self, unseen: SecureAverage, cohort: Cohort) -> None:
        began = time.monotonic()
        try:
            adapter = await asyncio.to_thread(lambda: unseen.average(cohort, self._adapter_of(self.state.adapter)))
        except WireError as error:
            async with self._lock:
                await self._record(Lost(error.detail))
        else:
            await self._make_version(adapter, f"the sum of {len(cohort.uploads)} masked updates", 0, began)

    def _average_patience(self) -> float | None:
        """Seconds until a deadline of the buffer or the cohort may pass; None where only news can change anything."""
        if self._unseen is not None:
            return self._unseen.patience(self.state, self._now())
        if (how := self._settings.averaged) is None or not (batch := self._run.averaged(self.state, math.inf)):
            return None
        return max(coordinator.since(batch) + how.deadline_seconds - self._now(), 0.01)

    @property
    def trouble(self) -> str:
        """Why no version is being made, for the operator; "" where all is well."""
        return "; ".join(self._troubles.values())

    async def ready(self) -> str:
        """Why devices should not be sent here now: no version yet or any more, or no writes; "" where all is well."""
        async with self._check:
            if time.monotonic() - self._checked >= CHECK_SECONDS:
                self._refusal = await asyncio.to_thread(self._try_to_write)
                self._checked = time.monotonic()
        if self._log.lost:
            self.lost.set()
        return self._refusal or ("" if self.state.version >= 0 else "there is no version yet") or self.trouble

    def _try_to_write(self) -> str:
        try:
            self._log.check()
        except DataError as error:
            log.warning("not ready: %s", error)
            return str(error)
        return ""

    def _patience(self) -> float | None:
        """Seconds until a deadline may pass; None where only news can change anything."""
        sheets = coordinator.unheard(self.state, self._unheard).sheets
        if not sheets or (last := sheets[-1]).judged or not last.ballots:
            return None
        return max(last.at + self._run.deadline_seconds - self._now(), 0.01)

    async def _llm_step(self, llm: Llm) -> bool:
        """Lets the LLM do what is next; whether there was anything."""
        self._unheard = await asyncio.to_thread(self.revoked)
        events, said = await llm.step(coordinator.unheard(self.state, self._unheard))
        async with self._lock:
            for event in events:
                await self._record(event)
        if events:
            self._say(said)
        return bool(events)

    async def _make_version(self, adapter: dict[str, Array], source: str, folded: int, began: float) -> None:
        version = self.state.version + 1
        adapter, llm, learned = await self._run.refine(adapter, self.state)
        await self._publish(version, adapter, folded, llm)
        for told in self.on_version:
            told(time.monotonic() - began)
        self._say(f"version {version} from {source}{learned}")

    async def _publish(self, version: int, adapter: dict[str, Array], folded: int, llm: str = "") -> None:
        body = await asyncio.to_thread(self._versions.write, version, adapter)
        blob = await asyncio.to_thread(self.blobs.put, body)
        async with self._lock:
            await self._record(Published(version, blob, folded, llm, self._now() if folded else 0.0))

    def status(self) -> Status:
        return coordinator.status(self.state, self._settings.system, self._run.finished(self.state))

    async def _record(self, event: Event) -> None:
        """On disk first, then in memory, also when the caller is cancelled in between; the caller holds the lock."""
        writing = asyncio.create_task(self._write(event))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await writing
            raise

    async def _write(self, event: Event) -> None:
        began = time.monotonic()
        try:
            await asyncio.to_thread(self._log.append, msgspec.json.encode(event))
        except DataError:
            if self._log.lost:
                self.lost.set()
            raise
        seconds = time.monotonic() - began
        self.state = coordinator.apply(self.state, event)
        for told in self.on_commit:
            told(event, seconds)
        if self._log.newest % self._snapshot_every == 0:
            try:
                await asyncio.to_thread(snapshots.take, self._log, self.state)
            except DataError as error:  # the event is on disk, and only that was promised
                log.warning("no snapshot: %s", error)

    def _averaged(self, version: int, batch: tuple[Buffered, ...], how: LpFl) -> dict[str, Array]:
        """What `version` becomes."""
        known = self.state.adapters
        adapter = known[version]
        bases = {known[waiting.version] for waiting in batch} if lpfl.wants_bases(how) else set()
        opened = {blob: self._adapter_of(blob) for blob in {adapter, *bases}}
        buffer = (self._contribution(version, waiting, opened.get(known[waiting.version])) for waiting in batch)
        return lpfl.step(how, self.manifest.adapter, opened[adapter], buffer)

    def _contribution(self, version: int, waiting: Buffered, base: Arrays | None) -> Contribution:
        delta = wire.unpack(self.blobs.get(waiting.blob), self._update_shapes)[1]
        return Contribution(delta, waiting.num_examples, version - waiting.version, base)

    def _adapter_of(self, blob: str) -> dict[str, Array]:
        return wire.unpack_adapter(self.blobs.get(blob), self._shapes)
