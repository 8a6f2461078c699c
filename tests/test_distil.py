"""FedCoLLM's inner loop: by hand on a few numbers, and on models of a few thousand parameters of which two must agree."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import pytest_asyncio
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from edge_sdk import bundle as bundles
from edge_sdk.adapters import AdapterSpec
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.tasks import Example, Task
from edge_sdk.training.batches import epochs
from edge_sdk.training.learner import Learner
from edge_server.compute import JobFailed, LocalCompute
from edge_server.llm import distil
from edge_server.llm.jobs import Distil, Distilled, Labelled, Lessons, LlmSettings, Mutual, Slm, Tune, Tuning
from edge_server.llm.model import Llm
from edge_server.llm.worker import Models, do
from tests import factories, strategies, tiny
from tests.training_helpers import ANSWERS

Table = NDArray[np.float64]
STILL = 1e-12  # a learning rate that changes nothing that can be measured


# By hand --------------------------------------------------------------------------------------------------------------
class Linear:
    """Scores of each row of an example's numbers, x W; `asked` and `graded` list what it was asked, and whether to learn."""

    def __init__(self, examples: Sequence[Table], weight: Table) -> None:
        self.rows = [torch.from_numpy(x).float() for x in examples]
        self.weight = nn.Parameter(torch.from_numpy(weight).float())
        self.asked: list[tuple[int, ...]] = []
        self.graded: list[bool] = []

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return [self.weight]

    def said(self, some: Sequence[int]) -> Tensor:
        self.asked.append(tuple(some))
        self.graded.append(torch.is_grad_enabled())
        return torch.cat([self.rows[i] for i in some]) @ self.weight


@dataclass
class World:
    """Two linear models on the same examples, each seeing numbers of its own; three classes."""

    xs: list[list[Table]]  # of each model, for each example (rows, 2)
    weights: list[Table]  # of each model, (2, 3)
    truths: list[NDArray[np.int64]]  # of each example, (rows,)

    def partners(self) -> list[Linear]:
        return [Linear(x, weight) for x, weight in zip(self.xs, self.weights, strict=True)]

    def targets(self) -> list[Tensor]:
        return [torch.from_numpy(truth) for truth in self.truths]


def world(seed: int = 0, lengths: Sequence[int] = (1, 1, 1, 1), size: float = 1.0) -> World:
    rng = np.random.default_rng(seed)
    xs = [[size * rng.normal(size=(n, 2)) for n in lengths] for _ in range(2)]
    return World(xs, [rng.normal(size=(2, 3)) for _ in range(2)], [rng.integers(0, 3, n) for n in lengths])


def probabilities(x: Table, weight: Table) -> Table:
    e = np.exp(x @ weight)
    found: Table = e / e.sum(1, keepdims=True)
    return found


def graded(x: Table, weight: Table, truth: NDArray[np.int64], teacher: Table, weigh: float) -> tuple[float, Table]:
    """CE + weigh * KL(teacher || student) of a linear model, a row's mean, and its gradient: x^T (q - y + weigh (q - p)) / n."""
    q, y, n = probabilities(x, weight), np.eye(3)[truth], len(truth)
    loss = -(y * np.log(q)).sum() / n + weigh * (teacher * np.log(teacher / q)).sum() / n
    return float(loss), x.T @ (q - y + weigh * (q - teacher)) / n


def by_hand(world: World, batches: Sequence[Sequence[int]], how: Mutual, current: bool = True) -> tuple[list[float], list[Table]]:
    """Mean losses and weights after these batches, by AdamW without decay and gradients of norm 1 at most.

    Args:
        current: whether the LLM hears the SLM that has just learned, or the one from before the batch.
    """
    weights, losses = [w.copy() for w in world.weights], [0.0, 0.0]
    first, second = ([np.zeros((2, 3)) for _ in range(2)] for _ in range(2))
    for t, batch in enumerate(batches, 1):
        truth, before = np.concatenate([world.truths[i] for i in batch]), [w.copy() for w in weights]
        xs = [np.concatenate([x[i] for i in batch]) for x in world.xs]
        for student, rate in enumerate((how.slm_learning_rate, how.llm_learning_rate)):
            teacher = 1 - student
            told = probabilities(xs[teacher], (weights if current else before)[teacher])
            loss, gradient = graded(xs[student], weights[student], truth, told, how.weight)
            losses[student] += loss / len(batches)
            gradient = gradient * min(1.0, 1 / (float(np.sqrt((gradient**2).sum())) + 1e-6))
            first[student] = 0.9 * first[student] + 0.1 * gradient
            second[student] = 0.999 * second[student] + 0.001 * gradient**2
            step = first[student] / (1 - 0.9**t) / (np.sqrt(second[student] / (1 - 0.999**t)) + 1e-8)
            weights[student] = weights[student] - rate * step
    return losses, weights


