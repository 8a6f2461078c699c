"""Split training against the whole model: the same scores, losses and gradients, whatever is cut off, padded or mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec, Array, take
from edge_sdk.agent import Models
from edge_sdk.assets import Asset
from edge_sdk.bundle import Bundle
from edge_sdk.engines import Engine, open_engine
from edge_sdk.errors import DataError
from edge_sdk.protocol import PROTOCOL, Manifest
from edge_sdk.tasks import Kind, Task
from edge_sdk.training import losses
from edge_sdk.training.batches import Answer, Classes, Guess, Job, Label, Row, Source, Target, TopTokens, Training
from edge_sdk.training.depth import Limits
from edge_sdk.training.learner import Learner
from tests import factories, tiny
from tests.training_helpers import ANSWERS, answers_of, bench_of, job_of, rows_of

TEXTS = ["a lovely film", "the story was so very dull .", "grim", "the day was nice and it was bright", "a poor phone"]
MODULES = {
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"),
    **dict.fromkeys(tiny.DECODERS, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}
WINDOWS = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
FP16 = 5e-3  # of the largest value: what caching hidden states in float16 may cost


@pytest.fixture(
    scope="module", params=["encoder", "decoder", *(pytest.param(name, marks=pytest.mark.slow) for name in tiny.FAMILIES)]
)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two bundles of all tests, and one of each family with LoRA on every linear layer, int8 and fp32."""
    if request.param in ("encoder", "decoder"):
        made: Path = request.getfixturevalue(f"{request.param}_bundle")
        return made
    pytest.importorskip("onnx")
    from edge_export.bundle import Recipe, make

    home = tmp_path_factory.mktemp(request.param)
    model = tiny.write(home / "model", request.param, **(WINDOWS if request.param == "gemma3_text" else {}))
    kind: Kind = "encoder" if request.param == "bert" else "decoder"
    recipe = Recipe(("int8", "fp32"), MODULES[request.param], factories.task(kind), factories.PROBE, floor=0.9)
    make(Asset(str(model)), home / "bundle", recipe)
    return home / "bundle"


@dataclass
class Pair:
    """A model under one random adapter on every slot: split learners of it, and all of it in torch."""

    folder: Path
    bundle: Bundle
    adapter: Adapter
    whole: Learner
    engine: Engine

    def split(self, layers: int, task: Task | None = None, variant: str = "fp32") -> Learner:
        """The learner a device makes for the top `layers` layers, the rest of the adapter on its trunk."""
        task = task or self.bundle.task
        manifest = Manifest(PROTOCOL, "lpfl", task, self.adapter.spec, self.bundle, min_layers=1)
        part, models = manifest.part(layers, 0), Models(self.folder, manifest, variant, 1)
        learner = models.learner(part, models.states(part, self.adapter.arrays, Limits(), None, print), Limits())
        torch.set_float32_matmul_precision("highest")
        learner.set(take(self.adapter.arrays, part))
        return learner

    def logits(self, ids: Sequence[int]) -> Tensor:
        """What the whole decoder says after each token of one sequence, (tokens, vocabulary)."""
        model: Any = self.whole.model
        found: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0]
        return found

    def depths(self) -> range:
        return range(1, self.bundle.layers + 1)


@pytest.fixture
def pair(folder: Path) -> Pair:
    bundle = bundles.read(folder)
    spec, rng = AdapterSpec(bundle.slots, 3, 6.0), np.random.default_rng(1)
    size = 0.1 if len(bundle.variants) > 1 else 1.0  # the two bundles of all tests have small weights: little depends on queries
    adapter = Adapter({n: rng.normal(0, size, shape).astype(np.float32) for n, shape in spec.shapes().items()}, spec)
    engine = open_engine(folder, bundle, variant="fp32")
    whole = Learner.whole(bundle, engine.head, engine.encoder, spec)
    torch.set_float32_matmul_precision("highest")
    whole.set(adapter.arrays)
    return Pair(folder, bundle, adapter, whole, engine)


def near(found: Any, expected: Any, share: float = FP16) -> None:
    """Equal to a share of the largest value."""
    exact = np.asarray(expected)
    np.testing.assert_allclose(np.asarray(found), exact, rtol=0, atol=share * float(np.abs(exact).max()))


