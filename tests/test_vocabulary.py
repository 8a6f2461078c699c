"""`edge-export shrink --vocabulary`: a smaller tokenizer spells every text, and the model knows what its tokens mean."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from edge_export import shrink, source, vocabulary
from edge_export.bundle import Recipe
from edge_export.cli import main
from edge_export.shrink import Shrinking
from edge_sdk import bundle as bundles
from edge_sdk.assets import Asset
from edge_sdk.engines import open_engine
from edge_sdk.errors import DataError
from edge_sdk.training import base
from tests import (
    factories,
    strategies,  # noqa: F401  # its hypothesis profile
    tiny,
)
from tests.training_helpers import bench_of, job_of

SPECIAL = ("<unk>", "<start>", "<end>", "<pad>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SAID = "i n,Ġ t,h e,Ġt he,f i,Ġ fi,l m,Ġfi lm,Ġ w,a s,Ġw as,g o,Ġ go,o d,Ġgo od,b a,Ġ ba,Ġba d"
MERGES = [(a, b) for a, b in (pair.split(" ") for pair in SAID.split(","))]
NOUNS, FILLERS = ("film", "phone", "day", "story"), ("was", "was so", "was very")
TEXTS = [f"the {n} {f} {w} ." for n, f, w in product(NOUNS, FILLERS, ["good", "bad", *factories.GOOD + factories.BAD])]
LAYERS, OWN = 5, 300
SETTINGS = Shrinking(3, steps=10, batch_size=8, learning_rate=3e-3, threads=1, vocabulary=OWN, adapt_steps=60)
TASK = """
[task]
labels = ["negative", "positive"]
pattern = "{text} it was"
verbalizer = [[" bad"], [" good"]]
"""


def byte_level(tokens: list[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """Special tokens, then these, in this order."""
    ids = {token: i for i, token in enumerate([*SPECIAL, *tokens])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def learnt(count: int, missing: str = "") -> Tokenizer:
    """Bytes but these, and what the first `count` merges make."""
    merges = list(MERGES[:count])
    made = list(dict.fromkeys("".join(pair) for pair in merges))
    return byte_level([*(c for c in BYTES if c not in missing), *made], merges)


def teachers() -> Tokenizer:
    """320 tokens, the special ones last and backwards, so that every id changes in a smaller one."""
    texts = [*TEXTS, *["is it good or bad"] * 50]
    tokenizer = vocabulary.train(texts, 320, byte_level([*BYTES, *(f"unused{i}" for i in range(200))], []))
    state = json.loads(tokenizer.to_str())
    last = {token: 316 + i for i, token in enumerate(reversed(SPECIAL))}
    others = [token for token in sorted(state["model"]["vocab"], key=state["model"]["vocab"].get) if token not in SPECIAL]
    state["model"]["vocab"] = {token: i for i, token in enumerate(others)} | last
    state["added_tokens"] = [{**token, "id": last[token["content"]]} for token in reversed(state["added_tokens"])]
    made: Tokenizer = Tokenizer.from_str(json.dumps(state))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a byte-level tokenizer of 320 tokens, each sequence of which starts with `<start>`."""
    folder = tmp_path_factory.mktemp("vocabulary") / "model"
    tokenizer = teachers()
    start, end, pad = (tokenizer.token_to_id(token) for token in ("<start>", "<end>", "<pad>"))
    ids = {"bos_token_id": start, "eos_token_id": [end, start], "pad_token_id": pad}
    tiny.write(folder, "llama", num_hidden_layers=LAYERS, vocab_size=324, max_position_embeddings=256, **ids)
    tokenizer.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", start)])
    wrap: Any = transformers.PreTrainedTokenizerFast
    names = {"unk_token": "<unk>", "bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    wrap(tokenizer_object=tokenizer, chat_template="<start>{{ messages }}<end>", **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line leaves: `out` and `out-model`."""
    folder = tmp_path_factory.mktemp("made")
    assert run(model, folder) == 0
    return folder


def run(model: Path, folder: Path, *more: str, texts: str = "\n".join(TEXTS)) -> int:
    (folder / "task.toml").write_text(TASK)
    (folder / "public.txt").write_text(texts)
    sizes = ["--layers", "3", "--vocabulary", str(OWN), "--steps", "10", "--adapt-steps", "30", "--batch-size", "8"]
    files = ["--text", str(folder / "public.txt"), "--task", str(folder / "task.toml"), "--probe", str(factories.PROBE)]
    return main(["shrink", str(model), "-o", str(folder / "out"), "--variants", "fp32", "--threads", "1", *sizes, *files, *more])


SMALL = vocabulary.train(TEXTS, OWN, teachers())


def change(**changes: Any) -> Shrinking:
    return Shrinking(**{**{name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}, **changes})


# The tokenizer --------------------------------------------------------------------------------------------------------
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("😀👩🏽‍💻\x00\x1b\u202eé́▁Ġ<0x41>"), max_size=40))
def test_every_text_can_be_spelled(text: str) -> None:
    """Emoji, control characters and what no text held before come back as they were, and nothing is unknown."""
    ids = SMALL.encode(text).ids

    assert SMALL.decode(ids, skip_special_tokens=False) == text
    assert SMALL.token_to_id("<unk>") not in ids


