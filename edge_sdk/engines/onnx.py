"""ONNX Runtime on a bundle: class scores, next tokens, text and vectors, with any adapter swapped in by name.

Sequences of similar length run together, padded on the right. Where the model keeps a cache (decoders), what all prompts of
the task have in common in front of the text is read once for each adapter, and every batch goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edge_sdk.adapters import Adapter, check
from edge_sdk.bundle import TOKENIZER, Bundle, Variant
from edge_sdk.engines import Sampling, TopK, sample, wanted
from edge_sdk.errors import DataError
from edge_sdk.tasks import Head, Task, log_softmax, softmax
from edge_sdk.tokens import Ids, PromptEncoder, by_length, by_tokens, pad, readable

BATCH = 16
TOKENS = 512  # whose hidden states are computed at a time, padding counted
Feeds = dict[str, NDArray[Any]]


class OnnxEngine:
    """Runs one ONNX variant of a bundle folder for one task.

    Args:
        folder: the bundle; its files are trusted to be verified.
        threads: of ONNX Runtime inside one operator.

    Raises:
        DataError: the task's words do not fit the bundle's tokenizer or kind, or ONNX Runtime cannot load the graph.
    """

    def __init__(self, folder: Path, bundle: Bundle, variant: Variant, task: Task, threads: int = 1) -> None:
        self.encoder = PromptEncoder(folder / TOKENIZER, bundle.prefix, bundle.suffix, bundle.positions, task)
        self._task, self._bundle = task, bundle
        self._session = _session(folder / variant.file, threads)
        self._inputs = {i.name: i.shape for i in self._session.get_inputs()}
        self._columns = {o.name: o.shape[-1] for o in self._session.get_outputs()}
        self._only = ort.RunOptions()
        self._only.only_execute_path_to_fetches = True  # type: ignore[attr-defined, unused-ignore]
        self._adapter: Feeds = {}
        self._shared: Feeds | None = None  # cache of what all prompts begin with, under the present adapter
        self._words = [] if bundle.kind == "encoder" else self.encoder.words()
        single = bool(task.labels) and all(len(ids) == 1 for ids in self._words)
        self._head = self._make_head() if single else None

    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""
        self._session = None

    @property
    def head(self) -> Head:
        """Raises: DataError: a label word is more than one token, and so no row of the vocabulary."""
        self._needs_classes()
        if self._head is None:
            longest = max(zip(self._words, self._task.verbalizer, strict=True), key=lambda pair: len(pair[0]))
            raise DataError(
                f"label word {longest[1][0]!r} is {len(longest[0])} tokens here: it can be scored, but training needs words of "
                "one token, with their leading space"
            )
        return self._head

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Uses an adapter from the next call on; None goes back to the base model.

        Raises:
            DataError: names or shapes do not fit the spec, or the spec does not fit this bundle; the old one stays.
        """
        feeds: Feeds = {}
        if adapter is not None:
            check(adapter, self._bundle.slots)
            arrays, spec = adapter
            feeds = {s.a: np.array(arrays[s.a], np.float32, order="C") for s in spec.slots}
            feeds |= {s.b: np.array(arrays[s.b] * np.float32(spec.scaling), np.float32, order="C") for s in spec.slots}
        self._adapter, self._shared = feeds, None

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class scores (n, n_classes) before the softmax; of words of several tokens the sum of their log-probabilities."""
        self._needs_classes()
        return self._classes(self.encoder.prompts(texts), shared=True)

    def logits_of(self, sequences: Sequence[Ids]) -> NDArray[np.float32]:
        """The same for token ids as they stand."""
        self._needs_classes()
        readable(sequences, self.encoder.vocabulary)
        return self._classes(sequences, shared=False)

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class probabilities (n, n_classes), in the order of `texts`."""
        return softmax(self.logits(texts))

    def top_k(self, texts: Sequence[str], k: int) -> TopK:
        """The next token after each text as it stands. Raises: DataError: an encoder has none."""
        self._needs_decoder("top_k")
        sequences = self.encoder.plain(texts)
        k = wanted(k, self._columns["logits"])
        found = TopK(np.zeros((len(texts), k), np.int64), np.zeros((len(texts), k), np.float32))
        for batch, rows in self._batches(sequences, "logits"):
            found.ids[batch], found.logprobs[batch] = astuple(TopK.of(rows, k))
        return found

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-length vectors (n, width): an encoder's mean, a decoder's last hidden state."""
        rows = self._run(self.encoder.plain(texts), "readout")
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12), np.float32)

    def generate(self, prompt: str, sampling: Sampling = Sampling()) -> str:  # noqa: B008  # frozen
        """What the model writes after `prompt`, up to its end token. Raises: DataError: an encoder writes nothing."""
        self._needs_decoder("generate")
        return self._write(self.encoder.plain([prompt])[0], sampling)

    def answer(self, text: str, sampling: Sampling = Sampling()) -> str:  # noqa: B008  # frozen
        """What the model writes after a text in the task's pattern, which is read as in training."""
        self._needs_decoder("answer")
        return self._write(self.encoder.prompts([text])[0], sampling)

    def _write(self, ids: Ids, sampling: Sampling) -> str:
        rng = np.random.default_rng(sampling.seed)
        written: Ids = []
        cache: Feeds = {}
        for _ in range(min(sampling.max_tokens, self._bundle.positions - len(ids))):
            logits, cache = self._step(ids, cache)
            token = sample(logits[0], sampling, rng)
            if token in self._bundle.end:
                break
            written.append(token)
            ids = [token]
        return self.encoder.decode(written)

    def answers(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of answers, with the model's end token. Raises: DataError: the task's answers are its labels."""
        return self.encoder.answers(texts, self.end)

    @property
    def end(self) -> int | None:
        """The token that closes an answer, where the model has one."""
        return next(iter(self._bundle.end), None)

    def answer_logprobs(self, texts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float32]]:
        """Log-probability of each token of each text's answer, in nats: (tokens of the answer,) for each."""
        self._needs_decoder("answer_logprobs")
        return [
            log_softmax(self._follow(prompt, answer))[np.arange(len(answer)), answer]
            for prompt, answer in zip(self.encoder.prompts(texts), self.answers(answers), strict=True)
        ]

    def answer_top_k(self, texts: Sequence[str], answers: Sequence[str], k: int) -> list[TopK]:
        """The k likeliest tokens at each position of each text's answer, ids and log-probabilities (tokens, k) for each."""
        self._needs_decoder("answer_top_k")
        k = wanted(k, self.encoder.vocabulary)
        return [
            TopK.of(self._follow(prompt, answer)[:, : self.encoder.vocabulary], k)
            for prompt, answer in zip(self.encoder.prompts(texts), self.answers(answers), strict=True)
        ]

    def _follow(self, prompt: Ids, answer: Ids) -> NDArray[np.float32]:
        """The scores of all tokens before each token of an answer, (tokens, vocabulary)."""
        ids, cache, found = prompt, Feeds(), []
        for token in answer:
            scores, cache = self._step(ids, cache)
            found.append(scores)
            ids = [token]
        return np.concatenate(found)

    def readout(self, sequences: Sequence[Ids]) -> NDArray[np.float32]:
        """What the model makes of token ids as they stand, before any class, (n, width)."""
        return self._run(sequences, "readout")

    def hidden(self, sequences: Sequence[Ids], layer: int) -> list[NDArray[np.float32]]:
        """What enters a layer for each sequence, (tokens, width); the layers from it on are not computed.

        Raises:
            MemoryError: there is not enough for TOKENS tokens, or for one longer sequence.
        """
        readable(sequences, self.encoder.vocabulary)
        found: list[NDArray[np.float32]] = [np.empty((0, 0), np.float32)] * len(sequences)
        for batch in by_tokens(sequences, TOKENS):
            (rows,) = self._fetch([f"hidden.{layer}"], self._feeds([sequences[i] for i in batch], {}))
            for i, states in zip(batch, rows, strict=True):
                found[i] = states[: len(sequences[i])]
        return found

    # Running ----------------------------------------------------------------------------------------------------------
    def _needs_decoder(self, what: str) -> None:
        if self._bundle.kind == "encoder":
            raise DataError(f"{what} needs a decoder; this bundle holds an encoder, which reads and does not write")

    def _run(self, sequences: Sequence[Ids], output: str, shared: bool = False) -> NDArray[np.float32]:
        """One output row for each sequence. With `shared`, all of them begin with `encoder.shared`."""
        out = np.zeros((len(sequences), self._columns[output]), np.float32)
        for batch, rows in self._batches(sequences, output, shared):
            out[batch] = rows
        return out

    def _batches(
        self, sequences: Sequence[Ids], output: str, shared: bool = False
    ) -> Iterator[tuple[list[int], NDArray[np.float32]]]:
        """Batch by batch, which sequences were read and their output rows."""
        start = len(self.encoder.shared)
        past = self._shared_cache() if shared and all(len(ids) > start for ids in sequences) else {}
        start = start if past else 0
        for batch in by_length(sequences, BATCH):
            feeds = self._feeds([sequences[i][start:] for i in batch], past)
            (rows,) = self._fetch([output], feeds)
            yield batch, rows

    def _fetch(self, outputs: list[str], feeds: Feeds) -> list[NDArray[Any]]:
        """Raises: MemoryError: ONNX Runtime ran out of memory, which it says in an exception of its own."""
        try:
            return list(self._session.run(outputs, feeds, self._only))
        except Exception as error:  # its errors have no root but this one
            if "std::bad_alloc" in str(error) or "Failed to allocate memory" in str(error):
                raise MemoryError(f"ONNX Runtime: {str(error).splitlines()[0][:200]}") from error
            raise

    def _feeds(self, sequences: Sequence[Ids], past: Feeds) -> Feeds:
        ids, mask = pad(sequences)
        feeds: Feeds = {"input_ids": ids, "attention_mask": mask, **self._adapter}
        length = next(iter(past.values())).shape[2] if past else 0
        if length:
            feeds["attention_mask"] = np.concatenate([np.ones((len(ids), length), np.int64), mask], axis=1)
        for name, shape in self._caches():
            if past:
                feeds[name] = np.repeat(past[name], len(ids), axis=0)
            else:
                feeds[name] = np.zeros((len(ids), shape[1], 0, shape[3]), np.float32)
        if "token_type_ids" in self._inputs:
            feeds["token_type_ids"] = np.zeros_like(ids)
        if "position_ids" in self._inputs:
            feeds["position_ids"] = np.broadcast_to(np.arange(length, length + ids.shape[1]), ids.shape).copy()
        if "label_ids" in self._inputs:
            feeds["label_ids"] = np.zeros(0, np.int64)
        return feeds

    def _caches(self) -> Iterator[tuple[str, Sequence[Any]]]:
        return ((name, shape) for name, shape in self._inputs.items() if name.startswith("past_key_values."))

    def _step(self, ids: Ids, past: Feeds) -> tuple[NDArray[np.float32], Feeds]:
        """Scores of the next token (1, vocabulary), and the cache after `ids`."""
        names = [name for name, _ in self._caches()]
        outputs = ["logits", *(name.replace("past_key_values.", "present.") for name in names)]
        logits, *cache = self._fetch(outputs, self._feeds([ids], past))
        return logits, dict(zip(names, cache, strict=True))

    def _shared_cache(self) -> Feeds:
        """The cache of what all prompts begin with; nothing where that is nothing, or where there is no cache."""
        if self._shared is None:
            start = self.encoder.shared
            self._shared = self._step(start, {})[1] if start and self._bundle.kind == "decoder" else {}
        return self._shared

    def _needs_classes(self) -> None:
        if not self._task.labels:
            raise DataError("this task has no classes; its answers are texts: use `generate`")

    # Classes ----------------------------------------------------------------------------------------------------------
    def _make_head(self) -> Head:
        """Decoder: output embeddings of the label words. Encoder: unit-length mean of each label's descriptions."""
        task = self._task
        if self._bundle.kind == "encoder":
            means = [self._run([self.encoder.description(d) for d in words], "readout").mean(0) for words in task.verbalizer]
            return Head(np.stack([m / np.linalg.norm(m) for m in means]).astype(np.float32), task.scale)
        feeds = self._feeds([[0]], {}) | {"label_ids": np.array([ids[0] for ids in self._words], np.int64)}
        (rows,) = self._fetch(["rows"], feeds)
        return Head(np.asarray(rows, np.float32), task.scale)

    def _classes(self, prompts: Sequence[Ids], shared: bool) -> NDArray[np.float32]:
        if self._head is not None:
            return self._head.scores(self._run(prompts, "readout", shared))
        return np.asarray(self._task.scale * self._word_logprobs(prompts, shared), np.float32)

    def _word_logprobs(self, prompts: Sequence[Ids], shared: bool) -> NDArray[np.float32]:
        """Sum of the log-probabilities of each class's word, token by token, (n, n_classes)."""
        total = np.zeros((len(prompts), len(self._words)), np.float32)
        for said in dict.fromkeys(tuple(word[:at]) for word in self._words for at in range(len(word))):
            # words with the same beginning share its run
            following = [(column, word[len(said)]) for column, word in enumerate(self._words) if _begins(word, said)]
            for batch, rows in self._batches([[*p, *said] for p in prompts], "logits", shared):
                logprobs = log_softmax(rows)
                for column, token in following:
                    total[batch, column] += logprobs[:, token]
        return total


def _begins(word: Ids, said: tuple[int, ...]) -> bool:
    return len(word) > len(said) and tuple(word[: len(said)]) == said


def _session(path: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep what the largest batch took, also after the session is gone
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # one warning per optional input otherwise
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have many roots; all mean that this file does not run here
        reason = str(error).splitlines()[0][:200]
        raise DataError(f"ONNX Runtime {ort.__version__} cannot load {path}: {reason}") from error
