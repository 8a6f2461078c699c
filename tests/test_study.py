"""The LLM in FedMKT at token level, on a model of a few thousand parameters: what it says, what it learns and what it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from edge_sdk import exchange, knowledge
from edge_sdk.errors import DataError
from edge_sdk.exchange import POSITIONS, Voice
from edge_sdk.knowledge import Knowledge
from edge_sdk.protocol import Judgment, Text
from edge_sdk.tokens import PromptEncoder
from edge_sdk.training.batches import Row, TopTokens
from edge_server.llm import study
from edge_server.llm.jobs import Answers, Describe, Described, LlmSettings, Studied, Study, Tell, Told, Tuning
from edge_server.llm.model import Llm
from edge_server.llm.worker import Models, do
from tests import factories, tiny
from tests.training_helpers import ANSWERS

Table = NDArray[np.float64]
SETTINGS = LlmSettings(layers=2, rank=4, alpha=8.0, threads=1)
PUBLIC = [
    Text("p0", "the film", 0, "great"),
    Text("p1", "the day", 0, "very sad"),
    Text("p2", "a phone", 0, "so good"),
    Text("p3", "the story", 0, "grim"),
    Text("p4", "a film", 0, "lovely"),
]
HOW = Tuning(steps=30, batch_size=3, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_spelling(tmp_path_factory.mktemp("llm"), 130)


@pytest.fixture
def llm(folder: Path) -> Llm:
    return Llm(folder, ANSWERS, SETTINGS)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's tokenizer: whole words."""
    return factories.write_model(tmp_path_factory.mktemp("device"), "decoder") / "tokenizer.json"


def voice(tokenizer: Path, end: int | None = 2) -> Voice:
    return Voice(PromptEncoder(tokenizer, (), (), POSITIONS, ANSWERS), end)


def distributions(llm: Llm, text: Text) -> Table:
    """The whole model's probabilities at each position of an answer, (tokens, vocabulary)."""
    (prompt,) = llm.voice.encoder.prompts([text.text])
    (answer,) = llm.voice.encoder.answers([text.answer], llm.voice.end)
    with torch.no_grad():
        scores = llm._model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]
    return np.asarray(torch.softmax(scores.double(), 1).numpy(), np.float64)


def sure(who: Voice, share: float, texts: Sequence[Text] = PUBLIC) -> list[Knowledge]:
    """Somebody who gives each token of an answer this share, and the rest to the next token."""
    found, size = [], len(who.vocabulary)
    for name, truth in exchange.sheet(who, texts).truths.items():
        ids = np.array([[token, (token + 1) % size] for token in truth.tokens])
        found.append(Knowledge(name, truth.size, ids, np.log(np.full(ids.shape, [share, 1 - share], np.float32))))
    return found


def judged(path: Path, who: Voice, share: float = 0.9, texts: Sequence[Text] = PUBLIC) -> str:
    """The file of a device's judgment."""
    path.write_bytes(knowledge.pack(sure(who, share, texts), exchange.sheet(who, texts), Judgment("d", 0, 1, {})))
    return str(path)


def of(llm: Llm) -> Models:
    return Models(llm)


# What it says ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("k", [1, 4, 10_000])
def test_it_tells_what_the_whole_model_says(llm: Llm, k: int) -> None:
    """The likeliest tokens at each position of each answer, as in one pass of the whole model; and how many are right."""
    found, right = study.tell(llm, PUBLIC, k)
    expected = [distributions(llm, text) for text in PUBLIC]
    truths = exchange.sheet(llm.voice, PUBLIC).truths
    hits = [p.argmax(1) == truths[text.id].tokens for p, text in zip(expected, PUBLIC, strict=True)]

    assert [known.id for known in found] == [text.id for text in PUBLIC]
    for known, p in zip(found, expected, strict=True):
        assert known.ids.shape == (len(p), min(k, p.shape[1]))
        np.testing.assert_allclose(np.exp(known.logprobs), np.take_along_axis(p, known.ids, 1), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(np.exp(known.logprobs), -np.sort(-p, 1)[:, :k], rtol=1e-3, atol=1e-6)
    assert right == pytest.approx(np.concatenate(hits).mean())


def test_a_description_is_enough_to_read_what_it_tells(llm: Llm, tmp_path: Path) -> None:
    """Tokenizer and end token from one job spell the answers of the other's file."""
    described, out = do(of(llm), Describe()), tmp_path / "told"
    told = do(of(llm), Tell("", str(out), tuple(PUBLIC), 4))
    assert isinstance(described, Described)
    assert isinstance(told, Told)
    who = Voice(PromptEncoder(described.tokenizer, (), (), POSITIONS, ANSWERS), described.end)
    found = knowledge.unpack(out.read_bytes(), exchange.sheet(who, PUBLIC))
    expected, right = study.tell(llm, PUBLIC, 4)

    assert (described.end, told.right) == (2, right)
    for one, other in zip(found, expected, strict=True):
        assert (one.ids == other.ids).all()
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=1e-3)


