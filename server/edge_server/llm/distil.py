"""FedCoLLM's inner loop: an LLM and the SLM of all devices learn from labels and from each other (Fan et al. 2024, 2411.11707).

    for a batch of the auxiliary set D_a, R passes:                                                  Algorithm 1, equations 4-6
        theta <- theta - eta_theta * grad (CE(g_theta(x), y) + lambda * KL(f_omega(x) || g_theta(x)))
        omega <- omega - eta_omega * grad (CE(f_omega(x), y) + lambda * KL(g_theta(x) || f_omega(x)))

The partner is detached and current: the LLM learns from the SLM that has just learned. Classes are compared as classes, each
model asked in its own words; answers are compared token by token over the whole vocabulary, which both models must share. The
rows that a model's table has beyond it, as padding, say nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_sdk.errors import DataError
from edge_sdk.tasks import Example
from edge_sdk.tokens import Ids
from edge_sdk.training.batches import epochs
from edge_sdk.training.learner import Learner
from edge_server.llm.jobs import Mutual
from edge_server.llm.model import Llm


class Partner(Protocol):
    """A model that is asked for an example's answer."""

    @property
    def trained(self) -> Sequence[nn.Parameter]: ...

    def said(self, some: Sequence[int]) -> Tensor:
        """Scores before the softmax: of classes, (n, n_classes), or of tokens at each position of the answers, (tokens, V)."""
        ...


def distil(slm: Partner, llm: Partner, truths: Sequence[Tensor], how: Mutual, seed: int) -> tuple[float, float]:
    """Both learn from where they stand; returns their mean losses, the SLM's first.

    Args:
        truths: for each example the class, (1,), or the answer's tokens, (tokens,).

    Raises:
        DataError: there are no examples, or a loss is not finite; what was learned until then must be thrown away.
    """
    if not truths:
        raise DataError("the auxiliary set is empty")
    rng, steps = np.random.default_rng(seed), how.passes * -(-len(truths) // how.batch_size)
    optimizers = {
        id(model): torch.optim.AdamW(model.trained, lr=rate, weight_decay=0.0)
        for model, rate in ((slm, how.slm_learning_rate), (llm, how.llm_learning_rate))
    }
    totals = {id(slm): 0.0, id(llm): 0.0}
    for batch in epochs([1] * len(truths), how.batch_size, steps, rng):
        some = batch.tolist()
        truth = torch.cat([truths[i] for i in some])
        for student, teacher in ((slm, llm), (llm, slm)):
            with torch.no_grad():
                told = F.log_softmax(teacher.said(some), dim=1)
            said = F.log_softmax(student.said(some), dim=1)
            loss = F.nll_loss(said, truth) + how.weight * F.kl_div(said, told, reduction="batchmean", log_target=True)
            optimizer = optimizers[id(student)]
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            norm = nn.utils.clip_grad_norm_(student.trained, 1.0)
            totals[id(student)] += float(loss.detach())
            if not math.isfinite(totals[id(student)]) or not math.isfinite(float(norm)):
                raise DataError("a loss of the mutual distillation is not finite; try lower learning rates")
            optimizer.step()
    return totals[id(slm)] / steps, totals[id(llm)] / steps


class OfSlm:
    """The devices' model, all of its adapter trained.

    Args:
        starts: of the answers; None where it is asked for classes. words: of the vocabulary.
    """

    def __init__(self, learner: Learner, sequences: Sequence[Ids], starts: Sequence[int] | None, words: int = 0) -> None:
        self._learner, self._sequences, self._starts, self._words = learner, sequences, starts, words

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return [p for p in self._learner.parameters.values() if p.requires_grad]

    def said(self, some: Sequence[int]) -> Tensor:
        sequences = [self._sequences[i] for i in some]
        if self._starts is None:
            return self._learner.class_scores(sequences)
        return self._learner.token_scores(sequences, [self._starts[i] for i in some])[:, : self._words]


class OfLlm:
    """The server's model; arguments as `OfSlm`'s."""

    def __init__(self, llm: Llm, sequences: Sequence[Ids], starts: Sequence[int] | None, words: int = 0) -> None:
        self._llm, self._sequences, self._starts, self._words, self._cache = llm, sequences, starts, words, llm.frozen()

    @property
    def trained(self) -> Sequence[nn.Parameter]:
        return self._llm.trained

    def said(self, some: Sequence[int]) -> Tensor:
        sequences = [self._sequences[i] for i in some]
        if self._starts is None:
            return self._llm.class_scores(sequences, self._cache)
        return self._llm.token_scores(sequences, [self._starts[i] for i in some], self._cache)[:, : self._words]


def partners(learner: Learner, llm: Llm, examples: Sequence[Example], end: int | None) -> tuple[OfSlm, OfLlm, list[Tensor]]:
    """Both models on the auxiliary set, and what is true of it.

    Args:
        end: the SLM's end token, that closes an answer.

    Raises:
        DataError: answers are texts and the models do not have one vocabulary.
    """
    texts, encoder = [e.text for e in examples], learner.encoder
    prompts = encoder.prompts(texts)
    if all(e.label is not None for e in examples):
        labels = [torch.tensor([e.label]) for e in examples]
        return OfSlm(learner, prompts, None), OfLlm(llm, llm.questions(texts), None), labels
    if any(e.answer is None for e in examples):
        raise DataError("an example of the auxiliary set has neither the label nor the answer of this task")
    if not llm.speaks(encoder):
        raise DataError("the LLM has another vocabulary than the devices' model, so their tokens cannot be compared; see FedMKT")
    answers = encoder.answers([e.answer or "" for e in examples], end)
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    starts, words = [len(prompt) for prompt in prompts], 1 + max(encoder.tokens().values())
    both = OfSlm(learner, sequences, starts, words), OfLlm(llm, sequences, starts, words)
    return *both, [torch.tensor(answer) for answer in answers]
