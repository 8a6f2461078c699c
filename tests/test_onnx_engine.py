"""The ONNX engine against torch on tiny models of every family: classes, next tokens, text, vectors; fp32 and int8."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from edge_export.bundle import Recipe, make
from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter, AdapterSpec
from edge_sdk.assets import Asset
from edge_sdk.bundle import Bundle
from edge_sdk.engines import Engine, Sampling, open_engine, sample
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.tasks import Kind, Task, log_softmax
from edge_sdk.training import base
from edge_sdk.training.learner import Learner, readout
from tests import factories, tiny

TEXTS = ["a lovely film", "the story was so very dull .", "grim", "the day was nice and it was bright"]
MODULES = {
    "bert": ("query", "key", "value", "attention.output.dense", "intermediate.dense"),
    **dict.fromkeys(tiny.DECODERS, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")),
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with LoRA on every linear layer, so that a scale folded the wrong way shows."""
    home = tmp_path_factory.mktemp(request.param)
    model = tiny.write(home / "model", request.param)
    kind: Kind = "encoder" if request.param == "bert" else "decoder"
    recipe = Recipe(("int8", "fp32"), MODULES[request.param], factories.task(kind), factories.PROBE, floor=0.9)
    make(Asset(str(model)), home / "bundle", recipe)
    return home / "bundle"


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return bundles.read(folder)


def decoder(bundle: Bundle) -> None:
    if bundle.kind == "encoder":
        pytest.skip("an encoder has no next word")


def torch_model(bundle: Bundle) -> Any:
    torch.set_float32_matmul_precision("highest")
    return base.load(bundle)


def adapter_of(bundle: Bundle, seed: int = 1, size: float = 0.1) -> Adapter:
    spec = AdapterSpec(bundle.slots, rank=3, alpha=6.0)
    rng = np.random.default_rng(seed)
    return Adapter({name: rng.normal(0, size, shape).astype(np.float32) for name, shape in spec.shapes().items()}, spec)


def learner(bundle: Bundle, engine: Engine, adapter: Adapter) -> Learner:
    made = Learner.whole(bundle, engine.head, engine.encoder, adapter.spec, threads=1)
    torch.set_float32_matmul_precision("highest")
    made.set(adapter.arrays)
    return made


# Classes --------------------------------------------------------------------------------------------------------------
def test_float_scores_are_those_of_torch_and_peft(folder: Path, bundle: Bundle) -> None:
    """Through smoothed weights and one attention operator, an adapter on every layer does what PEFT does, to 1e-3."""
    engine, adapter = open_engine(folder, bundle, variant="fp32"), adapter_of(bundle)
    engine.set_adapter(adapter)
    expected = learner(bundle, engine, adapter).scores(TEXTS)

    np.testing.assert_allclose(engine.logits(TEXTS), expected, atol=1e-3 * np.abs(expected).max())
    base_scores = open_engine(folder, bundle, variant="fp32").logits(TEXTS)
    assert np.abs(base_scores - expected).max() > 0.02 * np.abs(expected).max()


def test_int8_scores_follow_float_scores_with_an_adapter(folder: Path, bundle: Bundle) -> None:
    """What an adapter changes, it changes in the int8 graph too: the adapted scores are nearer to fp32's than the base's."""
    fine, coarse, adapter = open_engine(folder, bundle, variant="fp32"), open_engine(folder, bundle), adapter_of(bundle)
    before = fine.logits(TEXTS)
    fine.set_adapter(adapter)
    coarse.set_adapter(adapter)
    exact = fine.logits(TEXTS)

    assert np.abs(coarse.logits(TEXTS) - exact).max() < 0.25 * np.abs(exact - before).max()


@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_a_text_does_not_depend_on_its_neighbours(folder: Path, bundle: Bundle, variant: str) -> None:
    """Scores are the same alone and in a padded batch, in int8 too: no scale is shared between tokens."""
    engine = open_engine(folder, bundle, variant=variant)
    alone = np.concatenate([engine.logits([text]) for text in TEXTS])

    np.testing.assert_allclose(engine.logits(TEXTS), alone, atol=1e-4 * np.abs(alone).max())


