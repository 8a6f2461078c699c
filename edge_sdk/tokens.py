"""Texts -> token ids of a task's prompt, padded; one implementation for the ONNX engine and the torch learner."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edge_sdk.errors import DataError
from edge_sdk.tasks import Task

Ids = list[int]


class PromptEncoder:
    """Tokenizes prompts exactly as the bundle says they start and end.

    Args:
        tokenizer: path of a `tokenizer.json`.
        prefix: token ids every sequence starts with ([CLS] of an encoder; nothing, or BOS, for a decoder).
        suffix: token ids every sequence ends with ([SEP] of an encoder).
        positions: longest sequence the model can read.
        task: pattern and length limit.

    Raises:
        DataError: the pattern alone is as long as the model can read.
    """

    def __init__(self, tokenizer: Path, prefix: Sequence[int], suffix: Sequence[int], positions: int, task: Task) -> None:
        self._tokenizer: Tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        before, after = task.pattern.split("{text}")
        self._before = [*prefix, *self._plain(before)]
        self._after = [*self._plain(after), *suffix]
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._max_tokens = min(task.max_tokens, positions - len(self._before) - len(self._after))
        if self._max_tokens < 1:
            raise DataError(f"the pattern leaves no room for text: this model reads {positions} tokens; make it shorter")

    def _plain(self, text: str) -> Ids:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text inside the pattern; the text is cut, the pattern never."""
        encoded = self._tokenizer.encode_batch([text.strip() for text in texts], add_special_tokens=False)
        return [[*self._before, *e.ids[: self._max_tokens], *self._after] for e in encoded]

    def description(self, text: str) -> Ids:
        """Token ids of a class description: no pattern, the encoder's own start and end."""
        return [*self._prefix, *self._plain(text), *self._suffix]

    def word(self, word: str) -> int:
        """Token id of a label word.

        Raises:
            DataError: the word is not a single token of this tokenizer.
        """
        ids = self._plain(word)
        if len(ids) != 1:
            raise DataError(
                f"label word {word!r} is {len(ids)} tokens here; choose one that is a single token, with its leading space"
            )
        return ids[0]


def pad(sequences: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Right-pads with 0: input ids and attention mask, both (n, longest)."""
    longest = max(len(ids) for ids in sequences)
    input_ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return input_ids, mask


def by_length(sequences: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Index batches of sequences of similar length, so that padding costs little."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
