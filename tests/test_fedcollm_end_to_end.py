"""FedCoLLM with real processes: a server, its two models in a process of their own, and two devices; then without power."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edge_sdk import bundle as bundles
from edge_sdk import wire
from edge_sdk.adapters import AdapterSpec, Array, Arrays
from edge_sdk.engines import open_engine
from edge_sdk.protocol import Manifest, Status
from edge_sdk.tasks import Example
from edge_sdk.training.batches import Training
from edge_sdk.training.learner import Learner
from edge_server import settings as run_settings
from edge_server.aggregation import Contribution, fedbuff
from edge_server.coordinator import Accepted, Published
from edge_server.llm import distil
from edge_server.llm.jobs import LlmSettings, Mutual
from edge_server.llm.model import Llm
from edge_server.systems.fedcollm import FedCoLlm
from edge_server.systems.lpfl import LpFl
from tests import factories, tiny
from tests.server_helpers import events
from tests.test_end_to_end import House, private, sentences, status, toml, until

pytestmark = pytest.mark.slow

DEVICES = ("one", "two")
TASK = msgspec.structs.replace(factories.ENCODER_TASK, scale=100.0)
PATIENCE = 300.0  # seconds, for a run on a busy machine
OWN = [Example(text, label) for text, label in sentences(77, 24)]
RUN = FedCoLlm(
    "own.jsonl",
    LpFl(versions=2, buffer_size=2, wait_seconds=0.05, seed=5, training=Training(steps=4, batch_size=8, learning_rate=0.03)),
    Mutual(passes=10, batch_size=4, slm_learning_rate=1e-2, llm_learning_rate=1e-3),
    LlmSettings(layers=2, rank=2, pattern="{text} it was", words=("bad", "good"), threads=1),
)


def house_of(folder: Path, bundle: Path) -> House:
    """Everything a run needs; the server's own texts lie beside its settings."""
    folder.mkdir()
    house = House(folder, bundle)
    llm = msgspec.structs.replace(RUN.llm, model=str(tiny.write(folder / "llm", "llama")))
    run = {"system": "fedcollm", "task": TASK, "adapter": {"rank": 2, "alpha": 8.0}}
    both = msgspec.structs.replace(RUN, llm=llm)
    house.config.write_text(toml(msgspec.to_builtins({**run, "fedcollm": both})))
    lines = [json.dumps({"text": e.text, "label": TASK.labels[e.label or 0]}) for e in OWN]
    (folder / "own.jsonl").write_text("\n".join([*lines, json.dumps({"text": "a film nobody labelled"})]) + "\n")
    for number, name in enumerate(DEVICES):
        house.fill(name, private(number))
    return house


@dataclass
class Ended:
    """What a finished run left behind."""

    house: House
    status: Status

    @property
    def data(self) -> Path:
        return self.house.folder / "server"

    def version(self, number: int) -> bytes:
        return (self.data / "versions" / f"{number:04d}" / "adapter_model.safetensors").read_bytes()

    @property
    def published(self) -> list[Published]:
        return [event for event in events(self.data) if isinstance(event, Published)]


def ended(house: House, address: str) -> Ended:
    """Once all devices have gone."""
    agents = house.running[1:]
    until(lambda: status(address).finished, PATIENCE)
    found = status(address)
    until(lambda: all(process.poll() is not None for process in agents if "edge_sdk.cli" in process.args), PATIENCE)  # type: ignore[operator]
    return Ended(house, found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, encoder_bundle: Path) -> Iterator[Ended]:
    """A run that nothing happened to."""
    house = house_of(tmp_path_factory.mktemp("fedcollm") / "undisturbed", encoder_bundle)
    try:
        _, address = house.serve()
        for name in DEVICES:
            house.agent(name, address)
        yield ended(house, address)
    finally:
        house.close()