def order(count: int, how: Mutual, seed: int) -> list[list[int]]:
    """The batches of a run."""
    steps = how.passes * -(-count // how.batch_size)
    return [batch.tolist() for batch in epochs([1] * count, how.batch_size, steps, np.random.default_rng(seed))]


HOW = Mutual(passes=2, batch_size=3, weight=0.7, slm_learning_rate=0.3, llm_learning_rate=0.2)


@pytest.mark.parametrize("size", [0.3, 3.0])  # gradients below the norm of 1, and above
@pytest.mark.parametrize("lengths", [(1, 1, 1, 1), (1, 3, 2, 1, 4)])
def test_both_learn_as_worked_out_by_hand(lengths: Sequence[int], size: float) -> None:
    """Some steps in numpy, losses and weights: each row counts alike, be it a class or one of an answer's tokens."""
    some = world(0, lengths, size)
    slm, llm = some.partners()
    losses = distil.distil(slm, llm, some.targets(), HOW, 5)
    expected, weights = by_hand(some, order(len(lengths), HOW, 5), HOW)

    assert losses == pytest.approx(expected, rel=1e-4)
    for model, weight in zip((slm, llm), weights, strict=True):
        np.testing.assert_allclose(model.weight.detach().numpy(), weight, rtol=2e-3, atol=2e-4)


def test_the_llm_hears_the_slm_that_has_just_learned() -> None:
    """In one batch the LLM's loss and step are against the SLM after its step; against the SLM before it they are others."""
    how = Mutual(batch_size=4, weight=2.0, slm_learning_rate=0.5, llm_learning_rate=0.5)
    some = world(1)
    slm, llm = some.partners()
    losses = distil.distil(slm, llm, some.targets(), how, 0)
    (current, fresh), (cached, stale) = (by_hand(some, order(4, how, 0), how, current) for current in (True, False))

    assert losses == pytest.approx(current, rel=1e-5)
    assert losses[0] == pytest.approx(cached[0], rel=1e-5)  # who learns first hears the same either way
    assert abs(losses[1] - cached[1]) > 0.02
    np.testing.assert_allclose(llm.weight.detach().numpy(), fresh[1], rtol=1e-3, atol=1e-4)
    assert llm.graded == [False, True]  # asked to teach, then to learn
    assert slm.graded == [True, False]
    assert (fresh[0] == stale[0]).all()


def test_no_gradient_reaches_the_teacher() -> None:
    """After a step each model holds the gradient of its own loss and of nothing else."""
    how = Mutual(batch_size=4, slm_learning_rate=STILL, llm_learning_rate=STILL)
    some = world(2, size=0.2)
    slm, llm = some.partners()
    distil.distil(slm, llm, some.targets(), how, 0)
    for student, teacher in ((0, 1), (1, 0)):
        xs = [np.concatenate(x) for x in some.xs]
        told = probabilities(xs[teacher], some.weights[teacher])
        _, own = graded(xs[student], some.weights[student], np.concatenate(some.truths), told, how.weight)
        found = (slm, llm)[student].weight.grad
        assert found is not None
        np.testing.assert_allclose(found.numpy(), own, atol=1e-6)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 3))
def test_without_the_partner_it_is_plain_training(seed: int, batch_size: int, passes: int) -> None:
    """With weight 0 both models end, bit for bit, where cross-entropy alone would have led each of them."""
    how = Mutual(passes, batch_size, 0.0, 0.1, 0.2)
    some = world(seed)
    slm, llm = some.partners()
    distil.distil(slm, llm, some.targets(), how, seed)
    for model, alone, rate in zip((slm, llm), some.partners(), (0.1, 0.2), strict=True):
        optimizer = torch.optim.AdamW([alone.weight], lr=rate, weight_decay=0.0)
        for batch in order(4, how, seed):
            optimizer.zero_grad()
            loss = F.cross_entropy(alone.said(batch), torch.cat([some.targets()[i] for i in batch]))
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            nn.utils.clip_grad_norm_([alone.weight], 1.0)
            optimizer.step()
        assert torch.equal(model.weight, alone.weight)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 4), st.integers(0, 99))
