"""A causal LM with LoRA in its top layers, the base frozen: it writes texts, labels them, and learns from `Lessons`.

What lies below the lowest LoRA layer never changes, so what comes out of it is computed once for each sequence while it learns.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from edge_sdk.adapters import Array, Arrays, mismatch, shapes_of
from edge_sdk.engines import Sampling
from edge_sdk.errors import DataError
from edge_sdk.exchange import POSITIONS, Voice
from edge_sdk.tasks import Task
from edge_sdk.tokens import Ids, PromptEncoder, by_length, by_tokens, controls
from edge_sdk.training import base, losses
from edge_sdk.training.batches import Answer, Row, TopTokens, epochs
from edge_server.llm.jobs import Lessons, LlmSettings, Tuning
from edge_server.llm.quotation import CLOSING, WHOLE, inside
from edge_server.llm.writing import continuations

LEASH_TOKENS = 64  # of the base's distribution at each position
CACHE_TOKENS = 1024  # that go through the frozen layers at a time
Said = tuple[Ids, int]  # a sequence, and where in it the text after the prompt starts


class Llm:
    """One causal LM for one task.

    Args:
        path: a transformers folder or one GGUF file.
        task: its labels, and the pattern and words by which the LLM is asked for them, unless the settings have their own.
        settings: where it learns, and with how many threads.

    Raises:
        DataError: the weights cannot be read, the model has none of these modules, or a label word is more than one token.
    """

    def __init__(self, path: Path, task: Task, settings: LlmSettings) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from transformers import AutoTokenizer

        base.quiet()
        torch.set_num_threads(settings.threads)
        torch.set_float32_matmul_precision("medium")  # oneDNN's kernels, as the devices' training
        where = (path.parent, {"gguf_file": path.name}) if path.suffix == ".gguf" else (path, {})
        self._tokenizer: Any = AutoTokenizer.from_pretrained(where[0], **where[1])  # type: ignore[no-untyped-call]
        self._model = _load(path)
        depth = len(self._model.model.layers)
        split = max(depth - settings.layers, 0)
        tops = tuple(f"model.layers.{i}." for i in range(split, depth))
        names = [n for n, _ in self._model.named_modules() if n.startswith(tops) and n.split(".")[-1] in settings.modules]
        if not names:
            raise DataError(f"{path.name} has no {' or '.join(settings.modules)} in its layers; llm.modules names them")
        alpha: Any = settings.alpha  # PEFT says int and takes a float
        inject_adapter_in_model(LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=names), self._model)
        self._lora = [m for m in self._model.modules() if hasattr(m, "lora_A")]
        lora = {name.replace(".default.", "."): p for name, p in self._model.named_parameters() if ".lora_" in name}
        self._parameters = {f"base_model.model.{name}": p for name, p in lora.items()}  # as PEFT's files have it
        self._lower, self._top = _cut(self._model.model, split)
        self._vocabulary: Tensor = self._model.lm_head.weight
        self._first = self._tokenizer.bos_token_id if getattr(self._tokenizer, "add_bos_token", False) else None
        self._controls = controls(self._tokenizer.backend_tokenizer)
        pattern = settings.pattern or task.pattern
        self._before, self._after = (self._ids(part, control=True) for part in pattern.split("{text}"))
        self._task, self._max_tokens = task, task.max_tokens
        words = [self._ids(word, control=True) for word in settings.words or [word[0] for word in task.verbalizer]]
        if any(len(ids) != 1 for ids in words):
            raise DataError("the LLM says one token for each class: llm.words, or the task's verbalizer, must be such")
        self._head = self._vocabulary[[ids[0] for ids in words]]
        pieces = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        self._ends = [i for i, piece in enumerate(pieces) if CLOSING in piece or "\n" in piece]
        self._ends += [self._tokenizer.eos_token_id] if self._tokenizer.eos_token_id is not None else []
        self.set(None)

    # The adapter ------------------------------------------------------------------------------------------------------
    def get(self) -> dict[str, Array]:
        """A copy of the adapter as it stands."""
        return {name: np.array(p.detach().numpy(), np.float32) for name, p in self._parameters.items()}

    def set(self, arrays: Arrays | None) -> None:
        """None is the base. Raises: DataError: names or shapes are not those of the adapter."""
        arrays = self.start(0) if arrays is None else arrays
        if problem := mismatch(shapes_of(arrays), {name: tuple(p.shape) for name, p in self._parameters.items()}):
            raise DataError(problem)
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(torch.tensor(arrays[name]))

    def start(self, seed: int) -> dict[str, Array]:
        """An adapter that changes nothing: B is zero, A uniform in 1 / sqrt(width)."""
        rng, found = np.random.default_rng(seed), {}
        for name, parameter in self._parameters.items():
            shape, bound = tuple(parameter.shape), 1 / math.sqrt(parameter.shape[1])
            drawn = np.zeros(shape) if ".lora_B" in name else rng.uniform(-bound, bound, shape)
            found[name] = drawn.astype(np.float32)
        return found

    @contextmanager
    def base(self) -> Iterator[None]:
        """Without the adapter."""
        for layer in self._lora:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._lora:
                layer.enable_adapters(True)

    # With a partner ---------------------------------------------------------------------------------------------------
    @property
    def trained(self) -> list[nn.Parameter]:
        """What learns."""
        return list(self._parameters.values())

    def frozen(self) -> Frozen:
        """A cache for the two below."""
        return Frozen(self._lower)

    def questions(self, texts: Sequence[str]) -> list[Ids]:
        """Each text in the pattern that asks for its class."""
        return [self._question(text) for text in texts]

    def class_scores(self, sequences: Sequence[Ids], cache: Frozen) -> Tensor:
        """Class scores (n, n_classes) of questions; differentiable."""
        scores: Tensor = torch.stack([states[-1] for states in self._over(cache, sequences)]) @ self._head.T
        return scores

    def token_scores(self, sequences: Sequence[Ids], starts: Sequence[int], cache: Frozen) -> Tensor:
        """Scores of every token at each position from `starts` on, all sequences' one after the other, (tokens, V)."""
        rows = zip(self._over(cache, sequences), sequences, starts, strict=True)
        return torch.cat([states[start - 1 : len(ids) - 1] for states, ids, start in rows]) @ self._vocabulary.T

    def answer_losses(self, rows: Sequence[Row], cache: Frozen) -> Tensor:
        """The loss of each row's answer, (n,), the mean over its tokens; differentiable."""
        states = zip(self._over(cache, [row.ids for row in rows]), rows, strict=True)
        own = [(s, row.ids, row.target) for s, row in states if isinstance(row.target, Answer | TopTokens)]
        return torch.stack([losses.answer(s, self._vocabulary, ids, target).mean() for s, ids, target in own])

    @cached_property
    def voice(self) -> Voice:
        """How it spells the answers of its task, where these are texts."""
        first = [] if self._first is None else [self._first]
        encoder = PromptEncoder(self._tokenizer.backend_tokenizer.to_str(), first, (), POSITIONS, self._task)
        return Voice(encoder, self._tokenizer.eos_token_id)

    def speaks(self, encoder: PromptEncoder) -> bool:
        """Whether its tokens are those of this encoder."""
        return dict(self._tokenizer.get_vocab()) == encoder.tokens()

    # Writing ----------------------------------------------------------------------------------------------------------
    def write(self, prompts: Sequence[str], counts: Sequence[int], sampling: Sampling) -> list[list[str]]:
        """`counts[i]` texts after `prompts[i]`, each up to a closing quote, a line break or the end token."""
        asked = [self._ids(prompt, first=True, control=True) for prompt in prompts]
        bare, ends = self._model.model, self._ends
        written = continuations(bare, lambda states: states @ self._vocabulary.T, asked, counts, sampling, ends)
        return [[inside(text) for text in self._tokenizer.batch_decode(ids, skip_special_tokens=True)] for ids in written]

    # Reading ----------------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def logits(self, texts: Sequence[str], batch_size: int = 32) -> NDArray[np.float32]:
        """Class scores (n, n_classes): of the label words after the pattern."""
        sequences = self.questions(texts)
        found = np.zeros((len(texts), len(self._head)), np.float32)
        for batch in by_length(sequences, batch_size):
            states = _run(self._model.model, [sequences[i] for i in batch])
            found[batch] = torch.stack([s[-1] @ self._head.T for s in states]).numpy()
        return found

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str], batch_size: int = 16) -> float:
        """exp of the mean nats of a token, the first of each text not counted. Raises: DataError: no second token anywhere."""
        sequences = [self._ids(text, first=True) for text in texts]
        nats, count = 0.0, sum(len(ids) - 1 for ids in sequences)
        if count < 1:
            raise DataError("perplexity needs a text of at least two tokens")
        for batch in by_length(sequences, batch_size):
            for i, states in zip(batch, _run(self._model.model, [sequences[i] for i in batch]), strict=True):
                nats += float(losses.tokens(states[:-1], self._vocabulary, torch.tensor(sequences[i][1:])).sum())
        return math.exp(nats / count)

    # Learning ---------------------------------------------------------------------------------------------------------
    def tune(self, lessons: Lessons, tuning: Tuning, seed: int) -> float:
        """Learns from where it stands; returns the mean loss.

            loss = generation * mean of -q ln P(text | prompt)
                 + contrast_weight * DPO or unlikelihood on pairs after the same prompt
                 + task * cross-entropy of the label words against the judges' probabilities
                 + leash * KL(base || tuned) at each token of the base's own texts

        docs/systems/crosslm.md says what of it is reconstructed.

        Raises:
            DataError: there is nothing to learn from, or the loss is not finite; the adapter stays as it was.
        """
        before = self.get()
        cache = Frozen(self._lower)
        good = [(self._said(x.prompt, x.text), x.weight) for x in lessons.good]
        pairs = [(self._said(x.prompt, x.good), self._said(x.prompt, x.bad)) for x in lessons.pairs]
        pairs = [] if tuning.contrast == "none" else pairs
        questions = self.questions([x.text for x in lessons.labelled])
        told = torch.tensor([x.probabilities for x in lessons.labelled])
        leash = [ids for ids in (self._ids(text, first=True) for text in lessons.leash) if len(ids) > 1]
        started: dict[int, list[float]] = {}  # of pairs, and
        held: dict[int, tuple[Tensor, Tensor]] = {}  # of the leash: what the base makes of them, once they are drawn

        @torch.no_grad()
        def remember(what: dict[int, Any], some: Sequence[int], compute: Callable[[int], Any]) -> None:
            with self.base():
                what.update((i, compute(i)) for i in some if i not in what)

        def generation(some: Sequence[int]) -> Tensor:
            values = [x.mean() for x in self._logprobs(cache, [good[i][0] for i in some])]
            return -(torch.tensor([good[i][1] for i in some]) * torch.stack(values)).mean()

        def contrast(some: Sequence[int]) -> Tensor:
            remember(started, some, lambda i: [float(x.sum()) for x in self._logprobs(cache, pairs[i])])
            values = self._logprobs(cache, [said for i in some for said in pairs[i]])
            found = [_contrast(values[2 * at], values[2 * at + 1], started[i], tuning) for at, i in enumerate(some)]
            return torch.stack(found).mean()

        def task(some: Sequence[int]) -> Tensor:
            return losses.classes(self.class_scores([questions[i] for i in some], cache), told[list(some)]).mean()

        def hold(some: Sequence[int]) -> Tensor:
            remember(held, some, lambda i: self._likeliest(self._over(cache, [leash[i]])[0][:-1]))
            states = self._over(cache, [leash[i] for i in some])
            values = [losses.top_k(s[:-1], self._vocabulary, *held[i]) for i, s in zip(some, states, strict=True)]
            return torch.cat(values).mean()

        kinds: list[tuple[float, int, Callable[[Sequence[int]], Tensor]]] = [
            (tuning.generation, len(good), generation),
            (tuning.contrast_weight, len(pairs), contrast),
            (tuning.task, len(questions), task),
            (tuning.leash, len(leash), hold),
        ]
        if not any(weight and count for weight, count, _ in kinds[:3]):
            raise DataError("there is nothing to learn from: no text was judged")
        rng, total = np.random.default_rng(seed), 0.0
        draws = [epochs([1] * count, tuning.batch_size, tuning.steps, rng) for _, count, _ in kinds]
        optimizer = torch.optim.AdamW(self._parameters.values(), lr=tuning.learning_rate, weight_decay=0.0)
        for _ in range(tuning.steps):
            optimizer.zero_grad()
            for (weight, _, loss), batches in zip(kinds, draws, strict=True):
                if weight and len(batch := next(batches)):
                    value = weight * loss(batch.tolist())
                    value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                    total += float(value.detach())
            norm = nn.utils.clip_grad_norm_(self._parameters.values(), 1.0)
            if not math.isfinite(total) or not math.isfinite(float(norm)):
                self.set(before)
                raise DataError("the LLM's loss is not finite; its adapter stays as it was. Try a lower tuning.learning_rate")
            optimizer.step()
        return total / tuning.steps

    def _logprobs(self, cache: Frozen, rows: Sequence[Said]) -> list[Tensor]:
        """Log-probability of each token of each text, in nats."""
        hidden = self._over(cache, [ids for ids, _ in rows])
        said = torch.cat([states[at - 1 : len(ids) - 1] for states, (ids, at) in zip(hidden, rows, strict=True)])
        values = -losses.tokens(said, self._vocabulary, torch.tensor([token for ids, at in rows for token in ids[at:]]))
        return list(torch.split(values, [len(ids) - at for ids, at in rows]))

    def _likeliest(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest tokens at each position (n, k) and their log-probabilities."""
        logprobs = F.log_softmax(states @ self._vocabulary.T, dim=1)
        top = logprobs.topk(min(LEASH_TOKENS, logprobs.shape[1]))
        return top.indices, top.values

    def _over(self, cache: Frozen, sequences: Sequence[Ids]) -> list[Tensor]:
        """Final hidden states of each sequence, from what enters the top layers."""
        below = nn.utils.rnn.pad_sequence(cache.states(sequences), batch_first=True)
        out = self._top(inputs_embeds=below, use_cache=False).last_hidden_state
        return [row[: len(ids)] for row, ids in zip(out, sequences, strict=True)]

    # Tokens -----------------------------------------------------------------------------------------------------------
    def _ids(self, text: str, first: bool = False, control: bool = False) -> Ids:
        """Args:
        first: as a sequence starts. control: the operator wrote it, so that its control tokens are such; a text's are characters.
        """
        ids = list(self._tokenizer(text, add_special_tokens=False, split_special_tokens=not control)["input_ids"]) if text else []
        ids = ids if control else [token for token in ids if token not in self._controls]
        return [self._first, *ids] if first and self._first is not None else ids

    def _said(self, prompt: str, text: str) -> Said:
        """A text after its prompt, up to the closing quote, if it is whole: what was cut short does not teach where to end."""
        before = self._ids(prompt, first=True, control=True)
        return [*before, *self._ids(text + CLOSING if text.endswith(WHOLE) else text)], len(before)

    def _question(self, text: str) -> Ids:
        return [*self._before, *self._ids(text)[: self._max_tokens], *self._after]


class Frozen:
    """What comes out of the frozen layers for each sequence, computed once."""

    def __init__(self, lower: Any) -> None:
        self._lower = lower
        self._kept: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def states(self, sequences: Sequence[Ids]) -> list[Tensor]:
        new = [list(ids) for ids in dict.fromkeys(tuple(ids) for ids in sequences) if ids not in self._kept]
        for batch in by_tokens(new, CACHE_TOKENS):
            for i, states in zip(batch, _run(self._lower, [new[i] for i in batch]), strict=True):
                self._kept[tuple(new[i])] = states.clone()
        return [self._kept[tuple(ids)] for ids in sequences]


def _load(path: Path) -> Any:
    """The base in torch, frozen."""
    return base.load_path(path, "decoder").requires_grad_(False)


def _contrast(good: Tensor, bad: Tensor, started: Sequence[float], tuning: Tuning) -> Tensor:
    """Of the log-probabilities of two texts' tokens; `started`: their sums under the base.

    DPO: -ln sigmoid(beta ((ln P(good) - ln P0(good)) - (ln P(bad) - ln P0(bad)))), Rafailov et al. 2023, equation 7.
    Unlikelihood: the mean of -ln(1 - P(token)) over the bad one's tokens, Welleck et al. 2020, equation 4.
    """
    if tuning.contrast == "dpo":
        return -F.logsigmoid(tuning.dpo_beta * ((good.sum() - started[0]) - (bad.sum() - started[1])))
    return -torch.log1p(-bad.exp().clamp(max=1 - 1e-6)).mean()


def _run(bare: Any, sequences: Sequence[Ids]) -> list[Tensor]:
    """What a bare decoder makes of each sequence, (tokens, width); it is causal, so padding on the right is never seen."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    out = bare(input_ids=ids, use_cache=False).last_hidden_state
    return [row[: len(s)] for row, s in zip(out, sequences, strict=True)]


def _cut(model: Any, split: int) -> tuple[Any, Any]:
    """A bare decoder's layers below `split` without the final norm, and the rest with it; the weights are shared."""
    parts = []
    for layers, norm in ((model.layers[:split], nn.Identity()), (model.layers[split:], model.norm)):
        part = copy.copy(model)
        part._modules = {**model._modules, "layers": layers, "norm": norm}
        parts.append(part)
    return parts[0], parts[1]