def test_it_tells_with_the_adapter_it_is_given(llm: Llm, tmp_path: Path) -> None:
    """Another adapter, other numbers; the same job again, the same bytes."""
    rng, adapter = np.random.default_rng(0), str(tmp_path / "adapter")
    save_file({name: rng.normal(size=array.shape).astype(np.float32) for name, array in llm.get().items()}, adapter)
    bodies = []
    for i, given in enumerate(("", adapter, "", adapter)):
        do(of(llm), Tell(given, str(tmp_path / f"{i}"), tuple(PUBLIC), 4))
        bodies.append((tmp_path / f"{i}").read_bytes())

    assert bodies[:2] == bodies[2:]
    assert bodies[0] != bodies[1]


# What it learns -------------------------------------------------------------------------------------------------------
def cost(llm: Llm) -> float:
    """Mean nats of the answers' tokens."""
    truths = exchange.sheet(llm.voice, PUBLIC).truths
    nats = [-np.log(p[range(len(p)), truths[t.id].tokens]) for t, p in ((t, distributions(llm, t)) for t in PUBLIC)]
    return float(np.concatenate(nats).mean())


def test_it_learns_public_answers(llm: Llm) -> None:
    """Without any device: their loss falls, more tokens are right, and nobody is said to have taught."""
    before, (_, right) = cost(llm), study.tell(llm, PUBLIC, 1)
    loss, taught = study.study(llm, PUBLIC, [], 4, 0.9, HOW, 1)

    assert cost(llm) < min(before, loss) - 0.5
    assert study.tell(llm, PUBLIC, 1)[1] > right
    assert taught == 0.0


def apart(llm: Llm, rows: Sequence[Row]) -> float:
    """Mean KL of what is taught from what the whole model says of the same tokens, over positions that teach two of them."""
    found = []
    for text, row in zip(PUBLIC, rows, strict=True):
        assert isinstance(row.target, TopTokens)
        for p, ids, logprobs in zip(distributions(llm, text), row.target.ids, np.exp(row.target.logprobs), strict=True):
            teacher = dict(zip(ids.tolist(), logprobs.tolist(), strict=True))
            total = sum(p[token] for token in teacher)
            found += [sum(q * np.log(q / (p[t] / total)) for t, q in teacher.items())] if len(teacher) > 1 else []
    assert len(found) >= len(PUBLIC)
    return float(np.mean(found))


def test_a_teacher_alone_is_moved_towards(llm: Llm, words: Path) -> None:
    """At label_weight 0 the LLM comes to say what a device says in words of its own: the word, or perhaps the next one."""
    who = voice(words)
    told = sure(who, 0.75)
    rows, _ = exchange.lessons(llm.voice, PUBLIC, study.tell(llm, PUBLIC, 2)[0], [(who, told)], 0.0)
    before = apart(llm, rows)
    _, taught = study.study(llm, PUBLIC, [(who, told)], 2, 0.0, HOW, 1)

    assert taught == 1.0
    assert apart(llm, rows) < before / 4


def test_who_says_it_worse_teaches_nothing(llm: Llm, words: Path) -> None:
    """The adapter is that of the answers alone, at whatever label_weight."""
    start, ends = llm.start(1), []
    for heard, weight in (([], 0.9), ([(voice(words), sure(voice(words), 1e-9))], 0.9), ([], 0.1)):
        llm.set(start)
        _, taught = study.study(llm, PUBLIC, heard, 2, weight, HOW, 1)
        assert taught == 0.0
        ends.append(llm.get())

    assert all((ends[0][name] == other[name]).all() for other in ends[1:] for name in ends[0])


