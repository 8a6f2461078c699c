"""llama.cpp on a bundle: class scores, next tokens, text and vectors, with any adapter swapped in.

Many short texts run in one decode, each as a sequence of its own, and only their last tokens ask for an output. What all
prompts of the task begin with is read once for each adapter, in sequence 0, and shared with the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar

import gguf
import numpy as np
from numpy.typing import NDArray

from edge_sdk.adapters import Adapter, check
from edge_sdk.bundle import TOKENIZER, Bundle, Variant
from edge_sdk.engines import Sampling, TopK, gguf_adapter, sample, wanted
from edge_sdk.engines.llama import BATCH, TOKENS, Runtime
from edge_sdk.errors import DataError
from edge_sdk.tasks import Head, Task, log_softmax, softmax
from edge_sdk.tokens import Ids, PromptEncoder, readable

LOADED = 4  # adapters kept in memory

P = ParamSpec("P")
R = TypeVar("R")
_SHARED = 0  # the sequence that holds what all prompts begin with


def _alone(method: Callable[Concatenate[GgufEngine, P], R]) -> Callable[Concatenate[GgufEngine, P], R]:
    """One call at a time: llama.cpp ends the process when two threads use a context."""

    @wraps(method)
    def call(self: GgufEngine, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class GgufEngine:
    """Runs one GGUF variant of a bundle folder for one task.

    Args:
        folder: the bundle; its files are trusted to be verified.
        threads: of llama.cpp.

    Raises:
        DataError: the task's words do not fit the bundle's tokenizer, or this llama.cpp cannot run the file.
    """

    def __init__(self, folder: Path, bundle: Bundle, variant: Variant, task: Task, threads: int = 1) -> None:
        if bundle.kind != "decoder":
            raise DataError(f"variant {variant.name!r} is an encoder, which runs in ONNX Runtime only; choose another variant")
        self.encoder = PromptEncoder(folder / TOKENIZER, bundle.prefix, bundle.suffix, bundle.positions, task)
        self._path, self._bundle, self._task = folder / variant.file, bundle, task
        self._words = self.encoder.words()
        self._loaded: list[tuple[Adapter, Any]] = []  # the one used last comes last
        self._holds = False  # whether sequence 0 holds what all prompts begin with
        self._head: Head | None = None
        self._lock = RLock()
        self._runtime = Runtime(self._path, threads)

    @_alone
    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""
        self._loaded, self._holds = [], False
        self._runtime.shut()

    @property
    def head(self) -> Head:
        """Raises: DataError: a label word is more than one token, and so no row of the vocabulary, or there are no classes."""
        self._needs_classes()
        longest = max(range(len(self._words)), key=lambda i: len(self._words[i]))
        if len(self._words[longest]) > 1:
            raise DataError(
                f"label word {self._task.verbalizer[longest][0]!r} is {len(self._words[longest])} tokens here: it can be scored, "
                "but training needs words of one token, with their leading space"
            )
        if self._head is None:
            self._head = Head(_output_rows(self._path, [ids[0] for ids in self._words]), self._task.scale)
        return self._head

    # Adapters ---------------------------------------------------------------------------------------------------------
    @_alone
    def set_adapter(self, adapter: Adapter | None) -> None:
        """Uses an adapter from the next call on; None goes back to the base model. Its arrays must not change afterwards.

        Raises:
            DataError: names or shapes do not fit the spec, or the spec does not fit this bundle; the old one stays.
        """
        handle = None
        self._runtime.opened()
        if adapter is not None:
            handle = self._find(adapter)
            if handle is None:
                check(adapter, self._bundle.slots)
                handle = self._load(adapter)
        self._runtime.wear(handle)
        self._holds = False
        while len(self._loaded) > LOADED:
            self._runtime.free_adapter(self._loaded.pop(0)[1])

    def _find(self, adapter: Adapter) -> Any:
        """The handle of an adapter that is still loaded; a few hundred bytes compared, not its arrays."""
        for i, (known, handle) in enumerate(self._loaded):
            if known.arrays is adapter.arrays and known.spec == adapter.spec:
                self._loaded.append(self._loaded.pop(i))
                return handle
        return None

    def _load(self, adapter: Adapter) -> Any:
        model = self._runtime
        with tempfile.TemporaryDirectory(prefix="edge-adapter-") as folder:
            path = Path(folder) / "adapter.gguf"
            gguf_adapter.write(path, adapter, model.architecture, model.heads, model.kv_heads, model.layers)
            handle = model.load_adapter(path)
        if handle is None:
            raise DataError("llama.cpp cannot load the adapter; it does not fit this GGUF file")
        self._loaded.append((adapter, handle))
        return handle

    # Answers ----------------------------------------------------------------------------------------------------------
    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class scores (n, n_classes) before the softmax; of words of several tokens the sum of their log-probabilities."""
        self._needs_classes()
        return self._classes(self.encoder.prompts(texts), shared=True)

    def logits_of(self, sequences: Sequence[Ids]) -> NDArray[np.float32]:
        """The same for token ids as they stand."""
        self._needs_classes()
        readable(sequences, self._runtime.vocabulary)
        return self._classes(sequences, shared=False)

    @_alone
    def _classes(self, prompts: Sequence[Ids], shared: bool) -> NDArray[np.float32]:
        out = np.zeros((len(prompts), len(self._words)), np.float32)
        first = np.array([ids[0] for ids in self._words])
        single = all(len(ids) == 1 for ids in self._words)
        for batch, sequences, indices in self._batches(prompts, shared):
            if single:
                out[batch] = [self._runtime.scores(i)[first] for i in indices]
            else:
                out[batch] = self._word_logprobs([len(prompts[i]) for i in batch], sequences, indices)
        return np.asarray(self._task.scale * out, np.float32)

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class probabilities (n, n_classes), in the order of `texts`."""
        return softmax(self.logits(texts))

    @_alone
    def top_k(self, texts: Sequence[str], k: int) -> TopK:
        """The next token after each text as it stands."""
        sequences = self.encoder.plain(texts)
        k = wanted(k, self._runtime.vocabulary)
        found = np.zeros((len(sequences), k), np.int64)
        logprobs = np.zeros((len(sequences), k), np.float32)
        for batch, _, indices in self._batches(sequences):
            top = TopK.of(np.stack([self._runtime.scores(i) for i in indices]), k)
            found[batch], logprobs[batch] = top.ids, top.logprobs
        return TopK(found, logprobs)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-length vectors (n, width): the last hidden state."""
        rows = self.readout(self.encoder.plain(texts))
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12), np.float32)

    @_alone
    def readout(self, sequences: Sequence[Ids]) -> NDArray[np.float32]:
        """The last hidden state of token ids as they stand, (n, width)."""
        out = np.zeros((len(sequences), self._runtime.width), np.float32)
        self._runtime.ask_hidden(True)
        try:
            for batch, _, indices in self._batches(sequences):
                out[batch] = [self._runtime.hidden(i) for i in indices]
        finally:
            self._runtime.ask_hidden(False)
        return out

    @_alone
    def generate(self, prompt: str, sampling: Sampling = Sampling()) -> str:  # noqa: B008  # frozen
        """What the model writes after `prompt`, up to its end token."""
        return self._write(self.encoder.plain([prompt])[0], sampling)

    @_alone
    def answer(self, text: str, sampling: Sampling = Sampling()) -> str:  # noqa: B008  # frozen
        """What the model writes after a text in the task's pattern, which is read as in training."""
        return self._write(self.encoder.prompts([text])[0], sampling)

    def _write(self, ids: Ids, sampling: Sampling) -> str:
        rng = np.random.default_rng(sampling.seed)
        room = min(sampling.max_tokens, self._bundle.positions - len(ids))
        self._fit(self._start + len(ids) + max(room, 0))
        written: Ids = []
        try:
            for _ in range(room):
                at = len(ids) - 1 + len(written) if written else 0
                (index,) = self._runtime.decode([(1, at, [written[-1]] if written else ids)])
                token = sample(self._runtime.scores(index), sampling, rng)
                if token in self._bundle.end:
                    break
                written.append(token)
        finally:
            self._runtime.forget(1)
        return self.encoder.decode(written)

    def answers(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of answers, with the model's end token. Raises: DataError: the task's answers are its labels."""
        return self.encoder.answers(texts, self.end)

    @property
    def end(self) -> int | None:
        """The token that closes an answer, where the model has one."""
        return next(iter(self._bundle.end), None)

    @_alone
    def answer_logprobs(self, texts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float32]]:
        """Log-probability of each token of each text's answer, in nats: (tokens of the answer,) for each."""
        return [
            log_softmax(self._follow(prompt, answer))[np.arange(len(answer)), answer]
            for prompt, answer in zip(self.encoder.prompts(texts), self.answers(answers), strict=True)
        ]

    @_alone
    def answer_top_k(self, texts: Sequence[str], answers: Sequence[str], k: int) -> list[TopK]:
        """The k likeliest tokens at each position of each text's answer, ids and log-probabilities (tokens, k) for each."""
        k = wanted(k, self.encoder.vocabulary)
        return [
            TopK.of(self._follow(prompt, answer)[:, : self.encoder.vocabulary], k)
            for prompt, answer in zip(self.encoder.prompts(texts), self.answers(answers), strict=True)
        ]

    def _follow(self, prompt: Ids, answer: Ids) -> NDArray[np.float32]:
        """The scores of all tokens before each token of an answer, (tokens, vocabulary)."""
        self._fit(self._start + len(prompt) + len(answer))
        found = []
        try:
            for at in range(len(answer)):
                part = (1, len(prompt) + at - 1, [answer[at - 1]]) if at else (1, 0, prompt)
                (index,) = self._runtime.decode([part])
                found.append(self._runtime.scores(index).copy())
        finally:
            self._runtime.forget(1)
        return np.stack(found)

    def hidden(self, sequences: Sequence[Ids], layer: int) -> list[NDArray[np.float32]]:
        """Raises: DataError: always; llama.cpp keeps hidden states to itself."""
        raise DataError(
            f"llama.cpp does not hand out what enters layer {layer}; split training runs its trunk in an onnxruntime variant"
        )

    def _needs_classes(self) -> None:
        if not self._task.labels:
            raise DataError("this task has no classes; its answers are texts: use `generate`")

    # Running ----------------------------------------------------------------------------------------------------------
    @property
    def _start(self) -> int:
        return len(self.encoder.shared)

    def _fit(self, tokens: int) -> None:
        if self._runtime.fit(tokens):
            self._holds = False

    def _batches(self, sequences: Sequence[Ids], shared: bool = False) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Reads sequences batch by batch, short ones first.

        Args:
            shared: all of them begin with `encoder.shared`.

        Yields:
            Which of them were read, the sequence ids that hold them, and the batch indices of their last tokens.
        """
        start = self._start if shared and all(len(ids) > self._start for ids in sequences) else 0
        words = max((len(ids) for ids in self._words), default=0)
        for batch in _by_length([len(ids) - start + words for ids in sequences]):
            self._fit(self._start + max(TOKENS, sum(len(sequences[i]) - start + words for i in batch)))
            used = list(range(1, len(batch) + 1))
            try:
                if start:
                    self._read_shared()
                    for sequence in used:
                        self._runtime.copy(_SHARED, sequence)
                parts = [(s, start, sequences[i][start:]) for s, i in zip(used, batch, strict=True)]
                yield batch, used, self._runtime.decode(parts)
            finally:
                for sequence in used:
                    self._runtime.forget(sequence)

    def _read_shared(self) -> None:
        if not self._holds:
            self._runtime.decode([(_SHARED, 0, self.encoder.shared)])
            self._holds = True

    def _word_logprobs(self, lengths: list[int], sequences: list[int], indices: list[int]) -> NDArray[np.float32]:
        """Sum of the log-probabilities of each class's word, token by token; the texts just read are not read again."""
        first = log_softmax(np.stack([self._runtime.scores(i) for i in indices]))
        out = first[:, [ids[0] for ids in self._words]]
        for column, word in enumerate(self._words):
            tries = [sequence + BATCH for sequence in sequences]
            for source, target in zip(sequences, tries, strict=True):
                self._runtime.copy(source, target)
            for at, (token, following) in enumerate(pairwise(word)):
                asked = self._runtime.decode([(s, n + at, [token]) for s, n in zip(tries, lengths, strict=True)])
                out[:, column] += log_softmax(np.stack([self._runtime.scores(i) for i in asked]))[:, following]
            for target in tries:
                self._runtime.forget(target)
        return out


def _by_length(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Index batches of at most BATCH sequences and TOKENS tokens, the shortest first; a longer one stands alone."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) == BATCH or tokens + lengths[i] > TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def _output_rows(path: Path, ids: list[int]) -> NDArray[np.float32]:
    """Rows of the output head, which are those of the token embeddings where the model ties them."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    table = tensors.get("output.weight") or tensors["token_embd.weight"]
    return np.array(gguf.quants.dequantize(np.ascontiguousarray(table.data[ids]), table.tensor_type), np.float32)
