"""Real processes on 127.0.0.1: a server, agents with private text, power cuts."""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.request import urlopen

import msgspec
import numpy as np
import pytest

from bench import fleet
from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec, Arrays, read_peft
from edge_sdk.engines import open_engine
from edge_sdk.protocol import Status
from edge_sdk.softlabels import SoftLabels
from edge_sdk.store import Store
from edge_sdk.tasks import Example, Private
from edge_sdk.training.batches import Training
from edge_sdk.training.learner import Learner
from edge_server.systems.lpfl import LpFl
from tests import factories

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
DEVICES = ("one", "two", "three")
LPFL = LpFl(
    versions=3,
    buffer_size=3,
    wait_seconds=0.05,
    training=Training(steps=8, batch_size=8, learning_rate=0.03),
    soft=SoftLabels(growth=6, temperature=0.5, batch_size=4),
)
TASK = msgspec.structs.replace(factories.ENCODER_TASK, scale=100.0)
CONFIG = {"task": TASK, "adapter": {"rank": 2, "alpha": 8.0}}


def sentences(seed: int, count: int) -> list[tuple[str, int]]:
    """Distinct made-up sentences whose class is that of their one telling word."""
    rng = random.Random(seed)
    found: dict[str, int] = {}
    while len(found) < count:
        label = rng.randrange(2)
        words = [*rng.sample(factories.OTHER[:10], 4), rng.choice(factories.GOOD[:2] if label else factories.BAD[:2])]
        rng.shuffle(words)
        found[" ".join(words)] = label
    return list(found.items())


def private(seed: int) -> Private:
    rows = sentences(seed, 60)
    labelled = tuple(Example(text, label) for text, label in rows[:8])
    rest = rows[8:32]
    held_out = tuple(Example(text, label) for text, label in rows[32:])
    return Private(labelled, tuple(t for t, _ in rest), tuple(label for _, label in rest), held_out)


class House:
    """Starts our programs in one folder and makes sure that none survives the test."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.folder = folder
        self.bundle = bundle
        self.running: list[subprocess.Popen[bytes]] = []
        self.config = folder / "run.toml"
        self.configure(LPFL)

    def configure(self, lpfl: LpFl) -> None:
        """What the next server runs."""
        self.config.write_text(toml(msgspec.to_builtins({**CONFIG, "lpfl": lpfl})))

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", *map(str, arguments)]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        self.running.append(process)
        return process

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def serve(self, port: int = 0) -> tuple[subprocess.Popen[bytes], str]:
        heard = self.log("server").count("listening on ")
        data = self.folder / "server"
        arguments = ("--config", self.config, "--bundle", self.bundle, "--data", data, "--port", str(port))
        process = self.start("server", "edge_server.cli", "serve", *arguments)
        until(lambda: self.log("server").count("listening on ") > heard or process.poll() is not None)
        assert process.poll() is None, self.log("server")
        return process, self.log("server").split("listening on ")[-1].split(",")[0]

    def agent(self, name: str, address: str) -> subprocess.Popen[bytes]:
        home, cache = self.folder / name, self.folder / "cache"
        return self.start(name, "edge_sdk.cli", "run", "--home", home, "--server", address, "--name", name, "--cache", cache)

    def fill(self, name: str, own: Private) -> None:
        store, labels = Store(self.folder / name), factories.ENCODER_TASK.labels
        store.add_all((e.text, labels[e.label or 0], None, False) for e in own.labelled)
        store.add_all((t, None, labels[k or 0], False) for t, k in zip(own.unlabelled, own.truths, strict=True))
        store.add_all((e.text, labels[e.label or 0], None, True) for e in own.held_out)
        store.close()

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.wait()


def toml(value: dict[str, object]) -> str:
    """Enough TOML for a run's settings; what is None is left out."""
    import json

    plain = [f"{k} = {json.dumps(v)}" for k, v in value.items() if v is not None and not isinstance(v, dict)]
    text = "\n".join(plain)
    for key, inner in value.items():
        if isinstance(inner, dict):
            nested = toml(inner).replace("\n[", f"\n[{key}.")
            text += f"\n[{key}]\n{nested}" if not nested.startswith("[") else f"\n[{key}.{nested[1:]}"
    return text


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Polls until `condition` holds; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def status(address: str) -> Status:
    with urlopen(f"{address}/v1/status", timeout=10) as answer:  # noqa: S310  # our own server
        return msgspec.json.decode(answer.read(), type=Status)


def reached(address: str, version: int) -> None:
    until(lambda: status(address).version >= version)


@pytest.fixture
def house(tmp_path: Path, encoder_bundle: Path) -> Iterator[House]:
    made = House(tmp_path, encoder_bundle)
    yield made
    made.close()


def final_adapter(house: House) -> Arrays:
    slots = bundles.read(house.bundle).slots
    return read_peft(house.folder / "server" / "versions" / f"{LPFL.versions:04d}", slots)[0]