@pytest.mark.parametrize("variant", ["int8", "fp32"])
def test_an_adapter_comes_off_without_a_trace(folder: Path, bundle: Bundle, variant: str) -> None:
    """After `set_adapter(None)` the answers are bit for bit those of the base."""
    engine = open_engine(folder, bundle, variant=variant)
    before = engine.logits(TEXTS)
    engine.set_adapter(adapter_of(bundle))
    assert (engine.logits(TEXTS) != before).any()
    engine.set_adapter(None)

    assert (engine.logits(TEXTS) == before).all()


def test_a_refused_adapter_leaves_the_old_one_on(folder: Path, bundle: Bundle) -> None:
    """A swap happens whole or not at all."""
    engine, good = open_engine(folder, bundle), adapter_of(bundle)
    engine.set_adapter(good)
    worn = engine.logits(TEXTS)
    slots = (*bundle.slots[:-1], msgspec.structs.replace(bundle.slots[-1], module="nowhere.q_proj"))
    foreign = AdapterSpec(slots, 3, 6.0)
    for bad in (Adapter(foreign.start(0), foreign), Adapter({}, good.spec), Adapter(foreign.start(0), good.spec)):
        with pytest.raises(DataError):
            engine.set_adapter(bad)

    assert (engine.logits(TEXTS) == worn).all()


def test_probabilities_are_the_softmax_of_the_scores(folder: Path, bundle: Bundle) -> None:
    """Each text's probabilities are positive, sum to one, and rank the classes as the scores do."""
    engine = open_engine(folder, bundle)
    probabilities = engine.score(TEXTS)

    assert (probabilities > 0).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    assert (probabilities.argmax(1) == engine.logits(TEXTS).argmax(1)).all()


def test_no_texts_have_no_scores(folder: Path, bundle: Bundle) -> None:
    """An empty list is answered with empty tables."""
    engine = open_engine(folder, bundle)

    assert engine.score([]).shape == (0, 2)
    assert engine.embed([]).shape[0] == 0


def test_a_shared_beginning_is_read_once_and_changes_nothing(folder: Path, bundle: Bundle) -> None:
    """With a pattern before the text, going on from its cache gives the scores of reading everything, adapter or not."""
    decoder(bundle)
    task = msgspec.structs.replace(factories.DECODER_TASK, pattern="the story was so very {text} it was")
    engine = open_engine(folder, bundle, task, "fp32")
    assert len(engine.encoder.shared) == 5
    for adapter in (None, adapter_of(bundle), None):
        engine.set_adapter(adapter)
        whole = engine.logits_of(engine.encoder.prompts(TEXTS))
        np.testing.assert_allclose(engine.logits(TEXTS), whole, atol=1e-4 * np.abs(whole).max())


def test_label_words_of_several_tokens_score_their_whole_probability(folder: Path, bundle: Bundle) -> None:
    """A class's score is log p(first token) + log p(second | first), as torch has it, whatever the words' lengths."""
    decoder(bundle)
    task = Task(("no", "yes", "very"), "{text} it was", (("bad",), ("very good",), ("very so good",)))
    engine, model = open_engine(folder, bundle, task, "fp32"), torch_model(bundle)
    expected = np.zeros((len(TEXTS), 3))
    for row, prompt in enumerate(engine.encoder.prompts(TEXTS)):
        for column, word in enumerate(engine.encoder.words()):
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([[*prompt, *word]])).logits[0].log_softmax(-1)
            expected[row, column] = sum(float(logprobs[len(prompt) - 1 + at, token]) for at, token in enumerate(word))

    np.testing.assert_allclose(engine.logits(TEXTS), expected, atol=2e-3 * np.abs(expected).max())
    with pytest.raises(DataError, match="training needs words of one token"):
        _ = engine.head