# Jobs -----------------------------------------------------------------------------------------------------------------
def job(out: Path, *heard: Answers, adapter: str = "", seed: int = 5) -> Study:
    return Study(adapter, str(out), tuple(PUBLIC), heard, 2, 0.5, msgspec.structs.replace(HOW, steps=4), seed)


def learned(llm: Llm, work: Study) -> tuple[Studied, bytes]:
    outcome = do(of(llm), work)
    assert isinstance(outcome, Studied)
    return outcome, Path(work.out).read_bytes()


def test_the_same_job_gives_the_same_bytes(llm: Llm, words: Path, tmp_path: Path) -> None:
    """Whatever the LLM wore before; another seed or start gives others."""
    heard = Answers(judged(tmp_path / "one", voice(words)), str(words), ANSWERS, 2)
    one, body = learned(llm, job(tmp_path / "a", heard))
    two, again = learned(llm, job(tmp_path / "b", heard))

    assert body == again
    assert (one.loss, one.heard, one.taught) == (two.loss, 1, 1.0)
    assert learned(llm, job(tmp_path / "c", heard, seed=6))[1] != body
    assert learned(llm, job(tmp_path / "d", heard, adapter=str(tmp_path / "a")))[1] != body
    assert learned(llm, job(tmp_path / "e"))[1] != body  # without the device


def test_what_is_of_another_model_or_other_texts_is_left_out(llm: Llm, words: Path, folder: Path, tmp_path: Path) -> None:
    """As if it had not been sent: another tokenizer's, another end's, other answers', and bytes that are none."""
    who, texts = voice(words), [msgspec.structs.replace(PUBLIC[0], answer="so sad"), *PUBLIC[1:]]
    good = Answers(judged(tmp_path / "good", who), str(words), ANSWERS, 2)
    (tmp_path / "torn").write_bytes((tmp_path / "good").read_bytes()[:-3])
    strange = [
        Answers(judged(tmp_path / "llm", llm.voice), str(words), ANSWERS, 2),
        Answers(judged(tmp_path / "open", voice(words, None)), str(words), ANSWERS, 2),
        Answers(judged(tmp_path / "other", who, 0.9, texts), str(words), ANSWERS, 2),
        Answers(str(tmp_path / "torn"), str(words), ANSWERS, 2),
    ]
    alone, body = learned(llm, job(tmp_path / "a", good))
    among, same = learned(llm, job(tmp_path / "b", *strange[:2], good, *strange[2:]))

    assert (alone.heard, among.heard) == (1, 1)
    assert same == body
    assert learned(llm, job(tmp_path / "c", *strange))[0].heard == 0


def test_one_tokenizer_in_two_models_with_ends_of_their_own(llm: Llm, words: Path, tmp_path: Path) -> None:
    """Each is read by its own end token, in whatever order: the surer one teaches as if it were alone."""
    shares = {2: 0.9, 0: 0.99}
    two = [Answers(judged(tmp_path / str(e), voice(words, e), p), str(words), ANSWERS, e) for e, p in shares.items()]
    _, alone = learned(llm, job(tmp_path / "a", two[1]))

    for heard in (two, two[::-1]):
        both, body = learned(llm, job(tmp_path / "b", *heard))
        assert (both.heard, body) == (2, alone)


def test_what_is_not_finite_ends_it(llm: Llm, tmp_path: Path) -> None:
    """An adapter whose scores overflow is no start: the reason is said, nothing is written, the adapter is as it was."""
    huge = {name: np.full(array.shape, 1e30, np.float32) for name, array in llm.get().items()}
    save_file(huge, tmp_path / "huge")
    with pytest.raises(DataError, match=r"not finite; its adapter stays as it was\. Try a lower fedmkt\.learning_rate"):
        do(of(llm), job(tmp_path / "out", adapter=str(tmp_path / "huge")))

    assert not (tmp_path / "out").exists()
    assert all((llm.get()[name] == array).all() for name, array in load_file(tmp_path / "huge").items())
