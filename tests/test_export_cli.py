"""`edge-export`: bundles that are whole or not there, and a check that finds one flipped bit anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file

from edge_export import graph as surgery
from edge_export.bundle import Recipe, make
from edge_export.cli import main
from edge_sdk import bundle as bundles
from edge_sdk import golden
from edge_sdk.assets import Asset
from edge_sdk.engines import open_engine
from edge_sdk.errors import AssetError, DataError
from tests import factories, tiny

TASK = """
[task]
labels = ["negative", "positive"]
pattern = "{text} it was"
verbalizer = [["bad"], ["good"]]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("tiny") / "model", "llama")


@pytest.fixture(scope="module")
def made(model: Path) -> Path:
    """A bundle with both ONNX variants."""
    recipe = Recipe(("int8", "fp32"), task=factories.DECODER_TASK, probe=factories.PROBE, floor=0.9)
    make(Asset(str(model)), model.parent / "made", recipe)
    return model.parent / "made"


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def export(model: Path, out: Path, *more: str, task: str = TASK) -> int:
    file = out.parent / "task.toml"
    file.write_text(task)
    options = ["--variants", "int8", "--floor", "0.9", "--probe", str(factories.PROBE), "--task", str(file)]
    return main(["bundle", str(model), "-o", str(out), *options, *more])


def left(folder: Path) -> list[str]:
    """What an export left in its folder beside its task file."""
    return sorted(p.name for p in folder.iterdir() if p.name != "task.toml")


