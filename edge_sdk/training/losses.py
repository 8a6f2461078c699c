"""Losses, one value per row (or per token); each is tested against a value worked out by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_sdk.tokens import Ids
from edge_sdk.training.batches import Answer, TopTokens


def hard(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores (n, n_classes) against class indices (n,): (n,)."""
    return F.cross_entropy(scores, labels, reduction="none")


def soft(scores: Tensor, teacher: Tensor, temperature: float | Tensor) -> Tensor:
    """KL(softmax(teacher / T) || softmax(scores)) of each row: (n,).

    Only the teacher is tempered. A student that starts as its own teacher has no gradient when both are tempered alike;
    T < 1 sharpens the target, as MixMatch does (Berthelot et al. 2019, section 3.2), and T -> 0 gives iPET's hard labels.

    Args:
        scores: the student's, (n, n_classes); carries the gradient.
        teacher: the teacher's untempered scores, (n, n_classes); detached.
        temperature: T, positive; or one for each row, (n, 1).
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(F.log_softmax(scores, dim=1), target, reduction="none").sum(1)


def distil(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(scores / T)) of each row: (n,). Hinton et al. 2015, section 2.

    T^2 keeps the size of the gradient when T changes.

    Args:
        scores, teacher: (n, n_columns) of the same columns; the teacher is detached.
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(F.log_softmax(scores / temperature, dim=1), target, reduction="none").sum(1)


def classes(scores: Tensor, probabilities: Tensor) -> Tensor:
    """Class-level distillation: cross-entropy of scores against a teacher's class probabilities, (n, n_classes): (n,).

    Whatever the teacher is (a model with another tokenizer, a vote of devices), its classes are the same, so nothing needs
    to be aligned. Rows of `probabilities` that do not sum to 1 (8-bit rounding) are divided by their sum.
    """
    target = probabilities.detach()
    target = target / target.sum(1, keepdim=True)
    return -(target * F.log_softmax(scores, dim=1)).sum(1)


def tokens(hidden: Tensor, vocabulary: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the next token at each position, in nats: (n,).

    Args:
        hidden: final hidden states of the positions that count, (n, width); never a whole batch of sequences.
        vocabulary: output embeddings, (V, width).
        targets: token ids, (n,).
    """
    return F.cross_entropy(hidden @ vocabulary.T, targets, reduction="none")


def top_k(hidden: Tensor, vocabulary: Tensor, ids: Tensor, logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student) over the teacher's k likeliest tokens, both renormalized over these k: (n,).

    The student's logits are computed for these tokens alone, by gathering their rows: (n, k), never (n, V).

    Args:
        hidden: the student's final hidden states, (n, width).
        vocabulary: output embeddings, (V, width).
        ids: the teacher's likeliest tokens, (n, k). logprobs: their log-probabilities, (n, k); detached.
    """
    scores = (vocabulary[ids] @ hidden[:, :, None]).squeeze(2)
    return distil(scores, logprobs, temperature)


def answer(hidden: Tensor, vocabulary: Tensor, ids: Ids, target: Answer | TopTokens) -> Tensor:
    """The loss at each position of a sequence's answer, (m,); position t - 1 says token t.

    Of `TopTokens` label_weight * `tokens` + (1 - label_weight) * `top_k`: FedMKT's loss (Fan et al. 2024, equations 7 and 8).

    Args:
        hidden: final hidden states of the whole sequence, (tokens, width). vocabulary: output embeddings, (V, width).
        ids: of the sequence.
    """
    if isinstance(target, Answer):
        return tokens(hidden[target.start - 1 : len(ids) - 1], vocabulary, torch.tensor(ids[target.start :]))
    end, weight = target.start + len(target.ids), target.label_weight
    states = hidden[target.start - 1 : end - 1]
    told = top_k(states, vocabulary, torch.from_numpy(target.ids), torch.from_numpy(target.logprobs))
    if not weight:
        return told
    return weight * tokens(states, vocabulary, torch.tensor(ids[target.start : end])) + (1 - weight) * told
