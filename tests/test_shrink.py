"""`edge-export shrink`: a few layers of a model, taught by the whole of it, are a bundle like any other."""

from __future__ import annotations

import argparse
import copy
import json
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from torch import nn

from edge_export import shrink, source
from edge_export.bundle import Recipe
from edge_export.cli import _parser, main
from edge_export.shrink import Row, Shrinking
from edge_sdk import bundle as bundles
from edge_sdk.assets import Asset
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError, SettingsError
from edge_sdk.tokens import Ids
from edge_sdk.training import base
from tests import (
    factories,
    strategies,  # noqa: F401  # its hypothesis profile
    tiny,
)
from tests.training_helpers import bench_of, job_of

LAYERS, KEPT = 7, (0, 2, 4, 6)
NOUNS, FILLERS = ("film", "phone", "day", "story"), ("was", "was so", "was very")
TEXTS = [f"the {n} {f} {w} ." for n, f, w in product(NOUNS, FILLERS, factories.GOOD + factories.BAD)]
SETTINGS = Shrinking(4, steps=30, batch_size=8, learning_rate=3e-3, threads=1)
TASK = """
[task]
labels = ["negative", "positive"]
pattern = "{text} it was"
verbalizer = [["bad"], ["good"]]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("shrink") / "model", "llama", num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def teacher(model: Path) -> nn.Module:
    return base.load_path(model, "decoder").requires_grad_(False)


@pytest.fixture(scope="module")
def rows(model: Path) -> list[Ids]:
    return [row.ids for row in shrink.rows_of(TEXTS, source.tokenizer_of(model), [], 128)]


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line leaves: `out`, `out-model` and what it printed."""
    folder = tmp_path_factory.mktemp("made")
    assert run(model, folder, "--json") == 0
    return folder


def run(model: Path, folder: Path, *more: str, texts: str = "\n".join(TEXTS)) -> int:
    (folder / "task.toml").write_text(TASK)
    (folder / "public.txt").write_text(texts)
    options = ["--layers", "4", "--steps", "20", "--batch-size", "8", "--threads", "1", "--variants", "fp32"]
    files = ["--text", str(folder / "public.txt"), "--task", str(folder / "task.toml"), "--probe", str(factories.PROBE)]
    return main(["shrink", str(model), "-o", str(folder / "out"), *options, *files, *more])


def perplexity(model: nn.Module, rows: list[Ids]) -> float:
    return shrink.judged("", model, [Row(ids, "", 1) for ids in rows]).perplexity


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("task.toml", "public.txt"))


# Layers ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("of", "layers", "kept"),
    [
        (30, 10, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29)),
        (30, 12, (0, 3, 5, 8, 11, 13, 16, 18, 21, 24, 26, 29)),
        (30, 2, (0, 29)),
        (4, 3, (0, 2, 3)),
        (3, 2, (0, 2)),
    ],
)
def test_layers_are_kept_at_an_even_stride(of: int, layers: int, kept: tuple[int, ...]) -> None:
    """Worked out by hand; a half is rounded up."""
    assert shrink.even(of, layers) == kept


@given(st.integers(3, 200).flatmap(lambda of: st.tuples(st.just(of), st.integers(2, of - 1))))
def test_the_stride_is_even(sizes: tuple[int, int]) -> None:
    """The first and the last layer are kept, none twice, and no gap is a whole layer off the stride."""
    of, layers = sizes
    kept = shrink.even(of, layers)
    stride = (of - 1) / (layers - 1)

    assert (kept[0], kept[-1], len(kept)) == (0, of - 1, layers)
    assert all(abs(b - a - stride) < 1 and b > a for a, b in pairwise(kept))
    assert all(abs(layer - i * stride) <= 0.5 + 1e-9 for i, layer in enumerate(kept))


@pytest.mark.parametrize("layers", [0, 1, 30, 31])
def test_as_many_layers_as_there_are_is_no_shrinking(layers: int) -> None:
    """Fewer than two, or all of them, are refused with what can be chosen."""
    with pytest.raises(DataError, match="choose 2 to 29"):
        shrink.even(30, layers)


