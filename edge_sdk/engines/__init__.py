"""Inference on the device: what an engine can do; `onnx.py` does it with ONNX Runtime, `gguf.py` with llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_sdk import bundle as bundles
from edge_sdk.adapters import Adapter
from edge_sdk.bundle import Bundle, Variant
from edge_sdk.errors import MissingRuntime, SettingsError
from edge_sdk.tasks import Head, Task, log_softmax, softmax
from edge_sdk.tokens import Ids, PromptEncoder


@dataclass(frozen=True)
class TopK:
    """The k likeliest next tokens of each text, the likeliest first: ids (n, k) and natural log-probabilities (n, k)."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]

    @classmethod
    def of(cls, scores: NDArray[np.float32], k: int) -> TopK:
        """Of the scores (n, vocabulary) of all tokens, before the softmax; the lowest id first among equals."""
        logprobs = log_softmax(scores)
        ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
        return cls(ids, np.take_along_axis(logprobs, ids, axis=1))


@dataclass(frozen=True)
class Sampling:
    """How `generate` chooses tokens.

    Args:
        max_tokens: how many at most.
        temperature: 0 takes the likeliest token each time.
        top_p: sample from the smallest set of tokens with this much probability (nucleus sampling, Holtzman et al. 2020).
        seed: of the sampling.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 0 or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1 or self.seed < 0:
            raise SettingsError("max_tokens, temperature and seed must not be negative, top_p in (0, 1]")


def wanted(k: int, vocabulary: int) -> int:
    """How many next tokens there can be of the k asked for. Raises: SettingsError: k is below 1."""
    if k < 1:
        raise SettingsError(f"top_k needs k of at least 1, not {k}")
    return min(k, vocabulary)


def sample(logits: NDArray[np.float32], sampling: Sampling, rng: np.random.Generator) -> int:
    """One token id from the scores (vocabulary,) of all next tokens."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = softmax(logits[None], sampling.temperature)[0].astype(np.float64)
    order = np.argsort(-probabilities, kind="stable")
    sums = probabilities[order].cumsum()
    kept = order[: int(np.searchsorted(sums, sampling.top_p * sums[-1])) + 1]
    return int(rng.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))


class Scorer(Protocol):
    """What labelling and measuring need of a model; `Engine` is one."""

    @property
    def encoder(self) -> PromptEncoder: ...

    def set_adapter(self, adapter: Adapter | None) -> None:
        """Uses an adapter from the next call on; None is the base model. Fails whole: the old one stays on an error.

        Its arrays must not change afterwards.

        Raises:
            DataError: names or shapes do not fit the adapter's own spec, values are not finite, or the spec does not fit
            this bundle.
        """
        ...

    def logits(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class scores (n, n_classes) before the softmax, in the order of `texts`."""
        ...

    def answers(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of answers, with the model's end token. Raises: DataError: the task's answers are its labels."""
        ...

    def answer_logprobs(self, texts: Sequence[str], answers: Sequence[str]) -> list[NDArray[np.float32]]:
        """Log-probability of each token of each text's answer, in nats: (tokens of the answer,) for each."""
        ...

    @property
    def end(self) -> int | None:
        """The token that closes an answer, where the model has one."""
        ...

    def answer_top_k(self, texts: Sequence[str], answers: Sequence[str], k: int) -> list[TopK]:
        """The k likeliest tokens at each position of each text's answer, ids and log-probabilities (tokens, k) for each."""
        ...


class Engine(Scorer, Protocol):
    """One base model, one task, and any adapter; for one thread at a time.

    Texts are lists: a bare string, or a text that leaves nothing to read, is a DataError.
    """

    @property
    def head(self) -> Head:
        """The task's class rows, for training.

        Raises:
            DataError: a label word is more than one token, or the task has no classes.
        """
        ...

    def close(self) -> None:
        """Frees the model; the engine cannot be used afterwards."""
        ...

    def logits_of(self, sequences: Sequence[Ids]) -> NDArray[np.float32]:
        """The same for token ids as they stand, complete with pattern, start and end."""
        ...

    def score(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Class probabilities (n, n_classes), in the order of `texts`."""
        ...

    def top_k(self, texts: Sequence[str], k: int) -> TopK:
        """The next token after each text as it stands (no pattern). Raises: DataError: an encoder has none."""
        ...

    def generate(self, prompt: str, sampling: Sampling = Sampling()) -> str:  # frozen
        """What the model writes after `prompt`, up to its end token; control tokens in a prompt are characters.

        Raises:
            DataError: an encoder writes nothing.
        """
        ...

    def answer(self, text: str, sampling: Sampling = Sampling()) -> str:  # frozen
        """What the model writes after a text in the task's pattern; the text is cut as in training, the pattern never."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-length vectors (n, width): an encoder's mean, a decoder's last hidden state."""
        ...

    def hidden(self, sequences: Sequence[Ids], layer: int) -> list[NDArray[np.float32]]:
        """What enters a layer for each sequence, (tokens, width), under the present adapter; for split training.

        Raises:
            DataError: this runtime does not hand out hidden states.
        """
        ...


def open_bundle(folder: str | Path, task: Task | None = None, variant: str = "", threads: int = 1) -> Engine:
    """Loads a bundle from disk, its files verified first; a bundle and the base install are enough to classify.

        engine = open_bundle("runs/minilm")
        print(engine.score(["what a lovely film"]))

    Raises:
        AssetError: no bundle, or a file of it is damaged. SettingsError, DataError: as `open_engine`.
    """
    folder = Path(folder).expanduser()
    bundle = bundles.read(folder)
    bundles.verify(folder, bundle.needs(variant))
    return open_engine(folder, bundle, task, variant, threads)


def check_runtime(variant: Variant) -> None:
    """Raises: MissingRuntime: what runs the variant is not installed here, or is too old; says how to get it."""
    package, extra = ("llama-cpp-python", "[gguf]") if variant.runtime == "llama.cpp" else ("onnxruntime", "")
    try:
        found = version(package)
        find_spec(package.removesuffix("-python").replace("-", "_"))
    except (PackageNotFoundError, ModuleNotFoundError) as error:
        raise MissingRuntime(
            f"variant {variant.name!r} runs in {variant.runtime}, which is not installed: pip install 'tandem-edge{extra}'"
            f"{' (it compiles for some minutes)' if extra else ''}, or choose another variant"
        ) from error
    if bundles.older(found, variant.minimum):
        raise MissingRuntime(
            f"variant {variant.name!r} needs {package} {variant.minimum}, this is {found}: pip install --upgrade {package}"
        )


def open_engine(folder: Path, bundle: Bundle, task: Task | None = None, variant: str = "", threads: int = 1) -> Engine:
    """Loads a variant of a verified bundle folder, for the bundle's own task unless another is given.

    Raises:
        SettingsError: the bundle has no such variant.
        MissingRuntime: the variant's runtime is missing or too old. DataError: the task does not fit the model, or the file
        does not load.
    """
    chosen = bundle.variant(variant)
    check_runtime(chosen)
    if chosen.runtime == "llama.cpp":
        from edge_sdk.engines.gguf import GgufEngine

        return GgufEngine(folder, bundle, chosen, task or bundle.task, threads)
    from edge_sdk.engines.onnx import OnnxEngine

    return OnnxEngine(folder, bundle, chosen, task or bundle.task, threads)