def test_a_fleet_of_processes_learns_what_the_same_loop_learns_in_one_process(house: House) -> None:
    """Agents and server end at the adapter that bench/fleet.py computes without a network, and it is better than none."""
    owned = {name: private(seed) for seed, name in enumerate(DEVICES)}
    for name, own in owned.items():
        house.fill(name, own)
    server, address = house.serve()
    agents = [house.agent(name, address) for name in DEVICES]
    until(lambda: all(agent.poll() is not None for agent in agents))

    assert [agent.poll() for agent in agents] == [0, 0, 0], "\n".join(house.log(name) for name in DEVICES)
    seen = status(address)
    assert (seen.version, seen.finished, seen.buffered) == (LPFL.versions, True, 0)
    assert [device.updates for device in seen.devices] == [LPFL.versions] * 3
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=20) == 0

    bundle = bundles.read(house.bundle)
    spec = AdapterSpec(bundle.slots, 2, 8.0)
    engine = open_engine(house.bundle, bundle, TASK)
    learner = Learner.beside(engine, house.bundle, bundle, spec, TASK)
    expected = fleet.federate(list(owned.values()), spec.start(LPFL.seed), spec, LPFL, engine, learner)
    got = final_adapter(house)
    for name, array in expected.items():
        np.testing.assert_allclose(got[name], array, atol=1e-5)
    before = np.mean(fleet.accuracies(spec.start(0), spec, list(owned.values()), engine))
    after = np.mean(fleet.accuracies(got, spec, list(owned.values()), engine))
    assert after > before + 0.1
    measured = [m.metrics["accuracy"] for m in seen.measurements if m.kind == "evaluation" and m.version == LPFL.versions]
    assert np.mean(measured) == pytest.approx(after, abs=0.02)


def test_power_cuts_on_both_sides_change_nothing(house: House) -> None:
    """Agents and the server are killed in the middle, started again, and the run ends at the undisturbed adapter."""
    for seed, name in enumerate(DEVICES):
        house.fill(name, private(seed))
    server, address = house.serve()
    port = int(address.rsplit(":", 1)[1])
    agents = {name: house.agent(name, address) for name in DEVICES}
    rng, kills = random.Random(0), 0
    for version in range(1, LPFL.versions):
        reached(address, version)
        victim = rng.choice(DEVICES)
        agents[victim].kill()
        agents[victim].wait()
        server.kill()
        server.wait()
        kills += 2
        server, address = house.serve(port)
        agents[victim] = house.agent(victim, address)
    until(lambda: all(agent.poll() is not None for agent in agents.values()))

    assert [agent.poll() for agent in agents.values()] == [0, 0, 0], "\n".join(house.log(name) for name in DEVICES)
    assert kills == 2 * (LPFL.versions - 1)
    assert [device.updates for device in status(address).devices] == [LPFL.versions] * 3
    owned = [private(seed) for seed in range(3)]
    bundle = bundles.read(house.bundle)
    spec = AdapterSpec(bundle.slots, 2, 8.0)
    engine = open_engine(house.bundle, bundle, TASK)
    learner = Learner.beside(engine, house.bundle, bundle, spec, TASK)
    expected = fleet.federate(owned, spec.start(LPFL.seed), spec, LPFL, engine, learner)
    for name, array in final_adapter(house).items():
        np.testing.assert_allclose(array, expected[name], atol=1e-5)


def test_an_agent_waits_for_a_server_that_is_down(house: House) -> None:
    """Without a server an agent says so, stays up, and begins when the server comes."""
    house.fill("one", private(0))
    server, address = house.serve()
    port = int(address.rsplit(":", 1)[1])
    server.kill()
    server.wait()
    agent = house.agent("one", address)
    until(lambda: "is the server running?" in house.log("one"))
    assert agent.poll() is None
    house.serve(port)

    until(lambda: "delivered" in house.log("one"))
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=20) == 0
    assert "stopped" in house.log("one")


def test_a_device_without_text_says_so_and_stays_up(house: House) -> None:
    """An empty device measures nothing, cannot train, names the command that helps, and does not exit."""
    _, address = house.serve()
    agent = house.agent("empty", address)

    until(lambda: "edge-agent add" in house.log("empty"))
    assert agent.poll() is None
    assert status(address).devices[0].updates == 0


def test_the_quickstart_runs(house: House) -> None:
    """examples/quickstart.py learns with a real server until the run is over, keeps its result, and predicts with it."""
    house.configure(msgspec.structs.replace(LPFL, buffer_size=1))
    _, address = house.serve()
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py", address],
        cwd=house.folder,
        env={"PATH": "/usr/bin:/bin", "TANDEM_CACHE": str(house.folder / "cache"), "HOME": str(house.folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )

    assert done.returncode == 0, done.stderr
    assert [line.split(":")[1] for line in done.stdout.splitlines()] == [" a great evening", " not for me"]
    assert status(address).devices[0].updates == LPFL.versions
    kept = (house.folder / "runs" / "quickstart-device" / "adapter.safetensors").read_bytes()
    assert hashlib.sha256(kept).hexdigest() == status(address).adapter