def test_every_example_is_seen_once_in_each_pass(count: int, batch_size: int, passes: int, seed: int) -> None:
    """By both models in the same batches, none larger than asked for."""
    some = world(0, [1] * count)
    slm, llm = some.partners()
    distil.distil(slm, llm, some.targets(), Mutual(passes, batch_size), seed)
    learned = [[batch for batch, grade in zip(m.asked, m.graded, strict=True) if grade] for m in (slm, llm)]
    taught = [[batch for batch, grade in zip(m.asked, m.graded, strict=True) if not grade] for m in (slm, llm)]
    each = -(-count // batch_size)

    assert learned[0] == learned[1] == taught[0] == taught[1]
    assert len(learned[0]) == passes * each
    assert max(len(batch) for batch in learned[0]) <= batch_size
    for at in range(0, passes * each, each):
        assert Counter(i for batch in learned[0][at : at + each] for i in batch) == Counter(range(count))


def test_a_seed_is_an_order() -> None:
    """The same seed gives the same bits, another one another order and another result."""
    found = []
    for seed in (1, 1, 2):
        some = world(0, [1] * 8)
        slm, llm = some.partners()
        losses = distil.distil(slm, llm, some.targets(), HOW, seed)
        found.append((losses, slm.asked, slm.weight.tolist(), llm.weight.tolist()))

    assert found[0] == found[1]
    assert all(a != b for a, b in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_ends_it(who: int, value: float) -> None:
    """A number in either model that is none is an error that says what may help."""
    some = world()
    some.weights[who][0, 0] = value
    slm, llm = some.partners()
    with pytest.raises(DataError, match="not finite; try lower learning rates"):
        distil.distil(slm, llm, some.targets(), HOW, 0)


def test_a_gradient_that_is_not_finite_ends_it() -> None:
    """The loss may be a number and its gradient none: the weights stay numbers."""

    class Rooted(Linear):
        def said(self, some: Sequence[int]) -> Tensor:
            return torch.cat([self.rows[i] for i in some]) @ self.weight.sqrt()

    some = world()
    llm, slm = some.partners()[1], Rooted(some.xs[0], np.zeros((2, 3)))
    with pytest.raises(DataError, match="not finite"):
        distil.distil(slm, llm, some.targets(), HOW, 0)
    assert torch.equal(slm.weight, torch.zeros(2, 3))


def test_an_empty_set_is_refused() -> None:
    """Nothing to learn from is an error, not a mean of nothing."""
    with pytest.raises(DataError, match="auxiliary set is empty"):
        distil.distil(Linear([], np.zeros((2, 3))), Linear([], np.zeros((2, 3))), [], HOW, 0)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"passes": 0}, {"passes": 10_001}, {"batch_size": 0}, {"batch_size": 4097}),
        *({"weight": -0.1}, {"weight": math.inf}, {"weight": math.nan}),
        *({"slm_learning_rate": 0.0}, {"slm_learning_rate": 1.1}, {"llm_learning_rate": 0.0}, {"llm_learning_rate": math.nan}),
    ],
)
def test_settings_out_of_bounds_are_named(wrong: dict[str, Any]) -> None:
    """The error names the setting; the bounds themselves are fine."""
    with pytest.raises(SettingsError, match=rf"mutual\..*{next(iter(wrong))}"):
        Mutual(**wrong)
    Mutual(passes=10_000, batch_size=4096, weight=0.0, slm_learning_rate=1.0, llm_learning_rate=1.0)