def test_a_vocabulary_has_the_size_asked_for() -> None:
    """Special tokens first, in their order, then the bytes, then what the texts say most; no id is left out."""
    tokens = SMALL.get_vocab()

    assert sorted(tokens.values()) == list(range(OWN))
    assert [SMALL.id_to_token(i) for i in range(4)] == list(reversed(SPECIAL))
    assert [SMALL.id_to_token(i) for i in range(4, 260)] == BYTES
    assert {"Ġwas", "Ġfilm", "Ġvery"} <= tokens.keys()


def test_the_same_texts_give_the_same_tokenizer() -> None:
    """To the byte; other texts do not."""
    again, other = vocabulary.train(list(TEXTS), OWN, teachers()), vocabulary.train(TEXTS[:80], 270, teachers())

    assert again.to_str() == SMALL.to_str()
    assert other.get_vocab() != vocabulary.train(TEXTS[80:], 270, teachers()).get_vocab()


def test_a_smaller_vocabulary_is_the_beginning_of_a_larger() -> None:
    """What is merged does not depend on how much is."""
    smaller = vocabulary.train(TEXTS, 280, teachers()).get_vocab()

    assert smaller == {token: i for token, i in SMALL.get_vocab().items() if i < 280}


def test_special_tokens_keep_their_meaning() -> None:
    """They are found in texts and hidden in answers as before, and what is put around a text has their new ids."""
    old = teachers()
    template = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(name, old.token_to_id(name)) for name in ("<start>", "<end>")]
    )
    old.post_processor = processors.Sequence([processors.ByteLevel(), template])
    new = vocabulary.train(TEXTS, OWN, old)
    start, end = (new.token_to_id(token) for token in ("<start>", "<end>"))

    assert (start, end) != (old.token_to_id("<start>"), old.token_to_id("<end>"))
    assert new.encode("bad<end>day").ids == [start, *SMALL.encode("bad").ids, end, *SMALL.encode("day").ids, end]
    assert new.decode([start, *SMALL.encode("bad").ids, end]) == "bad"
    old.post_processor = processors.RobertaProcessing(*((name, old.token_to_id(name)) for name in ("<end>", "<start>")))
    assert vocabulary.train(TEXTS, OWN, old).encode("bad").ids == [start, *SMALL.encode("bad").ids, end]


def test_words_are_cut_as_the_teacher_cuts_them() -> None:
    """Normalizer and pre-tokenizer are the teacher's; padding and truncation, which know old ids, are gone."""
    old = teachers()
    old.normalizer = normalizers.Lowercase()
    old.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), old.pre_tokenizer])
    old.enable_padding(pad_id=319, pad_token=SPECIAL[3], length=9)
    new = vocabulary.train([*(text.upper() for text in TEXTS), *["in 2024 , 2024"] * 99], OWN, old)

    assert "Ġfilm" in new.get_vocab()
    assert not any(len(token) > 1 and token.isdigit() for token in new.get_vocab())
    assert new.encode("The FILM").tokens == new.encode("the film").tokens
    assert new.encode("2024").tokens == ["2", "0", "2", "4"]


def test_label_words_stay_whole() -> None:
    """A word that the old tokenizer has is a token of the new one, however rare in the texts; one it had not may be split."""
    rare = [text for text in TEXTS if "good" not in text]

    assert len(vocabulary.train(rare, OWN, teachers()).encode(" good").ids) > 1
    assert len(vocabulary.train(rare, OWN, teachers(), [" good"]).encode(" good").ids) == 1
    assert vocabulary.train(rare, OWN, teachers(), [" quixotic"]).to_str() == vocabulary.train(rare, OWN, teachers()).to_str()
    with pytest.raises(DataError, match="a vocabulary of 261 splits the label word ' good'; choose a larger one"):
        vocabulary.train(rare, 261, teachers(), [" good"])