# Next tokens ----------------------------------------------------------------------------------------------------------
def test_the_likeliest_next_tokens_are_those_of_torch(folder: Path, bundle: Bundle) -> None:
    """Ids and log-probabilities of the five likeliest next tokens agree with torch's full softmax, best first."""
    decoder(bundle)
    engine, model = open_engine(folder, bundle, variant="fp32"), torch_model(bundle)
    found = engine.top_k(TEXTS, 5)
    for row, ids in enumerate(engine.encoder.plain(TEXTS)):
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1).topk(5)
        assert found.ids[row].tolist() == expected.indices.tolist()
        np.testing.assert_allclose(found.logprobs[row], expected.values, atol=1e-2)


def test_what_it_writes_is_what_torch_writes(folder: Path, bundle: Bundle) -> None:
    """Greedy writing with the cache gives the tokens of greedy writing without one, and as many as asked for."""
    decoder(bundle)
    bundle = msgspec.structs.replace(bundle, end=())
    engine, model = open_engine(folder, bundle, variant="fp32"), torch_model(bundle)
    for adapter in (None, adapter_of(bundle)):
        engine.set_adapter(adapter)
        reference = learner(bundle, engine, adapter).model if adapter else model
        ids = engine.encoder.plain(["the film was"])[0]
        written: list[int] = []
        for _ in range(12):
            with torch.no_grad():
                written.append(int(reference(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        assert engine.generate("the film was", Sampling(max_tokens=12)) == engine.encoder.decode(written)


def test_writing_stops_at_the_end_token(folder: Path, bundle: Bundle) -> None:
    """The end token ends the text and is not part of it; no tokens asked for are none written."""
    decoder(bundle)
    engine = open_engine(folder, bundle, variant="fp32")
    first = int(engine.top_k(["the film was"], 1).ids[0, 0])
    ending = open_engine(folder, msgspec.structs.replace(bundle, end=(first,)), variant="fp32")

    assert ending.generate("the film was") == ""
    assert engine.generate("the film was", Sampling(max_tokens=0)) == ""


def test_sampling_is_repeatable_and_keeps_to_the_nucleus() -> None:
    """A seed decides; a small nucleus leaves the likeliest token only; temperature 0 takes it always."""
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    free, narrow = Sampling(temperature=1.0), Sampling(temperature=1.0, top_p=0.5)
    draws = [sample(logits, free, np.random.default_rng(seed)) for seed in range(300)]

    assert draws == [sample(logits, free, np.random.default_rng(seed)) for seed in range(300)]
    assert 0.5 < draws.count(1) / 300 < 0.7
    assert {sample(logits, narrow, np.random.default_rng(seed)) for seed in range(50)} == {1}
    assert sample(logits, Sampling(), np.random.default_rng(0)) == 1


@pytest.mark.parametrize("bad", [{"max_tokens": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"top_p": 0.0}])
def test_impossible_sampling_is_refused(bad: dict[str, Any]) -> None:
    """Settings out of bounds are an error, not a strange text."""
    with pytest.raises(SettingsError):
        Sampling(**bad)


def test_vectors_have_length_one_and_are_those_of_torch(folder: Path, bundle: Bundle) -> None:
    """An encoder's mean and a decoder's last hidden state, of the text without the pattern."""
    engine = open_engine(folder, bundle, variant="fp32")
    with torch.no_grad():
        rows = readout(torch_model(bundle), bundle.kind, engine.encoder.plain(TEXTS)).numpy()
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    np.testing.assert_allclose(engine.embed(TEXTS), rows, atol=1e-3)


def test_an_encoder_does_not_write(encoder_bundle: Path) -> None:
    """What needs a decoder says so."""
    engine = open_engine(encoder_bundle, bundles.read(encoder_bundle))
    for ask in (lambda: engine.top_k(["a"], 1), lambda: engine.generate("a")):
        with pytest.raises(DataError, match="needs a decoder"):
            ask()


# The graph ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_hidden_states_are_what_enters_a_layer(folder: Path, bundle: Bundle, layer: int) -> None:
    """`hidden` of the fp32 graph is torch's hidden state before each layer, where split training may start."""
    engine = open_engine(folder, bundle, variant="fp32")
    sequences = engine.encoder.prompts(TEXTS)
    for ids, hidden in zip(sequences, engine.hidden(sequences, layer), strict=True):
        with torch.no_grad():
            states = torch_model(bundle)(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]

        np.testing.assert_allclose(hidden, states[0].numpy(), atol=2e-3 * float(states.abs().max()))


class Session:
    """Stands before a session of ONNX Runtime; says how much it was given, or fails as told."""

    def __init__(self, session: Any, error: str = "") -> None:
        self.session, self.error, self.sizes = session, error, list[tuple[int, int]]()

    def run(self, outputs: Any, feeds: Any, *rest: Any) -> Any:
        if self.error:
            raise RuntimeException(self.error)
        self.sizes.append(feeds["input_ids"].shape)
        return self.session.run(outputs, feeds, *rest)


def test_hidden_states_take_no_more_than_512_tokens_at_a_time(folder: Path, bundle: Bundle) -> None:
    """Padding counted; many long texts are what each is alone."""
    engine: Any = open_engine(folder, bundle, variant="fp32")
    sequences = [[1 + (i + at) % 20 for at in range(20 + i)] for i in range(40)]
    alone = [engine.hidden([ids], 1)[0] for ids in sequences]
    engine._session = session = Session(engine._session)
    for found, expected in zip(engine.hidden(sequences, 1), alone, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    assert max(count * longest for count, longest in session.sizes) <= 512
    assert sum(count for count, _ in session.sizes) == len(sequences)
    assert len(session.sizes) < len(sequences)


def test_out_of_memory_is_a_memory_error(folder: Path, bundle: Bundle) -> None:
    """What ONNX Runtime says in a class of its own is Python's MemoryError wherever it runs; its other errors stay."""
    engine: Any = open_engine(folder, bundle)
    calls: list[Callable[[], Any]] = [lambda: engine.hidden([[1]], 1), lambda: engine.logits(["film"])]
    if bundle.kind == "decoder":
        calls += [lambda: engine.top_k(["film"], 1), lambda: engine.generate("film")]  # batches, and token by token
    said = "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running {}"
    for call in calls:
        engine._session = Session(None, said.format("Concat node. Name:'' Status Message: std::bad_alloc"))
        with pytest.raises(MemoryError, match="bad_alloc"):
            call()
        engine._session = Session(None, said.format("Concat node. Status Message: shapes"))
        with pytest.raises(RuntimeException, match="shapes"):
            call()


def test_plain_rotary_attention_is_one_operator_a_layer(folder: Path, bundle: Bundle) -> None:
    """The traced attention of a Llama or Qwen2 becomes three operators a layer; others keep what optimum wrote."""
    graph = onnx.load(folder / "model.fp32.onnx").graph
    fused = sum(node.op_type == "Attention" for node in graph.node)
    family = bundle.slots[0].module.split(".")[0], len(graph.node)

    assert fused == (bundle.layers if "gemma" not in str(folder) and bundle.kind == "decoder" else 0), family
    assert all(node.op_type != "Softmax" for node in graph.node) == bool(fused)


def test_int8_weights_are_seven_bits_and_no_float_matrix_is_left(folder: Path) -> None:
    """In the int8 graph every linear layer and table is integers; only vectors and small constants are floats."""
    graph = onnx.load(folder / "model.int8.onnx").graph
    big = [w for w in graph.initializer if len(w.dims) == 2 and min(w.dims) > 8]
    weights = [onnx.numpy_helper.to_array(w) for w in big if w.data_type == onnx.TensorProto.INT8 and "MatMul" in w.name]

    assert weights
    assert all(np.abs(w.astype(int)).max() <= 63 for w in weights)
    floats = {w.name for w in big if w.data_type == onnx.TensorProto.FLOAT}
    assert all("position" in name or "token_type" in name for name in floats)


def test_no_product_of_the_int8_graph_saturates(folder: Path) -> None:
    """In every integer product of the graph, the vocabulary's included, two largest terms fit into 16 bits."""
    graph = onnx.load(folder / "model.int8.onnx").graph
    values = {w.name: onnx.numpy_helper.to_array(w) for w in graph.initializer}
    made_by = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type == "MatMulIntegerToFloat"]
    assert products
    for node in products:
        weight = values.get(node.input[1])
        if weight is None:
            weight = values[made_by[node.input[1]].input[0]]  # the head's transposed table
        largest = 2 * int(values[node.input[4]]) - 1  # zero point and levels: 128 +- 127, or 64 +- 63
        assert 2 * largest * int(np.abs(weight.astype(int)).max()) <= 2**15 - 1, node.name


def test_int8_next_tokens_follow_float(folder: Path, bundle: Bundle) -> None:
    """The rounded vocabulary's log-probabilities are near the float ones, and the likeliest token is among the first three."""
    decoder(bundle)
    exact = open_engine(folder, bundle, variant="fp32").top_k(TEXTS, 3)
    found = open_engine(folder, bundle).top_k(TEXTS, 29)

    assert all(first in row[:3] for first, row in zip(found.ids[:, 0], exact.ids, strict=True))
    rows = np.arange(len(TEXTS))[:, None]
    by_token = np.zeros_like(found.logprobs)
    by_token[rows, found.ids] = found.logprobs
    assert np.abs(by_token[rows, exact.ids] - exact.logprobs).max() < 0.1 * np.ptp(found.logprobs)


def test_log_softmax_is_the_logarithm_of_the_softmax() -> None:
    """Row sums of its exponential are one, also for scores that would overflow."""
    np.testing.assert_allclose(np.exp(log_softmax(np.array([[1, 2, 3], [1000, 0, -1000]], np.float32))).sum(1), 1, rtol=1e-6)


@pytest.mark.parametrize("text", ["", "film"])
def test_texts_are_lists_of_something_to_read(folder: Path, bundle: Bundle, text: str) -> None:
    """A bare string, an entry that is no string, and an empty text where no pattern stands around it are refused."""
    decoder(bundle)
    task = msgspec.structs.replace(factories.DECODER_TASK, pattern="{text}")
    engine = open_engine(folder, bundle, task, "fp32")
    for call in (engine.logits, engine.embed, lambda texts: engine.top_k(texts, 1)):
        with pytest.raises(DataError, match=r"list of strings|empty text"):
            call(text if text else ["film", ""])
    unreadable: tuple[list[list[int]], ...] = ([[]], [[-1]], [[10_000]])
    for ids in unreadable:
        with pytest.raises(DataError, match=r"empty text|not in the vocabulary"):
            engine.logits_of(ids)
    with pytest.raises(SettingsError, match="at least 1"):
        engine.top_k(["film"], 0)
    assert engine.top_k(["film"], 10_000).ids.shape == (1, 29)
    assert engine.top_k([], 40).ids.shape == (0, 29)


@pytest.mark.parametrize("kind", ["nan", "rank", "alpha", "twice"])
def test_a_senseless_adapter_is_refused(folder: Path, bundle: Bundle, kind: str) -> None:
    """NaN values, rank 0, an alpha that is no number and a slot named twice are never worn."""
    engine, good = open_engine(folder, bundle), adapter_of(bundle)
    before = engine.logits(TEXTS)
    spec = {"rank": AdapterSpec(bundle.slots, 0, 1.0), "alpha": AdapterSpec(bundle.slots, 3, float("nan"))}.get(kind, good.spec)
    if kind == "twice":
        spec = AdapterSpec((*bundle.slots, bundle.slots[0]), 3, 6.0)
    arrays = {n: a * np.float32("nan") for n, a in good.arrays.items()} if kind == "nan" else good.arrays
    with pytest.raises(DataError):
        engine.set_adapter(Adapter(arrays, spec))

    assert (engine.logits(TEXTS) == before).all()


def test_arrays_of_any_float_type_are_worn(folder: Path, bundle: Bundle) -> None:
    """float64, float16 and column-major arrays do what their float32 values do."""
    engine, adapter = open_engine(folder, bundle), adapter_of(bundle)
    engine.set_adapter(adapter)
    expected = engine.logits(TEXTS)
    wide: Any = {name: np.asfortranarray(array.astype(np.float64)) for name, array in adapter.arrays.items()}
    engine.set_adapter(Adapter(wide, adapter.spec))

    np.testing.assert_allclose(engine.logits(TEXTS), expected, rtol=1e-5)
