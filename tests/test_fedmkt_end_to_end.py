"""FedMKT with real processes: a server, its LLM, a device with an encoder and one with a decoder; then without power."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import load_file

from edge_sdk import bundle as bundles
from edge_sdk import wire
from edge_sdk.protocol import Sample, Status
from edge_sdk.tasks import softmax
from edge_sdk.training.batches import Training
from edge_server import cli
from edge_server import settings as run_settings
from edge_server.coordinator import Decided, Judged, Tuned, Written
from edge_server.llm.jobs import LlmSettings
from edge_server.llm.model import Llm
from edge_server.systems.fedmkt import FedMkt
from tests import factories, tiny
from tests import server_helpers as helpers
from tests.server_helpers import events
from tests.test_end_to_end import House, private, sentences, status, toml, until

pytestmark = pytest.mark.slow

MODELS = {"one": "small", "two": "other"}
PATIENCE = 300.0  # seconds, for a run on a busy machine
TASK = factories.DECODER_TASK  # the LLM's words
PUBLIC = sentences(99, 24)
RUN = FedMkt(
    "public.jsonl",
    versions=2,
    answers=2,
    alone=Training(steps=8, batch_size=8, learning_rate=0.03),
    training=Training(steps=8, batch_size=8, learning_rate=0.03),
    passes=40,
    llm_batch_size=4,
    learning_rate=1e-2,
    llm=LlmSettings(layers=2, rank=4, threads=1),
    wait_seconds=0.05,
)


class Home(House):
    """A house whose server has two bundles, and whose devices choose one."""

    def __init__(self, folder: Path, small: Path, other: Path, llm: Path) -> None:
        folder.mkdir()
        super().__init__(folder, folder / "small")
        shutil.copytree(small, folder / "small")
        shutil.copytree(other, folder / "other")
        run = {"system": "fedmkt", "task": TASK, "adapter": {"rank": 2, "alpha": 8.0}}
        chosen = msgspec.structs.replace(RUN, llm=msgspec.structs.replace(RUN.llm, model=str(llm)))
        self.config.write_text(toml(msgspec.to_builtins({**run, "fedmkt": chosen})))
        lines = [json.dumps({"text": text, "label": TASK.labels[label]}) for text, label in PUBLIC]
        (folder / "public.jsonl").write_text("\n".join([*lines, json.dumps({"text": "a film nobody labelled"})]) + "\n")
        for number, name in enumerate(MODELS):
            self.fill(name, private(number))

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        if name == "server":
            return super().start(name, *arguments, "--bundle", self.folder / "other")
        return super().start(name, *arguments, "--model", MODELS[name])


@dataclass
class Ended:
    """What a finished run left behind."""

    house: House
    status: Status

    @property
    def data(self) -> Path:
        return self.house.folder / "server"

    def blob(self, sha256: str) -> bytes:
        return (self.data / "blobs" / sha256).read_bytes()

    @property
    def said(self) -> list[str]:
        """What the LLM said of each version, a blob of lessons."""
        return [event.judged for event in events(self.data) if isinstance(event, Decided)]

    @property
    def tuned(self) -> list[str]:
        return [event.adapter for event in events(self.data) if isinstance(event, Tuned)]

    def adapter(self, name: str) -> bytes:
        return (self.house.folder / name / "adapter.safetensors").read_bytes()


def ended(house: House, address: str) -> Ended:
    """Once all devices have gone."""
    agents = [process for process in house.running if "edge_sdk.cli" in process.args]  # type: ignore[operator]
    until(lambda: all(process.poll() is not None for process in agents), PATIENCE)
    return Ended(house, status(address))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, encoder_bundle: Path, decoder_bundle: Path) -> Iterator[Ended]:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("fedmkt")
    house = Home(folder / "undisturbed", encoder_bundle, decoder_bundle, tiny.write(folder / "llm", "llama"))
    try:
        _, address = house.serve()
        for name in MODELS:
            house.agent(name, address)
        yield ended(house, address)
    finally:
        house.close()


def test_models_of_two_kinds_and_the_llm_teach_each_other(undisturbed: Ended) -> None:
    """Both answer twice and learn three times, each for its own kind of model; no adapter travels, the log tells each step."""
    house, seen = undisturbed.house, undisturbed.status

    assert (seen.system, seen.version, seen.finished, seen.buffered) == ("fedmkt", 2, True, 0)
    assert [device.updates for device in seen.devices] == [0, 0]
    assert [(s.written, s.judges, s.accepted) for s in seen.sheets] == [(24, 2, 0)] * 2
    learned = [m for m in seen.measurements if m.kind == "kept"]
    assert sorted(m.version for m in learned) == [0, 0, 1, 1, 2, 2]
    assert {m.metrics.get("public_examples") for m in learned if m.version} == {24.0}
    assert not any("public_examples" in m.metrics for m in learned if not m.version)
    assert sorted(m.version for m in seen.measurements if m.kind == "judgment") == [0, 0, 1, 1]
    log = house.log("server")
    assert log.count("devices are asked what they make of 24 public texts") == 2
    assert log.count("the LLM learned from 2 devices, loss ") == 2
    assert [process.poll() for process in house.running[1:]] == [0, 0]
    adapters = {name: load_file(house.folder / name / "adapter.safetensors") for name in MODELS}
    for name, model in MODELS.items():
        bundle = bundles.read(house.folder / model)
        spec = run_settings.manifest(run_settings.load(house.config), bundle).adapter
        assert {key: array.shape for key, array in adapters[name].items()} == spec.shapes()
    assert adapters["one"].keys() != adapters["two"].keys()
    assert not list((undisturbed.data / "blobs").glob("incoming-*"))


def test_the_llm_learned_the_public_texts(undisturbed: Ended) -> None:
    """What it says is what its adapters on disk say, computed in this process; it gets more of them right than the base does."""
    house = undisturbed.house
    llm = Llm(house.folder.parent / "llm", TASK, RUN.llm)
    texts, labels = [text for text, _ in PUBLIC], [label for _, label in PUBLIC]
    right = [float(np.mean(llm.logits(texts).argmax(1) == labels))]
    for version, (adapter, blob) in enumerate(zip(undisturbed.tuned, undisturbed.said, strict=True)):
        llm.set(load_file(undisturbed.data / "blobs" / adapter))
        lines = wire.unpack_lines(undisturbed.blob(blob), Sample)
        assert [line.text for line in lines] == texts
        assert [line.label for line in lines] == [TASK.labels[label] for label in labels]
        assert {(line.version, line.adapter) for line in lines} == {(version, adapter)}
        np.testing.assert_allclose([line.soft for line in lines], softmax(llm.logits(texts)), atol=1e-4)
        right.append(float(np.mean(np.argmax([line.soft for line in lines], 1) == labels)))

    assert [sheet.acceptance for sheet in undisturbed.status.sheets] == right[1:]
    assert right[-1] > right[0]


def test_a_server_killed_while_the_llm_learns_goes_on(tmp_path: Path, undisturbed: Ended) -> None:
    """kill -9 in the middle of the second lesson: a new server and its LLM end at the same bytes, and so do both devices."""
    before = undisturbed.house.folder
    house = Home(tmp_path / "killed", before / "small", before / "other", before.parent / "llm")
    blobs = house.folder / "server" / "blobs"
    try:
        server, address = house.serve()
        for name in MODELS:
            house.agent(name, address)
        until(lambda: "version 1: devices are asked" in house.log("server"), PATIENCE)
        until(lambda: bool(list(blobs.glob("incoming-*"))) and answered(house, 1) == 2, PATIENCE)
        server.kill()
        server.wait()
        log = events(house.folder / "server")
        assert [type(event) for event in log if isinstance(event, Written | Tuned | Decided)] == [
            Written,
            Tuned,
            Decided,
            Written,
        ]
        house.serve(int(address.rsplit(":", 1)[1]))
        again = ended(house, address)

        assert (again.said, again.tuned) == (undisturbed.said, undisturbed.tuned)
        assert [again.adapter(name) for name in MODELS] == [undisturbed.adapter(name) for name in MODELS]
        assert [type(event) for event in events(again.data) if isinstance(event, Written | Tuned | Decided)] == [
            Written,
            Tuned,
            Decided,
        ] * 2
    finally:
        house.close()


def answered(house: Home, sheet: int) -> int:
    return sum(isinstance(event, Judged) and event.sheet == sheet for event in events(house.folder / "server"))


# What is refused before anything is made ------------------------------------------------------------------------------
@pytest.fixture
def serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`edge-server serve` with these bundles; what it says when it ends at once with exit code 2."""

    def run(*folders: Path, system: str = "fedmkt", texts: str = '{"text": "so nice", "label": "positive"}\n') -> str:
        (tmp_path / "settings").mkdir()
        if texts:
            (tmp_path / "settings" / "public.jsonl").write_text(texts)
        config = tmp_path / "settings" / "run.toml"
        run = {"system": system, "task": factories.ENCODER_TASK, "fedmkt": RUN, "lpfl": {"versions": 1}}
        config.write_text(toml(msgspec.to_builtins(run)))
        given = [argument for folder in folders for argument in ("--bundle", str(folder))]
        code = cli.main(["serve", "--config", str(config), *given, "--data", str(tmp_path / "data"), "--port", "0"])
        assert (code, (tmp_path / "data").exists()) == (2, False)
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