def test_what_is_kept_is_the_teachers(teacher: nn.Module) -> None:
    """Before distillation every weight is bit for bit that of its layer, in memory of its own; the teacher stays whole."""
    whole: Any = teacher
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    student: Any = shrink.drop(teacher, KEPT)

    assert student.config.num_hidden_layers == len(student.model.layers) == len(KEPT)
    for layer, kept in zip(student.model.layers, KEPT, strict=True):
        own, theirs = layer.state_dict(), whole.model.layers[kept].state_dict()
        assert own.keys() == theirs.keys()
        assert all(torch.equal(own[name], theirs[name]) and own[name] is not theirs[name] for name in own)
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == list(range(len(KEPT)))
    assert torch.equal(student.model.norm.weight, whole.model.norm.weight)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    with torch.no_grad():
        student.model.embed_tokens.weight.zero_()
        student.model.layers[0].mlp.up_proj.weight.zero_()
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in before.items())


# Losses ---------------------------------------------------------------------------------------------------------------
def test_divergence_counts_what_the_teacher_excludes() -> None:
    """KL over two of four tokens and the rest as one, worked out by hand; 0 where both agree."""
    teacher = torch.tensor([[0.5, 0.3, 0.1, 0.1]]).log()
    logprobs, ids = teacher.topk(2)
    student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log() + 3  # logits, not normalized
    by_hand = 0.5 * np.log(0.5 / 0.25) + 0.3 * np.log(0.3 / 0.25) + 0.2 * np.log(0.2 / 0.5)

    assert shrink.divergence(student, ids, logprobs).item() == pytest.approx(by_hand, abs=1e-5)
    assert shrink.divergence(teacher + 1, ids, logprobs).item() == pytest.approx(0, abs=1e-5)


def test_divergence_over_the_whole_vocabulary_is_finite() -> None:
    """Where the k tokens are all there are, nothing is left over, and neither value nor gradient is infinite."""
    logits = torch.tensor([[30.0, 0.0]], requires_grad=True)
    logprobs, ids = torch.tensor([[1.0, 2.0]]).log_softmax(1).topk(2)
    loss = shrink.divergence(logits, ids, logprobs).sum()
    loss.backward()  # type: ignore[no-untyped-call]

    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_distance_is_relative_at_each_position() -> None:
    """A position a hundred times as large counts as any other."""
    teacher = torch.tensor([[100.0, 100.0], [1.0, 1.0]])
    found = shrink.distance(teacher * torch.tensor([[1.1], [1.2]]), teacher)

    np.testing.assert_allclose(found.numpy(), [0.01, 0.04], rtol=1e-4)


def test_the_rate_rises_and_falls() -> None:
    """A tenth of the steps up, then down to nearly nothing, never above 1."""
    rates = [shrink.rate(step, 100) for step in range(100)]

    assert rates[0] == pytest.approx(0.1)
    assert max(rates) <= 1
    assert max(range(100), key=rates.__getitem__) == 9
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001


