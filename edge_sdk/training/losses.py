"""Losses over class scores, one value per row; each is tested against a value worked out by hand."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def hard(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of scores (n, n_classes) against class indices (n,): (n,)."""
    return F.cross_entropy(scores, labels, reduction="none")


def soft(scores: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(softmax(teacher / T) || softmax(scores)) of each row: (n,).

    Only the teacher is tempered. A student that starts as its own teacher has no gradient when both are tempered alike;
    T < 1 sharpens the target, as MixMatch does (Berthelot et al. 2019, section 3.2), and T -> 0 gives iPET's hard labels.

    Args:
        scores: the student's, (n, n_classes); carries the gradient.
        teacher: the teacher's untempered scores, (n, n_classes); detached.
        temperature: T, positive.
    """
    target = F.softmax(teacher.detach() / temperature, dim=1)
    return F.kl_div(F.log_softmax(scores, dim=1), target, reduction="none").sum(1)
