"""llama.cpp on tiny models of every family: the same answers as torch and PEFT, with permuted rows and swapped adapters."""

from __future__ import annotations

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="GGUF tests need llama-cpp-python: make setup GGUF=1")

from edge_export import gguf as writer
from edge_export.bundle import Recipe, make
from edge_sdk import bundle as bundles
from edge_sdk import exchange, knowledge, wire
from edge_sdk.adapters import Adapter, AdapterSpec
from edge_sdk.agent import Agent
from edge_sdk.assets import Asset
from edge_sdk.bundle import Bundle
from edge_sdk.eligibility import Conditions
from edge_sdk.engines import Sampling, gguf_adapter, open_engine
from edge_sdk.engines.gguf import GgufEngine
from edge_sdk.errors import DataError, MissingRuntime, SettingsError
from edge_sdk.exchange import Voice
from edge_sdk.protocol import PROTOCOL, Finished, Judgment, Manifest, Predict, Text
from edge_sdk.store import Store
from edge_sdk.tasks import Task
from edge_sdk.testing import ServerSimulator
from edge_sdk.training import base
from edge_sdk.training.learner import Learner
from tests import factories, tiny

TEXTS = ["a lovely film", "the story was so very dull .", "grim", "the day was nice and it was bright"]
SAID = ["great", "very sad story", "so good bad film", "lovely"]
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module", params=tiny.DECODERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with an f16 and an fp32 variant, and LoRA slots on every linear layer."""
    home = tmp_path_factory.mktemp(request.param)
    model = tiny.write(home / "model", request.param)
    make(Asset(str(model)), home / "bundle", Recipe(("f16", "fp32"), MODULES, factories.DECODER_TASK, factories.PROBE, 0.98))
    return home / "bundle"


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return bundles.read(folder)


def opened(folder: Path, bundle: Bundle, task: Task | None = None) -> GgufEngine:
    engine = open_engine(folder, bundle, task, "f16")
    assert isinstance(engine, GgufEngine)
    return engine


def adapter_of(bundle: Bundle, seed: int = 1) -> Adapter:
    spec = AdapterSpec(bundle.slots, rank=3, alpha=6.0)
    rng = np.random.default_rng(seed)
    return Adapter({name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in spec.shapes().items()}, spec)


def near(found: Any, expected: Any, share: float = 0.02) -> None:
    """Within a share of the largest value: f16 weights and caches leave about a thousandth."""
    np.testing.assert_allclose(found, expected, atol=share * float(np.abs(expected).max()))


# Parity ---------------------------------------------------------------------------------------------------------------
def test_scores_are_those_of_torch_and_peft(folder: Path, bundle: Bundle) -> None:
    """Base and adapter on every layer: a wrong name, order of rows or scale of alpha would show in the scores."""
    engine, adapter = opened(folder, bundle), adapter_of(bundle)
    learner = Learner.whole(bundle, engine.head, engine.encoder, adapter.spec, threads=1)
    torch.set_float32_matmul_precision("highest")
    learner.set(adapter.spec.start(0))
    before = learner.scores(TEXTS)
    near(engine.logits(TEXTS), before)
    learner.set(adapter.arrays)
    engine.set_adapter(adapter)

    near(engine.logits(TEXTS), learner.scores(TEXTS))
    assert np.abs(engine.logits(TEXTS) - before).max() > 0.1 * np.abs(before).max()


def test_both_runtimes_agree(folder: Path, bundle: Bundle) -> None:
    """llama.cpp and ONNX Runtime give the same scores, next tokens and vectors, with an adapter and without."""
    engine, other = opened(folder, bundle), open_engine(folder, bundle, variant="fp32")
    for adapter in (None, adapter_of(bundle)):
        engine.set_adapter(adapter)
        other.set_adapter(adapter)
        near(engine.logits(TEXTS), other.logits(TEXTS))
        near(engine.score(TEXTS), other.score(TEXTS), 0.05)
        near(engine.embed(TEXTS), other.embed(TEXTS))
        found, expected = engine.top_k(TEXTS, 3), other.top_k(TEXTS, 3)
        assert found.ids[:, 0].tolist() == expected.ids[:, 0].tolist()
        near(found.logprobs, expected.logprobs)