def gradient(learner: Learner, loss: Tensor | None, rows: Sequence[tuple[Row, float]] = ()) -> dict[str, Array]:
    """The gradient of a loss, or of weighted rows without dropout."""
    learner.model.zero_grad()
    if loss is not None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    else:
        with learner.training(0.0, 0):
            learner.accumulate(rows)
    return {name: p.grad.numpy().copy() for name, p in learner.parameters.items() if p.grad is not None}


def same_gradient(found: dict[str, Array], expected: dict[str, Array]) -> None:
    """Near the expected one in every array, to a share of the largest gradient of any."""
    largest = max(float(np.abs(expected[name]).max()) for name in found)
    assert largest > 0
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=2 * FP16 * largest, err_msg=name)


def decoder(pair: Pair) -> None:
    if pair.bundle.kind == "encoder":
        pytest.skip("an encoder writes no answers")


# The same model -------------------------------------------------------------------------------------------------------
def test_scores_are_those_of_the_whole_model_and_of_the_engine(pair: Pair) -> None:
    """Top 1, 2 and all layers in torch over the engine's trunk score as the whole PEFT model and as the engine do."""
    expected = pair.whole.scores(TEXTS)
    before = pair.engine.logits(TEXTS)
    pair.engine.set_adapter(pair.adapter)
    near(pair.engine.logits(TEXTS), expected, 1e-3)
    for layers in pair.depths():
        near(pair.split(layers).scores(TEXTS), expected)

    assert np.abs(before - expected).max() > 2 * FP16 * np.abs(expected).max()  # the adapter changes what is compared


def test_gradients_are_those_of_the_whole_model(pair: Pair) -> None:
    """Without dropout, the gradient of labelled rows is the whole model's, for every factor of every depth."""
    rows = [(Row(ids, Label(i % 2)), 0.5) for i, ids in enumerate(pair.engine.encoder.prompts(TEXTS))]
    expected = gradient(pair.whole, None, rows)
    for layers in pair.depths():
        learner = pair.split(layers)
        found = gradient(learner, None, rows)

        assert found.keys() == learner.parameters.keys()
        assert len(found) == 2 * sum(s.layer >= pair.bundle.layers - layers for s in pair.bundle.slots)
        same_gradient(found, expected)


def test_on_the_int8_trunk_it_stays_near_the_int8_engine(pair: Pair) -> None:
    """Exact top layers over the quantized trunk are within 1.5 times what quantization costs, one layer within that cost."""
    if len(pair.bundle.variants) == 1:
        pytest.skip("this bundle has no int8")
    coarse = open_engine(pair.folder, pair.bundle, variant="int8")
    coarse.set_adapter(pair.adapter)
    pair.engine.set_adapter(pair.adapter)
    served, exact = coarse.logits(TEXTS), pair.engine.logits(TEXTS)
    cost, rounding = np.abs(exact - served).max(), FP16 / 5 * np.abs(exact).max()
    assert cost < 0.05 * np.abs(exact).max()
    for layers in pair.depths():
        trained = pair.split(layers, variant="int8").scores(TEXTS)

        assert np.abs(trained - served).max() < (1.0 if layers == 1 else 1.5) * cost + rounding


# Answers --------------------------------------------------------------------------------------------------------------
def answered(pair: Pair) -> list[Row]:
    """Prompts and answers of different lengths, each by itself the longest or the shortest."""
    engine = open_engine(pair.folder, pair.bundle, ANSWERS, "fp32")
    prompts = engine.encoder.prompts(["the film was", "a", "the day was so very"])
    said = engine.answers(["great", "very sad story", "lovely"])
    return [Row([*prompt, *answer], Answer(len(prompt))) for prompt, answer in zip(prompts, said, strict=True)]


def test_losses_of_answers_are_those_of_the_whole_models_logits(pair: Pair) -> None:
    """Rows of different lengths in one batch: each loss is the mean of -log p(token | what stands before), as torch has it."""
    decoder(pair)
    rows = answered(pair)
    by_hand = []
    for row in rows:
        start = next(iter(vars(row.target).values()))
        logprobs = pair.logits(row.ids).log_softmax(-1)
        by_hand.append(-torch.stack([logprobs[at - 1, row.ids[at]] for at in range(start, len(row.ids))]).mean())
    expected = gradient(pair.whole, torch.stack(by_hand).sum())
    for layers in pair.depths():
        learner = pair.split(layers, ANSWERS)

        near(learner.losses(rows).detach(), torch.stack(by_hand).detach())
        same_gradient(gradient(learner, None, [(row, 1.0) for row in rows]), expected)


