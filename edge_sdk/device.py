"""The five-line facade: keep private examples, take part in learning, predict.

    device = EdgeDevice("~/.tandem", server="http://127.0.0.1:8440")
    device.add("what a lovely film", label="positive")
    device.learn()
    print(device.predict(["not for me"]))

Synchronous on purpose: a script needs no event loop. The daemon is `agent.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edge_sdk.assets import cache_folder
from edge_sdk.errors import DataError
from edge_sdk.protocol import Manifest
from edge_sdk.store import Store


@dataclass(frozen=True)
class Prediction:
    """The likeliest label and every label's probability."""

    text: str
    label: str
    probabilities: dict[str, float]


class EdgeDevice:
    """One device: its private examples, its model, and the server it learns with.

    Args:
        home: folder of the device's store; made if missing.
        server: URL; only needed to learn, and for the first prediction.
        name: shown to the server's operator.
        threads: for inference and training.
        cache: folder for model files; the user's cache by default.
    """

    def __init__(
        self, home: str | Path, server: str | None = None, name: str = "device", threads: int = 1, cache: Path | None = None
    ) -> None:
        self._store = Store(Path(home).expanduser())
        self._server = server
        self._name = name
        self._threads = threads
        self._cache = cache or cache_folder()

    def add(self, text: str, label: str | None = None) -> None:
        """Keeps a private text on this device, with its label where one is known."""
        self._store.add(text, label)

    def learn(self, updates: int = 1) -> int:
        """Takes part in the run until `updates` adapter updates are delivered or the run is over.

        Returns:
            The version learned from last, or the final one.

        Raises:
            DataError: no labelled text, or no torch. SettingsError: the server speaks another protocol.
        """
        from edge_sdk.agent import Agent
        from edge_sdk.transport import HttpTransport

        async def take_part() -> int:
            async with HttpTransport(self._need_server()) as transport:
                return await Agent(self._store, transport, self._cache, self._name, self._threads, lambda _: None).run(updates)

        return asyncio.run(take_part())

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        """Labels texts with the newest adapter this device keeps, or the base model where it has none; no torch needed.

        Raises:
            DataError: the device has never met its server, so it has no model.
        """
        from edge_sdk.agent import Agent, Models, bundle_folder, kept_adapter
        from edge_sdk.tasks import softmax
        from edge_sdk.transport import HttpTransport

        async def meet() -> None:
            async with HttpTransport(self._need_server()) as transport:
                await Agent(self._store, transport, self._cache, self._name, self._threads, lambda _: None).models()

        if (known := self._store.fact("manifest")) is None or not bundle_folder(self._cache, _manifest(known)).exists():
            asyncio.run(meet())
            known = self._store.fact("manifest")
        if known is None:
            raise DataError("this device has no model yet; give it a server once")
        manifest = _manifest(known)
        engine = Models(bundle_folder(self._cache, manifest), manifest, self._threads).engine
        engine.set_adapter(kept_adapter(self._store, manifest), manifest.adapter)
        labels = manifest.task.labels
        rows = softmax(engine.scores(texts))
        return [
            Prediction(text, labels[int(row.argmax())], {label: float(p) for label, p in zip(labels, row, strict=True)})
            for text, row in zip(texts, rows, strict=True)
        ]

    def close(self) -> None:
        self._store.close()

    def _need_server(self) -> str:
        if self._server is None:
            raise DataError("this device has no server; pass server='http://HOST:PORT'")
        return self._server


def _manifest(known: str) -> Manifest:
    return msgspec.json.decode(known, type=Manifest)