def test_the_head_is_the_vocabularys_rows(folder: Path, bundle: Bundle) -> None:
    """Class rows for training come out of the GGUF file as they came out of the ONNX graph."""
    near(opened(folder, bundle).head.rows, open_engine(folder, bundle, variant="fp32").head.rows, 0.001)


def test_it_writes_what_torch_writes(folder: Path, bundle: Bundle) -> None:
    """Greedy writing gives the tokens of a full pass of torch at every step."""
    bundle = msgspec.structs.replace(bundle, end=())
    engine, model = opened(folder, bundle), base.load(bundle)
    torch.set_float32_matmul_precision("highest")
    net: Any = model
    ids = engine.encoder.plain(["the film was"])[0]
    written: list[int] = []
    for _ in range(8):
        with torch.no_grad():
            written.append(int(net(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))

    assert engine.generate("the film was", Sampling(max_tokens=8)) == engine.encoder.decode(written)


def test_text_answers_agree_with_the_other_runtime(folder: Path, bundle: Bundle) -> None:
    """Log-probabilities of each answer's tokens are near ONNX Runtime's, and both write from the prompt that is trained on."""
    task = Task((), "{text} it was", (), max_tokens=8, answer_tokens=4)
    engine, other = opened(folder, bundle, task), open_engine(folder, bundle, task, "fp32")
    said = SAID
    for adapter in (None, adapter_of(bundle)):
        engine.set_adapter(adapter)
        other.set_adapter(adapter)
        near(np.concatenate(engine.answer_logprobs(TEXTS, said)), np.concatenate(other.answer_logprobs(TEXTS, said)))
        for own, onnx in zip(engine.answer_top_k(TEXTS, said, 99), other.answer_top_k(TEXTS, said, 99), strict=True):
            assert own.ids.shape == onnx.ids.shape == (len(own.ids), engine.encoder.vocabulary)
            near(
                np.take_along_axis(own.logprobs, own.ids.argsort(1), 1), np.take_along_axis(onnx.logprobs, onnx.ids.argsort(1), 1)
            )
        assert [len(top.ids) for top in engine.answer_top_k(TEXTS, said, 2)] == [len(answer) for answer in engine.answers(said)]
    assert engine.end == other.end == next(iter(bundle.end), None)
    long = "the story was so very dull . " * 20
    prompt = engine.encoder.decode(engine.encoder.prompts([long])[0])

    assert engine.answers(said) == other.answers(said)
    assert engine.answer(long, Sampling(6)) == engine.generate(prompt, Sampling(6))


async def test_an_agent_tells_what_is_likeliest_in_answers(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Asked in FedMKT, it sends the engine's likeliest tokens, which a server can read."""
    task = Task((), "{text} it was", (), max_tokens=8, answer_tokens=4)
    server = ServerSimulator(Manifest(PROTOCOL, "fedmkt", task, AdapterSpec(bundle.slots, 3, 6.0), bundle))
    for name in bundle.files:
        server.keep((folder / name).read_bytes())
    public = [Text(f"p{i}", text, 0, answer) for i, (text, answer) in enumerate(zip(TEXTS, SAID, strict=True))]
    body, start = wire.pack_lines(public), wire.pack_adapter(server.manifest.adapter.start(0))
    server.work += [Predict(0, server.keep(start), server.keep(body), len(body), 4, "probabilities", 3), Finished(1, "")]
    store, lines = Store(tmp_path / "home"), list[str]()
    await Agent(store, server, tmp_path / "cache", "d", variant="f16", look=Conditions, say=lines.append).run()
    store.close()
    engine = opened(folder, bundle, task)
    spelled = exchange.sheet(Voice(engine.encoder, engine.end), public)
    _, found = knowledge.unpack_judgment(server.bodies[0], lambda _: spelled, 1 << 21, 3)

    assert [type(result) for result in server.results] == [Judgment]
    for known, top in zip(found, engine.answer_top_k(TEXTS, SAID, 3), strict=True):
        assert (known.ids == top.ids).all()
        near(known.logprobs, top.logprobs)


def test_label_words_of_several_tokens_agree_with_the_other_runtime(folder: Path, bundle: Bundle) -> None:
    """The sum of a word's log-probabilities is the same in both runtimes, also behind a shared beginning."""
    words = (("bad",), ("very good",), ("very so good",))
    for pattern in ("{text} it was", "the story was so very {text} it was"):
        task = Task(("no", "yes", "very"), pattern, words)
        engine = opened(folder, bundle, task)
        near(engine.logits(TEXTS), open_engine(folder, bundle, task, "fp32").logits(TEXTS))
        with pytest.raises(DataError, match="training needs words of one token"):
            _ = engine.head


# Batches and caches ---------------------------------------------------------------------------------------------------
def test_a_text_does_not_depend_on_its_neighbours(folder: Path, bundle: Bundle) -> None:
    """Alone, in a batch, and in a list longer than a batch, a text has the same scores in the order asked."""
    engine = opened(folder, bundle)
    alone = np.concatenate([engine.logits([text]) for text in TEXTS])

    near(engine.logits(TEXTS), alone, 0.005)
    near(engine.logits(TEXTS * 9), np.tile(alone, (9, 1)), 0.005)
    assert engine.logits([]).shape == (0, 2)


def test_a_shared_beginning_changes_nothing(folder: Path, bundle: Bundle) -> None:
    """Going on from the copied cache of what all prompts begin with gives the scores of reading everything."""
    task = msgspec.structs.replace(factories.DECODER_TASK, pattern="the story was so very {text} it was")
    engine = opened(folder, bundle, task)
    for adapter in (None, adapter_of(bundle), None):
        engine.set_adapter(adapter)
        near(engine.logits(TEXTS), engine.logits_of(engine.encoder.prompts(TEXTS)), 0.005)


def test_a_text_longer_than_a_batch_is_read(folder: Path, bundle: Bundle) -> None:
    """The context grows with what is asked, up to what the model can read, and forgets nothing it is still asked for."""
    engine = opened(folder, bundle)
    before = engine.logits(TEXTS)
    assert np.isfinite(engine.embed(["film " * 500])).all()

    near(engine.logits(TEXTS), before, 0.005)


# Adapters -------------------------------------------------------------------------------------------------------------
def test_an_adapter_comes_off_without_a_trace(folder: Path, bundle: Bundle) -> None:
    """After `set_adapter(None)` the answers are bit for bit those of the base: no cache outlives a swap."""
    engine = opened(folder, bundle)
    before = engine.logits(TEXTS)
    engine.set_adapter(adapter_of(bundle))
    assert (engine.logits(TEXTS) != before).any()
    engine.set_adapter(None)

    assert (engine.logits(TEXTS) == before).all()


def test_a_refused_adapter_leaves_the_old_one_on(folder: Path, bundle: Bundle) -> None:
    """A swap happens whole or not at all."""
    engine, good = opened(folder, bundle), adapter_of(bundle)
    engine.set_adapter(good)
    worn = engine.logits(TEXTS)
    slots = (*bundle.slots[:-1], msgspec.structs.replace(bundle.slots[-1], module="nowhere.q_proj"))
    foreign = AdapterSpec(slots, 3, 6.0)
    for bad in (Adapter(foreign.start(0), foreign), Adapter({}, good.spec), Adapter(foreign.start(0), good.spec)):
        with pytest.raises(DataError):
            engine.set_adapter(bad)

    assert (engine.logits(TEXTS) == worn).all()


def test_more_adapters_than_are_kept_in_memory(folder: Path, bundle: Bundle) -> None:
    """Ten adapters in turn, twice: each gives its own scores each time, though llama.cpp holds only a few at once."""
    engine = opened(folder, bundle)
    adapters = [adapter_of(bundle, seed) for seed in range(10)]
    first = []
    for adapter in adapters:
        engine.set_adapter(adapter)
        first.append(engine.logits(TEXTS))
    for adapter, expected in zip(adapters, first, strict=True):
        engine.set_adapter(adapter)
        assert (engine.logits(TEXTS) == expected).all()
    assert len({scores.tobytes() for scores in first}) == 10


def test_a_swap_between_loaded_adapters_is_quick(folder: Path, bundle: Bundle) -> None:
    """No file is written and nothing loaded again: a hundred swaps take less than a second."""
    engine = opened(folder, bundle)
    pair = [adapter_of(bundle, seed) for seed in (1, 2)]
    for adapter in pair:
        engine.set_adapter(adapter)
    started = time.perf_counter()
    for turn in range(100):
        engine.set_adapter(pair[turn % 2])

    assert time.perf_counter() - started < 1


def test_a_module_without_a_tensor_is_named(tmp_path: Path) -> None:
    """An adapter for a layer that the architecture does not have is refused by name."""
    with pytest.raises(DataError, match=r"layer\.0\.query has no tensor"):
        gguf_adapter.write(tmp_path / "a.gguf", Adapter(factories.SPEC.start(0), factories.SPEC), "llama", 2, 1, 2)


def test_rows_come_back_to_their_place() -> None:
    """llama.cpp's order of query rows interleaves each head's halves; other tensors stay as they are."""
    rows = np.arange(8)[:, None]

    assert gguf_adapter.reorder("blk.0.attn_q.weight", rows, 2, 1)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert gguf_adapter.reorder("blk.0.attn_k.weight", rows, 2, 1)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert (gguf_adapter.reorder("blk.0.attn_v.weight", rows, 2, 1) == rows).all()


# Files ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "q4_k_m", "q6_k"])
def test_every_quantization_is_written_and_runs(folder: Path, bundle: Bundle, tmp_path: Path, quant: str) -> None:
    """What the exporter offers, llama.cpp loads and scores with, K-quants too where rows fit or fall back."""
    writer.write(Path(bundle.base), tmp_path / "model.f16.gguf", quant)
    shutil.copyfile(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    engine = GgufEngine(tmp_path, bundle, bundle.variant("f16"), bundle.task)

    assert np.isfinite(engine.logits(TEXTS)).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.f16.gguf", "tokenizer.json"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """An unknown quantization and an encoder are refused with what is supported, and leave no file."""
    model = tiny.write(tmp_path / "model", "bert")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="no GGUF quantization 'q3'; choose one of"):
        writer.write(model, tmp_path / "out" / "m.gguf", "q3")
    with pytest.raises(DataError, match="'bert' model cannot be written as GGUF"):
        writer.write(model, tmp_path / "out" / "m.gguf", "q8_0")
    with pytest.raises(DataError, match="'bert' model cannot be written as GGUF"):
        make(Asset(str(model)), tmp_path / "b", Recipe(("q8_0",), task=factories.ENCODER_TASK, probe=factories.PROBE))
    assert not list((tmp_path / "out").iterdir())


def test_a_file_that_is_no_model_is_named(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    """Garbage in place of the file is an error of ours that says what to do."""
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.f16.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(DataError, match="cannot load"):
        opened(tmp_path / "copy", bundle)


def test_an_old_llama_cpp_is_named(folder: Path, bundle: Bundle) -> None:
    """A variant that needs a newer llama-cpp-python says how to get it."""
    variants = tuple(msgspec.structs.replace(v, minimum="99") for v in bundle.variants)
    with pytest.raises(MissingRuntime, match="pip install --upgrade llama-cpp-python"):
        open_engine(folder, msgspec.structs.replace(bundle, variants=variants), variant="f16")


@pytest.mark.parametrize("text", ["", "film"])
def test_texts_are_lists_of_something_to_read(folder: Path, bundle: Bundle, text: str) -> None:
    """A bare string, an entry that is no string, and an empty text where no pattern stands around it are refused."""
    task = msgspec.structs.replace(factories.DECODER_TASK, pattern="{text}")
    engine = opened(folder, bundle, task)
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
    engine, good = opened(folder, bundle), adapter_of(bundle)
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
    engine, adapter = opened(folder, bundle), adapter_of(bundle)
    engine.set_adapter(adapter)
    expected = engine.logits(TEXTS)
    wide: Any = {name: np.asfortranarray(array.astype(np.float64)) for name, array in adapter.arrays.items()}
    engine.set_adapter(Adapter(wide, adapter.spec))

    np.testing.assert_allclose(engine.logits(TEXTS), expected, rtol=1e-5)


def test_two_threads_take_turns(folder: Path, bundle: Bundle) -> None:
    """Calls from several threads on one engine neither end the process nor mix their answers."""
    engine = opened(folder, bundle)
    expected = engine.logits(TEXTS)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: engine.logits(TEXTS), range(24)))

    assert all((scores == expected).all() for scores in found)


def test_a_closed_engine_says_so(folder: Path, bundle: Bundle) -> None:
    """After `close` every call is an error of ours, not a crash."""
    engine, adapter = opened(folder, bundle), adapter_of(bundle)
    engine.logits(TEXTS)
    engine.close()
    for call in (lambda: engine.logits(TEXTS), lambda: engine.embed(TEXTS), lambda: engine.set_adapter(adapter)):
        with pytest.raises(DataError, match="closed"):
            call()
    engine.close()