def test_losses_of_a_teachers_tokens_are_those_of_the_whole_models_logits(pair: Pair) -> None:
    """KL over the teacher's three likeliest tokens at each position, both renormalized over them, then the mean."""
    decoder(pair)
    rng = np.random.default_rng(3)
    rows, by_hand = [], []
    for plain in answered(pair):
        start = next(iter(vars(plain.target).values()))
        count = len(plain.ids) - start
        ids = np.stack([rng.choice(25, 3, replace=False) for _ in range(count)]).astype(np.int64)
        logprobs = np.log(rng.dirichlet(np.ones(4), count)[:, :3]).astype(np.float32)
        rows.append(Row(plain.ids, TopTokens(start, ids, logprobs)))
        teacher = torch.from_numpy(logprobs).softmax(-1)
        student = pair.logits(plain.ids)[start - 1 : len(plain.ids) - 1].gather(1, torch.from_numpy(ids)).log_softmax(-1)
        by_hand.append((teacher * (teacher.log() - student)).sum(1).mean())
    expected = gradient(pair.whole, torch.stack(by_hand).sum())
    for layers in pair.depths():
        learner = pair.split(layers, ANSWERS)

        near(learner.losses(rows).detach(), torch.stack(by_hand).detach())
        same_gradient(gradient(learner, None, [(row, 1.0) for row in rows]), expected)


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_answer_and_teacher_share_a_loss_by_weight(pair: Pair, weight: float) -> None:
    """Of its own tokens and a teacher's, what both cost alone; the gradient alike."""
    decoder(pair)
    rng = np.random.default_rng(4)
    plain = answered(pair)
    starts = [next(iter(vars(row.target).values())) for row in plain]
    tops = []
    for row, start in zip(plain, starts, strict=True):
        count = len(row.ids) - start
        ids = np.stack([rng.choice(25, 3, replace=False) for _ in range(count)]).astype(np.int64)
        logprobs = np.log(rng.dirichlet(np.ones(4), count)[:, :3]).astype(np.float32)
        tops.append(TopTokens(start, ids, logprobs))
    learner = pair.split(1, ANSWERS)
    told = [Row(row.ids, top) for row, top in zip(plain, tops, strict=True)]
    both = [Row(row.ids, TopTokens(t.start, t.ids, t.logprobs, weight)) for row, t in zip(plain, tops, strict=True)]
    expected = weight * learner.losses(plain).detach() + (1 - weight) * learner.losses(told).detach()

    near(learner.losses(both).detach(), expected)
    parts = [*((row, weight) for row in plain), *((row, 1 - weight) for row in told)]
    same_gradient(gradient(learner, None, [(row, 1.0) for row in both]), gradient(learner, None, parts))


# Before the softmax ---------------------------------------------------------------------------------------------------
def test_class_scores_are_the_whole_models_with_their_gradient(pair: Pair) -> None:
    """Of prompts of different lengths in one batch, and in the order asked for; what is learned through them is the same too."""
    prompts = pair.engine.encoder.prompts(TEXTS)
    weights = torch.from_numpy(np.random.default_rng(2).normal(size=(len(TEXTS), 2)).astype(np.float32))
    expected = pair.whole.class_scores(prompts)
    wanted = gradient(pair.whole, (weights * expected).sum())
    for layers in pair.depths():
        learner = pair.split(layers)
        found = learner.class_scores(prompts)

        near(found.detach(), expected.detach())
        near(learner.class_scores(prompts[::-1]).detach().flip(0), found.detach(), 1e-4)
        near(learner.scores(TEXTS), found.detach(), 1e-4)
        same_gradient(gradient(learner, (weights * found).sum()), wanted)


