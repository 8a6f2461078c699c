"""What the LLM can be asked to do, and what comes of it: values that travel to the process where torch lives.

Adapters are files; everything else is in the message. A job is a function of its fields alone, so it may be repeated.
"""

from __future__ import annotations

import math
import re
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from edge_sdk.adapters import AdapterSpec
from edge_sdk.engines import Sampling
from edge_sdk.errors import SettingsError
from edge_sdk.protocol import Text
from edge_sdk.tasks import Example, Task


class LlmSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The LLM of a run.

    Args:
        model: a name of `edge_sdk.assets.MODELS`, a path, or `hf:ORG/NAME`: any causal LM that transformers loads.
        layers: LoRA sits in this many layers nearest the output. rank, alpha: y = W x + (alpha / rank) B A x.
        modules: last parts of the names of the layers that carry it.
        pattern: how it is asked for a text's class, `{text}` in it. words: its answer for each class, one token each.
            Empty: the task's own, which the devices' model reads.
        threads: torch's. memory_mb: of its process; 0 for no limit. timeout_seconds: for one job. tries: of a job that crashed.
        endpoint: URL of an OpenAI-compatible server (`http://127.0.0.1:8000/v1`) that does the writing; "" for none. It writes
            as its own model does: what this LLM learns is not there.
        endpoint_model: the model's name there. endpoint_seconds: for one of its answers. endpoint_key: the environment variable
            that holds its API key; "" where it needs none.
    """

    model: str = "smollm2"
    layers: int = 12
    rank: int = 16
    alpha: float = 32.0
    modules: tuple[str, ...] = ("q_proj", "v_proj")
    pattern: str = ""
    words: tuple[str, ...] = ()
    threads: int = 2
    memory_mb: int = 0
    timeout_seconds: float = 3600.0
    tries: int = 2
    endpoint: str = ""
    endpoint_model: str = ""
    endpoint_seconds: float = 120.0
    endpoint_key: str = ""

    def __post_init__(self) -> None:
        if self.layers < 1 or not 1 <= self.rank <= 256 or not 0 < self.alpha < math.inf or not self.modules:
            raise SettingsError("llm.layers must be at least 1, llm.rank 1 to 256, llm.alpha positive, llm.modules not empty")
        if self.threads < 1 or self.memory_mb < 0 or not 0 < self.timeout_seconds < math.inf or self.tries < 1:
            raise SettingsError("llm.threads, llm.tries and llm.timeout_seconds must be positive, llm.memory_mb not negative")
        if self.endpoint and not _is_http(self.endpoint):
            raise SettingsError("llm.endpoint must be an http or https URL without a password, e.g. http://127.0.0.1:8000/v1")
        if not 0 < self.endpoint_seconds < math.inf:
            raise SettingsError("llm.endpoint_seconds must be positive and finite")
        if self.endpoint_key and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.endpoint_key):
            raise SettingsError("llm.endpoint_key must be the name of the environment variable that holds the key, not the key")


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc and parts.port != 0
    except ValueError:
        return False


class Tuning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the LLM learns.

    Args:
        steps, batch_size, learning_rate: of AdamW; `batch_size` lessons of each kind in a step.
        generation: weight of -q log P(text | prompt) over good texts.
        contrast: of good against bad texts after the same prompt: `dpo` (Rafailov et al. 2023, equation 7), `unlikelihood`
            (Welleck et al. 2020, on the bad one's tokens), or `none`.
        contrast_weight: of it. dpo_beta: DPO's.
        task: weight of the loss of the task itself (beta in docs/systems/crosslm.md).
        leash: weight of KL(base || tuned) on texts of the base itself, which holds its general ability.
    """

    steps: int = 40
    batch_size: int = 8
    learning_rate: float = 5e-4
    generation: float = 1.0
    contrast: Literal["dpo", "unlikelihood", "none"] = "dpo"
    contrast_weight: float = 0.5
    dpo_beta: float = 0.1
    task: float = 1.0
    leash: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 100_000 or not 1 <= self.batch_size <= 4096 or not 0 < self.learning_rate <= 1:
            raise SettingsError("tuning.steps must be 1 to 100000, batch_size 1 to 4096, learning_rate in (0, 1]")
        weights = (self.generation, self.contrast_weight, self.dpo_beta, self.task, self.leash)
        if not all(0 <= w < math.inf for w in weights):
            raise SettingsError("tuning's weights must not be negative, and finite")


