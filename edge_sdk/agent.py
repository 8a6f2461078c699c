"""The device daemon: carries out what `session.py` decides, with a store, a transport, an engine and a learner.

Work runs in one worker thread, so the event loop stays free; everything worth keeping is on disk before the next step, so
the process may be killed at any time. Training goes in small steps, each only if the device's conditions allow it, and after
a power cut it goes on where it was, with or without a network. Said on stdout: one line per thing done.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import importlib.util
import logging
import random
import sqlite3
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import msgspec

from edge_sdk import bundle as bundles
from edge_sdk import codec, conditions, consent, exchange, files, knowledge, session, verbs, wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays, add, below, shapes_of
from edge_sdk.bundle import File
from edge_sdk.cohort import Request
from edge_sdk.eligibility import Conditions, NotNow, Policy, decide
from edge_sdk.engines import Engine, check_runtime, open_engine
from edge_sdk.errors import AssetError, DataError, MissingRuntime, Refused, SettingsError, Unreachable, WireError
from edge_sdk.exchange import Heard
from edge_sdk.protocol import (
    PROTOCOL,
    Evaluate,
    Evaluation,
    Finished,
    Judgment,
    Lesson,
    Manifest,
    Metrics,
    Predict,
    Sample,
    Text,
    Told,
    Train,
    Trained,
    Update,
)
from edge_sdk.session import Action, Event, Session
from edge_sdk.store import MEMBER, SPENT, UNSEEN, WORK, Parcel, Store
from edge_sdk.tasks import Private, Task
from edge_sdk.tokens import Ids
from edge_sdk.training.batches import Progress
from edge_sdk.training.depth import Limits, choose
from edge_sdk.transport import Api, Transport

if TYPE_CHECKING:  # they bring torch, which only training needs
    from edge_sdk.training.hidden import HiddenStates
    from edge_sdk.training.learner import Learner
    from edge_sdk.training.trainer import Trainer

ADAPTER = "adapter.safetensors"
START = "start.safetensors"  # the global adapter, where the device's own is another
MAX_TOKENIZER = 1 << 26  # bytes: one of 262,144 tokens has 33 MB
PAGE = 500  # lines of the feed asked for at a time
MAX_FEED_LINES = 200_000  # that a device reads of one run's feed
MAX_FEED = 1 << 26  # bytes of it that a device keeps
CHECKPOINT = "training.safetensors"
LESSON = "lesson.jsonl"  # the public texts of the last lesson, or what names its parts:
SHEET, KNOWLEDGE, TEACHER = "sheet.jsonl", "knowledge.bin", "teacher.json"  # texts, what the LLM says, and its tokenizer
BEFORE = "before.safetensors"  # the device's own adapter as it was when that lesson was begun
OWN = "own"  # the fact that this device has learned something for itself
HIDDEN = "hidden.sqlite"
SPEED = "gflops"  # the fact that holds this device's speed, measured once for each training: it may decide how many layers
DEFAULT_LIMITS, DEFAULT_POLICY = Limits(), Policy()
FORGOTTEN = ("unknown-device", "wrong-shape")  # refusals of a server that does not know this device's run
SHUT_OUT = ("unsigned", "token-needed", "bad-token", "revoked")  # refusals that only people can do something about
log = logging.getLogger(__name__)


class Models:
    """The bundle's engine and, while something is trained, the torch learner.

    Args:
        folder: verified bundle.
        manifest: task and adapter slots.
        variant: of the bundle; "" for the recommended one.
        threads: for the engine and torch each.
    """

    def __init__(self, folder: Path, manifest: Manifest, variant: str, threads: int) -> None:
        self.manifest = manifest
        self._folder, self._threads = folder, threads
        self._variant = manifest.bundle.variant(variant).name
        self._engines: dict[str, Engine] = {}
        self._open(self._variant)

    @property
    def engine(self) -> Engine:
        """The device's engine."""
        return self._open(self._variant)

    def _open(self, variant: str) -> Engine:
        if variant not in self._engines:
            bundle, task = self.manifest.bundle, self.manifest.task
            self._engines[variant] = open_engine(self._folder, bundle, task, variant, self._threads)
        return self._engines[variant]

    def rest(self) -> None:
        """Gives the engines' memory back; they are opened again when they are needed."""
        while self._engines:
            self._engines.popitem()[1].close()
        conditions.trim()

    def states(
        self, part: AdapterSpec, start: Arrays, limits: Limits, cache: Path | None, say: Callable[[str], None]
    ) -> HiddenStates:
        """What enters the lowest layer of `part`, under the rest of the adapter `start`; computed in ONNX Runtime.

        Args:
            cache: file for hidden states; None to compute them every time.
        """
        from edge_sdk.training.hidden import HiddenStates

        bundle, spec = self.manifest.bundle, self.manifest.adapter
        name, split = bundle.trunk(self._variant).name, min(slot.layer for slot in part.slots)
        lower = below(start, spec, split)

        def compute(sequences: Sequence[Ids]) -> list[Array]:
            trunk = self._open(name)
            trunk.set_adapter(lower)
            return trunk.hidden(sequences, split)

        under = hashlib.sha256(b"" if lower is None else wire.pack_adapter(lower.arrays)).hexdigest()
        return HiddenStates(compute, f"{bundle.sha256} {name} {split} {under}", cache, int(limits.cache_mb * 1e6), say)

    def learner(self, part: AdapterSpec, states: HiddenStates, limits: Limits) -> Learner:
        """A torch learner for a part of the adapter, on the hidden states that enter it; gives the engines' memory back.

        Raises:
            DataError: the train extra is not installed, or the bundle's files cannot be trained.
        """
        if not can_train():
            raise DataError("training needs torch: pip install 'tandem-edge[train]'")
        bundle, engine = self.manifest.bundle, self.engine
        head, encoder = None if self.manifest.task.answer_tokens else engine.head, engine.encoder
        del engine
        self.rest()
        from edge_sdk.training.learner import Learner

        layers = bundle.layers - min(slot.layer for slot in part.slots)
        return Learner.split(
            self._folder, bundle, head, encoder, part, states, layers, threads=self._threads, micro_tokens=limits.micro_tokens
        )


