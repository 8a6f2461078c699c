"""The device daemon: carries out what `session.py` decides, with a store, a transport, an engine and a learner.

Work runs in one worker thread, so the event loop stays free; everything worth keeping is on disk before the next step, so
the process may be killed at any time. Said on stdout: one line per thing done.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import importlib.util
import logging
import random
import sqlite3
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path

import msgspec

from edge_sdk import bundle as bundles
from edge_sdk import files, session, verbs, wire
from edge_sdk.adapters import Array, Arrays
from edge_sdk.engines import check_runtime, open_engine
from edge_sdk.errors import AssetError, DataError, MissingRuntime, Refused, SettingsError, Unreachable, WireError
from edge_sdk.protocol import PROTOCOL, Evaluate, Evaluation, Finished, Manifest, Train, Update
from edge_sdk.session import Action, Event, Session
from edge_sdk.store import Parcel, Store
from edge_sdk.tasks import Private
from edge_sdk.transport import Api, Transport

ADAPTER = "adapter.safetensors"
FORGOTTEN = ("unknown-device", "wrong-shape")  # refusals of a server that does not know this device's run
log = logging.getLogger(__name__)


class Models:
    """The bundle's engine and, on first use, the torch learner.

    Args:
        folder: verified bundle.
        manifest: task and adapter slots.
        variant: of the bundle; "" for the recommended one.
        threads: for the engine and torch each.
    """

    def __init__(self, folder: Path, manifest: Manifest, variant: str, threads: int) -> None:
        self.manifest = manifest
        self._threads = threads
        self.engine = open_engine(folder, manifest.bundle, manifest.task, variant, threads)

    @cached_property
    def trainer(self) -> verbs.Trainer:
        """Raises: DataError: the train extra is not installed."""
        if not can_train():
            raise DataError("training needs torch: pip install 'tandem-edge[train]'")
        from edge_sdk.training.learner import Learner

        return Learner.load(self.manifest.bundle, self.engine.head, self.engine.encoder, self.manifest.adapter, self._threads)


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
        say: Callable[[str], None] = print,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._api = Api(transport)
        self._cache = cache
        self._name = name
        self._threads = threads
        self._variant = variant
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
            SettingsError: the server speaks another protocol, or another process uses this device's home.
            DataError: with `updates`, this device cannot do its work.
        """
        with files.held(self._store.home, "edge-agent"):
            return await self._live(updates)

    async def _live(self, updates: int | None) -> int:
        state, action = session.step(Session(session.AskForWork()), session.Started(self._store.pending() is not None), 0.0)
        while not isinstance(action, session.Stop) and self._delivered != updates:
            event = await self._carry_out(action)
            if updates is not None and isinstance(event, session.WorkFailed):
                raise DataError(event.reason)
            state, action = session.step(state, event, self._random.random())
        return int(self._store.fact("version") or 0)

    async def models(self) -> Models:
        """Enrols if need be, fetches the bundle, and loads it."""
        if self._models is None:
            manifest = await self._enroll()
            check_runtime(manifest.bundle.variant(self._variant))  # before anything is downloaded for it
            folder = await self._bundle(manifest)
            self._models = await asyncio.to_thread(Models, folder, manifest, self._variant, self._threads)
        return self._models

    async def _carry_out(self, action: Action) -> Event:
        """One action, and what came of it; every expected failure is an event."""
        try:
            match action:
                case session.AskForWork():
                    await self._enroll()
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
            if error.code == "unknown-device":
                return session.NoAnswer()
            if error.retry_after is not None:
                return session.NoAnswer(error.retry_after)
            if isinstance(action, session.Do):
                return session.WorkFailed(str(error))
            return session.Rejected(error.code)
        except (SettingsError, MissingRuntime):
            raise
        except (DataError, AssetError, WireError, OSError, sqlite3.Error) as error:
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
        if parcel is not None:
            receipt = await self._api.send(parcel.content_type, parcel.body)
            self._store.delivered()
            self._delivered += parcel.content_type == wire.TENSORS_TYPE
            self._say(f"delivered {len(parcel.body):,} bytes as {receipt.id[:12]}; the server is at version {receipt.version}")
        return session.Delivered()

    async def _do(self, work: Train | Evaluate | Finished) -> None:
        """Gets the adapter, works, and puts the result into the outbox; of a finished run only the adapter is kept."""
        start = await self._adapter(work.adapter, work.version)
        if isinstance(work, Finished):
            self._say(f"kept version {work.version}")
            return
        models = await self.models()
        manifest = models.manifest
        private = await asyncio.to_thread(self._store.private, manifest.task.labels)
        if isinstance(work, Evaluate):
            count, metrics = await asyncio.to_thread(verbs.evaluate, start, manifest.adapter, private, models.engine)
            self._say(f"version {work.version}: {_numbers(metrics)} on {count} held-out texts")
            evaluation = Evaluation(self._store.device_id, work.version, count, metrics)
            self._store.post(Parcel(wire.JSON_TYPE, wire.encode(evaluation)))
            return
        learned = await asyncio.to_thread(self._learn, work, start, private, models)
        self._say(f"version {work.version}: trained on {learned.num_examples} texts, {_numbers(learned.metrics)}")
        update = Update(self._store.device_id, work.version, learned.num_examples, learned.metrics)
        self._store.post(Parcel(wire.TENSORS_TYPE, wire.pack(update, learned.delta)))

    def _learn(self, work: Train, start: Arrays, private: Private, models: Models) -> verbs.Learned:
        spec = models.manifest.adapter
        return verbs.train(work.version, start, spec, private, work.training, work.soft, work.seed, models.engine, models.trainer)

    async def _enroll(self) -> Manifest:
        """The run's manifest, asked for once in a process."""
        if self._manifest is None:
            manifest = await self._api.enroll(self._store.device_id, self._name)
            if manifest.protocol != PROTOCOL:
                raise SettingsError(
                    f"the server speaks protocol {manifest.protocol}, this device {PROTOCOL}; update the older one"
                )
            if self._store.fact("run") not in (None, manifest.run):
                self._say("the server started another run; what belongs to the old one is dropped")
                self._store.delivered()
                (self._store.home / ADAPTER).unlink(missing_ok=True)
                self._store.set_fact("version", "0")
            self._store.set_fact("run", manifest.run)
            self._store.set_fact("manifest", wire.encode(manifest).decode())
            self._manifest = manifest
        return self._manifest

    async def _bundle(self, manifest: Manifest) -> Path:
        """The bundle folder with the files this device needs, verified; downloaded on first use, resumed where it stopped."""
        folder = bundle_folder(self._cache, manifest)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:  # agents of one machine share the cache; the first one fetches
            await asyncio.to_thread(fcntl.flock, lock, fcntl.LOCK_EX)
            for name, file in manifest.bundle.needs(self._variant).items():
                if not await asyncio.to_thread(bundles.intact, folder / name, file):
                    self._say(f"fetching {name} ({file.size / 1e6:.0f} MB)")
                    await self._api.blob(file, folder / name)
        return folder

    async def _adapter(self, sha256: str, version: int) -> dict[str, Array]:
        """A global adapter, from disk where it is the one kept last, else from the server, and then kept."""
        shapes = (await self._enroll()).adapter.shapes()
        if (kept := _kept_body(self._store)) is not None and hashlib.sha256(kept).hexdigest() == sha256:
            self._store.set_fact("version", str(version))
            return wire.unpack_adapter(kept, shapes)
        body = await self._api.blob_bytes(sha256, wire.size_limit(shapes))
        arrays = wire.unpack_adapter(body, shapes)
        await asyncio.to_thread(_keep, self._store, body, version)
        return arrays


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


def _kept_body(store: Store) -> bytes | None:
    path = store.home / ADAPTER
    return path.read_bytes() if path.exists() else None


def _keep(store: Store, body: bytes, version: int) -> None:
    """Makes `body` the device's adapter."""
    files.write(store.home / ADAPTER, body)
    store.set_fact("version", str(version))


def _numbers(metrics: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in metrics.items()) or "no numbers"
