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

UNSEEN = "\U0010fffd"  # for private use, so that no vocabulary has it


class PromptEncoder:
    """Tokenizes prompts exactly as the bundle says they start and end.

    The operator's pattern may spell control tokens ([SEP], <|im_end|>); everywhere else they are characters like any others.

    Args:
        tokenizer: path of a `tokenizer.json`, or what is in it.
        prefix: token ids every sequence starts with ([CLS] of an encoder; nothing, or BOS, for a decoder).
        suffix: token ids every sequence ends with ([SEP] of an encoder).
        positions: longest sequence the model can read.
        task: pattern and length limit.

    Raises:
        DataError: the pattern alone is as long as the model can read.
    """

    def __init__(self, tokenizer: Path | str, prefix: Sequence[int], suffix: Sequence[int], positions: int, task: Task) -> None:
        read = Tokenizer.from_str if isinstance(tokenizer, str) else Tokenizer.from_file
        self._tokenizer: Tokenizer = read(str(tokenizer))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        before, after = task.pattern.split("{text}")
        self._ends_in_space = task.pattern[-1:].isspace()
        self._controls: frozenset[int] = frozenset()
        self._before = [*prefix, *self._plain(before)]
        self._after = [*self._plain(after), *suffix]
        self._tokenizer.encode_special_tokens = True
        self._controls = controls(self._tokenizer)
        self._prefix, self._suffix = list(prefix), list(suffix)
        self._positions, self._verbalizer, self._answer_tokens = positions, task.verbalizer, task.answer_tokens
        self.labels = task.labels
        self._unknown = _unknown(self._tokenizer)
        self.vocabulary = int(self._tokenizer.get_vocab_size())
        self._max_tokens = min(task.max_tokens, positions - len(self._before) - len(self._after) - task.answer_tokens)
        if self._max_tokens < 1:
            raise DataError(f"the pattern leaves no room for text: this model reads {positions} tokens; make it shorter")

    def _plain(self, text: str) -> Ids:
        return self._without(self._tokenizer.encode(text, add_special_tokens=False).ids) if text else []

    def _without(self, ids: Sequence[int]) -> Ids:
        return [token for token in ids if token not in self._controls]

    def prompts(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of each text inside the pattern; the text is cut, the pattern never.

        Raises:
            DataError: not a list of strings, or a text that leaves nothing to read.
        """
        encoded = self._encode([text.strip() for text in _strings(texts)])
        return _read([[*self._before, *ids[: self._max_tokens], *self._after] for ids in encoded])

    def _encode(self, texts: list[str]) -> list[Ids]:
        try:
            return [self._without(e.ids) for e in self._tokenizer.encode_batch(texts, add_special_tokens=False)]
        except TypeError as error:
            raise DataError("a text holds characters that are no Unicode (lone surrogates); clean it first") from error

    @property
    def shared(self) -> Ids:
        """What all prompts begin with."""
        return list(self._before)

    def description(self, text: str) -> Ids:
        """Token ids of a class description: no pattern, the encoder's own start and end."""
        room = self._positions - len(self._prefix) - len(self._suffix)
        return [*self._prefix, *self._plain(text)[:room], *self._suffix]

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of texts without the pattern, with the model's own start and end; cut to what it can read.

        Raises:
            DataError: not a list of strings, or a text that leaves nothing to read.
        """
        room = self._positions - len(self._prefix) - len(self._suffix)
        return _read([[*self._prefix, *ids[:room], *self._suffix] for ids in self._encode(_strings(texts))])

    def answers(self, texts: Sequence[str], end: int | None) -> list[Ids]:
        """Token ids of each answer, with a leading space where the pattern ends without one, and the end token.

        An answer of more than `task.answer_tokens` tokens is cut, and then it has no end: nobody should learn to stop there.

        Raises:
            DataError: this task's answers are labels, or an answer is empty.
        """
        if not self._answer_tokens:
            raise DataError("the answers of this task are its labels")
        encoded = _read(self._encode([self.spelled(text) for text in _strings(texts)]))
        last = [] if end is None else [end]
        return [[*ids, *last][: self._answer_tokens] for ids in encoded]

    def spelled(self, answer: str) -> str:
        """An answer as it is tokenized: with a leading space where the pattern ends without one; "" for an empty one."""
        bare = answer.strip()
        return bare if self._ends_in_space or not bare else " " + bare

    @property
    def tokenizer(self) -> Tokenizer:
        """It neither cuts nor pads, and reads control tokens as characters."""
        return self._tokenizer

    def words(self) -> list[Ids]:
        """Token ids of each class's label word, for a decoder.

        Raises:
            DataError: a class has several words, or two classes have the same tokens.
        """
        if any(len(words) != 1 for words in self._verbalizer):
            raise DataError("a decoder needs exactly one label word per class")
        ids = [self._plain(words[0]) for words in self._verbalizer]
        for word, tokens in zip(self._verbalizer, ids, strict=True):
            if not tokens or self._unknown in tokens:
                raise DataError(f"label word {word[0]!r} is not in this model's vocabulary; choose another")
        if len({tuple(tokens) for tokens in ids}) < len(ids):
            raise DataError("two label words are the same tokens of this tokenizer; choose others")
        return ids

    def tokens(self) -> dict[str, int]:
        """The whole vocabulary, each token's id."""
        return dict(self._tokenizer.get_vocab())

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as text, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))


def _strings(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise DataError("texts are a list of strings: [text], not text")
    return list(texts)


def _read(rows: list[Ids]) -> list[Ids]:
    """Raises: DataError: a sequence without tokens, which no model can read."""
    if not all(rows):
        raise DataError("an empty text cannot be read; give it at least one word")
    return rows


def readable(sequences: Sequence[Ids], vocabulary: int) -> None:
    """Raises: DataError: a sequence is empty, or holds an id that the vocabulary lacks."""
    _read([list(ids) for ids in sequences])
    if any(not 0 <= token < vocabulary for ids in sequences for token in ids):
        raise DataError(f"a token id is not in the vocabulary of {vocabulary}")


def _unknown(tokenizer: Tokenizer) -> int | None:
    """The id that stands for whatever the vocabulary lacks, where the tokenizer has one."""
    name = getattr(tokenizer.model, "unk_token", None)
    return tokenizer.token_to_id(name) if name else None


def controls(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that no text may become, spelled or not: a unigram model finds its control tokens even where they are read as
    characters. What stands for unknown characters is none of them."""
    special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
    unseen = tokenizer.encode(UNSEEN, add_special_tokens=False).ids
    return frozenset(special - {_unknown(tokenizer), *unseen})


def pad(sequences: Sequence[Ids]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Right-pads with 0: input ids and attention mask, both (n, longest)."""
    longest = max(len(ids) for ids in sequences)
    input_ids = np.zeros((len(sequences), longest), np.int64)
    mask = np.zeros((len(sequences), longest), np.int64)
    for row, ids in enumerate(sequences):
        input_ids[row, : len(ids)] = ids
        mask[row, : len(ids)] = 1
    return input_ids, mask


def by_tokens(sequences: Sequence[Ids], tokens: int) -> Iterator[list[int]]:
    """Index batches of sequences of similar length with at most `tokens` tokens, padding counted; a longer one stands alone."""
    batch: list[int] = []
    for i in sorted(range(len(sequences)), key=lambda i: len(sequences[i])):
        if batch and (len(batch) + 1) * len(sequences[i]) > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def by_length(sequences: Sequence[Ids], batch_size: int) -> Iterator[list[int]]:
    """Index batches of sequences of similar length, so that padding costs little."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