def can_train() -> bool:
    """Whether the train extra is installed; imports nothing."""
    return all(importlib.util.find_spec(name) is not None for name in ("torch", "transformers", "peft"))


class Agent:
    """One device's life with one server.

    Args:
        store: private data and outbox.
        transport: way to the server.
        cache: folder for bundles, shared by the agents of one machine.
        name: shown to the operator.
        threads: for inference and training.
        variant: of the bundle; "" for the recommended one.
        model: which bundle, in a run that has several; "" for the first.
        token: admits this device to a server that knows its devices, at the first contact.
        only_secure: it shares what it learned in secure averaging only, whatever the server says of its run.
        limits: what training may cost. policy: when it may run. look: tells how the device is.
        say: told one line per thing done.
        sleep: waits that many seconds.
    """

    def __init__(
        self,
        store: Store,
        transport: Transport,
        cache: Path,
        name: str,
        threads: int = 1,
        variant: str = "",
        limits: Limits = DEFAULT_LIMITS,
        policy: Policy = DEFAULT_POLICY,
        look: Callable[[], Conditions] = conditions.look,
        say: Callable[[str], None] = print,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        model: str = "",
        token: str = "",
        only_secure: bool = False,
    ) -> None:
        self._store = store
        self._api = Api(transport)
        self._cache = cache
        self._name = name
        self._threads = threads
        self._variant, self._model, self._token = variant, model, token
        self._only_secure = only_secure
        self._limits, self._policy, self._look = limits, policy, look
        self._say = say
        self._sleep = sleep
        self._manifest: Manifest | None = None
        self._models: Models | None = None
        self._delivered = 0
        self._random = random.Random()  # noqa: S311  # spreads retries, guards nothing

    async def run(self, updates: int | None = None) -> int:
        """Takes part until the run is over, or until `updates` updates are delivered.

        Returns:
            The newest version this device holds, the final one where the run is over.

        Raises:
            SettingsError: the server speaks another protocol, does not let this device in, or another process uses its home.
            DataError: with `updates`, this device cannot do its work.
        """
        with files.held(self._store.home, "edge-agent"):
            return await self._live(updates)

    async def _live(self, updates: int | None) -> int:
        started = session.Started(self._store.pending() is not None, self._under_way())
        state, action = session.step(Session(session.AskForWork()), started, 0.0)
        while not isinstance(action, session.Stop) and self._delivered != updates:
            event = await self._carry_out(action)
            if updates is not None and isinstance(event, session.WorkFailed):
                raise DataError(event.reason)
            state, action = session.step(state, event, self._random.random())
        return int(self._store.fact("version") or 0)

    async def join(self) -> Manifest:
        """Meets the server, and does nothing else. Raises: Refused: it does not let this device in."""
        return await self._enroll()

    async def models(self, training: bool = False) -> Models:
        """Enrols if the device has never met its server, fetches the bundle, and loads it.

        Args:
            training: fetches what training the whole adapter needs, too.
        """
        if training:
            manifest = await self._enroll()
            await self._fetch_training(manifest, manifest.adapter)
        if self._models is None:
            manifest = self._manifest or self._known() or await self._enroll()
            check_runtime(manifest.bundle.variant(self._variant))  # before anything is downloaded for it
            folder = await self._fetch(manifest, manifest.bundle.needs(self._variant))
            self._models = await asyncio.to_thread(Models, folder, manifest, self._variant, self._threads)
        return self._models

    async def synthetic(self) -> list[Sample]:
        """All samples of the run's feed of synthetic data that are not withdrawn; only what is new is fetched.

        The device takes part in nothing else by this: it needs no bundle and sends nothing but its name.
        """
        await self._enroll()
        await self._catch_up()
        return await asyncio.to_thread(self._store.synthetic, self._store.cursor)

    async def _carry_out(self, action: Action) -> Event:
        """One action, and what came of it; every expected failure is an event."""
        try:
            match action:
                case session.AskForWork():
                    await self._enroll()
                    if self._store.cursor:  # what was withdrawn goes at the next contact
                        await self._catch_up_if_any()
                    return session.Assigned(await self._api.ask(self._store.device_id, can_train()))
                case session.Do(work):
                    await self._do(work)
                    return session.Worked()
                case session.Send():
                    return await self._send()
                case session.Drop(code):
                    self._store.delivered()
                    self._say(f"dropped a result the server refused ({code})")
                    return session.Woke()
                case session.Sleep(seconds):
                    await self._sleep(seconds)
                    return session.Woke()
                case _:
                    raise ValueError(f"{action} is for the caller")
        except Unreachable as error:
            self._say(f"waiting: {error}")
            return session.NoAnswer()
        except Refused as error:
            self._say(f"refused: {error}")
            if error.code in FORGOTTEN:  # the server was set up anew: meet it again before the next word
                self._manifest = self._models = None
            if error.code in SHUT_OUT:
                raise SettingsError(f"the server does not let this device in: {error.detail}") from error
            if error.retry_after is not None:
                return session.NoAnswer(error.retry_after)
            if error.code in ("unknown-device", "bad-digest") or error.status in (401, 408, 429):  # it may be taken yet
                return session.NoAnswer()
            if isinstance(action, session.Do):
                return session.WorkFailed(str(error))
            return session.Rejected(error.code)
        except (SettingsError, MissingRuntime):
            raise
        except (DataError, AssetError, WireError, OSError, sqlite3.Error, MemoryError) as error:
            self._say(f"cannot work: {error}")
            return session.WorkFailed(str(error)) if isinstance(action, session.Do) else session.NoAnswer()
        except Exception as error:
            if not isinstance(action, session.Do):
                raise
            log.exception("unexpected, please report it")  # models fail in many ways; the device stays with its fleet
            self._say(f"cannot work: {type(error).__name__}: {error}")
            return session.WorkFailed(str(error))

    async def _send(self) -> Event:
        await self._enroll()  # a result of another run is dropped there
        parcel = self._store.pending()
        if parcel is not None and parcel.content_type == wire.TENSORS_TYPE and self._only_secure:
            self._store.delivered()
            self._say("dropped an update that was to be shared by itself")
        elif parcel is not None:
            receipt = await self._api.send(parcel.content_type, parcel.body)
            self._store.delivered()
            self._delivered += parcel.content_type == wire.TENSORS_TYPE
            self._say(f"delivered {len(parcel.body):,} bytes as {receipt.id[:12]}; the server is at version {receipt.version}")
        return session.Delivered()

    async def _do(self, work: Train | Predict | Evaluate | Finished | Request) -> None:
        """Gets the adapter, works, and puts the result into the outbox; of a finished run only the adapter is kept."""
        consent.check(manifest := self._manifest or self._known() or await self._enroll(), work, self._only_secure)
        if isinstance(work, Request):
            secure = _secure()
            self._store.post(parcel := await asyncio.to_thread(secure.speak, self._store, manifest, work))
            self._say(f"secure averaging: {secure.told(work)}, {len(parcel.body):,} bytes")
            return
        if isinstance(work, Train) and work.masked:
            _secure().check_unspent(self._store, work.version)  # before anything is downloaded and trained for it
        if isinstance(work, Finished):  # no cohort will ask again
            self._store.drop_fact(MEMBER)
            (self._store.home / UNSEEN).unlink(missing_ok=True)
        if isinstance(work, Finished) and not work.adapter:  # what the device has learned for itself is the result
            self._store.drop_fact(WORK)
            self._store.set_fact("version", str(work.version))
            self._say("finished; the device keeps the adapter it trained")
            return
        own = isinstance(work, Predict) or (isinstance(work, Train) and not work.share and not work.masked)
        apart = own or self._store.fact(OWN) is not None  # what it learned for itself is not overwritten by what all share
        start = await self._adapter(work.adapter, work.version, START if apart else ADAPTER)
        if isinstance(work, Train) and work.lesson is not None:
            start = await self._onward(work, start)
        if isinstance(work, Finished):
            if apart:
                await self._keep_better(start, work.version)
            self._store.drop_fact(WORK)  # of training that failed: it would bring an older adapter back
            self._say(f"kept version {work.version}")
            return
        models = await self.models()
        manifest = models.manifest
        private = await asyncio.to_thread(self._store.private, manifest.task)
        if isinstance(work, Predict):
            await self._judge(work, start, private, models)
            return
        if isinstance(work, Evaluate):
            count, metrics = await asyncio.to_thread(verbs.evaluate, start, manifest.adapter, private, models.engine)
            self._say(f"version {work.version}: {_numbers(metrics)} on {count} held-out texts")
            if apart:
                await self._keep_better(start, work.version, metrics)
            evaluation = Evaluation(self._store.device_id, work.version, count, metrics)
            self._store.post(Parcel(wire.JSON_TYPE, wire.encode(evaluation)))
            return
        if self._store.fact(WORK) != (body := wire.encode(work).decode()):
            self._store.drop_fact(SPEED)
            self._store.set_fact(WORK, body)
        await self._clear()
        if self._store.fact(SPEED) is None:
            self._store.set_fact(SPEED, str(await asyncio.to_thread(conditions.gflops, self._threads)))
        if work.synthetic is not None and self._store.cursor < work.synthetic.until:
            await self._catch_up()
            if self._store.cursor < work.synthetic.until:
                raise WireError("bad-message", f"the feed of synthetic data ends before line {work.synthetic.until}")
        prepared, learned = await self._train(work, start, private, models, await self._lesson(work.lesson, manifest.task))
        self._say(f"version {work.version}: trained on {learned.num_examples} texts, {_numbers(learned.metrics)}")
        device, part, residual = self._store.device_id, prepared.part, None
        if work.masked:
            update = Update(device, work.version, learned.num_examples, {})
            await asyncio.to_thread(_secure().keep, self._store, update, learned.delta)
            parcel = Parcel(wire.JSON_TYPE, wire.encode(Trained(device, work.version, 1, {})))
        elif work.share:
            update = Update(device, work.version, learned.num_examples, learned.metrics, part.depth, part.rank, work.upload)
            parcel, residual = await asyncio.to_thread(_packed, self._store, update, learned.delta)
        else:
            metrics = {**learned.metrics, **await self._keep_better(add(start, learned.delta), work.version)}
            self._store.set_fact(OWN, str(work.version))
            parcel = Parcel(wire.JSON_TYPE, wire.encode(Trained(device, work.version, learned.num_examples, metrics)))
        self._store.post(parcel, residual)
        (self._store.home / CHECKPOINT).unlink(missing_ok=True)

    async def _keep_better(self, new: Arrays, version: int, known: Metrics | None = None) -> Metrics:
        """Makes `new` the device's adapter unless the one it has is better on its held-out text; numbers of what it keeps."""
        models = await self.models()
        manifest, held = models.manifest, None
        try:
            held = kept_adapter(self._store, manifest)
        except DataError as error:
            self._say(f"the adapter it had is lost: {error}")
        private = await asyncio.to_thread(self._store.private, manifest.task)
        found = await asyncio.to_thread(verbs.better, held, new, manifest.adapter, private, models.engine, known)
        chosen, measured, newer = found
        if not newer:
            self._say(f"version {version}: the adapter it had is better on held-out text, and stays")
        await asyncio.to_thread(_keep, self._store, wire.pack_adapter(chosen), version)
        return {**measured, "newer": float(newer)}

    async def _judge(self, work: Predict, start: Arrays, private: Private, models: Models) -> None:
        """Tells what the device's own adapter makes of a sheet of texts; `start` where it has trained none."""
        manifest, device = models.manifest, self._store.device_id
        if manifest.task.answer_tokens and not work.top_k:
            raise WireError("bad-message", "answers are texts here, and it is not said how many tokens to tell at each position")
        adapter = kept_adapter(self._store, manifest) or dict(start)
        sheet = wire.unpack_lines(await self._blob(SHEET, work.sheet, min(work.size, wire.MAX_SHEET)), Text)
        if not sheet or len(sheet) != work.count:
            raise WireError(
                "bad-message", f"sheet {work.version} has {len(sheet)} texts, not the {work.count} it was said to have"
            )
        await self._clear()

        def answer() -> tuple[Judgment, bytes]:
            engine, spec = models.engine, manifest.adapter
            if manifest.task.answer_tokens:
                metrics, known, spelled = verbs.tell(sheet, adapter, spec, private, engine, work.top_k)
                judgment = Judgment(device, work.version, len(private.labelled), metrics)
                return judgment, knowledge.pack(known, spelled, judgment)
            count, metrics, covers, said = verbs.judge(sheet, adapter, spec, private, engine, work.form)
            judgment = Judgment(device, work.version, count, metrics, covers)
            return judgment, wire.pack_judgment(judgment, said)

        judgment, body = await asyncio.to_thread(answer)
        self._say(f"sheet {work.version}: judged {len(sheet)} texts, {_numbers(judgment.metrics)}")
        self._store.post(Parcel(wire.JUDGMENT_TYPE, body))

    async def _catch_up_if_any(self) -> None:
        """The same, where the server may be another by now, one without a feed: asking for work will tell."""
        try:
            await self._catch_up()
        except Refused as error:
            if error.code != "wrong-system":
                raise

    async def _catch_up(self) -> None:
        """Fetches what is new in the feed of synthetic data, and drops what was withdrawn.

        Raises:
            WireError: it has gaps, or is longer than a device reads and keeps.
        """
        while lines := await self._api.synthetic(self._store.cursor, PAGE):
            if [line.seq for line in lines] != list(range(self._store.cursor + 1, self._store.cursor + 1 + len(lines))):
                raise WireError("bad-message", "the feed of synthetic data has gaps, or comes again")
            size = await asyncio.to_thread(self._store.feed_size) + sum(len(wire.encode(line)) for line in lines)
            if lines[-1].seq > MAX_FEED_LINES or size > MAX_FEED:
                limits = f"{MAX_FEED_LINES} lines, or {MAX_FEED} bytes"
                raise WireError("too-large", f"the feed of synthetic data has more than a device takes: {limits}")
            await asyncio.to_thread(self._store.take_lines, lines)

    async def _lesson(self, lesson: Lesson | None, task: Task) -> list[Sample] | Heard:
        """The public texts of a lesson. Raises: WireError: they are not as many as there should be."""
        if lesson is None:
            return []
        body = await self._blob(LESSON, lesson.blob, wire.MAX_SHEET)
        found: list[Sample] | Heard
        if task.answer_tokens:
            told = wire.decode(body, Told)
            limits = {SHEET: wire.MAX_SHEET, KNOWLEDGE: wire.MAX_SHEET, TEACHER: MAX_TOKENIZER}
            parts = (SHEET, told.texts), (KNOWLEDGE, told.knowledge), (TEACHER, told.tokenizer)
            bodies = [await self._blob(name, file.sha256, min(file.size, limits[name])) for name, file in parts]
            found = await asyncio.to_thread(exchange.hear, told, *bodies)
        else:
            found = wire.unpack_lines(body, Sample)
        count = len(found.public if isinstance(found, Heard) else found)
        if count != lesson.count:
            raise WireError("bad-message", f"the lesson has {count} texts, not the {lesson.count} it was said to have")
        return found

    async def _blob(self, name: str, sha256: str, limit: int) -> bytes:
        """A blob, from the file `name` where it is the one kept there last, else from the server, and then kept."""
        if (body := _kept_body(self._store, name)) is None or hashlib.sha256(body).hexdigest() != sha256:
            body = await self._api.blob_bytes(sha256, limit)
            await asyncio.to_thread(files.write, self._store.home / name, body)
        return body

    async def _onward(self, work: Train, start: dict[str, Array]) -> dict[str, Array]:
        """Where a lesson begins: at what the device has learned for itself, else at `start`; after a power cut where it began."""
        if self._store.fact(WORK) != wire.encode(work).decode():
            (self._store.home / BEFORE).unlink(missing_ok=True)
            own = _kept_body(self._store) if self._store.fact(OWN) is not None else None
            if own is not None:
                await asyncio.to_thread(files.write, self._store.home / BEFORE, own)
        if (body := _kept_body(self._store, BEFORE)) is None:
            return start
        manifest = self._manifest or self._known() or await self._enroll()
        try:
            return wire.unpack_adapter(body, manifest.adapter.shapes())
        except WireError as error:
            self._say(f"the adapter it had is lost: {error.detail}")
            return start

    async def _train(
        self, work: Train, start: Arrays, private: Private, models: Models, public: list[Sample] | Heard
    ) -> tuple[verbs.Prepared, verbs.Learned]:
        """One training in small steps, each if the device's conditions allow it; resumed where it stopped."""
        manifest = models.manifest
        chosen = choose(manifest, self._limits, self._variant, float(str(self._store.fact(SPEED))))
        part = manifest.part(*chosen)
        await self._fetch_training(manifest, part)

        def prepare() -> tuple[verbs.Prepared, HiddenStates]:
            args = work.version, start, manifest.adapter, private, work.training, work.soft, work.seed, models.engine, part
            synthetic = self._store.synthetic(work.synthetic.until) if work.synthetic else ()
            return verbs.prepare(*args, synthetic, work.synthetic, public, work.lesson), models.states(
                part, start, self._limits, self._store.home / HIDDEN, self._say
            )

        def open_trainer() -> Trainer:
            learner = models.learner(part, states, self._limits)
            from edge_sdk.training.trainer import Trainer

            return Trainer(learner, prepared.job, self._store.home / CHECKPOINT, say=self._say)

        prepared, states = await asyncio.to_thread(prepare)
        try:  # first what goes through the frozen layers, then torch, without the engine; a look at the device before each step
            unread = await asyncio.to_thread(states.missing, [row.ids for row in prepared.job.rows])
            while unread:
                await self._clear()
                if unread := await asyncio.to_thread(states.advance, unread, self._limits.step_seconds):
                    self._say(f"version {work.version}: {len(unread)} texts to read")
            await self._clear()
            trainer = await asyncio.to_thread(open_trainer)
            while isinstance(state := await asyncio.to_thread(trainer.step, self._limits.step_seconds), Progress):
                self._say(f"version {work.version}: step {state.step} of {state.steps}")
                await self._clear()
            return prepared, prepared.learned(state.arrays, state.loss)
        finally:
            states.close()

    async def _fetch_training(self, manifest: Manifest, part: AdapterSpec) -> None:
        bundle, held = manifest.bundle, manifest.bundle.layers - min(slot.layer for slot in part.slots)
        trunk = bundle.needs(bundle.trunk(self._variant).name)
        await self._fetch(manifest, trunk | bundle.trains(held, bool(manifest.task.answer_tokens)))

    async def _clear(self) -> None:
        """Returns once nothing stands in the way of a small step."""
        said = ""
        while isinstance(verdict := decide(self._look(), self._policy), NotNow):
            if verdict.reason != said:
                self._say(f"not now: {verdict.reason}")
                said = verdict.reason
            await self._sleep(verdict.seconds)

    def _under_way(self) -> Train | None:
        """The training that a power cut interrupted; None where there is none, or it is of another version of this program."""
        if (known := self._store.fact(WORK)) is None or self._known() is None:
            return None
        with contextlib.suppress(WireError):
            return wire.decode(known.encode(), Train)
        return None

    def _known(self) -> Manifest | None:
        """The manifest this device met last; None where there is none, or another version of this program wrote it."""
        if (known := self._store.fact("manifest")) is None:
            return None
        with contextlib.suppress(WireError):
            manifest = wire.decode(known.encode(), Manifest)
            return manifest if manifest.protocol == PROTOCOL else None
        return None

    async def _enroll(self) -> Manifest:
        """The run's manifest, asked for once in a process."""
        if self._manifest is None:
            manifest = await self._api.enroll(self._store.device_id, self._name, self._model, self._token)
            if manifest.protocol != PROTOCOL:
                raise SettingsError(
                    f"the server speaks protocol {manifest.protocol}, this device {PROTOCOL}; update the older one"
                )
            known, changed = self._known(), ""
            consent.check_manifest(known, manifest)
            if self._store.fact("run") not in (None, manifest.run):
                changed = "the server started another run"
            elif known is not None and known.bundle != manifest.bundle:
                changed = "this device takes part with another model"
            if changed:
                self._say(f"{changed}; what belongs to the old one is dropped")
                self._store.delivered()
                self._store.drop_fact(WORK)
                self._store.drop_fact(OWN)
                self._store.drop_fact(MEMBER)
                self._store.drop_fact(SPENT)
                self._store.drop_synthetic()
                self._store.drop_residual()
                for name in (ADAPTER, START, CHECKPOINT, UNSEEN, LESSON, SHEET, KNOWLEDGE, TEACHER, BEFORE):
                    (self._store.home / name).unlink(missing_ok=True)
                self._store.set_fact("version", "0")
                self._models = None
            self._store.set_fact("run", manifest.run)
            self._store.set_fact("manifest", wire.encode(manifest).decode())
            self._manifest = manifest
        return self._manifest

    async def _fetch(self, manifest: Manifest, needed: Mapping[str, File]) -> Path:
        """The bundle folder with the files that are needed now, verified; downloaded on first use, resumed where it stopped."""
        folder = bundle_folder(self._cache, manifest)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:  # agents of one machine share the cache; the first one fetches
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
            for name, file in needed.items():
                if not await asyncio.to_thread(bundles.intact, folder / name, file):
                    self._say(f"fetching {name} ({file.size / 1e6:.0f} MB)")
                    await self._api.blob(file, folder / name)
        return folder

    async def _adapter(self, sha256: str, version: int, name: str) -> dict[str, Array]:
        """A global adapter, from the file `name` where it is the one kept there last, else from the server, and then kept."""
        manifest = self._manifest or self._known() or await self._enroll()
        shapes = manifest.adapter.shapes()
        if (kept := _kept_body(self._store, name)) is not None and hashlib.sha256(kept).hexdigest() == sha256:
            if name == ADAPTER:
                self._store.set_fact("version", str(version))
            return wire.unpack_adapter(kept, shapes)
        body = await self._api.blob_bytes(sha256, wire.size_limit(shapes))
        arrays = wire.unpack_adapter(body, shapes)
        if name == ADAPTER:
            await asyncio.to_thread(_keep, self._store, body, version)
        else:
            await asyncio.to_thread(files.write, self._store.home / name, body)
        return arrays