def test_perplexity_is_that_of_transformers(teacher: nn.Module, rows: list[Ids]) -> None:
    """exp of the mean loss that transformers computes itself, weighted by tokens."""
    whole: Any = teacher
    some = [rows[0], rows[40][:3], rows[100]]
    losses = [float(whole(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss) for ids in some]
    counts = [len(ids) - 1 for ids in some]

    assert perplexity(teacher, some) == pytest.approx(np.exp(np.average(losses, weights=counts)), rel=1e-4)


# Distillation ---------------------------------------------------------------------------------------------------------
def taught(teacher: nn.Module, rows: list[Ids], settings: Shrinking) -> nn.Module:
    student = shrink.drop(teacher, KEPT)
    shrink.distil(teacher, student, KEPT, rows, settings)
    return student


def change(**changes: Any) -> Shrinking:
    return Shrinking(**{**{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}, **changes})


def test_nothing_is_lost_with_layers_that_do_nothing(teacher: nn.Module, rows: list[Ids]) -> None:
    """Where the dropped layers pass on what they read, the rest is the teacher, and no layer has anything to learn from it."""
    whole: Any = copy.deepcopy(teacher)
    for layer in set(range(LAYERS)) - set(KEPT):
        for part in (whole.model.layers[layer].self_attn.o_proj, whole.model.layers[layer].mlp.down_proj):
            nn.init.zeros_(part.weight)
    student = shrink.drop(whole, KEPT)
    losses: list[float] = []
    settings = change(steps=1, lm=0.0)
    shrink.distil(whole, student, KEPT, rows, settings, lambda done, steps, loss: losses.append(loss))

    assert losses == [pytest.approx(0, abs=1e-4)]
    assert perplexity(shrink.drop(whole, KEPT), rows) == pytest.approx(perplexity(whole, rows), rel=1e-4)


def test_distillation_learns_what_it_was_not_shown(teacher: nn.Module, rows: list[Ids]) -> None:
    """Held-out perplexity falls; the embeddings are the teacher's still, everything else has moved."""
    learn, judge = shrink.hold_out(rows)
    before = shrink.drop(teacher, KEPT)
    after = taught(teacher, learn, SETTINGS)

    assert perplexity(after, judge) < 0.8 * perplexity(before, judge)
    moved = {name: not torch.equal(p, dict(before.named_parameters())[name]) for name, p in after.named_parameters()}
    assert moved.pop("model.embed_tokens.weight") is False
    assert all(moved.values())


@pytest.mark.parametrize("weights", [(0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_each_way_of_distilling_comes_nearer_to_the_teacher(
    teacher: nn.Module, rows: list[Ids], weights: tuple[float, float, float]
) -> None:
    """Without any look at the texts' own next tokens, the student's held-out predictions move towards the teacher's."""
    learn, judge = shrink.hold_out(rows)
    lm, kd, hidden = weights

    def gap(student: Any) -> float:
        whole: Any = teacher
        ids = torch.tensor(judge[0])[None]
        with torch.no_grad():
            p, q = whole(input_ids=ids).logits[0].log_softmax(1), student(input_ids=ids).logits[0].log_softmax(1)
        return float((p.exp() * (p - q)).sum(1).mean())

    assert gap(taught(teacher, learn, change(lm=lm, kd=kd, hidden=hidden))) < gap(shrink.drop(teacher, KEPT))


def test_the_seed_decides_everything(teacher: nn.Module, rows: list[Ids]) -> None:
    """The same seed gives the same bits, another one does not; torch's own randomness is neither used nor moved."""
    torch.manual_seed(1)
    first = taught(teacher, rows, change(steps=4)).state_dict()
    drawn = torch.rand(1)
    torch.manual_seed(1)

    assert torch.equal(drawn, torch.rand(1))
    second, other = (taught(teacher, rows, change(steps=4, seed=seed)).state_dict() for seed in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_micro_batches_change_nothing(teacher: nn.Module, rows: list[Ids], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step whose texts do not fit into memory at once moves the weights as one whose texts do."""
    texts = [ids for ids in rows if len(ids) == len(rows[0])]
    whole = taught(teacher, texts, change(steps=2)).state_dict()
    monkeypatch.setattr(shrink, "MICRO_TOKENS", 16)
    parts = taught(teacher, texts, change(steps=2)).state_dict()

    assert all(torch.allclose(whole[name], parts[name], atol=2e-4) for name in whole)


def test_a_loss_that_explodes_is_named(teacher: nn.Module, rows: list[Ids]) -> None:
    """An endless loss stops the training and says what to lower."""
    broken = copy.deepcopy(shrink.drop(teacher, KEPT))
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(DataError, match="smaller --learning-rate"):
        shrink.distil(teacher, broken, KEPT, rows, SETTINGS)


# Text -----------------------------------------------------------------------------------------------------------------
def test_texts_are_cleaned(tmp_path: Path) -> None:
    """Control characters, blanks, empty lines, repetitions and what is longer than anybody reads are dropped."""
    (tmp_path / "a").write_bytes("\ufeffone\x00 two\x1b[0m\r\n\n  one   two [0m \nüber\u202e\n".encode())
    (tmp_path / "b").write_text("x" * 10_000)

    assert shrink.read([tmp_path / "a", tmp_path / "b"]) == ["one two [0m", "über", "x" * shrink.MAX_LINE]


@pytest.mark.parametrize(
    ("body", "message"), [(b"\xff\xfe", "is not UTF-8"), (b"x" * 11, "is larger than"), (None, "cannot read")]
)
def test_files_that_are_no_text_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes | None, message: str
) -> None:
    """Other encodings, files out of all proportion and missing ones are errors of ours."""
    monkeypatch.setattr(shrink, "MAX_FILE", 10)
    if body is not None:
        (tmp_path / "a").write_bytes(body)
    with pytest.raises(DataError, match=message):
        shrink.read([tmp_path / "a"])


def test_pythons_manual_is_enough() -> None:
    """Without any file there are a thousand paragraphs, none of them twice."""
    texts = shrink.manual()

    assert len(texts) == len(set(texts)) > 1000
    assert all(shrink.clean(text) == text for text in texts)


@given(st.integers(shrink.LEAST_TEXTS, 3000))
def test_held_out_texts_are_not_learnt(count: int) -> None:
    """Every text is on one side, at most 128 and at least 8 judge."""
    rows = [[i, i] for i in range(count)]
    learn, judge = shrink.hold_out(rows)

    assert sorted(learn + judge) == rows
    assert 8 <= len(judge) <= shrink.HELD_OUT


def test_rows_are_cut_and_begin_as_the_model_wants(model: Path) -> None:
    """The start is counted, and texts without a next token are left out."""
    tokenizer = source.tokenizer_of(model)

    assert [len(row.ids) for row in shrink.rows_of(["the film was great", "film", ""], tokenizer, [], 3)] == [3]
    assert [row.ids[:1] for row in shrink.rows_of(["the film was great", "film"], tokenizer, [1], 3)] == [[1], [1]]


def test_rows_know_what_they_say(model: Path) -> None:
    """Text and bytes are those of the tokens that are left; the bytes of a first token that nothing predicts are not counted."""
    tokenizer = source.tokenizer_of(model)
    first, started = (shrink.rows_of(["the über film was"], tokenizer, prefix, 3)[0] for prefix in ([], [1]))

    assert (first.text, first.size) == ("the über film", len(" über film".encode()))
    assert (started.text, started.size) == ("the über", len("the über".encode()))


def test_nats_per_byte_are_those_of_all_predicted_tokens(teacher: nn.Module, rows: list[Ids]) -> None:
    """The logarithm of the perplexity, times the tokens predicted, over the bytes they say."""
    found = shrink.judged("x", teacher, [Row(rows[0], "", 7), Row(rows[40], "", 4)])
    tokens = len(rows[0]) + len(rows[40]) - 2

    assert found.nats_per_byte == pytest.approx(np.log(found.perplexity) * tokens / 11, rel=1e-6)
    assert (found.name, found.layers, found.vocabulary) == ("x", LAYERS, tiny.SIZES["vocab_size"])


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model_type", ["bert", "qwen2", "gemma3_text"])
def test_another_architecture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str) -> None:
    """Encoders, and decoders nobody tried this on, are refused with what is supported."""
    tiny.write(tmp_path / "model", model_type)

    assert run(tmp_path / "model", tmp_path) == 1
    assert f"a {model_type!r} model cannot be shrunk; supported are decoders of type llama" in capsys.readouterr().err
    assert left(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--layers", "7"], "choose 2 to 6"),
        (["--layers", "1"], "layers must be 2 to 1000"),
        (["--learning-rate", "2"], "learning_rate must be in (0, 1]"),
        (["--vocabulary", "256"], "vocabulary must be 257 to 1000000"),
        (["--vocabulary", "300"], "is no byte-level BPE"),
        (["--variants", "int3"], "variant 'int3' does not exist"),
        (["--text", "/nowhere.txt"], "cannot read /nowhere.txt"),
        (["--probe", "/nowhere.jsonl"], "nowhere.jsonl"),
        (["--keep-model", "OUT/model"], "lie in each other"),
        (["--keep-model", "OUT/.."], "lie in each other"),
    ],
)
def test_wrong_choices_are_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """What cannot work is said before any training, and nothing is left behind."""
    assert run(model, tmp_path, *(word.replace("OUT", str(tmp_path / "out")) for word in more)) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "distilling" not in said
    assert left(tmp_path) == []


def test_too_few_texts_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An empty file of texts is no wish for Python's manual."""
    assert run(model, tmp_path, texts="\n") == 1
    assert "0 texts of two tokens or more are too few; give at least 64" in capsys.readouterr().err
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", ["out", "out-model"])
def test_somebody_elses_files_are_kept(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Neither the bundle nor its model replaces a folder with anything else in it."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "thesis.txt").write_text("years of work")

    assert run(model, tmp_path) == 1
    assert "holds other files (thesis.txt" in capsys.readouterr().err
    assert (tmp_path / name / "thesis.txt").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        *({"layers": n} for n in (1, 1001)),
        *({"steps": n} for n in (-1, 100_001)),
        *({"batch_size": n} for n in (0, 4097)),
        *({"learning_rate": x} for x in (0.0, 1.1, float("nan"))),
        *({name: x} for name in ("lm", "kd", "hidden") for x in (-0.1, float("inf"))),
        {"lm": 0.0, "kd": 0.0, "hidden": 0.0},
        *({"tokens": n} for n in (1, 4097)),
        *({"top_k": n} for n in (0, 1025)),
        {"clip": 0.0},
        {"seed": -1},
        {"threads": 0},
        *({"vocabulary": n} for n in (-1, 1, 256, 1_000_001)),
        *({"adapt_steps": n} for n in (-1, 100_001)),
    ],
)
def test_settings_have_bounds(wrong: dict[str, Any]) -> None:
    """Numbers that make no sense are refused where they are written."""
    with pytest.raises(SettingsError):
        change(**wrong)


# The bundle -----------------------------------------------------------------------------------------------------------
def test_the_command_line_has_the_same_defaults() -> None:
    """What `--help` says is what the settings say."""
    args: argparse.Namespace = _parser().parse_args(["shrink", "smollm2", "-o", "out", "--layers", "12"])
    settings = Shrinking(12)

    for name in ("layers", "steps", "batch_size", "learning_rate", "seed", "threads", "vocabulary", "adapt_steps"):
        assert getattr(args, name) == getattr(settings, name)


def test_a_shrunk_bundle_checks_out(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The bundle passes `check`, an engine opens it, and its base is the folder beside it, with the weights it was made of."""
    assert left(made) == ["out", "out-model"]
    assert main(["check", str(made / "out")]) == 0
    bundle = bundles.read(made / "out")
    weights: Any = base.load(bundle)

    assert (bundle.layers, bundle.base) == (4, str(made / "out-model"))
    assert bundle.parameters == base.count_parameters(weights)
    stored = load_file(made / "out" / bundles.layer_file(2))["mlp.up_proj.weight"].float()
    assert torch.allclose(stored, weights.model.layers[2].mlp.up_proj.weight, atol=1e-2)
    assert np.isfinite(open_engine(made / "out", bundle).logits(["a lovely film"])).all()


def test_a_shrunk_bundle_is_trained_at_all_its_layers(made: Path) -> None:
    """A device trains every layer of it, and its loss falls."""
    bench = bench_of(made / "out", layers=4)
    arrays, loss = bench.learner.fit(job_of(bench, 12))

    assert len({slot.layer for slot in bench.spec.slots}) == 4
    assert any(np.abs(array).max() > 0 for name, array in arrays.items() if "lora_B" in name)
    assert loss < bench.learner.fit(job_of(bench, 1))[1]


@pytest.mark.slow
def test_people_and_scripts_see_what_it_came_to(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages on stderr, a table or JSON on stdout, the same in the model's folder; a second run replaces the first."""
    assert run(model, tmp_path, "--json", "--steps", "3") == 0
    said = json.loads(capsys.readouterr().out)
    history = json.loads((tmp_path / "out-model" / shrink.NAME).read_bytes())

    assert said["kept"] == history["taught"]["kept"] == list(KEPT)
    assert [(s["name"], s["layers"]) for s in said["stages"]] == [("teacher", 7), ("dropped", 4), ("distilled", 4)]
    assert said["stages"][2]["perplexity"] != said["stages"][1]["perplexity"]
    assert said["model"] == str(tmp_path / "out-model")
    assert history["settings"]["steps"] == 3

    assert run(model, tmp_path, "--steps", "0") == 0
    shown = capsys.readouterr()
    assert "perplexity" in shown.out
    assert "keeping 4 of 7 layers: 0, 2, 4, 6" in shown.err
    assert json.loads((tmp_path / "out-model" / shrink.NAME).read_bytes())["settings"]["steps"] == 0
    assert left(tmp_path) == ["out", "out-model"]


def test_a_terminal_shows_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Stages stay on the screen, the present step stands beside the bar."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with shrink.progress() as (say, tell):
        say("loading")
        tell(2, 3, 1.5)
    shown = capsys.readouterr().err

    assert "loading" in shown
    assert "step 2 of 3, loss 1.500" in shown


def test_elsewhere_each_tenth_is_a_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A log of a hundred steps has ten lines."""
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    with shrink.progress() as (_, tell):
        for step in range(100):
            tell(step + 1, 100, 2.0)
    lines = capsys.readouterr().err.splitlines()

    assert (len(lines), lines[0]) == (10, "step 10 of 100, loss 2.000")


def test_a_failed_export_leaves_the_older_model(made: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bundle cannot be made, bundle and model are byte for byte what they were."""
    before = {p: p.read_bytes() for name in ("out", "out-model") for p in (made / name).iterdir()}

    def fail(*_: Any) -> Any:
        raise DataError("below the floor")

    monkeypatch.setattr("edge_export.bundle.make", fail)
    with pytest.raises(DataError, match="below the floor"):
        shrink.make(Asset(str(model)), made / "out", change(steps=1), TEXTS, Recipe(("fp32",)))

    assert {p: p.read_bytes() for name in ("out", "out-model") for p in (made / name).iterdir()} == before
    assert not list(made.glob(".shrink-*"))


def test_a_failed_export_does_not_lose_a_new_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there was none before, the trained model stays, and `bundle` can go on from there."""

    def fail(*_: Any) -> Any:
        raise DataError("below the floor")

    monkeypatch.setattr("edge_export.bundle.make", fail)
    with pytest.raises(DataError, match="below the floor"):
        shrink.make(Asset(str(model)), tmp_path / "out", change(steps=1), TEXTS, Recipe(("fp32",)), tmp_path / "kept")

    assert left(tmp_path) == ["kept"]
    assert len(base.load_path(tmp_path / "kept", "decoder").model.layers) == 4  # type: ignore[union-attr,arg-type]


def test_a_shrunk_model_runs_in_llama_cpp(model: Path, tmp_path: Path) -> None:
    """A GGUF variant is made of it as of any other model, and scores like ONNX Runtime."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    recipe = Recipe(("fp32", "q8_0"), task=factories.DECODER_TASK, probe=factories.PROBE, floor=0.9)
    shrink.make(Asset(str(model)), tmp_path / "out", change(steps=1), TEXTS, recipe)
    exact, coarse = (open_engine(tmp_path / "out", bundles.read(tmp_path / "out"), variant=name) for name in ("fp32", "q8_0"))

    np.testing.assert_allclose(coarse.logits(TEXTS[:4]), exact.logits(TEXTS[:4]), atol=0.3)


def test_a_tokenizer_out_of_a_gguf_file_adds_no_bos(model: Path, tmp_path: Path) -> None:
    """Such tokenizers add BOS, which the model was not trained with; the shrunk model's folder does not, and reads alike."""
    tokenizer = source.tokenizer_of(model)
    tokenizer.add_special_tokens({"bos_token": "[CLS]"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    assert source.frame(tokenizer, "decoder", gguf=False) == ((1,), ())
    for gguf, prefix in ((True, ()), (False, (1,))):
        shrink._portable(tokenizer, gguf).save_pretrained(tmp_path / f"{gguf}")
        found = source.tokenizer_of(tmp_path / f"{gguf}")
        assert source.frame(found, "decoder", gguf=False) == (prefix, ())
        assert found(TEXTS[0]).input_ids == [*prefix, *tokenizer(TEXTS[0], add_special_tokens=False).input_ids]


def test_torch_is_left_as_it_was(model: Path, tmp_path: Path) -> None:
    """Threads and precision of the training are not those of what comes after it."""
    torch.set_float32_matmul_precision("highest")
    threads = torch.get_num_threads()
    shrink.teach(Asset(str(model)), tmp_path / "m", change(steps=1, threads=threads + 1), TEXTS, lambda _: None)

    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_num_threads() == threads
