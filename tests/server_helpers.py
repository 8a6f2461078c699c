"""Servers on data folders of their own, updates for them, and what they must have computed from these."""

from __future__ import annotations

import asyncio
import hashlib
import json
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from aiohttp.test_utils import TestClient, TestServer

from edge_sdk import bundle as bundles
from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays
from edge_sdk.protocol import PROTOCOL, Enroll, Receipt, Status, Update
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, fedbuff
from edge_server.app import create_app
from edge_server.coordinator import Accepted, Event, Published
from edge_server.ledger import Ledger
from edge_server.settings import AdapterSettings, RunSettings
from edge_server.storage import EventLog
from edge_server.systems.lpfl import LpFl
from tests import factories

SPEC = factories.SPEC
SHAPES = SPEC.shapes()
Client = TestClient[Any, Any]


def settings(**lpfl: Any) -> RunSettings:
    """Two updates make a version, nobody evaluates, and the run does not end before a test does."""
    system = LpFl(**{"versions": 1000, "buffer_size": 2, "evaluate_every": 0, "wait_seconds": 0.25, **lpfl})
    return RunSettings(factories.ENCODER_TASK, "lpfl", AdapterSettings(SPEC.rank, SPEC.alpha), system)


def open_ledger(data: Path, run: RunSettings | None = None, say: Callable[[str], None] = lambda _: None) -> Ledger:
    run = run or settings()
    return Ledger(run, run_settings.manifest(run, factories.bundle()), data, say)


@dataclass(frozen=True)
class Running:
    """A server on a real socket, and the ledger behind it."""

    client: Client
    ledger: Ledger
    data: Path

    async def enroll(self, *devices: str) -> None:
        for device in devices:
            answer = await self.client.post("/v1/enroll", data=wire.encode(Enroll(PROTOCOL, device, f"name of {device}")))
            assert answer.status == 200

    async def send(self, body: bytes) -> Receipt:
        answer = await self.client.post("/v1/results", data=body, headers={"Content-Type": wire.TENSORS_TYPE})
        assert answer.status == 200, await answer.text()
        return wire.decode(await answer.read(), Receipt)

    async def status(self) -> Status:
        answer = await self.client.get("/v1/status")
        return wire.decode(await answer.read(), Status)

    async def reaches(self, version: int) -> None:
        await until(lambda: self.ledger.state.version == version)


@asynccontextmanager
async def running(data: Path, run: RunSettings | None = None) -> AsyncIterator[Running]:
    """The application on a free port of 127.0.0.1; stopped as `edge-server` stops."""
    ledger = open_ledger(data, run)
    async with TestClient(TestServer(create_app(ledger))) as client:
        yield Running(client, ledger, data)


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns once `condition` holds; a test fails if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0.002)


async def take(ledger: Ledger, body: bytes) -> Receipt:
    """What the handler does with an uploaded body."""
    incoming = ledger.blobs.incoming()
    try:
        incoming.write_bytes(body)
        return await ledger.take_update(incoming, hashlib.sha256(body).hexdigest())
    finally:
        incoming.unlink(missing_ok=True)


async def work_through(ledger: Ledger, version: int) -> None:
    """Opens a ledger and lets it make versions until it reaches `version` and has nothing left to do."""
    await ledger.open()
    maker = asyncio.create_task(ledger.make_versions())
    await until(lambda: maker.done() or ledger.state.version >= version)
    if maker.done():
        await maker
    maker.cancel()
    await asyncio.wait([maker])


def delta(seed: int = 0, spec: AdapterSpec = SPEC) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.shapes().items()}


def upload(device: str, version: int, seed: int = 0, num_examples: int = 10, metrics: Mapping[str, float] | None = None) -> bytes:
    """The body a device sends for `delta(seed)`."""
    return wire.pack(Update(device, version, num_examples, dict(metrics or {"loss": 0.5})), delta(seed))


def tensors(header: object, data: bytes = b"") -> bytes:
    """Safetensors bytes with any header at all, to be wrong in one chosen place."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def parts(body: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the data of safetensors bytes, to be changed and put together again by `tensors`."""
    (length,) = struct.unpack("<Q", body[:8])
    return json.loads(body[8 : 8 + length]), body[8 + length :]


def with_message(message: object) -> bytes:
    """A valid body but for its message."""
    header, data = parts(upload("d1", 0))
    header["__metadata__"] = {"message": message if isinstance(message, str) else json.dumps(message)}
    return tensors(header, data)


def events(data: Path) -> list[Event]:
    """Everything on disk, oldest first."""
    log = EventLog(data / "events.sqlite")
    try:
        return [msgspec.json.decode(body, type=Event) for body in log.read()]
    finally:
        log.close()


def blobs(data: Path) -> set[str]:
    return {path.name for path in (data / "blobs").iterdir()}


def fold(log: Iterable[Event], deltas: Callable[[Accepted], Arrays], run: RunSettings) -> dict[str, Array]:
    """The newest adapter, computed in memory from the accepted updates in the order of the log."""
    adapter = SPEC.start(run.lpfl.seed)
    version, buffer = -1, list[Contribution]()
    for event in log:
        match event:
            case Accepted():
                buffer.append(Contribution(deltas(event), event.num_examples, version - event.version))
            case Published(0):
                version = 0
            case Published():
                adapter = fedbuff(adapter, buffer[: run.lpfl.buffer_size], run.lpfl.server_lr, cap=run.lpfl.max_examples)
                version, buffer = version + 1, buffer[run.lpfl.buffer_size :]
    return adapter


def write_bundle(folder: Path) -> Path:
    """A bundle folder without a model: one small file and the slots of `factories.SPEC`."""
    folder.mkdir()
    (folder / "dummy.bin").write_bytes(b"not a model" * 100)
    bundle = msgspec.structs.replace(factories.bundle(), files={"dummy.bin": bundles.digest(folder / "dummy.bin")})
    bundles.write(folder, bundle)
    return folder


def write_config(path: Path, run: RunSettings) -> Path:
    """The TOML file of `run`, as far as tests change it."""
    sections = {
        "task": ["labels", "pattern", "verbalizer", "scale"],
        "adapter": ["rank", "alpha"],
        "lpfl": [
            "versions",
            "buffer_size",
            "max_staleness",
            "server_lr",
            "max_examples",
            "wait_seconds",
            "evaluate_every",
            "seed",
        ],
    }
    lines = []
    for section, keys in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(getattr(getattr(run, section), key))}" for key in keys)]
    path.write_text("\n".join(lines) + "\n")
    assert run_settings.load(path) == run
    return path