class Mutual(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How LLM and SLM distil each other (FedCoLLM; Fan et al. 2024, equations 4 to 6).

    Args:
        passes: over the auxiliary set, for each version (R). batch_size: examples in a step.
        weight: lambda, of the KL divergence from the partner; 0 learns from labels alone.
        slm_learning_rate, llm_learning_rate: of AdamW, new for each version.
    """

    passes: int = 1
    batch_size: int = 8
    weight: float = 1.0
    slm_learning_rate: float = 5e-4
    llm_learning_rate: float = 5e-4

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= 10_000 or not 1 <= self.batch_size <= 4096 or not 0 <= self.weight < math.inf:
            raise SettingsError("mutual.passes must be 1 to 10000, batch_size 1 to 4096, weight not negative, and finite")
        if not 0 < self.slm_learning_rate <= 1 or not 0 < self.llm_learning_rate <= 1:
            raise SettingsError("mutual.slm_learning_rate and llm_learning_rate must be in (0, 1]")


class Good(msgspec.Struct, frozen=True, array_like=True):
    """A text that shall become likelier after its prompt, with its weight."""

    prompt: str
    text: str
    weight: float


class Pair(msgspec.Struct, frozen=True, array_like=True):
    """Two texts after the same prompt."""

    prompt: str
    good: str
    bad: str


class Labelled(msgspec.Struct, frozen=True, array_like=True):
    """A text and what judges make of it: class probabilities (n_classes,)."""

    text: str
    probabilities: tuple[float, ...]


class Lessons(msgspec.Struct, frozen=True):
    """What the LLM learns from: texts worth writing, contrasts, the task, and texts of the base that hold it where it was."""

    good: tuple[Good, ...] = ()
    pairs: tuple[Pair, ...] = ()
    labelled: tuple[Labelled, ...] = ()
    leash: tuple[str, ...] = ()


# Jobs and their results -----------------------------------------------------------------------------------------------
class Write(msgspec.Struct, frozen=True, tag="write"):
    """`counts[i]` texts after `prompts[i]`, by the LLM with the adapter file `adapter` ("" for the base)."""

    adapter: str
    prompts: tuple[str, ...]
    counts: tuple[int, ...]
    sampling: Sampling


class Tune(msgspec.Struct, frozen=True, tag="tune"):
    """Learns from `lessons`, starting at the file `adapter` ("" for one that changes nothing), and writes the file `out`."""

    adapter: str
    out: str
    lessons: Lessons
    tuning: Tuning
    seed: int


class Label(msgspec.Struct, frozen=True, tag="label"):
    """Class scores of texts."""

    adapter: str
    texts: tuple[str, ...]


class Foresee(msgspec.Struct, frozen=True, tag="foresee"):
    """Perplexity of texts."""

    adapter: str
    texts: tuple[str, ...]


class Distil(msgspec.Struct, frozen=True, tag="distil"):
    """LLM and SLM learn from `examples` and from each other: from the adapter files `llm` ("" for one that changes nothing) and
    `slm`, and into the files `llm_out` and `slm_out`."""

    llm: str
    slm: str
    llm_out: str
    slm_out: str
    examples: tuple[Example, ...]
    how: Mutual
    seed: int


class Describe(msgspec.Struct, frozen=True, tag="describe"):
    """How the LLM spells answers."""


class Tell(msgspec.Struct, frozen=True, tag="tell"):
    """What the LLM says of public answers, `k` tokens a position: the file `out` (`edge_sdk.knowledge.pack`)."""

    adapter: str
    out: str
    public: tuple[Text, ...]
    k: int


class Answers(msgspec.Struct, frozen=True, array_like=True):
    """A device's judgment of public answers, the file `body`, and how its model spells them: see `edge_sdk.exchange.Voice`."""

    body: str
    tokenizer: str
    task: Task
    end: int | None


class Study(msgspec.Struct, frozen=True, tag="study"):
    """Learns public answers from what devices say of them, from the file `adapter` ("" for one that changes nothing) to `out`.

    What is not of these answers, or of another model than is said, is left out. Of `tuning` only the steps, their size and
    the rate are of use.
    """

    adapter: str
    out: str
    public: tuple[Text, ...]
    heard: tuple[Answers, ...]
    k: int
    label_weight: float
    tuning: Tuning
    seed: int


Job = Write | Tune | Label | Foresee | Distil | Describe | Tell | Study


class Texts(msgspec.Struct, frozen=True, tag="texts"):
    """One list for each prompt."""

    texts: tuple[tuple[str, ...], ...]
    seconds: float


class Tuned(msgspec.Struct, frozen=True, tag="tuned"):
    loss: float
    seconds: float


class Scores(msgspec.Struct, frozen=True, tag="scores"):
    """(n, n_classes), before the softmax."""

    scores: tuple[tuple[float, ...], ...]


class Perplexity(msgspec.Struct, frozen=True, tag="perplexity"):
    value: float


class Distilled(msgspec.Struct, frozen=True, tag="distilled"):
    """Mean losses."""

    slm_loss: float
    llm_loss: float
    seconds: float


class Described(msgspec.Struct, frozen=True, tag="described"):
    """The LLM's `tokenizer.json`, and the token that closes its answers."""

    tokenizer: str
    end: int | None


class Told(msgspec.Struct, frozen=True, tag="told"):
    """The share of the public answers' tokens that the LLM finds likeliest."""

    right: float


class Studied(msgspec.Struct, frozen=True, tag="studied"):
    """The mean loss, how many devices' judgments could be read, and the share of answers that one of them says better."""

    loss: float
    heard: int
    taught: float
    seconds: float


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job cannot be done, and would fail again."""

    reason: str


Outcome = Texts | Tuned | Scores | Perplexity | Distilled | Described | Told | Studied | Failed


class Slm(msgspec.Struct, frozen=True):
    """The devices' model: a bundle's folder, and the adapter that is trained."""

    folder: str
    adapter: AdapterSpec


class Hello(msgspec.Struct, frozen=True):
    """The first message to a worker: which models it has."""

    path: str
    task: Task
    llm: LlmSettings
    slm: Slm | None = None
