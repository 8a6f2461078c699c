"""Secure averaging with real processes: the mean is that of plain averaging, whoever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from bench import fleet
from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec, Arrays, read_peft
from edge_sdk.device import EdgeDevice
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError
from edge_sdk.softlabels import SoftLabels
from edge_sdk.tasks import Private
from edge_sdk.training.learner import Learner
from edge_server.cohorts import Secure
from edge_server.systems.lpfl import LpFl
from tests.test_end_to_end import LPFL, TASK, House, private, status, until

pytestmark = pytest.mark.slow
DEVICES = ("one", "two", "three", "four")
SECURE = Secure(threshold=3, join_seconds=60.0, phase_seconds=60.0)


def settings(**secure: float) -> LpFl:
    changed = msgspec.structs.replace(SECURE, **secure)
    return msgspec.structs.replace(LPFL, versions=2, buffer_size=4, soft=SoftLabels(growth=0), secure=changed)


@pytest.fixture
def house(tmp_path: Path, encoder_bundle: Path) -> Iterator[House]:
    made = House(tmp_path, encoder_bundle)
    made.configure(settings())
    yield made
    made.close()


def fill(house: House) -> dict[str, Private]:
    owned = {name: private(seed) for seed, name in enumerate(DEVICES)}
    for name, own in owned.items():
        house.fill(name, own)
    return owned


def expected(house: House, devices: list[Private]) -> Arrays:
    """What plain averaging ends at that clips nothing by size, and counts no update for more examples."""
    bundle = bundles.read(house.bundle)
    spec = AdapterSpec(bundle.slots, 2, 8.0)
    engine = open_engine(house.bundle, bundle, TASK)
    learner = Learner.beside(engine, house.bundle, bundle, spec, TASK)
    plain = msgspec.structs.replace(settings(), secure=None, clip_norm=0.0, max_examples=SECURE.max_weight)
    return fleet.federate(devices, spec.start(plain.seed), spec, plain, engine, learner)


def close(found: Arrays, wanted: Arrays) -> None:
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, atol=1e-4)
        assert np.abs(array).max() > 0.01


def final(house: House) -> Arrays:
    return read_peft(house.folder / "server" / "versions" / "0002", bundles.read(house.bundle).slots)[0]


def said(house: House, name: str, what: str) -> None:
    until(lambda: what in house.log(name))


def ended(agents: list[subprocess.Popen[bytes]], house: House) -> None:
    until(lambda: all(agent.poll() is not None for agent in agents))
    assert [agent.poll() for agent in agents] == [0] * len(agents), "\n".join(house.log(name) for name in DEVICES)


def test_a_secure_mean_is_the_plain_one(house: House) -> None:
    """Four devices, two versions: what comes out is what plain averaging makes, to 1e-4, and no update was sent bare."""
    owned = fill(house)
    server, address = house.serve()
    ended([house.agent(name, address) for name in DEVICES], house)

    seen = status(address)
    assert (seen.version, seen.finished) == (2, True)
    assert [m.metrics for m in seen.measurements if m.kind == "kept"] == [{}] * 8  # no loss, no number of examples
    assert {m.num_examples for m in seen.measurements if m.kind == "kept"} == {1}
    assert house.log("server").count("from the sum of 4 masked updates") == 2
    close(final(house), expected(house, list(owned.values())))
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=20) == 0


@pytest.mark.parametrize("phase", ["sent keys", "sent shares", "sent what it learned", "helped to take the masks off"])
def test_a_server_may_die_in_any_phase(house: House, phase: str) -> None:
    """Killed when a device has just answered in this phase, it goes on where it was, and the mean is the same."""
    owned = fill(house)
    server, address = house.serve()
    agents = [house.agent(name, address) for name in DEVICES]
    until(lambda: any(phase in house.log(name) for name in DEVICES))
    server.kill()
    server.wait()
    house.serve(int(address.rsplit(":", 1)[1]))
    ended(agents, house)

    close(final(house), expected(house, list(owned.values())))


def test_devices_may_die_and_come_back(house: House) -> None:
    """Every device is killed after its keys, and again after its masked vector; started again it goes on: nobody is missing."""
    owned = fill(house)
    _, address = house.serve()
    for phase in ("sent keys", "sent what it learned"):
        agents = [house.agent(name, address) for name in DEVICES]
        for name, agent in zip(DEVICES, agents, strict=True):
            said(house, name, phase)
            agent.kill()
            agent.wait()
    ended([house.agent(name, address) for name in DEVICES], house)

    close(final(house), expected(house, list(owned.values())))


def test_a_device_that_drops_out_is_left_out(house: House) -> None:
    """One device shares its keys and never masks: the first version's mean is that of the others, and its masks are taken off."""
    house.configure(settings(phase_seconds=3.0))
    fill(house)
    _, address = house.serve()
    agents = {name: house.agent(name, address) for name in DEVICES}
    until(lambda: "sent shares" in house.log("one"))
    os.kill(agents["one"].pid, signal.SIGSTOP)
    late = "sent what it learned" in house.log("one")  # it was faster than the signal: then nobody drops out
    until(lambda: status(address).version >= 1)
    os.kill(agents["one"].pid, signal.SIGCONT)
    ended(list(agents.values()), house)

    assert late or "version 1 from the sum of 3 masked updates" in house.log("server")
    assert status(address).finished


def test_a_device_for_secure_averaging_only_shares_nothing_else(house: House) -> None:
    """In a run that averages plainly it says why, as a command and in Python, and the server gets nothing from it."""
    house.configure(LPFL)
    fill(house)
    _, address = house.serve()
    command = ("edge_sdk.cli", "run", "--home", house.folder / "one", "--server", address, "--cache", house.folder / "cache")
    house.start("one", *command, "--only-secure")
    said(house, "one", "cannot work: not-secure: this device shares what it learned only in secure averaging")
    device = EdgeDevice(house.folder / "two", address, cache=house.folder / "cache", only_secure=True)
    with pytest.raises(DataError, match="not-secure"):
        device.learn(updates=1)
    device.close()

    assert [(d.updates, d.uploaded_bytes) for d in status(address).devices] == [(0, 0)] * 2