@pytest.mark.parametrize("size", [257, 260, 320, 5000])
def test_sizes_out_of_reach_are_named(size: int) -> None:
    """Too few for bytes and special tokens, or no fewer than there were: both say what can be chosen."""
    with pytest.raises(DataError, match=f"vocabulary of {size} tokens cannot be made: choose 261 to 319, more than the 256"):
        vocabulary.train(TEXTS, size, teachers())


def test_too_few_texts_are_named() -> None:
    """What occurs once is no token; the message names a size that these texts do give."""
    with pytest.raises(DataError, match="too few for a vocabulary of 310: give more, or choose --vocabulary ") as said:
        vocabulary.train(TEXTS[:3], 310, teachers())
    most = int(str(said.value).rsplit(" ", 1)[1])

    tokens = vocabulary.train(TEXTS[:3], most, teachers()).get_vocab()
    assert len(tokens) == most
    assert not any("gr" in token for token in tokens)  # `great` is in one of the three


def test_only_byte_level_bpe_is_made_smaller() -> None:
    """Other tokenizers cannot spell every text, and an end of text that is an ordinary token would not be found again."""
    words = Tokenizer(models.WordLevel({"a": 0, SPECIAL[0]: 1}, unk_token=SPECIAL[0]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    plain = Tokenizer(models.BPE({"a": 0}, []))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    for other in (words, plain):
        with pytest.raises(DataError, match="is no byte-level BPE"):
            vocabulary.check(OWN, other)
    old = teachers()
    with pytest.raises(DataError, match="'Ġfilm' ends a text and is no special token"):
        vocabulary.check(OWN, old, [old.token_to_id("<end>"), old.token_to_id("Ġfilm")])
    vocabulary.check(OWN, old, [old.token_to_id("<end>"), 4000])


# The embeddings -------------------------------------------------------------------------------------------------------
def test_rows_are_the_means_of_what_spelled_them() -> None:
    """Worked out by hand: kept tokens keep their row, others are the mean of their pieces, a byte nobody had of all rows."""
    old, new = learnt(10, missing="Ā"), learnt(len(MERGES))
    table = torch.arange(2.0 * (old.get_vocab_size() + 3)).square().reshape(-1, 2)  # three rows without a token
    found = vocabulary.rows(old, new, table)

    def row(*tokens: str) -> torch.Tensor:
        return torch.stack([table[old.token_to_id(token)] for token in tokens]).mean(0)

    assert found.shape == (new.get_vocab_size(), 2)
    expected = {
        "<end>": row("<end>"),
        "Ġthe": row("Ġthe"),
        "Ġ": row("Ġ"),
        "Ġwas": row("Ġw", "as"),
        "Ġgood": row("Ġ", "g", "o", "o", "d"),
        "Ġbad": row("Ġ", "b", "a", "d"),
        "Ā": table[: old.get_vocab_size()].mean(0),
    }
    for token, wanted in expected.items():
        torch.testing.assert_close(found[new.token_to_id(token)], wanted, rtol=1e-6, atol=0)
    few = vocabulary.rows(old, new, table[: old.token_to_id("Ġw")])  # a model with fewer rows than its tokenizer has tokens
    torch.testing.assert_close(few[new.token_to_id("Ġwas")], few[new.token_to_id("Ā")])
    with_piece = byte_level([*BYTES, "Āi"], [("Ā", "i")])
    torch.testing.assert_close(vocabulary.rows(old, with_piece, table)[with_piece.token_to_id("Āi")], row("i"))


def test_a_model_reads_the_same_text_by_other_ids(model: Path) -> None:
    """Where only ids changed, every prediction is the old one under its new id; the table is tied still, the old model whole."""
    old = teachers()
    state = json.loads(old.to_str())
    ids = {token: 319 - i for token, i in old.get_vocab().items()}
    state["model"]["vocab"] = ids
    state["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in state["added_tokens"]]
    shuffled = Tokenizer.from_str(json.dumps(state))
    teacher: Any = base.load_path(model, "decoder")
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    student: Any = vocabulary.swap(teacher, old, shuffled)
    text = "the film was good"
    with torch.no_grad():
        theirs, ours = (
            m(input_ids=torch.tensor([t.encode(text).ids])).logits[0] for m, t in ((teacher, old), (student, shuffled))
        )

    order = [ids[old.id_to_token(i)] for i in range(320)]
    torch.testing.assert_close(ours[:, order], theirs[:, :320], rtol=1e-5, atol=1e-5)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert not student.training
    assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in before.items())
    assert teacher.config.vocab_size == 324


def test_tables_that_are_not_tied_are_translated_each() -> None:
    """Input and output embeddings stay two."""
    old, new = teachers(), SMALL
    teacher = tiny.build("llama", vocab_size=320, tie_word_embeddings=False)
    student: Any = vocabulary.swap(teacher, old, new)

    assert torch.equal(student.lm_head.weight, vocabulary.rows(old, new, teacher.lm_head.weight.detach()))
    assert torch.equal(student.model.embed_tokens.weight, vocabulary.rows(old, new, teacher.model.embed_tokens.weight.detach()))
    assert not torch.equal(student.lm_head.weight, student.model.embed_tokens.weight)


def test_ids_of_the_configuration_follow(model: Path) -> None:
    """Begin, end and padding are the same tokens under their new ids, one or several; what was no token is none."""
    old, new = teachers(), SMALL
    teacher: Any = base.load_path(model, "decoder")
    teacher.config.unk_token_id, teacher.config.sep_token_id, teacher.config.cls_token_id = 319, -1, 4000
    teacher.config.eos_token_id = [old.token_to_id("<end>"), 4000]
    config: Any = vocabulary.swap(teacher, old, new).config

    assert (config.bos_token_id, config.eos_token_id) == (new.token_to_id("<start>"), [new.token_to_id("<end>")])
    assert (config.pad_token_id, config.unk_token_id) == (new.token_to_id("<pad>"), new.token_to_id("<unk>"))
    assert (config.sep_token_id, config.cls_token_id, config.vocab_size) == (None, None, OWN)


# The shrunk model -----------------------------------------------------------------------------------------------------
def adapted(model: Path, folder: Path, **changes: Any) -> shrink.Taught:
    return shrink.teach(Asset(str(model)), folder, change(**changes), TEXTS, lambda _: None)


def test_adapting_learns_what_it_was_not_shown(model: Path, tmp_path: Path) -> None:
    """Held-out text costs fewer nats a byte afterwards, and only the table has become smaller."""
    taught = adapted(model, tmp_path / "m")
    teacher, _, distilled, own, after = taught.stages

    assert [s.name for s in taught.stages] == ["teacher", "dropped", "distilled", "own vocabulary", "adapted"]
    assert [s.vocabulary for s in taught.stages] == [324, 324, 324, OWN, OWN]
    assert own.parameters == after.parameters == distilled.parameters - (324 - OWN) * 32
    assert after.nats_per_byte < 0.5 * own.nats_per_byte
    assert after.nats_per_byte < teacher.nats_per_byte


def test_adapting_moves_every_weight(model: Path) -> None:
    """The embeddings too, which distillation leaves alone."""
    student: Any = base.load_path(model, "decoder")
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    ids = [row.ids for row in shrink.rows_of(TEXTS, source.tokenizer_of(model), [], 64)]
    told: list[tuple[int, int]] = []
    shrink.adapt(student, ids, change(adapt_steps=2), lambda done, steps, _: told.append((done, steps)))

    assert not any(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert not any(p.requires_grad for p in student.parameters())
    assert told == [(1, 2), (2, 2)]


def test_held_out_texts_shape_no_token(model: Path, tmp_path: Path) -> None:
    """A word that only held-out texts use is spelled in pieces."""
    texts = [text if i % 8 else text + 9 * " zyxwvutsrq" for i, text in enumerate(TEXTS)]
    shrink.teach(Asset(str(model)), tmp_path / "m", change(steps=0, adapt_steps=0), texts, lambda _: None)

    assert not any("zy" in token for token in source.tokenizer_of(tmp_path / "m").get_vocab())


def test_the_limit_of_weights_is_for_the_finished_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that will be cut does not count whole."""
    student = shrink.drop(base.load_path(model, "decoder"), (0, 2, 4))
    finished = base.count_parameters(student) - (324 - OWN) * 32
    monkeypatch.setattr("edge_export.bundle.MOST_PARAMETERS", finished)

    assert adapted(model, tmp_path / "m", steps=0, adapt_steps=0).stages[-1].parameters == finished
    monkeypatch.setattr("edge_export.bundle.MOST_PARAMETERS", finished - 1)
    with pytest.raises(DataError, match=f"{finished:,} weights are too many"):
        adapted(model, tmp_path / "n", steps=0, adapt_steps=0)


def test_the_folder_reads_as_any_other(made: Path) -> None:
    """Names of special tokens, chat template, ids in both configurations, the start of a sequence: all as the teacher's."""
    folder = made / "out-model"
    tokenizer = source.tokenizer_of(folder)
    said, generation = (json.loads((folder / name).read_bytes()) for name in ("config.json", "generation_config.json"))
    ids = {name: tokenizer.convert_tokens_to_ids(f"<{name}>") for name in ("start", "end", "pad", "unk")}

    assert len(tokenizer) == said["vocab_size"] == OWN
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<start>", "<end>", "<pad>")
    assert (tokenizer.unk_token, tokenizer.chat_template) == ("<unk>", "<start>{{ messages }}<end>")
    for config in (said, generation):
        assert (config["bos_token_id"], config["pad_token_id"]) == (ids["start"], ids["pad"])
        assert config["eos_token_id"] == [ids["end"], ids["start"]]
    assert tokenizer("the film").input_ids[0] == ids["start"]
    assert tokenizer.decode(tokenizer("the film 😀").input_ids, skip_special_tokens=True) == "the film 😀"


def test_the_bundle_is_like_any_other(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It checks out; begin, end, label words and table are the new tokens'; it classifies, writes, and learns."""
    assert main(["check", str(made / "out")]) == 0
    bundle = bundles.read(made / "out")
    tokenizer = source.tokenizer_of(made / "out-model")
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<start>", "<end>"))

    assert (bundle.prefix, bundle.end) == ((start,), tuple(sorted((start, end))))
    assert bundle.label_ids == tuple((tokenizer.convert_tokens_to_ids(word),) for word in ("Ġbad", "Ġgood"))
    assert len(base.load_vocabulary(made / "out")) == OWN
    engine = open_engine(made / "out", bundle)
    assert np.isfinite(engine.logits(["a film 😀"])).all()
    assert isinstance(engine.generate("the film"), str)
    bench = bench_of(made / "out", layers=3)
    assert bench.learner.fit(job_of(bench, 12))[1] < bench.learner.fit(job_of(bench, 1))[1]


def test_people_and_scripts_see_both_stages(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """History and table have a row before and after adapting, and what compares across tokenizers."""
    history = json.loads((made / "out-model" / shrink.NAME).read_bytes())
    assert (history["settings"]["vocabulary"], history["settings"]["adapt_steps"]) == (OWN, 30)
    assert [s["name"] for s in history["taught"]["stages"]][3:] == ["own vocabulary", "adapted"]
    stages = tuple(shrink.Stage(**stage) for stage in history["taught"]["stages"])
    shrink.show(shrink.Taught((0, 2, 4), stages, 100, 10, 1.0))
    shown = capsys.readouterr().out

    assert "nats per byte" in shown
    assert f"{stages[4].nats_per_byte:.2f}" in next(line for line in shown.splitlines() if "adapted" in line)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocabulary", "400"], "choose 261 to 319"),
        (["--vocabulary", "260"], "choose 261 to 319"),
        (["--adapt-steps", "-1"], "adapt_steps must be 0 to 100000"),
    ],
)
def test_wrong_sizes_are_named_before_any_training(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    """Nothing is loaded, and nothing is left."""
    assert run(model, tmp_path, *more) == 1
    said = capsys.readouterr().err
    assert message in said
    assert "loading the weights" not in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["public.txt", "task.toml"]


def test_texts_that_give_too_few_tokens_are_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Enough texts to learn from, but of two words: said before the weights are loaded."""
    assert run(model, tmp_path, texts="\n".join("film " * n + "day" for n in range(100))) == 1
    said = capsys.readouterr().err
    assert f"the texts are too few for a vocabulary of {OWN}: give more, or choose --vocabulary 2" in said
    assert "loading the weights" not in said


def test_a_shrunk_vocabulary_runs_in_llama_cpp(model: Path, tmp_path: Path) -> None:
    """A GGUF variant is made of it as of any other model, and scores like ONNX Runtime."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    recipe = Recipe(("fp32", "q8_0"), task=factories.DECODER_TASK, probe=factories.PROBE, floor=0.9)
    shrink.make(Asset(str(model)), tmp_path / "out", change(steps=1, adapt_steps=1), TEXTS, recipe)
    exact, coarse = (open_engine(tmp_path / "out", bundles.read(tmp_path / "out"), variant=name) for name in ("fp32", "q8_0"))

    np.testing.assert_allclose(coarse.logits(TEXTS[:4]), exact.logits(TEXTS[:4]), atol=0.3)