def test_token_scores_are_what_the_whole_model_says_before_each_token(pair: Pair) -> None:
    """Row t of an answer is the logits at the token before it, over the whole vocabulary; answers stand one after the other."""
    decoder(pair)
    rows = answered(pair)
    starts = [next(iter(vars(row.target).values())) for row in rows]
    parts = [pair.logits(row.ids)[start - 1 : len(row.ids) - 1] for row, start in zip(rows, starts, strict=True)]
    weights = torch.from_numpy(np.random.default_rng(2).normal(size=tuple(torch.cat(parts).shape)).astype(np.float32))
    wanted = gradient(pair.whole, (weights * torch.cat(parts)).sum())
    for layers in pair.depths():
        learner = pair.split(layers, ANSWERS)
        found = learner.token_scores([row.ids for row in rows], starts)

        near(found.detach(), torch.cat(parts).detach())
        alone = [learner.token_scores([row.ids], [start]) for row, start in zip(rows, starts, strict=True)]
        near(torch.cat(alone).detach(), found.detach(), 1e-4)
        same_gradient(gradient(learner, (weights * found).sum()), wanted)


def test_scores_of_another_task_are_refused(decoder_bundle: Path) -> None:
    """Classes of a task of answers, and tokens of a task of classes, are errors that say what the task is."""
    with pytest.raises(DataError, match="no classes; its answers are text"):
        bench_of(decoder_bundle, task=ANSWERS).learner.class_scores([[4, 5, 6]])
    with pytest.raises(DataError, match="the task has classes"):
        bench_of(decoder_bundle).learner.token_scores([[4, 5, 6]], [2])


