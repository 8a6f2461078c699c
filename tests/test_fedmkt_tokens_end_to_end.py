"""FedMKT at token level with real processes: a server, its LLM, and two devices, each of the three with its own tokenizer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from safetensors.numpy import load_file

from edge_export.bundle import Recipe, make
from edge_sdk import bundle as bundles
from edge_sdk import exchange, knowledge, wire
from edge_sdk.assets import Asset
from edge_sdk.exchange import POSITIONS, Voice
from edge_sdk.knowledge import Sheet
from edge_sdk.protocol import Text, Told
from edge_sdk.store import Store
from edge_sdk.tokens import PromptEncoder
from edge_sdk.training.batches import Training
from edge_server.coordinator import Judged
from edge_server.llm import study
from edge_server.llm.jobs import LlmSettings
from edge_server.llm.model import Llm
from edge_server.systems.fedmkt import FedMkt
from tests import factories, tiny
from tests.server_helpers import events
from tests.test_end_to_end import House, sentences, toml
from tests.test_fedmkt_end_to_end import Ended, ended
from tests.training_helpers import ANSWERS

pytestmark = pytest.mark.slow

MODELS = {"one": "words", "two": "pieces"}
SAID = ("very sad", "so good")  # the answer to a text of each class
RUN = FedMkt(
    "public.jsonl",
    versions=2,
    answers=2,
    top_k=4,
    label_weight=0.5,
    alone=Training(steps=8, batch_size=8, learning_rate=0.03),
    training=Training(steps=8, batch_size=8, learning_rate=0.03),
    passes=4,
    llm_batch_size=4,
    learning_rate=1e-2,
    llm=LlmSettings(layers=2, rank=4, threads=1),
    wait_seconds=0.05,
)
PUBLIC = sentences(99, 12)


class Home(House):
    """A house whose server has two decoders' bundles, and whose devices choose one."""

    def __init__(self, folder: Path, words: Path) -> None:
        super().__init__(folder, folder / "words")
        (folder / "words").symlink_to(words)
        pieces, llm = tiny.write_spelling(folder / "pieces model", 44), tiny.write_spelling(folder / "llm", 130)
        make(Asset(str(pieces)), folder / "pieces", Recipe(("fp32",), task=factories.DECODER_TASK, probe=factories.PROBE))
        chosen = msgspec.structs.replace(RUN, llm=msgspec.structs.replace(RUN.llm, model=str(llm)))
        run = {"system": "fedmkt", "task": ANSWERS, "adapter": {"rank": 2, "alpha": 8.0}, "fedmkt": chosen}
        self.config.write_text(toml(msgspec.to_builtins(run)))
        lines = [json.dumps({"text": text, "label": SAID[label]}) for text, label in PUBLIC]
        (folder / "public.jsonl").write_text("\n".join(lines) + "\n")
        for number, name in enumerate(MODELS):
            store = Store(folder / name)
            store.add_all((text, SAID[label], None, i >= 8) for i, (text, label) in enumerate(sentences(number, 12)))
            store.close()

    def start(self, name: str, *arguments: str | Path) -> subprocess.Popen[bytes]:
        more = ("--bundle", self.folder / "pieces") if name == "server" else ("--model", MODELS[name])
        return super().start(name, *arguments, *more)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, decoder_bundle: Path) -> Iterator[Ended]:
    house = Home(tmp_path_factory.mktemp("tokens"), decoder_bundle)
    try:
        _, address = house.serve()
        for name in MODELS:
            house.agent(name, address)
        yield ended(house, address)
    finally:
        house.close()


def public(run: Ended) -> list[Text]:
    return wire.unpack_lines(run.blob(told(run)[0].texts.sha256), Text)


def told(run: Ended) -> list[Told]:
    return [wire.decode(run.blob(sha256), Told) for sha256 in run.said]


def test_three_tokenizers_teach_each_other(run: Ended) -> None:
    """Both devices answer twice and learn three times, and the LLM learns from both; something is taught on the way."""
    seen, log = run.status, run.house.log("server")
    learned = [m for m in seen.measurements if m.kind == "kept"]

    assert (seen.version, seen.finished) == (2, True)
    assert [process.poll() for process in run.house.running[1:]] == [0, 0]
    assert [(s.written, s.judges) for s in seen.sheets] == [(12, 2)] * 2
    assert sorted(m.version for m in learned) == [0, 0, 1, 1, 2, 2]
    assert {m.metrics.get("public_examples") for m in learned if m.version} == {12.0}
    assert max(m.metrics["public_taught"] for m in learned if m.version) > 0
    assert log.count("the LLM learned from 2 devices, loss ") == 2
    assert log.count("of the public answers' tokens right") == 2
    digests = {bundles.read(run.house.folder / name).files["tokenizer.json"].sha256 for name in MODELS.values()}
    assert len(digests | {each.tokenizer.sha256 for each in told(run)}) == 3


def test_the_llm_gets_more_tokens_right(run: Ended) -> None:
    """What it told is what its adapters say, computed in this process; more of it is right than of the base's."""
    llm = Llm(run.house.folder / "llm", ANSWERS, RUN.llm)
    texts = public(run)
    right = [study.tell(llm, texts, 4)[1]]
    for adapter, each in zip(run.tuned, told(run), strict=True):
        llm.set(load_file(run.data / "blobs" / adapter))
        known, share = study.tell(llm, texts, 4)
        found = exchange.hear(each, *(run.blob(f.sha256) for f in (each.texts, each.knowledge, each.tokenizer)))
        right.append(share)
        for one, other in zip(found.knowledge, known, strict=True):
            assert abs(one.logprobs - other.logprobs).max() < 0.02

    assert [sheet.acceptance for sheet in run.status.sheets] == pytest.approx(right[1:])
    assert right[-1] > right[0]


def test_nothing_but_judgments_and_numbers_travels(run: Ended) -> None:
    """Every blob a device sent is knowledge of the public answers, in its own tokens; no update, and no word of its texts."""
    log = events(run.data)
    judged = [event for event in log if isinstance(event, Judged)]
    models = {device.id: MODELS[device.name] for device in run.status.devices}
    for event in judged:
        sheet = spelled(run.house.folder / models[event.device], public(run))
        judgment, known = knowledge.unpack_judgment(run.blob(event.blob), lambda _: sheet, 1 << 21, 4)  # noqa: B023  # called now
        assert judgment.metrics.keys() == {"loss"}
        assert len(known) == 12

    assert len(judged) == 4
    assert [device.updates for device in run.status.devices] == [0, 0]
    assert [text.text for text in public(run)] == [text for text, _ in PUBLIC]


def spelled(folder: Path, texts: list[Text]) -> Sheet:
    """Public answers in the tokens of a bundle."""
    encoder = PromptEncoder(folder / "tokenizer.json", (), (), POSITIONS, ANSWERS)
    return exchange.sheet(Voice(encoder, next(iter(bundles.read(folder).end), None)), texts)
