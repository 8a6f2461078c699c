"""What a device says of a synthetic text, in a byte a class or in two bits; pure.

Two forms: `probabilities` tells the server the device's class probabilities in 256 levels; `agree` tells it only whether the
device would label the text as it was written, and whether it is sure. The second is the most private answer that still teaches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edge_sdk.errors import DataError

Form = Literal["probabilities", "agree"]
Bytes = NDArray[np.uint8]

SURE = 0.8  # of the likeliest class, from which on an `agree` answer says "sure"
# what the likeliest class's probability is taken to be, by an `agree` answer
MEANT = {False: 0.65, True: 0.9}
AGREE, CERTAIN = 1, 2  # bits


def width(form: Form, n_classes: int) -> int:
    """Bytes for each text."""
    return n_classes if form == "probabilities" else 1


def encode(probabilities: NDArray[np.floating], written: Sequence[int], form: Form) -> Bytes:
    """A device's answer, (n, `width`).

    Args:
        probabilities: (n, n_classes), rows that sum to 1.
        written: the class each text was written for, (n,).
    """
    if form == "probabilities":
        levels: Bytes = np.rint(np.clip(probabilities, 0, 1) * 255).astype(np.uint8)
        return levels
    likeliest = probabilities.argmax(1)
    agree = (likeliest == np.asarray(written)) * AGREE
    certain = (probabilities.max(1) >= SURE) * CERTAIN
    bits: Bytes = (agree + certain).astype(np.uint8)[:, None]
    return bits


def decode(answer: Bytes, written: Sequence[int], n_classes: int, form: Form) -> NDArray[np.float64]:
    """The class probabilities (n, n_classes) that an answer stands for; a row of zeros where there is none.

    An `agree` answer says nothing of which other class it may be: they share what is left alike.

    Raises:
        DataError: the answer has another shape, or a byte that means nothing.
    """
    if answer.shape != (len(written), width(form, n_classes)):
        raise DataError(f"judgments of {len(written)} texts have shape {answer.shape}")
    if form == "probabilities":
        sums = answer.sum(1, keepdims=True, dtype=np.float64)
        shares: NDArray[np.float64] = np.divide(answer, sums, out=np.zeros(answer.shape), where=sums > 0)
        return shares
    if (answer > (AGREE | CERTAIN)).any():
        raise DataError("a judgment is none of the four that there are")
    meant = np.where(answer[:, 0] & CERTAIN, MEANT[True], MEANT[False])
    own = np.where(answer[:, 0] & AGREE, meant, (1 - meant) / (n_classes - 1))
    found: NDArray[np.float64] = np.repeat(((1 - own) / (n_classes - 1))[:, None], n_classes, axis=1)
    found[np.arange(len(written)), list(written)] = own
    return found