# Beside an engine -----------------------------------------------------------------------------------------------------
@dataclass
class Watched:
    """An engine that lists which sequences it was asked for hidden states, and where."""

    engine: Engine
    read: list[tuple[int, ...]]
    layers: list[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def hidden(self, sequences: Sequence[Sequence[int]], split: int) -> list[Array]:
        self.read += [tuple(ids) for ids in sequences]
        self.layers.append(split)
        return self.engine.hidden([list(ids) for ids in sequences], split)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("task", [None, ANSWERS])
def test_beside_an_engine_it_learns_what_a_split_one_does(decoder_bundle: Path, layers: int, task: Task | None) -> None:
    """Whatever adapter the engine has: the same bits as `split` on a cache of hidden states, and each text is read once."""
    bench = bench_of(decoder_bundle, layers=layers, task=task, micro_tokens=512)
    engine = Watched(open_engine(decoder_bundle, bench.bundle, task), [], [])
    chosen = task or bench.bundle.task
    learner = Learner.beside(engine, decoder_bundle, bench.bundle, bench.spec, chosen)
    torch.set_float32_matmul_precision("highest")
    every = AdapterSpec(bench.bundle.slots, 2, 4.0)
    rng = np.random.default_rng(5)
    engine.set_adapter(Adapter({n: rng.normal(0, 1, s).astype(np.float32) for n, s in every.shapes().items()}, every))
    job = job_of(bench) if task is None else Job(bench.spec.start(1), [Source(answers_of(bench), 2)], Training(6, 2, 0.01), 0)
    texts = {tuple(row.ids) for row in job.rows}
    found, loss = learner.fit(job)
    again, _ = learner.fit(job)
    expected, same = bench.learner.fit(job)

    assert loss == same
    assert all((found[name] == array).all() and (again[name] == array).all() for name, array in expected.items())
    assert sorted(engine.read) == sorted(texts)  # six steps, twice, and none of them twice
    assert set(engine.layers) == {bench.bundle.layers - layers}
    assert learner.trunk is not None
    assert learner.trunk.missing([list(ids) for ids in texts]) == []  # nothing to be filled before


# Batches --------------------------------------------------------------------------------------------------------------
def test_padding_and_neighbours_change_nothing(pair: Pair) -> None:
    """A row's loss is the same alone and among longer, shorter and otherwise graded rows, in any order."""
    ids = pair.engine.encoder.prompts(TEXTS)
    guess, classes = Guess(np.array([0.3, -1.0], np.float32), 0.5), Classes(np.array([0.2, 0.8], np.float32))
    graded = [Row(ids[0], Label(1)), Row(ids[3], guess), Row(ids[2], classes), Row(ids[1], Label(0)), Row(ids[2], guess)]
    tasks: list[tuple[list[Row], Task | None]] = [(graded, None)]
    if pair.bundle.kind == "decoder":
        spoken = answered(pair)
        top = TopTokens(2, np.array([[4, 5]], np.int64), np.log(np.array([[0.5, 0.25]], np.float32)))
        tasks.append(([*spoken, Row(spoken[1].ids, top), spoken[0]], ANSWERS))
    for rows, task in tasks:
        learner = pair.split(1, task)
        together = learner.losses(rows).detach()
        alone = torch.cat([learner.losses([row]) for row in rows]).detach()

        near(together, alone, 1e-4)
        near(learner.losses(rows[::-1]).detach().flip(0), alone, 1e-4)


def test_a_batch_of_several_kinds_has_each_kinds_loss(pair: Pair) -> None:
    """Labels, guesses and probabilities in one batch are graded by their own losses, at their own places."""
    ids = pair.engine.encoder.prompts(TEXTS[:3])
    teacher = np.array([0.3, -1.0], np.float32)
    targets: list[Target] = [Guess(teacher, 0.25), Label(1), Classes(np.array([0.2, 0.8], np.float32))]
    learner = pair.split(1)
    scores = torch.from_numpy(learner.scores(TEXTS[:3]))
    expected = [
        losses.soft(scores[:1], torch.from_numpy(teacher)[None], 0.25),
        losses.hard(scores[1:2], torch.tensor([1])),
        losses.classes(scores[2:], torch.tensor([[0.2, 0.8]])),
    ]

    found = learner.losses([Row(row, target) for row, target in zip(ids, targets, strict=True)]).detach()
    near(found, torch.cat(expected), 1e-4)


def test_a_steps_loss_is_the_weighted_sum_of_its_sources_means(decoder_bundle: Path) -> None:
    """Three labels at weight 1 and two guesses at weight 1/4: one step's loss is mean + mean / 4, over two micro-batches."""
    bench = bench_of(decoder_bundle)
    labels = rows_of(bench)[:3]
    guesses = [Row(row.ids, Guess(np.array([1.0, -1.0], np.float32), 0.5)) for row in rows_of(bench)[3:5]]
    start = {name: array + np.float32(0.05) for name, array in bench.spec.start(1).items()}
    bench.learner.set(start)
    hard, soft = (float(bench.learner.losses(rows).mean().detach()) for rows in (labels, guesses))
    job = Job(start, [Source(labels, 3), Source(guesses, 2, 0.25)], Training(1, 3, dropout=0.0), 0)

    assert bench.learner.fit(job)[1] == pytest.approx(hard + soft / 4, rel=1e-5)
    assert soft != pytest.approx(hard, rel=0.01)


def test_torch_takes_as_many_threads_as_it_is_given(decoder_bundle: Path) -> None:
    """A learner for one thread leaves torch with one, whatever it had before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench_of(decoder_bundle)

        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# What does not fit ----------------------------------------------------------------------------------------------------
def test_rows_of_another_task_are_refused(decoder_bundle: Path) -> None:
    """A class without class rows, and an answer without a vocabulary, are errors that say what the task is."""
    speaking, grading = bench_of(decoder_bundle, task=ANSWERS), bench_of(decoder_bundle)
    row = Row([4, 5, 6], Label(1))
    with pytest.raises(DataError, match="no classes; its answers are text"):
        speaking.learner.losses([row])
    with pytest.raises(DataError, match="no classes; its answers are text"):
        speaking.learner.scores(["a film"])
    with pytest.raises(DataError, match="the task has classes"):
        grading.learner.losses([row, Row([4, 5, 6], Answer(2))])


def test_arrays_of_another_shape_are_refused(decoder_bundle: Path) -> None:
    """A job that starts at another rank, or in other layers, is never begun, and the parameters stay."""
    bench = bench_of(decoder_bundle)
    before = bench.learner.get()
    for spec in (AdapterSpec(bench.spec.slots, 3, 6.0), AdapterSpec(bench.bundle.slots, 2, 4.0)):
        with pytest.raises(DataError, match=r"has shape|unexpected"):
            bench.learner.set(spec.start(0))

    assert all((before[name] == array).all() for name, array in bench.learner.get().items())


def test_files_that_do_not_fit_the_model_are_named(decoder_bundle: Path, tmp_path: Path) -> None:
    """A layer's file that is not this transformers' layer is a DataError, not a random layer."""
    bundle = bundles.read(decoder_bundle)
    for file in decoder_bundle.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / bundles.layer_file(1)).write_bytes((tmp_path / bundles.FINAL).read_bytes())
    with pytest.raises(DataError, match="cannot be trained"):
        bench_of(tmp_path)
    (tmp_path / bundles.layer_file(1)).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="cannot be trained"):
        bench_of(tmp_path)
    with pytest.raises(DataError, match="3 of them cannot be trained"):
        msgspec.structs.replace(bundle).trains(3)