def bundle_of(folder: Path, **task: object) -> Path:
    """A bundle without a model, for a task of its own."""
    folder.parent.mkdir(exist_ok=True)
    helpers.write_bundle(folder)
    made = bundles.read(folder)
    bundles.write(folder, msgspec.structs.replace(made, task=msgspec.structs.replace(made.task, **task)))
    return folder


def test_one_bundle_where_adapters_are_averaged(serve: Callable[..., str], tmp_path: Path) -> None:
    """Several kinds of models have no mean; the system that takes them is named."""
    line = serve(bundle_of(tmp_path / "a"), bundle_of(tmp_path / "b"), system="lpfl")

    assert line == "edge-server: lpfl averages one model's adapters: give one --bundle; several models need fedmkt"


def test_bundles_for_other_labels(serve: Callable[..., str], tmp_path: Path) -> None:
    """Whichever bundle it is: both sets of labels are told."""
    line = serve(bundle_of(tmp_path / "a"), bundle_of(tmp_path / "b", labels=("bad", "good")))

    assert line == "edge-server: a bundle's labels are bad, good, the run's negative, positive"


def test_bundles_of_one_name(serve: Callable[..., str], tmp_path: Path) -> None:
    """Devices could not choose between them, and one would hide the other."""
    line = serve(bundle_of(tmp_path / "x" / "bundle"), bundle_of(tmp_path / "y" / "bundle"))

    assert line == "edge-server: devices choose a bundle by its folder's name: each --bundle needs another one"


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        ("", "cannot be used; mend it, or name another file: No such file or directory"),
        ('{"text": "so nice"}\n', "has no text with a label that is not held out; add some"),
        ('{"text": "so nice", "label": "great"}\n', "label 'great' is not one of this task's: negative, positive"),
        ('{"text": "two\\nlines", "label": "positive"}\n', "fedmkt.public: text 0 has a character that is not printable, U+000A"),
    ],
)
def test_public_texts_that_cannot_be_used(serve: Callable[..., str], tmp_path: Path, texts: str, said: str) -> None:
    """No file beside the run's, or nothing in it that all can learn from: the setting and the reason are told."""
    line = serve(bundle_of(tmp_path / "a"), bundle_of(tmp_path / "b"), texts=texts)

    assert line.startswith("edge-server: fedmkt.public: ")
    assert said in line
