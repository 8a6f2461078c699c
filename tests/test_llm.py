"""The LLM on a model of a few thousand parameters: the losses by hand, what is frozen, what is learned, what is kept."""

from __future__ import annotations

import json
import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.engines import Sampling
from edge_sdk.errors import DataError
from edge_sdk.tokens import PromptEncoder
from edge_server.llm.jobs import Good, Labelled, Lessons, LlmSettings, Pair, Tuning
from edge_server.llm.model import Frozen, Llm, _contrast
from edge_server.llm.quotation import inside
from edge_server.llm.writing import choose, continuations
from tests import factories, tiny

SETTINGS = LlmSettings(layers=2, rank=4, alpha=8.0, threads=1)
GOOD = Good("the film was", "great and lovely", 1.0)
PAIRS = (Pair("the film was", "great", "awful"), Pair("the day was", "lovely", "grim"))
LABELLED = (Labelled("the film was great", (0.1, 0.9)), Labelled("the film was awful", (0.9, 0.1)))
LEASH = ("the phone was so very good .", "it was a story")
QUICK = Tuning(steps=30, batch_size=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("llm"), "llama")


@pytest.fixture
def llm(folder: Path) -> Llm:
    return Llm(folder, factories.DECODER_TASK, SETTINGS)


def only(**weights: float) -> Tuning:
    """One loss of the four."""
    off = {"generation": 0.0, "contrast_weight": 0.0, "task": 0.0, "leash": 0.0}
    return msgspec.structs.replace(QUICK, **{**off, **weights})


def likelihood(llm: Llm, prompt: str, text: str) -> float:
    """Mean log-probability of a text's tokens."""
    said = llm._said(prompt, text)
    ids = torch.tensor([said[0]])
    with torch.no_grad():
        logprobs = torch.log_softmax(llm._model(ids).logits[0], dim=1)
    return float(torch.stack([logprobs[at - 1, said[0][at]] for at in range(said[1], len(said[0]))]).mean())


def test_a_fresh_adapter_changes_nothing(llm: Llm) -> None:
    """Scores with the start adapter are those of the base, and so they are after coming back to it."""
    texts = ["the film was great", "so dull"]
    with llm.base():
        bare = llm.logits(texts)
    np.testing.assert_array_equal(llm.logits(texts), bare)
    llm.tune(Lessons(labelled=LABELLED), QUICK, 0)
    assert np.abs(llm.logits(texts) - bare).max() > 0.01
    with llm.base():
        np.testing.assert_array_equal(llm.logits(texts), bare)
    llm.set(None)
    np.testing.assert_array_equal(llm.logits(texts), bare)


def test_scores_are_the_label_words_after_the_pattern(llm: Llm) -> None:
    """The whole model's logits of `bad` and `good` after the prompt, whatever else is in the batch."""
    texts = ["the film was great", "so very very very dull and grim"]
    for text, row in zip(texts, llm.logits(texts), strict=True):
        ids = llm._tokenizer(f"{text} it was", add_special_tokens=False, return_tensors="pt")["input_ids"]
        words = [llm._tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("bad", "good")]
        with torch.no_grad():
            whole = llm._model(ids).logits[0, -1, words].numpy()
        np.testing.assert_allclose(row, whole, rtol=1e-4, atol=1e-5)


def test_the_cut_model_is_the_model(llm: Llm) -> None:
    """Frozen layers once, then the top: the same log-probabilities as the whole model, in a batch of other lengths."""
    rows = [llm._said("the film was", "great and lovely"), llm._said("a day", "sad")]
    cache = Frozen(llm._lower)
    with torch.no_grad():
        found = [float(x.mean()) for x in llm._logprobs(cache, rows)]

    assert found == pytest.approx(
        [likelihood(llm, "the film was", "great and lovely"), likelihood(llm, "a day", "sad")], abs=1e-5
    )


def shaken(llm: Llm) -> Llm:
    """With an adapter that changes something."""
    torch.set_float32_matmul_precision("highest")
    rng = np.random.default_rng(1)
    llm.set({name: rng.normal(0, 0.3, array.shape).astype(np.float32) for name, array in llm.get().items()})
    return llm


def gradients(llm: Llm, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, llm.trained))


