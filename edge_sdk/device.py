"""The five-line facade: keep private examples, take part in learning, predict.

    device = EdgeDevice("~/.tandem", server="http://127.0.0.1:8440")
    device.add("what a lovely film", label="positive")
    device.learn()
    print(device.predict(["not for me"]))

Synchronous on purpose: a script needs no event loop. The daemon is `agent.py`.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter
from edge_sdk.assets import cache_folder
from edge_sdk.eligibility import Policy
from edge_sdk.engines import Engine, Sampling
from edge_sdk.errors import AssetError, DataError, Unreachable
from edge_sdk.protocol import Manifest, Sample
from edge_sdk.store import Store
from edge_sdk.training.depth import Limits

if TYPE_CHECKING:  # they bring aiohttp, which only a call needs
    from edge_sdk.agent import Agent, Models
    from edge_sdk.transport import HttpTransport

DEFAULT_LIMITS, DEFAULT_POLICY = Limits(), Policy()


@dataclass(frozen=True)
class Prediction:
    """The likeliest label and every label's probability."""

    text: str
    label: str
    probabilities: dict[str, float]


def predictions(engine: Engine, texts: Sequence[str]) -> list[Prediction]:
    """What an engine makes of texts, in words."""
    labels = engine.encoder.labels
    return [
        Prediction(text, labels[int(row.argmax())], {label: float(p) for label, p in zip(labels, row, strict=True)})
        for text, row in zip(texts, engine.score(texts), strict=True)
    ]


class EdgeDevice:
    """One device: its private examples, its model, and the server it learns with.

    Args:
        home: folder of the device's store; made if missing.
        server: URL; only needed to learn, and for the first prediction.
        name: shown to the server's operator.
        threads: for inference and training.
        variant: which of the bundle's variants to run (`int8`, `q8_0`, ...); "" for the recommended one.
        limits: what training may cost: layers, memory, seconds of a step. policy: when it may run: battery, heat, load.
        cache: folder for model files; the user's cache by default.
        say: told one line per thing done; prints to stderr by default.
        token: admits this device at the first contact, where the server wants one.
        only_secure: share what it learned in secure averaging only, whatever the server says of its run.
        ca: file of the server's certificate; by default it has to be one the system trusts.
    """

    def __init__(
        self,
        home: str | Path,
        server: str | None = None,
        name: str = "device",
        threads: int = 1,
        variant: str = "",
        limits: Limits = DEFAULT_LIMITS,
        policy: Policy = DEFAULT_POLICY,
        cache: Path | None = None,
        say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
        token: str = "",
        ca: Path | None = None,
        only_secure: bool = False,
    ) -> None:
        self._store = Store(Path(home).expanduser())
        self._server = server
        self._name = name
        self._threads = threads
        self._variant = variant
        self._limits, self._policy = limits, policy
        self._cache = cache or cache_folder()
        self._say = say
        self._token, self._ca, self._only_secure = token, ca, only_secure
        self._engine: tuple[Manifest, Engine] | None = None
        self._worn = "nothing yet"  # stamp of the adapter that the engine wears

    def add(self, text: str, label: str | None = None) -> None:
        """Keeps a private text on this device, with its label where one is known."""
        self._store.add(text, label)

    def learn(self, updates: int | None = None, timeout: float | None = None) -> int:
        """Takes part until the run is over, and keeps its result; or until `updates` adapter updates are delivered.

        Args:
            timeout: seconds after which to give up; what is done by then is kept. None waits as long as it takes, through
                every outage.

        Returns:
            The newest version this device keeps: the final one where the run is over.

        Raises:
            DataError: with `updates`, no labelled text or no torch. SettingsError: the server speaks another protocol, or
            another process uses this home. Unreachable: `timeout` is over.
        """

        async def take_part() -> int:
            async with self._transport() as transport, asyncio.timeout(timeout):
                return await self._agent(transport).run(updates)

        try:
            return asyncio.run(take_part())
        except TimeoutError as error:
            raise Unreachable(f"not finished after {timeout} seconds; call learn() again to go on") from error

    def synthetic(self) -> list[Sample]:
        """The run's synthetic data: texts its LLM wrote and its devices accepted, with soft labels; fetches what is new.

        The device need not take part in anything else; it sends nothing but its name. What was withdrawn is not among them.

        Raises:
            Refused: this run has no synthetic data. Unreachable: the server does not answer.
        """

        async def fetch() -> list[Sample]:
            async with self._transport() as transport:
                return await self._agent(transport).synthetic()

        return asyncio.run(fetch())

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Labels texts with the newest adapter this device keeps, or the base model where it has none; no torch needed.

        Raises:
            DataError: the device has never met its server, so it has no model. AssetError: its files are damaged, and there
            is no server to fetch them from.
        """
        if isinstance(texts, str):
            raise DataError("predict takes a list of texts: predict([text])")
        return predictions(self._ready()[1], texts)

    def answer(self, text: str, sampling: Sampling = Sampling()) -> str:  # noqa: B008  # frozen
        """What the newest adapter answers to a text, for a task whose answers are texts; no torch needed.

        Raises:
            DataError, AssetError: as `predict`; or the task has labels, which `predict` gives.
        """
        manifest, engine = self._ready()
        if not manifest.task.answer_tokens:
            raise DataError("the answers of this task are its labels: use predict")
        most = min(sampling.max_tokens, manifest.task.answer_tokens)
        return engine.answer(text, replace(sampling, max_tokens=most)).strip()

    def _ready(self) -> tuple[Manifest, Engine]:
        """The engine with the newest adapter on."""
        from edge_sdk.agent import adapter_stamp, kept_adapter

        if self._engine is None:
            self._engine = self._load()
        manifest, engine = self._engine
        if self._worn != (stamp := adapter_stamp(self._store)):
            kept = kept_adapter(self._store, manifest)
            engine.set_adapter(None if kept is None else Adapter(kept, manifest.adapter))
            self._worn = stamp
        return manifest, engine

    def _load(self) -> tuple[Manifest, Engine]:
        """The engine from files that are whole: from disk alone where it can be, else with the server's help."""
        from edge_sdk.agent import Models, bundle_folder

        if (known := self._store.fact("manifest")) is not None:
            manifest: Manifest = msgspec.json.decode(known, type=Manifest)
            folder = bundle_folder(self._cache, manifest)
            try:
                bundles.verify(folder, manifest.bundle.needs(self._variant))
                return manifest, Models(folder, manifest, self._variant, self._threads).engine
            except AssetError:
                if self._server is None:
                    raise

        async def meet() -> Models:
            async with self._transport() as transport:
                return await self._agent(transport).models()

        models = asyncio.run(meet())
        return models.manifest, models.engine

    def close(self) -> None:
        self._store.close()

    def _transport(self) -> HttpTransport:
        from edge_sdk.transport import HttpTransport

        if self._server is None:
            raise DataError("this device has no model yet and no server to get one from; name its server once")
        return HttpTransport(self._server, ca=self._ca)

    def _agent(self, transport: HttpTransport) -> Agent:
        from edge_sdk.agent import Agent
        from edge_sdk.signed import signing

        return Agent(
            self._store,
            signing(self._store, transport, self._token),
            self._cache,
            self._name,
            self._threads,
            self._variant,
            limits=self._limits,
            policy=self._policy,
            say=self._say,
            token=self._token,
            only_secure=self._only_secure,
        )