def _secure() -> ModuleType:
    """Raises: MissingRuntime: the secure extra is not installed."""
    if importlib.util.find_spec("cryptography") is None:
        raise MissingRuntime("this run averages masked updates, which needs cryptography: pip install 'tandem-edge[secure]'")
    from edge_sdk import secure

    return secure


def bundle_folder(cache: Path, manifest: Manifest) -> Path:
    """Where a bundle lives in the cache: named by its own description, so a changed bundle is another folder."""
    return cache / "bundles" / hashlib.sha256(msgspec.json.encode(manifest.bundle)).hexdigest()[:16]


def kept_adapter(store: Store, manifest: Manifest) -> dict[str, Array] | None:
    """The newest adapter this device has received, or None.

    Raises:
        DataError: the kept file is damaged, or belongs to another run.
    """
    if (body := _kept_body(store)) is None:
        return None
    try:
        return wire.unpack_adapter(body, manifest.adapter.shapes())
    except WireError as error:
        path = store.home / ADAPTER
        raise DataError(f"{path} does not fit this run ({error.detail}); delete it to go back to the base model") from error


def adapter_stamp(store: Store) -> str:
    """Changes whenever the kept adapter does: sha256 of its file, "" where there is none."""
    body = _kept_body(store)
    return "" if body is None else hashlib.sha256(body).hexdigest()


def _kept_body(store: Store, name: str = ADAPTER) -> bytes | None:
    path = store.home / name
    return path.read_bytes() if path.exists() else None


def _keep(store: Store, body: bytes, version: int) -> None:
    """Makes `body` the device's adapter."""
    files.write(store.home / ADAPTER, body)
    store.set_fact("version", str(version))


def _packed(store: Store, update: Update, delta: Arrays) -> tuple[Parcel, bytes | None]:
    """An update as it travels, and what int8 loses of it: with this the next one makes up for it; None where nothing is lost."""
    if update.encoding != "int8":
        return Parcel(wire.TENSORS_TYPE, wire.pack(update, delta)), None
    if (kept := store.residual()) is not None:
        with contextlib.suppress(WireError):  # it is of another part of the adapter
            delta = add(delta, wire.unpack_adapter(kept, shapes_of(delta)))
    return Parcel(wire.TENSORS_TYPE, wire.pack(update, delta)), wire.pack_adapter(codec.lost(delta, "int8"))


def _numbers(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()) or "no numbers"
