"""The LLM in FedMKT where answers are texts: what it says of public answers, and how it learns them (2406.02224).

    S_0 <- the likeliest tokens at each position of the public answers, and their log-probabilities              section 4
    omega <- omega - eta * grad (lambda * CE(f(x), y) + (1 - lambda) * KL(S_k || f(x)))                         equation 7

S_k is that of the device that says y best, if better than the LLM. It comes in the tokens of that device's model and is learned
in the LLM's own, where they meet; see `edge_sdk/exchange.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from edge_sdk import exchange
from edge_sdk.engines import TopK
from edge_sdk.errors import DataError
from edge_sdk.exchange import Voice
from edge_sdk.knowledge import Knowledge
from edge_sdk.protocol import Text
from edge_sdk.tokens import by_length
from edge_sdk.training.batches import epochs
from edge_server.llm.jobs import Tuning
from edge_server.llm.model import Llm

BATCH = 8  # answers whose scores over the whole vocabulary are in memory at once


@torch.no_grad()
def tell(llm: Llm, public: Sequence[Text], k: int) -> tuple[list[Knowledge], float]:
    """What the LLM says of public answers, and how much of their tokens it finds likeliest.

    Raises:
        DataError: an answer is empty.
    """
    voice, cache = llm.voice, llm.frozen()
    prompts = voice.encoder.prompts([text.text for text in public])
    answers = voice.encoder.answers([text.answer for text in public], voice.end)
    sequences = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    found, right, words = [TopK(np.empty((0, k), np.int64), np.empty((0, k), np.float32))] * len(public), 0, len(voice.vocabulary)
    for batch in by_length(sequences, BATCH):
        scores = llm.token_scores([sequences[i] for i in batch], [len(prompts[i]) for i in batch], cache)
        parts = np.split(scores[:, :words].numpy(), np.cumsum([len(answers[i]) for i in batch])[:-1])
        for i, part in zip(batch, parts, strict=True):
            found[i] = TopK.of(part, min(k, words))
            right += int((found[i].ids[:, 0] == answers[i]).sum())
    return exchange.said(voice, public, found), right / sum(map(len, answers))


def study(
    llm: Llm,
    public: Sequence[Text],
    heard: Sequence[tuple[Voice, Sequence[Knowledge]]],
    k: int,
    label_weight: float,
    tuning: Tuning,
    seed: int,
) -> tuple[float, float]:
    """Learns public answers from where it stands; the mean loss, and the share of answers that a device says better.

    Args:
        heard: what devices say. k: how many tokens a position has there at most.
        tuning: its steps, batch size and learning rate.

    Raises:
        DataError: a loss is not finite; the adapter stays as it was.
    """
    before, cache = llm.get(), llm.frozen()
    own, _ = tell(llm, public, k)
    rows, chosen = exchange.lessons(llm.voice, public, own, heard, label_weight)
    optimizer, total = torch.optim.AdamW(llm.trained, lr=tuning.learning_rate, weight_decay=0.0), 0.0
    for batch in epochs([1] * len(rows), tuning.batch_size, tuning.steps, np.random.default_rng(seed)):
        optimizer.zero_grad()
        loss = llm.answer_losses([rows[i] for i in batch], cache).mean()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        norm = nn.utils.clip_grad_norm_(llm.trained, 1.0)
        total += float(loss.detach())
        if not math.isfinite(total) or not math.isfinite(float(norm)):
            llm.set(before)
            raise DataError("the LLM's loss is not finite; its adapter stays as it was. Try a lower fedmkt.learning_rate")
        optimizer.step()
    return total / tuning.steps, float(np.mean(chosen >= 0))