# Two models -----------------------------------------------------------------------------------------------------------
SETTINGS = LlmSettings(layers=2, rank=4, alpha=8.0, pattern="{text} it was", words=("bad", "good"), threads=1)
CLASSES = tuple(
    Example(text, label)
    for text, label in (
        *(("the film was great", 1), ("so very dull and grim", 0), ("a lovely day", 1)),
        *(("the story was sad", 0), ("nice", 1), ("a poor and broken phone", 0)),
    )
)
ANSWERED = tuple(
    Example(text, answer=answer)
    for text, answer in (("the film", "great"), ("a day", "very sad story"), ("the day so very", "lovely"), ("phone", "bad bad"))
)
ALL = Mutual(batch_size=8, weight=0.5, slm_learning_rate=STILL, llm_learning_rate=STILL)  # one step that changes nothing
QUICK = Mutual(passes=4, batch_size=3, slm_learning_rate=1e-2, llm_learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("llm"), "llama")


def slm_of(bundle: Path, task: Task, freeze_a: bool = False, layers: int = 2) -> Learner:
    """A learner with an adapter that changes something."""
    read = bundles.read(bundle)
    slots = tuple(slot for slot in read.slots if slot.layer >= read.layers - layers)
    spec, rng = AdapterSpec(slots, 2, 4.0, freeze_a), np.random.default_rng(3)
    learner = Learner.beside(open_engine(bundle, read, task), bundle, read, spec, task)
    torch.set_float32_matmul_precision("highest")
    learner.set({name: rng.normal(0, 0.5, array.shape).astype(np.float32) for name, array in spec.start(0).items()})
    return learner


def llm_of(folder: Path, task: Task, settings: LlmSettings = SETTINGS) -> Llm:
    """An LLM with an adapter that changes something."""
    if task.answer_tokens:
        settings = msgspec.structs.replace(settings, pattern="", words=())
    llm, rng = Llm(folder, task, settings), np.random.default_rng(4)
    torch.set_float32_matmul_precision("highest")
    llm.set({name: rng.normal(0, 0.1, array.shape).astype(np.float32) for name, array in llm.get().items()})
    return llm


def end_of(bundle: Path) -> int | None:
    return next(iter(bundles.read(bundle).end), None)


