"""CrossLM-style learning with real processes: a server, its LLM in a process of its own, and devices that judge."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import pytest

from edge_sdk import wire
from edge_sdk.protocol import Line, Sample, Withdrawal
from edge_sdk.softlabels import SoftLabels
from edge_sdk.store import Store
from edge_sdk.training.batches import Training
from edge_server.knowledge.filters import Filter
from edge_server.llm.jobs import LlmSettings, Tuning
from edge_server.systems.crosslm import CrossLm
from edge_server.systems.lpfl import LpFl
from tests import factories, tiny
from tests.test_end_to_end import House, private, status, toml, until

pytestmark = pytest.mark.slow

DEVICES = ("one", "two", "three")
TASK = msgspec.structs.replace(factories.ENCODER_TASK, scale=100.0)


def settings(model: Path) -> CrossLm:
    return CrossLm(
        prompts=("the {label} film was", "a {label} day"),
        names=("bad", "good"),
        versions=2,
        samples=24,
        max_tokens=8,
        filter=Filter(min_words=2, max_words=20),
        judges=3,
        quality=0.5,
        tuning=Tuning(steps=3, batch_size=4, learning_rate=1e-3),
        llm=LlmSettings(model=str(model), layers=2, rank=2, pattern="{text} it was", words=("bad", "good"), threads=1),
        leash=5,
        training=Training(steps=4, batch_size=4, learning_rate=0.01),
        batch_size=4,
        wait_seconds=0.05,
    )


@pytest.fixture
def house(tmp_path: Path, encoder_bundle: Path) -> Iterator[House]:
    made = House(tmp_path, encoder_bundle)
    configure(made, settings(tiny.write(tmp_path / "llm", "llama")))
    yield made
    made.close()


def configure(house: House, run: CrossLm) -> None:
    """What the next server runs."""
    value = {"system": "crosslm", "task": TASK, "adapter": {"rank": 2, "alpha": 8.0}, "crosslm": run}
    house.config.write_text(toml(msgspec.to_builtins(value)))


def feed(address: str, since: int = 0, limit: int = 1000) -> list[Line]:
    with urlopen(f"{address}/v1/synthetic?since={since}&limit={limit}", timeout=10) as answer:  # noqa: S310  # our own server
        return wire.unpack_lines(answer.read(), Line)  # type: ignore[arg-type]  # a union is fine for msgspec


def start_devices(house: House, address: str) -> None:
    """One agent for each device, with private text of its own."""
    for number, name in enumerate(DEVICES):
        house.fill(name, private(number))
        house.agent(name, address)


def operator(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "edge_server.cli", *arguments], capture_output=True, text=True, check=False)


def test_devices_and_the_llm_teach_each_other(house: House) -> None:
    """Two sheets are written, judged by three devices and learned from by all; the feed is the same however it is paged."""
    _, address = house.serve()
    start_devices(house, address)
    until(lambda: status(address).finished, 300)
    stands = status(address)

    assert stands.version == 2
    assert [sheet.judges for sheet in stands.sheets] == [3, 3]
    assert all(sheet.written >= sheet.accepted > 0 for sheet in stands.sheets)
    assert "the LLM learned from sheet 1" in house.log("server")
    lines = feed(address)
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) == sum(sheet.accepted for sheet in stands.sheets)
    assert [line for at in range(0, len(lines), 7) for line in feed(address, at, 7)] == lines
    kinds = {m.kind for m in stands.measurements}
    assert kinds == {"kept", "judgment"}
    last = [m for m in stands.measurements if m.kind == "kept" and m.version == 2]
    assert len(last) == 3
    assert all("accuracy" in m.metrics and m.metrics["synthetic_examples"] == len(lines) for m in last)
    until(lambda: all(process.poll() is not None for process in house.running[1:]))
    for name in DEVICES:
        store = Store(house.folder / name)
        assert len(store.synthetic(10**6)) == len(lines)
        assert (store.home / "adapter.safetensors").exists()
        store.close()


def test_devices_average_after_the_last_sheet(house: House) -> None:
    """One sheet, then two versions that are averages of what devices learn with its texts; all get the last one."""
    run = settings(house.folder / "llm")
    training = Training(steps=4, batch_size=4, learning_rate=0.03)
    then = LpFl(versions=2, buffer_size=3, wait_seconds=0.05, training=training, soft=SoftLabels(growth=6, batch_size=4))
    configure(house, msgspec.structs.replace(run, versions=1, samples=12, federated=then))
    _, address = house.serve()
    start_devices(house, address)
    until(lambda: status(address).finished, 300)
    stands = status(address)
    until(lambda: all(process.poll() is not None for process in house.running[1:]))

    assert (stands.version, len(stands.sheets), stands.buffered) == (3, 1, 0)
    assert [device.updates for device in stands.devices] == [2, 2, 2]
    updates = [m for m in stands.measurements if m.kind == "update"]
    assert sorted((m.device, m.version) for m in updates) == sorted((d.id, v) for d in stands.devices for v in (1, 2))
    lines = feed(address)
    assert {m.metrics["synthetic_examples"] for m in updates} == {float(len(lines))}
    soft = {v: [m.metrics["soft_examples"] for m in updates if m.version == v] for v in (1, 2)}
    assert all(abs(count - 6 * version) <= 1 for version in (1, 2) for count in soft[version])  # their schedule starts here
    assert sorted((m.kind, m.version) for m in stands.measurements if m.kind in ("kept", "evaluation")) == sorted(
        [("kept", 0)] * 3 + [("evaluation", version) for version in (2, 3)] * 3
    )
    kept, shared = (
        [(house.folder / name / file).read_bytes() for name in DEVICES] for file in ("adapter.safetensors", "start.safetensors")
    )
    versions = house.folder / "server" / "versions"
    last = (versions / "0003" / "adapter_model.safetensors").read_bytes()
    assert shared == [last] * 3
    assert hashlib.sha256(last).hexdigest() == stands.adapter
    made = [(versions / f"{version:04d}" / "adapter_model.safetensors").read_bytes() for version in (0, 2)]
    assert len({*made, last}) == 3
    assert made[0] not in kept


def test_a_sample_is_withdrawn(house: House) -> None:
    """The operator lists, shows, exports and withdraws; the feed says so, and lists no longer show it."""
    _, address = house.serve()
    start_devices(house, address)
    until(lambda: len(feed(address)) > 1, 300)
    first = feed(address)[0]
    assert isinstance(first, Sample)

    assert first.id in operator("synthetic", "list", address).stdout
    assert msgspec.json.decode(operator("synthetic", "show", address, first.id).stdout, type=Sample) == first
    assert "withdrawn" in operator("synthetic", "withdraw", address, first.id).stdout
    assert operator("synthetic", "withdraw", address, first.id).returncode == 0  # again, nothing changes
    assert "no such sample" in operator("synthetic", "withdraw", address, "nobody").stderr
    assert first.id not in operator("synthetic", "list", address).stdout
    assert operator("synthetic", "show", address, first.id).returncode == 2
    out = house.folder / "out.jsonl"
    assert "written to" in operator("synthetic", "export", address, str(out)).stdout
    assert first.id not in out.read_text()
    until(lambda: status(address).finished, 300)
    gone = [line for line in feed(address) if isinstance(line, Withdrawal)]  # where it was, and where that is said
    assert [line.id for line in gone] == [first.id] * 2
    assert gone[0].seq == first.seq
    until(lambda: all(process.poll() is not None for process in house.running[1:]))
    again = house.agent("one", address)  # its next contact, if it had none since
    until(lambda: again.poll() is not None)
    store = Store(house.folder / "one")
    assert first.id not in {sample.id for sample in store.synthetic(10**6)}
    store.close()


def test_the_server_dies_while_the_llm_works(house: House) -> None:
    """kill -9 of the server: everything goes on and ends as it should."""
    server, address = house.serve()
    port = int(address.rsplit(":", 1)[1])
    start_devices(house, address)
    until(lambda: "sheet 0:" in house.log("server"), 120)
    server.send_signal(signal.SIGKILL)
    server.wait()
    house.serve(port)
    until(lambda: status(address).finished, 300)

    assert [sheet.judges for sheet in status(address).sheets] == [3, 3]


def test_the_feed_by_http(house: House) -> None:
    """An unchanged page is not sent again, and a wrong query is a problem."""
    _, address = house.serve()
    with urlopen(f"{address}/v1/synthetic", timeout=10) as answer:  # noqa: S310  # our own server
        etag = answer.headers["ETag"]
        assert answer.headers["Content-Type"].startswith("application/x-ndjson")
    with pytest.raises(HTTPError, match="304"):
        urlopen(Request(f"{address}/v1/synthetic", headers={"If-None-Match": etag}), timeout=10)  # noqa: S310
    for query in ("since=-1", "limit=1e3", "limit=100000", "since=a"):
        with pytest.raises(HTTPError, match="400"):
            urlopen(f"{address}/v1/synthetic?{query}", timeout=10)  # noqa: S310  # our own server