def test_class_scores_are_what_the_whole_model_says_of_the_words(llm: Llm) -> None:
    """Under an adapter, in a batch of different lengths, twice from one cache: the whole model's logits, and their gradient."""
    questions = shaken(llm).questions(["the film was great", "so very very very dull and grim", "nice"])
    words = [llm._tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("bad", "good")]
    whole = torch.stack([llm._model(torch.tensor([ids])).logits[0, -1, words] for ids in questions])
    expected = gradients(llm, (whole * torch.arange(6.0).reshape(3, 2)).sum())
    cache = llm.frozen()
    for _ in range(2):
        found = llm.class_scores(questions, cache)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
        for a, b in zip(gradients(llm, (found * torch.arange(6.0).reshape(3, 2)).sum()), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(llm.logits(["nice"])[0], found[2].detach().numpy(), rtol=1e-4, atol=1e-4)


def test_token_scores_are_what_the_whole_model_says_before_each_token(llm: Llm) -> None:
    """Row t of an answer is the logits at the token before it, of every token there is; answers stand one after the other."""
    rows = [shaken(llm)._said("the film was", "great and lovely"), llm._said("a day", "sad"), llm._said("so", "dull .")]
    whole = torch.cat([llm._model(torch.tensor([ids])).logits[0, at - 1 : -1] for ids, at in rows])
    found = llm.token_scores([ids for ids, _ in rows], [at for _, at in rows], llm.frozen())

    assert found.shape == (sum(len(ids) - at for ids, at in rows), len(llm._tokenizer))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    for a, b in zip(gradients(llm, (found * weights).sum()), gradients(llm, (whole * weights).sum()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_a_cache_computes_frozen_layers_once(llm: Llm) -> None:
    """However often a sequence is asked for, and by whatever adapter, it goes through the lower layers once."""
    runs: list[int] = []
    cache = Frozen(llm._lower)
    handle = llm._lower.layers[0].register_forward_hook(lambda _, args, __: runs.append(len(args[0])))
    some = llm.questions(["a film", "a day", "a film"])
    llm.class_scores(some, cache)
    shaken(llm).class_scores([*some, *llm.questions(["so dull"])], cache)
    handle.remove()

    assert runs == [2, 1]


def test_it_speaks_only_its_own_vocabulary(llm: Llm, folder: Path, tmp_path: Path) -> None:
    """The same tokens with the same ids; a word more, a word less or two that changed places make another language."""
    words = json.loads((folder / "tokenizer.json").read_text())

    def encoder(change: dict[str, int], gone: str = "") -> PromptEncoder:
        path = tmp_path / "tokenizer.json"
        known = {word: i for word, i in {**words["model"]["vocab"], **change}.items() if word != gone}
        path.write_text(json.dumps({**words, "model": {**words["model"], "vocab": known}}))
        return PromptEncoder(path, (), (), 64, factories.DECODER_TASK)

    vocabulary = words["model"]["vocab"]
    assert llm.speaks(encoder({}))
    assert not llm.speaks(encoder({"new": len(vocabulary)}))
    assert not llm.speaks(encoder({}, gone="grim"))
    assert not llm.speaks(encoder({"film": vocabulary["phone"], "phone": vocabulary["film"]}))


def test_contrast_by_hand() -> None:
    """DPO of margins 2 and -1 against the start, and the mean of -ln(1 - p) of two bad tokens."""
    good, bad = torch.tensor([-1.0, -2.0]), torch.tensor([math.log(0.5), math.log(0.2)])
    tuning = Tuning(contrast="dpo", dpo_beta=0.5)
    started = [-5.0, float(bad.sum()) + 1.0]
    want = -math.log(1 / (1 + math.exp(-0.5 * (2.0 - -1.0))))

    assert float(_contrast(good, bad, started, tuning)) == pytest.approx(want, abs=1e-6)
    unlikely = float(_contrast(good, bad, started, Tuning(contrast="unlikelihood")))
    assert unlikely == pytest.approx((math.log(2) - math.log(0.8)) / 2, abs=1e-6)


def test_good_texts_become_likelier(llm: Llm) -> None:
    """The generation loss alone raises the likelihood of what was judged good."""
    before = likelihood(llm, GOOD.prompt, GOOD.text)
    llm.tune(Lessons(good=(GOOD,)), only(generation=1.0), 0)

    assert likelihood(llm, GOOD.prompt, GOOD.text) > before + 0.5


def test_a_text_of_weight_zero_teaches_nothing(llm: Llm) -> None:
    """Quality weighs the likelihood."""
    llm.tune(Lessons(good=(Good("the film was", "great", 0.0),)), only(generation=1.0), 0)

    assert all(np.all(array == 0) for name, array in llm.get().items() if ".lora_B" in name)


@pytest.mark.parametrize("contrast", ["dpo", "unlikelihood"])
def test_contrast_parts_good_from_bad(llm: Llm, contrast: str) -> None:
    """Under the same prompt the good text gains on the bad one."""
    gap = [likelihood(llm, x.prompt, x.good) - likelihood(llm, x.prompt, x.bad) for x in PAIRS]
    llm.tune(Lessons(pairs=PAIRS), msgspec.structs.replace(only(contrast_weight=1.0), contrast=contrast, dpo_beta=1.0), 0)
    after = [likelihood(llm, x.prompt, x.good) - likelihood(llm, x.prompt, x.bad) for x in PAIRS]

    assert all(b > a + 0.2 for a, b in zip(gap, after, strict=True))


def test_the_task_is_learned_from_soft_labels(llm: Llm) -> None:
    """What judges said of texts becomes what the LLM says of them."""
    llm.tune(Lessons(labelled=LABELLED), only(task=1.0), 0)
    scores = llm.logits([x.text for x in LABELLED])

    assert scores.argmax(1).tolist() == [1, 0]


def test_the_leash_holds_the_base(llm: Llm) -> None:
    """Learning the same task on a leash, the base's own texts stay closer to as likely as they were."""
    before = llm.perplexity(LEASH)
    lessons = Lessons(labelled=LABELLED, leash=LEASH)
    drift = {}
    for leash in (0.0, 10.0):
        llm.set(None)
        llm.tune(lessons, only(task=1.0, leash=leash), 0)
        drift[leash] = abs(math.log(llm.perplexity(LEASH) / before))

    assert drift[10.0] < 0.5 * drift[0.0]


def test_the_same_seed_learns_the_same(llm: Llm) -> None:
    """A job may be repeated: adapter and loss are equal, and another seed's are not."""
    lessons, found = Lessons((GOOD,), PAIRS, LABELLED, LEASH), []
    for seed in (1, 1, 2):
        llm.set(llm.start(seed))
        found.append((llm.tune(lessons, QUICK, seed), llm.get()))

    assert found[0][0] == found[1][0] != found[2][0]
    assert all(np.array_equal(array, found[1][1][name]) for name, array in found[0][1].items())


def test_a_loss_that_is_not_finite_changes_nothing(llm: Llm) -> None:
    """The adapter is the one before, and the error says what may help."""
    before = llm.get()
    with pytest.raises(DataError, match="not finite"):
        llm.tune(Lessons(labelled=(Labelled("the film was great", (math.nan, 1.0)),)), QUICK, 0)

    assert all(np.array_equal(array, before[name]) for name, array in llm.get().items())


def test_nothing_to_learn_from(llm: Llm) -> None:
    """A leash alone is no lesson."""
    with pytest.raises(DataError, match="nothing to learn"):
        llm.tune(Lessons(leash=LEASH), QUICK, 0)


def test_writing_is_repeatable_and_bounded(llm: Llm) -> None:
    """The same seed writes the same texts, another one others; never more tokens than asked for."""
    prompts, some = ("the film was", "a day"), Sampling(max_tokens=5, temperature=1.0, top_p=0.9, seed=3)
    texts = llm.write(prompts, (6, 2), some)

    assert texts == llm.write(prompts, (6, 2), some)
    assert texts != llm.write(prompts, (6, 2), Sampling(5, 1.0, 0.9, 4))
    assert [len(some) for some in texts] == [6, 2]
    assert all(len(text.split()) <= 5 for some in texts for text in some)
    assert llm.write(prompts, (1, 1), Sampling(3)) == llm.write(prompts, (1, 1), Sampling(3, seed=9))  # greedy


def test_a_batch_of_prompts_writes_what_each_writes_alone(llm: Llm) -> None:
    """Greedy continuations of prompts of different length, padded together, against the model asked one token after another."""
    prompts, ends = ["the film was", "a", "the day was so very good and"], [7]
    asked = [llm._ids(prompt, first=True) for prompt in prompts]
    found = continuations(llm._model.model, lambda s: s @ llm._vocabulary.T, asked, (1, 70, 1), Sampling(6), ends)

    for ids, written in zip(asked, found, strict=True):
        want: list[int] = []
        for _ in range(6):
            with torch.no_grad():
                token = int(llm._model(torch.tensor([[*ids, *want]])).logits[0, -1].argmax())
            want.append(token)
            if token in ends:
                break
        assert written == [want] * len(written)


def test_texts_end_at_an_end_token_and_the_others_go_on(llm: Llm) -> None:
    """With tokens declared to be ends, they are the last of their texts: whole texts cut after them are the same (greedy)."""
    asked = [llm._ids(prompt, first=True) for prompt in ("the film was", "a day", "so")]
    whole = continuations(llm._model.model, lambda s: s @ llm._vocabulary.T, asked, (1, 1, 1), Sampling(8), [])
    ends = [whole[0][0][3]]
    cut = continuations(llm._model.model, lambda s: s @ llm._vocabulary.T, asked, (1, 1, 1), Sampling(8), ends)

    for (text,), (short,) in zip(whole, cut, strict=True):
        assert short == (text[: text.index(ends[0]) + 1] if ends[0] in text else text)
    assert all(len(text) == 8 for (text,) in whole)


@given(
    row=st.lists(st.floats(-4, 4), min_size=2, max_size=12),
    top_p=st.floats(0.05, 1.0),
    temperature=st.floats(0.2, 2.0),
    seed=st.integers(0, 99),
)
def test_a_nucleus_is_the_smallest_set_with_its_probability(
    row: list[float], top_p: float, temperature: float, seed: int
) -> None:
    """What is drawn is never a token that likelier ones made superfluous."""
    scores = torch.tensor([row] * 8)
    drawn = choose(scores, Sampling(1, temperature, top_p), torch.Generator().manual_seed(seed))
    p = torch.softmax(scores[0].double() / temperature, 0)
    for token in drawn.tolist():
        assert float(p[p > p[token] + 1e-6].sum()) < top_p + 1e-5


def test_draws_follow_the_probabilities() -> None:
    """20,000 draws of four tokens: each as often as its probability says, within four standard errors."""
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    drawn = choose(p.log().repeat(20_000, 1), Sampling(1, 1.0, 1.0), torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 20_000
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt()).all()


def test_perplexity_by_hand(llm: Llm) -> None:
    """exp of the mean nats over the tokens of two texts of different length."""
    texts = ["the film was great", "so dull"]
    nats, count = 0.0, 0
    for text in texts:
        ids = llm._tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logprobs = torch.log_softmax(llm._model(ids).logits[0], dim=1)
        nats -= float(sum(logprobs[at - 1, ids[0, at]] for at in range(1, ids.shape[1])))
        count += ids.shape[1] - 1

    assert llm.perplexity(texts) == pytest.approx(math.exp(nats / count), rel=1e-5)
    with pytest.raises(DataError, match="two tokens"):
        llm.perplexity(["film"])


def test_what_does_not_fit_is_refused(llm: Llm, folder: Path) -> None:
    """Another adapter's shapes, modules the model lacks, label words of two tokens."""
    with pytest.raises(DataError):
        llm.set({"a": np.zeros(3, np.float32)})
    with pytest.raises(DataError, match=r"llm\.modules"):
        Llm(folder, factories.DECODER_TASK, msgspec.structs.replace(SETTINGS, modules=("c_attn",)))
    with pytest.raises(DataError, match="one token"):
        Llm(folder, factories.DECODER_TASK, msgspec.structs.replace(SETTINGS, words=("very bad", "good")))


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ('A fine film." she said', "A fine film."),
        ("A fine film.\nNext", "A fine film."),
        ('no end"', "no end"),
        ("One is whole. The other was cut", "One is whole."),
        ("Is it? Yes! And then", "Is it? Yes!"),
        ("it was cut short", "it was cut short"),
        ("it is whole.", "it is whole."),
    ],
)
def test_what_was_written_is_what_stands_in_the_quotation(written: str, text: str) -> None:
    """Up to the closing quote or the line's end, with its full stop; a text cut short keeps its whole sentences."""
    assert inside(written) == text


def test_what_was_cut_short_does_not_teach_where_to_end(llm: Llm) -> None:
    """The closing quote follows whole sentences alone."""
    quote = llm._ids('"')
    whole, cut = llm._said("a day", "it was good ."), llm._said("a day", "it was")

    assert whole[0][-len(quote) :] == quote
    assert cut[0] == [*llm._ids("a day"), *llm._ids("it was")]


def test_only_the_operator_can_say_control_tokens(llm: Llm) -> None:
    """Pattern and prompts may hold them; texts that devices judge, learn from or hold may not."""
    mark, text = llm._tokenizer.sep_token_id, "the film [SEP] was great"

    assert mark in llm._ids(text, control=True)
    assert mark not in llm._ids(text)
    assert len(llm._ids(text)) == len(llm._ids(text, control=True)) + 2  # [, SEP, ]
    assert mark not in llm.questions([text])[0]
    assert [at for at, token in enumerate(llm._said(text, text)[0]) if token == mark] == [2]