# Making ---------------------------------------------------------------------------------------------------------------
def test_a_bundle_is_made_and_checks_out(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder of weights to a bundle that `check` finds good, with a table, a page and numbers for scripts."""
    assert export(model, tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in said["variants"]] == ["fp32", "int8"]
    assert said["variants"][1]["r"] >= 0.9
    assert "fp32" in (tmp_path / "out" / "report.html").read_text()
    assert main(["check", str(tmp_path / "out"), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["variants"]
    assert row["good"]
    assert left(tmp_path) == ["out"]


def test_people_see_a_table(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json every stage is a line on stderr and the result a table on stdout."""
    assert export(model, tmp_path / "out") == 0
    said = capsys.readouterr()

    assert "texts/s" in said.out
    assert "int8" in said.out
    assert "exporting to ONNX through optimum" in said.err


def test_the_description_says_what_a_client_needs(made: Path) -> None:
    """Label word ids, layers, variants with their agreement, and the hash of every file."""
    bundle = bundles.read(made)
    engine = open_engine(made, bundle)

    assert [list(ids) for ids in bundle.label_ids] == engine.encoder.words()
    assert (bundle.layers, bundle.layers_path) == (3, "model.layers")
    assert [(v.name, v.minimum) for v in bundle.variants] == [("int8", "1.23"), ("fp32", "1.23")]
    assert bundle.variants[0].r < bundle.variants[1].r == pytest.approx(1.0)
    assert set(bundle.files) == {p.name for p in made.iterdir()} - {"bundle.json"}
    assert set(bundle.needs()) == {"tokenizer.json", "model.int8.onnx"}


def test_a_variant_below_the_floor_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, and the refusal says how far off it is and what to try."""
    assert export(model, tmp_path / "out", "--floor", "0.99999999") == 1
    said = capsys.readouterr().err

    assert "below the floor of 0.99999999" in said
    assert "Try a finer variant" in said
    assert left(tmp_path) == []


def test_an_older_bundle_survives_a_failed_export(model: Path, copy: Path) -> None:
    """What was there stays, byte for byte, when its replacement fails."""
    before = {p.name: p.read_bytes() for p in copy.iterdir()}
    assert export(model, copy, "--floor", "0.99999999") == 1

    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before


def test_an_unsupported_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A family nobody has taught the exporter is refused with the list of those it knows."""
    import transformers

    hf: Any = transformers
    factories.write_model(tmp_path / "model", "decoder")
    config = hf.GPTNeoXConfig(vocab_size=29, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    hf.GPTNeoXForCausalLM(config).save_pretrained(tmp_path / "model")

    assert export(tmp_path / "model", tmp_path / "out") == 1
    assert "'gpt_neox' is not supported; supported: bert, gemma3_text, llama" in capsys.readouterr().err
    assert left(tmp_path) == ["model"]


def test_a_folder_that_is_no_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a configuration is an error of ours, not a traceback."""
    (tmp_path / "model").mkdir()

    assert export(tmp_path / "model", tmp_path / "out") == 1
    assert "is not a model that transformers can read" in capsys.readouterr().err


def test_an_untied_head_is_kept(tmp_path: Path) -> None:
    """A model whose output embeddings differ from its input embeddings scores with its own head, in float and int8."""
    model = tiny.write(tmp_path / "model", "llama", tie_word_embeddings=False)
    recipe = Recipe(("int8", "fp32"), task=factories.DECODER_TASK, probe=factories.PROBE, floor=0.9)
    make(Asset(str(model)), tmp_path / "bundle", recipe)  # compares with torch, and refuses what differs

    names = {w.name for w in onnx.load(tmp_path / "bundle" / "model.fp32.onnx").graph.initializer}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= names


def test_a_missing_head_is_named() -> None:
    """A graph that ends in anything but a product with a constant matrix has no vocabulary to score."""
    node = helper.make_node("Relu", ["x"], ["logits"])
    value = helper.make_tensor_value_info
    graph = helper.make_graph([node], "g", [value("x", TensorProto.FLOAT, [1])], [value("logits", TensorProto.FLOAT, [1])])
    with pytest.raises(DataError, match="no linear output head"):
        surgery.decoder_readout(graph)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (TASK.replace('"good"', '"splendid"'), "'splendid' is not in this model's vocabulary"),
        (TASK.replace("pattern", "patern"), "has no proper [task] table"),
        ("[other]", "has no proper [task] table"),
        (TASK.replace("{text} it was", "{text} " + "it was " * 40), "leaves no room for text"),
    ],
)
def test_a_task_that_does_not_fit_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str, message: str
) -> None:
    """Words the vocabulary lacks, malformed tasks and endless patterns are refused before any export."""
    assert export(model, tmp_path / "out", task=task) == 1
    assert message in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--variants", "int3"], "variant 'int3' does not exist"),
        (["--slots", "x_proj"], "no linear layer named 'x_proj'"),
        (["--probe", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["--task", "/nowhere.toml"], "cannot read /nowhere.toml"),
    ],
)
def test_wrong_choices_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """A variant, layer or file that does not exist is an error that names it."""
    assert export(model, tmp_path / "out", *more) == 1
    assert message in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize("gone", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
def test_missing_weights_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], gone: str) -> None:
    """Weights that are not in the file, the output head among them, are refused and not made up."""
    model = tiny.write(tmp_path / "model", "llama", tie_word_embeddings=False)
    weights = load_file(model / "model.safetensors")
    del weights[gone]
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    assert export(model, tmp_path / "out") == 1
    assert f"lacks 1 of the model's weights (first: {gone})" in capsys.readouterr().err
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize("damage", ["no tokenizer", "no weights", "garbage"])
def test_half_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str) -> None:
    """A folder without tokenizer or weights, or with garbage in their place, is an error of ours."""
    model = tiny.write(tmp_path / "model", "llama")
    if damage == "no tokenizer":
        for path in model.glob("*token*"):
            path.unlink()
    elif damage == "no weights":
        (model / "model.safetensors").unlink()
    else:
        (model / "model.safetensors").write_bytes(b"garbage")

    assert export(model, tmp_path / "out") == 1
    assert str(model) in capsys.readouterr().err
    assert left(tmp_path) == ["model"]


def test_somebody_elses_file_in_a_bundle_is_kept(model: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A bundle folder with a file that is not the bundle's is not replaced."""
    (copy / "thesis.txt").write_text("years of work")

    assert export(model, copy) == 1
    assert "holds other files (thesis.txt" in capsys.readouterr().err
    assert (copy / "thesis.txt").exists()


def test_the_folder_one_stands_in_is_replaced(model: Path, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-o .` in an older bundle puts the new one there."""
    monkeypatch.chdir(copy)
    make(Asset(str(model)), Path("."), Recipe(("fp32",), task=factories.DECODER_TASK, probe=factories.PROBE))

    assert [v.name for v in bundles.read(copy).variants] == ["fp32"]


def test_a_file_is_no_folder(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An output that is a file is refused before any work."""
    (tmp_path / "out").write_text("mine")

    assert export(model, tmp_path / "out") == 1
    assert "is a file" in capsys.readouterr().err


def test_a_tokenizer_that_starts_with_bos_is_followed(tmp_path: Path) -> None:
    """Where the tokenizer puts BOS before a text, so does the bundle."""
    from tokenizers import Tokenizer, processors

    model = tiny.write(tmp_path / "model", "llama")
    path = model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A", special_tokens=[("[CLS]", 1)])
    tokenizer.save(str(path))
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "[CLS]"}))
    made = make(Asset(str(model)), tmp_path / "out", Recipe(("fp32",), task=factories.DECODER_TASK, probe=factories.PROBE))

    assert made.bundle.prefix == (1,)
    engine = open_engine(tmp_path / "out", made.bundle)
    assert engine.encoder.shared == [1]
    whole = engine.logits_of(engine.encoder.prompts(["a film", "grim"]))
    np.testing.assert_allclose(engine.logits(["a film", "grim"]), whole, rtol=1e-4)


# Checking -------------------------------------------------------------------------------------------------------------
NAMES = ("model.int8.onnx", "model.fp32.onnx", "tokenizer.json", "golden.json", "golden.safetensors", "report.html")


@pytest.mark.parametrize("name", ["bundle.json", *NAMES])
def test_one_flipped_bit_is_found(copy: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """`check` ends with 1 and names the file, whichever it is."""
    assert main(["check", str(copy)]) == 0
    body = bytearray((copy / name).read_bytes())
    body[len(body) // 2] ^= 1
    (copy / name).write_bytes(body)

    assert main(["check", str(copy)]) == 1
    said = capsys.readouterr().err
    assert name in said or (name == "bundle.json" and "is not a bundle" in said)


def test_a_wrong_answer_is_found_even_where_hashes_fit(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A graph with other weights under a description made for it fails its golden vectors."""
    graph = onnx.load(copy / "model.int8.onnx")
    weight = next(w for w in graph.graph.initializer if w.name.endswith("o_proj/MatMul/scale"))
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 1.5, weight.name))
    onnx.save(graph, copy / "model.int8.onnx")
    redescribe(copy)

    assert main(["check", str(copy)]) == 1
    assert "int8: WRONG" in capsys.readouterr().out
    assert main(["check", str(copy), "--variant", "fp32"]) == 0


def redescribe(folder: Path, **changes: Any) -> None:
    """Writes the description anew with the hashes of what is there."""
    bundle = bundles.read(folder)
    files = {name: bundles.digest(folder / name) for name in bundle.files}
    bundles.write(folder, msgspec.structs.replace(bundle, files=files, **changes))


def test_a_bundle_of_a_newer_schema_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A description from the future says so, instead of being half understood."""
    body = (copy / "bundle.json").read_bytes().replace(f'"schema": {bundles.SCHEMA}'.encode(), b'"schema": 99')
    (copy / "bundle.json").write_bytes(body)

    assert main(["check", str(copy)]) == 1
    assert f"bundle schema 99 is not {bundles.SCHEMA}" in capsys.readouterr().err


def test_a_runtime_that_is_too_old_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant that needs a newer ONNX Runtime is left out with the command to get it; with no other, check fails."""
    variants = bundles.read(copy).variants
    new = msgspec.structs.replace(variants[0], minimum="999.1")
    redescribe(copy, variants=(new, variants[1]))

    assert main(["check", str(copy)]) == 0
    assert "int8: left out: variant 'int8' needs onnxruntime 999.1" in capsys.readouterr().out
    assert main(["check", str(copy), "--variant", "int8"]) == 1
    assert "no variant of this bundle runs on this machine" in capsys.readouterr().err


def test_a_model_that_does_not_load_is_wrong(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant whose file fits its hash and is no model fails the check, though another variant works."""
    (copy / "model.int8.onnx").write_bytes(b"garbage")
    redescribe(copy)

    assert main(["check", str(copy)]) == 1
    assert "int8: WRONG: ONNX Runtime" in capsys.readouterr().out


def test_answers_that_are_no_numbers_are_wrong() -> None:
    """NaN is never within the tolerance, without or with the adapter."""
    assert not golden.Outcome(0.0, float("nan"), 1.0).good
    assert not golden.Outcome(float("nan"), 0.0, 1.0).good
    assert golden.Outcome(0.5, 1.0, 1.0).good


def test_golden_vectors_of_another_bundle_do_not_pass(copy: Path) -> None:
    """Missing, garbled or foreign golden files are an error that asks for a new export."""
    bundle = bundles.read(copy)
    vectors, adapter = golden.read(copy, bundle)
    with pytest.raises(AssetError, match="no answers for variant 'q8_0'"):
        golden.check(open_engine(copy, bundle), "q8_0", vectors, adapter)
    with pytest.raises(AssetError, match="does not fit the bundle"):
        golden.read(copy, msgspec.structs.replace(bundle, slots=bundle.slots[1:]))
    (copy / golden.JSON).write_bytes(b"{}")
    with pytest.raises(AssetError, match="no readable golden vectors"):
        golden.read(copy, bundle)


def test_the_golden_adapter_changes_every_answer_beyond_the_tolerance(made: Path) -> None:
    """A client that ignores adapters cannot pass: every sequence's scores move by more than what is allowed."""
    vectors, _ = golden.read(made, bundles.read(made))
    for expected in vectors.expected.values():
        moved = np.abs(np.subtract(expected.base, expected.adapted)).max(axis=1)
        assert (moved > expected.tolerance).all()


def test_version_numbers_compare_as_numbers() -> None:
    """1.9 is older than 1.23, and 1.23 is no older than 1.23.0."""
    assert bundles.older("1.9.2", "1.23")
    assert not bundles.older("1.23", "1.23.0")
    assert not bundles.older("2.0", "1.23")
    assert not bundles.older("1.31.1", "1.23")