def test_devices_and_the_llm_learn_together(undisturbed: Ended) -> None:
    """Two versions from two devices each; both take home the last, the LLM has an adapter for each, and the log tells losses."""
    house, seen = undisturbed.house, undisturbed.status

    assert (seen.system, seen.version, seen.buffered) == ("fedcollm", 2, 0)
    assert [device.updates for device in seen.devices] == [2, 2]
    last = undisturbed.version(2)
    assert len({undisturbed.version(number) for number in range(3)}) == 3
    assert [(house.folder / name / "adapter.safetensors").read_bytes() for name in DEVICES] == [last, last]
    llms = [event.llm for event in undisturbed.published]
    assert llms[0] == ""
    assert len(set(llms[1:])) == 2
    assert all((undisturbed.data / "blobs" / sha256).stat().st_size > 0 for sha256 in llms[1:])
    assert not list((undisturbed.data / "blobs").glob("incoming-*"))
    assert house.log("server").count("; distilled in ") == 2
    updates = [m for m in seen.measurements if m.kind == "update"]
    assert [sorted(m.version for m in updates), any("soft_examples" in m.metrics for m in updates)] == [[0, 0, 1, 1], False]
    assert sorted(m.version for m in seen.measurements if m.kind == "evaluation") == [0, 0, 1, 1, 2, 2]


def test_versions_are_what_both_models_make_of_the_mean(undisturbed: Ended) -> None:
    """Every version, computed in this process from the updates on disk: the mean, and then what both models teach each other."""
    settings = run_settings.load(undisturbed.house.config)
    folder, bundle = undisturbed.house.bundle, bundles.read(undisturbed.house.bundle)
    manifest = run_settings.manifest(settings, bundle)
    spec: AdapterSpec = manifest.adapter
    llm = Llm(undisturbed.house.folder / "llm", TASK, RUN.llm)
    slm = Learner.beside(open_engine(folder, bundle, TASK), folder, bundle, spec, TASK)
    arrays: dict[str, Array] = spec.start(5)
    llm.set(llm.start(5 + 1))
    accepted = [event for event in events(undisturbed.data) if isinstance(event, Accepted)]
    for version in range(2):
        batch = [
            Contribution(_delta(undisturbed, event, manifest), event.num_examples, 0)
            for event in accepted
            if event.version == version
        ]
        mean = fedbuff(arrays, batch, 1.0, cap=10_000)
        slm.set(mean)
        distil.distil(*distil.partners(slm, llm, OWN, None), RUN.mutual, 5 + version + 1)
        arrays = slm.get()
        found = wire.unpack_adapter(undisturbed.version(version + 1), spec.shapes())
        for name, array in arrays.items():
            np.testing.assert_allclose(found[name], array, atol=1e-5)
        assert max(float(np.abs(mean[name] - array).max()) for name, array in found.items()) > 1e-3


def _delta(run: Ended, event: Accepted, manifest: Manifest) -> Arrays:
    return wire.unpack((run.data / "blobs" / event.blob).read_bytes(), wire.update_shapes(manifest))[1]


def test_a_server_killed_while_the_models_learn_goes_on(tmp_path: Path, undisturbed: Ended) -> None:
    """kill -9 in the middle of the second distillation: a new server makes the same bytes, of the SLM's adapter and the LLM's."""
    house = house_of(tmp_path / "killed", undisturbed.house.bundle)
    blobs = house.folder / "server" / "blobs"
    try:
        server, address = house.serve()
        for name in DEVICES:
            house.agent(name, address)
        # what goes in and what comes out of both models
        until(lambda: "version 1 from" in house.log("server") and len(list(blobs.glob("incoming-*"))) == 3, PATIENCE)
        server.kill()
        server.wait()
        log = events(house.folder / "server")
        assert [event.version for event in log if isinstance(event, Published)] == [0, 1]
        assert sum(isinstance(event, Accepted) and event.version == 1 for event in log) == 2
        house.serve(int(address.rsplit(":", 1)[1]))
        again = ended(house, address)

        assert [again.version(number) for number in (1, 2)] == [undisturbed.version(number) for number in (1, 2)]
        assert [(e.adapter, e.llm) for e in again.published] == [(e.adapter, e.llm) for e in undisturbed.published]
        assert [device.updates for device in again.status.devices] == [2, 2]
        assert [(house.folder / name / "adapter.safetensors").read_bytes() for name in DEVICES] == [again.version(2)] * 2
    finally:
        house.close()