def frozen(model: Any) -> dict[str, Tensor]:
    """A copy of every weight that is no adapter's."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if ".lora_" not in name}


def apart(slm: distil.Partner, llm: distil.Partner, count: int) -> float:
    """KL(LLM || SLM), the mean of rows."""
    with torch.no_grad():
        said, told = (F.log_softmax(model.said(range(count)), dim=1) for model in (slm, llm))
    return float((told.exp() * (told - said)).sum(1).mean())


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_classes_are_learned_by_both(request: pytest.FixtureRequest, folder: Path, kind: Any) -> None:
    """An encoder or a decoder and an LLM, each asked in its own words: both get all labels right, and no base weight moves."""
    bundle = request.getfixturevalue(f"{kind}_bundle")
    slm, llm = slm_of(bundle, factories.task(kind)), llm_of(folder, factories.task(kind))
    before = [slm.get(), llm.get()], [frozen(slm.model), frozen(llm._model)]
    pair = distil.partners(slm, llm, CLASSES, end_of(bundle))
    how = msgspec.structs.replace(QUICK, passes=40, batch_size=6, slm_learning_rate=3e-2)
    losses = distil.distil(*pair, how, 0)

    for partner in pair[:2]:
        assert partner.said(range(6)).argmax(1).tolist() == [example.label for example in CLASSES]
    assert all(0 < loss < 1 for loss in losses)
    for old, new in zip(before[0], (slm.get(), llm.get()), strict=True):
        assert all((old[name] != array).any() for name, array in new.items())
    for weights, model in zip(before[1], (slm.model, llm._model), strict=True):
        now = frozen(model)
        assert weights.keys() == now.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in now.items())
    assert np.argmax(llm.logits([e.text for e in CLASSES]), 1).tolist() == [e.label for e in CLASSES]  # as it is asked later


@pytest.mark.parametrize("examples", [CLASSES, ANSWERED])
def test_the_partner_is_learned_from(decoder_bundle: Path, folder: Path, examples: tuple[Example, ...]) -> None:
    """The divergence has a gradient: with much weight on it the two models end up closer than with none, at both levels."""
    task = factories.DECODER_TASK if examples is CLASSES else ANSWERS
    found, gradients = {}, {}
    for weight in (0.0, 20.0):
        slm, llm = slm_of(decoder_bundle, task), llm_of(folder, task)
        pair = distil.partners(slm, llm, examples, end_of(decoder_bundle))
        count, start = len(examples), apart(*pair[:2], len(examples))
        distil.distil(*pair, msgspec.structs.replace(ALL, weight=weight / 1000), 0)
        gradients[weight] = [p.grad.clone() for model in pair[:2] for p in model.trained if p.grad is not None]
        distil.distil(*pair, msgspec.structs.replace(QUICK, passes=10, weight=weight), 0)
        found[weight] = apart(*pair[:2], count)

    assert found[20.0] < 0.5 * min(found[0.0], start)
    assert len(gradients[0.0]) == len(gradients[20.0]) == len(slm.parameters) + len(llm.trained)
    assert all((a != b).any() for a, b in zip(gradients[0.0], gradients[20.0], strict=True))


def test_only_answers_count_and_each_token_at_its_place(decoder_bundle: Path, folder: Path) -> None:
    """Losses from both whole models' logits: what stands before an answer's token is what says it, for CE and KL alike."""
    slm, llm = slm_of(decoder_bundle, ANSWERS), llm_of(folder, ANSWERS)
    end = end_of(decoder_bundle)
    read = bundles.read(decoder_bundle)
    head = open_engine(decoder_bundle, read).head
    whole = Learner.whole(read, head, slm.encoder, AdapterSpec(read.slots, 2, 4.0))
    whole.set(slm.get())
    models: list[Any] = [whole.model, llm._model]
    said: list[list[Tensor]] = [[], []]
    wanted: list[int] = []
    for example in ANSWERED:
        (prompt,), (answer,) = slm.encoder.prompts([example.text]), slm.encoder.answers([example.answer or ""], end)
        wanted += answer
        for model, rows in zip(models, said, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
            rows += [logits[len(prompt) + t - 1] for t in range(len(answer))]
    slm_says, llm_says = torch.stack(said[0]), torch.stack(said[1])
    truth = torch.tensor(wanted)
    expected = [
        float(-a[range(len(truth)), truth].mean() + ALL.weight * (b.exp() * (b - a)).sum(1).mean())
        for a, b in ((slm_says, llm_says), (llm_says, slm_says))
    ]
    pair = distil.partners(slm, llm, ANSWERED, end)

    assert torch.cat(pair[2]).tolist() == wanted
    assert distil.distil(*pair, ALL, 0) == pytest.approx(expected, rel=1e-3)


@contextmanager
def noise(module: nn.Module, positions: slice) -> Iterator[None]:
    """Random numbers on the final hidden states, and so on all logits, of these positions."""

    def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        more = torch.zeros_like(out)
        more[:, positions] = torch.randn(more[:, positions].shape, generator=torch.Generator().manual_seed(0))
        return out + more

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def test_what_is_said_of_the_prompt_does_not_matter(decoder_bundle: Path, folder: Path) -> None:
    """Other logits within the prompt change no loss; the last of them, which says the first answer token, changes both."""
    slm, llm = slm_of(decoder_bundle, ANSWERS), llm_of(folder, ANSWERS)
    pair = distil.partners(slm, llm, [Example("the film", answer="great"), Example("a day", answer="very sad story")], None)
    start, norms = 4, (slm.model.get_submodule("base_model.model.norm"), llm._model.model.norm)  # `the film it was`
    quiet = distil.distil(*pair, ALL, 0)
    for model in (0, 1):
        with noise(norms[model], slice(start - 1)):
            assert distil.distil(*pair, ALL, 0) == quiet
        with noise(norms[model], slice(start - 1, start)):
            assert all(abs(a - b) > 1e-3 for a, b in zip(distil.distil(*pair, ALL, 0), quiet, strict=True))


def foreign(folder: Path, home: Path) -> Path:
    """The LLM with two words changed places in its vocabulary."""
    for file in folder.iterdir():
        (home / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((home / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["film"], words["phone"] = words["phone"], words["film"]
    (home / "tokenizer.json").write_text(json.dumps(tokenizer))
    return home


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_other_vocabularies_compare_classes_only(request: pytest.FixtureRequest, folder: Path, tmp_path: Path, kind: Any) -> None:
    """Tokens of another meaning cannot be compared, and the error names what can; classes can, with any tokenizer."""
    bundle = request.getfixturevalue(f"{kind}_bundle")
    other = foreign(folder, tmp_path)
    pair = distil.partners(slm_of(bundle, factories.task(kind)), llm_of(other, factories.task(kind)), CLASSES, None)
    assert all(loss > 0 for loss in distil.distil(*pair, QUICK, 0))
    if kind == "decoder":
        with pytest.raises(DataError, match=r"another vocabulary .* see FedMKT"):
            distil.partners(slm_of(bundle, ANSWERS), llm_of(other, ANSWERS), ANSWERED, None)


def test_tables_may_be_padded(decoder_bundle: Path, folder: Path, tmp_path: Path) -> None:
    """Models of one vocabulary pad their tables differently (Qwen2.5's do); rows that stand for no token are left out."""
    padded = llm_of(tiny.write(tmp_path, "llama", vocab_size=37), ANSWERS)
    slm, words = slm_of(decoder_bundle, ANSWERS), len(padded._tokenizer)
    pair = distil.partners(slm, padded, ANSWERED, None)
    tokens = sum(len(answer) for answer in pair[2])

    assert padded.token_scores(*_said(slm, ANSWERED), padded.frozen()).shape == (tokens, 37)
    assert pair[0].said(range(4)).shape == pair[1].said(range(4)).shape == (tokens, words)
    assert all(0 < loss < math.inf for loss in distil.distil(*pair, QUICK, 0))


def _said(slm: Learner, examples: Sequence[Example]) -> tuple[list[list[int]], list[int]]:
    prompts = slm.encoder.prompts([e.text for e in examples])
    answers = slm.encoder.answers([e.answer or "" for e in examples], None)
    return [[*a, *b] for a, b in zip(prompts, answers, strict=True)], [len(prompt) for prompt in prompts]


@pytest.mark.parametrize("examples", [CLASSES, ANSWERED])
def test_a_frozen_a_stays(decoder_bundle: Path, folder: Path, examples: tuple[Example, ...]) -> None:
    """Where devices train B alone the server does too: every A is the same to the bit, every B another."""
    task = factories.DECODER_TASK if examples is CLASSES else ANSWERS
    slm, llm = slm_of(decoder_bundle, task, freeze_a=True), llm_of(folder, task)
    before = slm.get()
    distil.distil(*distil.partners(slm, llm, examples, None), QUICK, 0)

    assert {name for name, array in slm.get().items() if (before[name] == array).all()} == {n for n in before if "lora_A" in n}


def test_an_answer_ends_with_the_end_token(decoder_bundle: Path, folder: Path) -> None:
    """What closes an answer is learned too, where the SLM has such a token."""
    slm, llm = slm_of(decoder_bundle, ANSWERS), llm_of(folder, ANSWERS)
    open_, closed = (distil.partners(slm, llm, ANSWERED, end)[2] for end in (None, 2))

    assert [truth.tolist() for truth in closed] == [[*truth.tolist(), 2] for truth in open_]


@pytest.mark.parametrize("odd", [(Example("a film"),), (*CLASSES, ANSWERED[0]), (*ANSWERED, Example("a film"))])
def test_an_example_without_a_truth_is_refused(decoder_bundle: Path, folder: Path, odd: tuple[Example, ...]) -> None:
    """Neither label nor answer, or now the one and now the other, is an error before anything is learned."""
    with pytest.raises(DataError, match="neither the label nor the answer"):
        distil.partners(slm_of(decoder_bundle, ANSWERS), llm_of(folder, ANSWERS), odd, None)


# Jobs -----------------------------------------------------------------------------------------------------------------
@dataclass
class Desk:
    """Adapter files, and jobs about them."""

    home: Path
    bundle: Path
    task: Task
    examples: tuple[Example, ...]

    @property
    def spec(self) -> AdapterSpec:
        return AdapterSpec(bundles.read(self.bundle).slots, 2, 4.0)

    def job(self, name: str, llm: str = "", seed: int = 1, how: Mutual = QUICK) -> Distil:
        start = self.home / "start.safetensors"
        rng = np.random.default_rng(3)
        save_file({n: rng.normal(0, 0.5, s).astype(np.float32) for n, s in self.spec.shapes().items()}, start)
        llm_out, slm_out = (str(self.home / f"{name}.{which}") for which in ("llm", "slm"))
        return Distil(llm, str(start), llm_out, slm_out, self.examples, how, seed)

    def learned(self, name: str) -> tuple[bytes, bytes]:
        return (self.home / f"{name}.llm").read_bytes(), (self.home / f"{name}.slm").read_bytes()


@pytest.fixture
def desk(tmp_path: Path, decoder_bundle: Path) -> Desk:
    return Desk(tmp_path, decoder_bundle, factories.DECODER_TASK, CLASSES)


@pytest.mark.parametrize("examples", [CLASSES, ANSWERED])
def test_a_job_is_what_its_fields_say(desk: Desk, folder: Path, examples: tuple[Example, ...]) -> None:
    """From the two files, or from an LLM's adapter that changes nothing, into the two files; the end token is the SLM's."""
    task = factories.DECODER_TASK if examples is CLASSES else ANSWERS
    desk = replace(desk, task=task, examples=examples)
    settings = SETTINGS if examples is CLASSES else msgspec.structs.replace(SETTINGS, pattern="", words=())
    models = Models(Llm(folder, task, settings), slm_of(desk.bundle, task), 2)
    job = desk.job("one", seed=7)
    outcome = do(models, job)
    do(models, desk.job("two", llm=job.llm_out, seed=8))

    slm, llm = slm_of(desk.bundle, task), Llm(folder, task, settings)
    llm.set(llm.start(7))
    for seed, name in ((7, "one"), (8, "two")):
        slm.set(load_file(job.slm))
        losses = distil.distil(*distil.partners(slm, llm, examples, 2), QUICK, seed)
        assert strategies.same(load_file(desk.home / f"{name}.slm"), slm.get())
        assert strategies.same(load_file(desk.home / f"{name}.llm"), llm.get())
        if seed == 7:
            assert isinstance(outcome, Distilled)
            assert (outcome.slm_loss, outcome.llm_loss) == losses
            assert outcome.seconds > 0


def test_a_worker_without_the_devices_model_refuses(desk: Desk, folder: Path) -> None:
    """Another system's worker cannot be asked, and writes nothing."""
    with pytest.raises(DataError, match="no model of the devices"):
        do(Models(Llm(folder, factories.DECODER_TASK, SETTINGS)), desk.job("one"))
    assert not list(desk.home.glob("one.*"))


def worker(desk: Desk, folder: Path) -> LocalCompute:
    settings = msgspec.structs.replace(SETTINGS, model=str(folder), timeout_seconds=120)
    return LocalCompute(settings, desk.task, Slm(str(desk.bundle), desk.spec))


@pytest_asyncio.fixture
async def compute(desk: Desk, folder: Path) -> AsyncIterator[LocalCompute]:
    made = worker(desk, folder)
    yield made
    await made.close()


@pytest.mark.slow
async def test_a_job_may_be_repeated(compute: LocalCompute, desk: Desk, folder: Path) -> None:
    """The same two files to the byte: from a process that did other jobs before, failed at one, and from a fresh one."""
    first = await compute.run(desk.job("first"))
    await compute.run(desk.job("between", llm=str(desk.home / "first.llm"), seed=9))
    lessons = Lessons(labelled=(Labelled("the film was great", (0.0, 1.0)),))
    await compute.run(Tune("", str(desk.home / "tuned"), lessons, Tuning(steps=2), 1))
    numberless = {name: array * np.float32(np.nan) for name, array in load_file(desk.home / "start.safetensors").items()}
    save_file(numberless, desk.home / "numberless")
    with pytest.raises(JobFailed, match="cannot distil: a loss of the mutual distillation is not finite"):
        await compute.run(msgspec.structs.replace(desk.job("broken"), slm=str(desk.home / "numberless")))
    process = compute.pid
    again = await compute.run(desk.job("again"))
    fresh = worker(desk, folder)
    other = await fresh.run(desk.job("other"))
    await fresh.close()

    assert process is not None
    assert compute.pid == process
    assert not list(desk.home.glob("broken.*"))
    assert desk.learned("first") == desk.learned("again") == desk.learned("other") != desk.learned("between")
    assert isinstance(first, Distilled)
    assert isinstance(again, Distilled)
    assert isinstance(other, Distilled)
    assert len({(done.slm_loss, done.llm_loss) for done in (first, again, other)}) == 1
